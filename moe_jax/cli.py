"""`moe-jax`: correct a file, score test sets, translate, run experiments and compare them, merge, import, export."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_jax import __version__, check_mesh, compare, correct, launch, main, score, sweep, translate, tune
from moe_jax.formats import Record
from moe_jax.merging import command
from moe_jax.speech import transcribe

ONCE = ("merge", "import", "export")  # commands that have each array once: memory that they kept would be in the way
DTYPES = ("float32", "bfloat16", "float16")


def entry(argv: Sequence[str] | None = None) -> int:
    if argv is None:
        launch.command(keep_memory=not set(sys.argv[1:2]) & set(ONCE))
    parser = argparse.ArgumentParser(prog="moe-jax", description="Correct what a recogniser wrote.")
    parser.add_argument("--version", action="version", version=f"moe-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    correct.add_arguments(
        commands.add_parser("correct", help="correct a file of hypotheses", description=correct.__doc__)
    )
    score.add_arguments(commands.add_parser("score", help="score test sets, ours beside other systems"))
    tune.add_arguments(
        commands.add_parser("tune", help="tune a checkpoint's guard on lists of your own", description=tune.__doc__)
    )
    transcribe.add_arguments(
        commands.add_parser("transcribe", help="recognise speech: audio files to n-best lists for correct")
    )
    main.add_arguments(commands.add_parser("run", help="run the jobs of a gin file: prepare, train, evaluate"))
    export = commands.add_parser(
        "export", help="write a run's best checkpoint, or a safetensors file, as another dtype, or with adapters merged"
    )
    export.add_argument("--checkpoint", required=True, help="a run folder, or a safetensors file")
    export.add_argument("--output", required=True, help="the safetensors file to write")
    export.add_argument("--adapters", help="a run's adapters.safetensors, to merge into --checkpoint, its base")
    export.add_argument("--dtype", default="float32", choices=DTYPES)
    formats = ("moe_jax", "huggingface")
    export.add_argument("--to", default="moe_jax", choices=formats, help="a file of ours, or a folder of theirs")
    bring = commands.add_parser("import", help="make a checkpoint of a pretrained model")
    bring.add_argument("--model", required=True, metavar="PATH", help="a Hugging Face folder, or a GGUF file")
    bring.add_argument("--output", required=True, metavar="FILE", help="the safetensors file to write")
    bring.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are)")
    bring.add_argument("--layout", default="instruct", help="how prompts are written (default: instruct)")
    bring.add_argument("--length", type=int, default=1024, help="tokens of prompt and correction (default: 1024)")
    translate.add_arguments(commands.add_parser("translate", help="translate a file, a line at a time"))
    command.add_arguments(commands.add_parser("merge", help="merge models tuned from one base"))
    statistics = commands.add_parser("statistics", help="what merging by fisher or regmean needs to know of a model")
    statistics.add_argument("--checkpoint", required=True, help="a run folder, or a safetensors file")
    statistics.add_argument("--data", required=True, help="a folder of prepared data: the model's own training data")
    statistics.add_argument("--kind", required=True, choices=("fisher", "gram"), help="gram: for regmean")
    statistics.add_argument("--rows", type=int, default=64, help="how many rows of it (default: 64)")
    statistics.add_argument("--output", required=True, help="the safetensors file to write")
    sweep.add_arguments(commands.add_parser("sweep", help="run a gin file at many settings and seeds, into one table"))
    compare.add_arguments(commands.add_parser("compare", help="what differs between runs, and their curves"))
    check_mesh.add_arguments(
        commands.add_parser("check-mesh", help="what a training step needs on machines that are not here")
    )
    part = commands.add_parser("subnetwork", help="the part of a model with routing by task that one task needs")
    part.add_argument("--checkpoint", required=True, help="a run folder, or a safetensors file")
    part.add_argument("--task", required=True, help="such as translate/en-de")
    part.add_argument("--output", required=True, help="the safetensors file to write")
    args = parser.parse_args(main.rewritten(sys.argv[1:] if argv is None else argv))
    if args.command == "run":
        return main.start(args)
    try:
        if args.command == "check-mesh":
            return check_mesh.main(args, *main.planned(args.gin_file, args.gin_bindings))
        if args.command == "correct":
            return correct.main(args, _load)
        if args.command == "score":
            return score.main(args, scored)
        own = {"merge": command.main, "transcribe": transcribe.main, "translate": translate.main}
        own |= {"sweep": sweep.main, "compare": compare.main, "tune": tune.main}
        if args.command in own:
            return own[args.command](args)
        others = {"export": _export, "import": _import, "statistics": _statistics, "subnetwork": _subnetwork}
        return others[args.command](args)
    except KeyboardInterrupt:
        kept = (
            "its trials are kept, the same command goes on" if getattr(args, "search", None) else "nothing was written"
        )
        print(f"interrupted; {kept}", file=sys.stderr)
        return 130
    except Exception as error:
        return main.report(error)


def _load(args: argparse.Namespace):
    """The corrector that the flags of `moe-jax correct` ask for."""
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
    from moe_jax import checkpoint, subnetwork, tree

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
