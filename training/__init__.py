"""interactdiff.training"""

if __name__ != "interactdiff.training":
    raise ImportError(f"import interactdiff.training, not {__name__}: the bare name loads every class twice")
