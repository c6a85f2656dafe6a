"""interactdiff doctor: what is installed, what can run here, what is attached."""

import argparse

from interactdiff.commands.arguments import Commands, adapters_of, add_models, quiet_libraries


def add_to(commands: Commands) -> None:
    """Add `doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="say what is installed and what can run",
        description="Versions, devices, backends; with --model or --adapter, what a pipeline has attached.",
    )
    parser.set_defaults(run=_run)
    add_models(parser)


def _run(args: argparse.Namespace) -> None:
    quiet_libraries()
    from interactdiff.doctor import doctor

    pipeline = None
    adapters = adapters_of(args)
    if args.model or adapters:
        from interactdiff.generation import ScenePipeline
        from interactdiff.models import MODEL

        model, device = args.model or MODEL, args.device or "auto"
        pipeline = ScenePipeline.from_pretrained(model, adapters, device).pipeline
    print(doctor(pipeline), end="")
