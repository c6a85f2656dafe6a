"""interactdiff.pipelines"""

if __name__ != "interactdiff.pipelines":
    raise ImportError(f"import interactdiff.pipelines, not {__name__}: the bare name loads every class twice")
