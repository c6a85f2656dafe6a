"""interactdiff bench badge: what badges cost."""

from interactdiff.commands.arguments import Commands


def add_to(kinds: Commands) -> None:
    """Add `bench badge`."""
    parser = kinds.add_parser("badge", help="what badges cost")
    parser.set_defaults(run=lambda args: print("nothing"))
