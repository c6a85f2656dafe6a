"""interactdiff bench: what methods cost, at true sizes with random weights."""

from importlib import import_module

from interactdiff.commands import bench_evaluate, bench_train
from interactdiff.commands.arguments import Commands
from interactdiff.registry import methods


def add_to(commands: Commands) -> None:
    """Add `bench`, and below it the benchmarks of all methods, and those of scoring and training."""
    parser = commands.add_parser("bench", help="time methods against the base alone")
    kinds = parser.add_subparsers(title="benchmarks", metavar="WHAT", required=True)
    for spec in methods().values():
        for module in spec.benches:
            import_module(module).add_to(kinds)
    bench_evaluate.add_to(kinds)
    bench_train.add_to(kinds)
