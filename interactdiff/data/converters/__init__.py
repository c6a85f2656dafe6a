"""Published data sets and annotation tools, converted into folders of pictures with `metadata.jsonl`.

A converter is a function of a source, `Options` and a `Counter` of what it left out, and yields `Converted`
pictures; `run.run` writes them.
"""

_HOME = "interactdiff.data.converters"
CONVERTERS = {
    "hico-det": f"{_HOME}.hico_det:convert",
    "vcoco": f"{_HOME}.vcoco:convert",
    "vg": f"{_HOME}.visual_genome:convert",
    "swig": f"{_HOME}.triplet_json:convert_swig",
    "hoia": f"{_HOME}.triplet_json:convert_hoia",
    "coco": f"{_HOME}.coco:convert",
    "layoutsam": f"{_HOME}.entities:convert_layoutsam",
    "eligen": f"{_HOME}.entities:convert_eligen",
    "labelstudio": f"{_HOME}.tools:convert_labelstudio",
    "cvat": f"{_HOME}.tools:convert_cvat",
    "scenes": f"{_HOME}.scenes:convert",
    "stickworld": f"{_HOME}.stickworld:convert",
}
"""Their names, and "module:function"."""
