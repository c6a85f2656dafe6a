"""The card of a trained adapter, and its way to the Hub."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData

from interactdiff.files import write_aside
from interactdiff.models import PACKAGED
from interactdiff.training.interaction_config import InteractionConfig

CARD, SAMPLE = "README.md", "samples.png"
SCORES = {
    "control/found": "boxes with an IoU above 0.5",
    "control/iou": "mean IoU of boxes",
    "control/actions": "actions in their boxes",
}


def card(
    config: InteractionConfig, facts: Mapping[str, str], scores: Mapping[str, float], shown: bool
) -> str:
    """A card in Markdown, with what the Hub reads at its head.

    Args:
        config: of the run.
        facts: of the training, by name.
        scores: of the last samples, as the log has them.
        shown: whether there is a sheet of samples beside it.
    """
    name = config.hub.id or config.export_to
    packaged = config.base in PACKAGED
    on_hub = not packaged and not Path(config.base).exists()
    base = f'model_path("{config.base}")' if packaged else f'"{config.base}"'
    head = ModelCardData(
        base_model=config.base if on_hub else None,
        license=config.hub.license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["interactdiff", "layout-to-image", "human-object-interaction"],
    )
    lines = [
        f"# {Path(name).name}",
        "",
        f"An interaction adapter (InteractDiffusion, arXiv 2312.05849) for `{config.base}`: who does what to "
        "what, and where.",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        f"from interactdiff import Interaction, InteractionAdapter, attach{', model_path' * packaged}",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({base})",
        f'with attach(pipe, InteractionAdapter.from_pretrained("{name}")) as handle:',
        '    handle.set_scene([Interaction("person", "riding", "bike", (0.3, 0.2, 0.6, 0.8), '
        "(0.25, 0.5, 0.7, 0.95))])",
        '    pipe("a person is riding a bike").images[0].save("out.png")',
        "```",
        "",
        "## Training",
        "",
        *(f"- {what}: {value}" for what, value in facts.items()),
    ]
    found = {words: scores[key] for key, words in SCORES.items() if key in scores}
    if found:
        without = {words: scores.get(f"{key}_without", 0.0) for key, words in SCORES.items()}
        lines += [
            "",
            f"| on {config.validation.count} scenes | with | without the adapter |",
            "|---|---|---|",
        ]
        lines += [f"| {words} | {value:.2f} | {without[words]:.2f} |" for words, value in found.items()]
    if shown:
        lines += [
            "",
            "The pictures themselves, drawn without the adapter, and with it:",
            "",
            f"![]({SAMPLE})",
        ]
    return str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"))


def write_card(
    config: InteractionConfig, facts: Mapping[str, str], scores: Mapping[str, float], sample: Path | None
) -> None:
    """Write the card, and the last samples, beside the adapter.

    Raises:
        OSError: they cannot be written.
    """
    folder = Path(config.export_to)
    text = card(config, facts, scores, sample is not None)
    write_aside(folder / CARD, lambda aside: aside.write_text(text, encoding="utf-8"))
    if sample is not None:
        write_aside(folder / SAMPLE, lambda aside: shutil.copyfile(sample, aside))


def push(folder: str, repository: str, private: bool) -> None:
    """Upload a folder to the Hub; what goes wrong is said, and the folder stays."""
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # of the network, of what the Hub refuses
        reason = " ".join(str(error).split())[:200]
        print(f"interactdiff: not uploaded to {repository}, it is in {folder}: {reason}", file=sys.stderr)
