"""`moe-jax`: correct a file, score test sets, translate, run experiments and compare them, merge, import, export.

A command's own module is imported when it is asked for: the others, JAX among what they import, would take seconds.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_jax import __version__, launch

if TYPE_CHECKING:
    from moe_jax import score
    from moe_jax.formats import Record

ONCE = ("merge", "import", "export")  # commands that have each array once: memory that they kept would be in the way
DTYPES = ("float32", "bfloat16", "float16")
# Command -> its module (None: it is here), what it does.
COMMANDS = {
    "correct": ("correct", "correct a file of hypotheses"),
    "score": ("score", "score test sets, ours beside other systems"),
    "tune": ("tune", "tune a checkpoint's guard on lists of your own"),
    "transcribe": ("speech.transcribe", "recognise speech: audio files to n-best lists for correct"),
    "run": ("main", "run the jobs of a gin file: prepare, train, evaluate"),
    "export": (None, "write a run's best checkpoint, or a safetensors file, as another dtype, or with adapters merged"),
    "import": (None, "make a checkpoint of a pretrained model"),
    "translate": ("translate", "translate a file, a line at a time"),
    "merge": ("merging.command", "merge models tuned from one base"),
    "statistics": (None, "what merging by fisher or regmean needs to know of a model"),
    "sweep": ("sweep", "run a gin file at many settings and seeds, into one table"),
    "compare": ("compare", "what differs between runs, and their curves"),
    "check-mesh": ("check_mesh", "what a training step needs on machines that are not here"),
    "subnetwork": (None, "the part of a model with routing by task that one task needs"),
}


def entry(argv: Sequence[str] | None = None) -> int:
    if argv is None:
        launch.command(keep_memory=not set(sys.argv[1:2]) & set(ONCE))
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="moe-jax", description="Correct what a recogniser wrote.")
    parser.add_argument("--version", action="version", version=f"moe-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    args = argparse.Namespace()
    try:
        for name, (_, said) in COMMANDS.items():
            own = commands.add_parser(name, help=said)
            if given[:1] == [name]:
                _add_arguments(name, own)  # imports for seconds
        args = parser.parse_args(launch.rewritten(given))
        return _run(args)
    except KeyboardInterrupt:
        kept = (
            "its trials are kept, the same command goes on" if getattr(args, "search", None) else "nothing was written"
        )
        print(f"interrupted; {kept}", file=sys.stderr)
        return 130
    except Exception as error:
        from moe_jax import main

        return main.report(error)


def _module(name: str):
    return importlib.import_module(f"moe_jax.{COMMANDS[name][0]}")


def _run(args: argparse.Namespace) -> int:
    here = {"export": _export, "import": _import, "statistics": _statistics, "subnetwork": _subnetwork}
    if args.command in here:
        return here[args.command](args)
    module = _module(args.command)
    if args.command == "run":
        return module.start(args)
    if args.command == "check-mesh":
        from moe_jax import main

        return module.main(args, *main.planned(args.gin_file, args.gin_bindings))
    more = {"correct": (_load,), "score": (scored,)}.get(args.command, ())
    return module.main(args, *more)


def _add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Those of a command."""
    add = parser.add_argument
    if COMMANDS[name][0]:
        module = _module(name)
        parser.description = module.__doc__ if name in ("correct", "tune") else None
        module.add_arguments(parser)
    elif name == "import":
        add("--model", required=True, metavar="PATH", help="a Hugging Face folder, or a GGUF file")
        add("--output", required=True, metavar="FILE", help="the safetensors file to write")
        add("--dtype", choices=DTYPES, help="of the weights (default: as they are)")
        add("--layout", default="instruct", help="how prompts are written (default: instruct)")
        add("--length", type=int, default=1024, help="tokens of prompt and correction (default: 1024)")
    else:
        add("--checkpoint", required=True, help="a run folder, or a safetensors file")
        add("--output", required=True, help="the safetensors file to write")
    if name == "export":
        add("--adapters", help="a run's adapters.safetensors, to merge into --checkpoint, its base")
        add("--dtype", default="float32", choices=DTYPES)
        formats = ("moe_jax", "huggingface")
        add("--to", default="moe_jax", choices=formats, help="a file of ours, or a folder of theirs")
    elif name == "statistics":
        add("--data", required=True, help="a folder of prepared data: the model's own training data")
        add("--kind", required=True, choices=("fisher", "gram"), help="gram: for regmean")
        add("--rows", type=int, default=64, help="how many rows of it (default: 64)")
    elif name == "subnetwork":
        add("--task", required=True, help="such as translate/en-de")


def _load(args: argparse.Namespace):
    """The corrector that the flags of `moe-jax correct` ask for."""
    from moe_jax import sharding
    from moe_jax.pipeline import Pipeline
    from moe_jax.sampling import Sampling

    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    drawn = {name: number for name, number in given.items() if number is not None}
    return Pipeline.load(
        args.checkpoint,
        weights=args.weights,
        beams=args.beam,
        guard=args.guard,
        task=args.task,
        sampling=Sampling(**drawn) if drawn else None,
        seed=args.seed,
        continuous=args.continuous,
        mesh=sharding.asked(args.mesh),
    )


def scored(checkpoint: str) -> score.Correct:
    """The corrector of a checkpoint for `moe-jax score`: each text as its guard has it, and without the guard."""
    from moe_jax import evaluate
    from moe_jax.pipeline import Pipeline

    pipeline = Pipeline.load(checkpoint)

    def correct(records: Sequence[Record]) -> list[tuple[str, str]]:
        proposals = evaluate.propose(pipeline, records)
        return [(pipeline.guard(p).text, p.guarded(-math.inf).text) for p in proposals]

    return correct


def _export(args: argparse.Namespace) -> int:
    from moe_jax import adapters, checkpoint, tree

    if args.adapters:
        table, meta = adapters.merged(args.adapters, args.checkpoint)
    else:
        table, meta = checkpoint.read_safetensors(args.checkpoint)
    if args.to == "huggingface":
        from moe_jax.interop import bring

        table = {name: checkpoint.cast(name, x, args.dtype) for name, x in table.items()}
        kind = bring.give(table, meta, args.output)
        print(f"{args.output}: a {kind} model of {tree.count(table) / 1e6:.2f} M parameters")
        return 0
    checkpoint.write_safetensors(args.output, table, meta, dtype=args.dtype)
    print(f"{args.output}: {tree.count(table) / 1e6:.2f} M parameters as {args.dtype}")
    return 0


def _import(args: argparse.Namespace) -> int:
    from moe_jax import checkpoint, tree
    from moe_jax.interop import bring

    if Path(args.output).exists():
        raise ValueError(f"{args.output}: is there already; remove it, or give another --output")
    table, meta = bring.bring(args.model, length=args.length, layout=args.layout)
    checkpoint.write_safetensors(args.output, table, meta, dtype=args.dtype)
    print(f"{args.output}: {tree.count(table) / 1e6:.2f} M parameters, every tensor accounted for")
    return 0


def _statistics(args: argparse.Namespace) -> int:
    from moe_jax.merging import statistics

    table = statistics.gather(args.checkpoint, args.data, args.kind, args.output, rows=args.rows)
    print(f"{args.output}: {args.kind} statistics of {len(table)} arrays")
    return 0


def _subnetwork(args: argparse.Namespace) -> int:
    from moe_jax import checkpoint, subnetwork, translate, tree

    if Path(args.output).exists():
        raise ValueError(f"{args.output}: is there already; remove it, or give another --output")
    table, meta = checkpoint.read_safetensors(args.checkpoint)
    if args.task in meta["families"] and (said := translate.untrained(args.task, meta.get("trained"))):
        print(f"warning: {said}", file=sys.stderr)
    small, about = subnetwork.extract(table, meta, args.task)
    checkpoint.write_safetensors(args.output, small, about)
    print(f"{args.output}: {tree.count(small) / 1e6:.2f} M of {tree.count(table) / 1e6:.2f} M parameters")
    return 0


if __name__ == "__main__":
    sys.exit(entry())
