"""interactdiff.app"""

if __name__ != "interactdiff.app":
    raise ImportError(f"import interactdiff.app, not {__name__}: the bare name loads every class twice")
