"""`moe-jax tune`: the guard of a checkpoint tuned on labelled lists of one's own recogniser.

How much a correction is to be trusted depends on who made the first pass: a run tunes its thresholds on its own
validation text, and a better recogniser than those it learnt from wants higher ones.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.formats import FormatError
from moe_jax.metrics.normalisers import FAMILY_NORMALISER

FOLDS = 5
FEWEST = 20  # lines: fewer say next to nothing of two thresholds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a run folder, or a safetensors file")
    parser.add_argument(
        "--input", required=True, nargs="+", metavar="FILE", help="hypotheses with references, of your recogniser"
    )
    parser.add_argument("--family", default="asr", choices=FAMILY_NORMALISER, help="of the files (default: asr)")
    parser.add_argument("--output", metavar="FILE", help="write the checkpoint with these thresholds (safetensors)")


def main(args: argparse.Namespace) -> int:
    from moe_jax import checkpoint, evaluate
    from moe_jax.pipeline import Pipeline, export

    if args.output and Path(args.output).exists():
        raise ValueError(f"{args.output}: is there already; remove it, or give another --output")
    records, rows = evaluate.read_rows(args.input, args.family)
    if len(rows) < FEWEST:
        raise FormatError(args.input[0], None, f"{len(rows)} lines are too few to tune on", f"give {FEWEST} or more")
    pipeline = Pipeline.load(args.checkpoint)
    proposals = evaluate.propose(pipeline, records)
    print(report(rows, proposals, pipeline.guard))
    guard = evaluate.tune_guard(rows, proposals)
    print(f"tuned on all {len(rows)} lines: {guard}")
    if args.output:
        params, meta = checkpoint.read_safetensors(args.checkpoint)
        export(args.output, params, meta, guard=dataclasses.asdict(guard))
        print(f"{args.output}: the same weights with these thresholds")
    else:
        print("--output FILE keeps a checkpoint with these thresholds")
    return 0


def report(rows: list[dict[str, Any]], proposals: list[Any], present: Any) -> str:
    """Word errors of the first pass and of three guards, and their change against it; what is tuned is judged on lines
    that it was not tuned on."""
    from moe_jax import evaluate

    held_out = np.arange(len(rows)) % FOLDS
    texts = [""] * len(rows)
    for fold in range(FOLDS):
        seen = np.flatnonzero(held_out != fold)
        guard = evaluate.tune_guard([rows[i] for i in seen], [proposals[i] for i in seen])
        for i in np.flatnonzero(held_out == fold):
            texts[i] = guard(proposals[i]).text
    found = {
        "first pass": [p.first for p in proposals],
        "no guard": [p.guarded(-np.inf).text for p in proposals],
        f"present ({present})": [present(p).text for p in proposals],
        f"tuned (on the other lines, {FOLDS} folds)": texts,
    }
    first = evaluate.line_errors(rows, found["first pass"])
    out = []
    for name, given in found.items():
        errors = evaluate.line_errors(rows, given)
        fixed, broken = int((errors < first).sum()), int((errors > first).sum())
        change = f" ({100 * (errors.sum() / first.sum() - 1):+.1f} %)" if first.any() else ""
        out.append(f"{name}: {int(errors.sum()):,} word errors{change}, {fixed} lines fixed, {broken} broken")
    return "\n".join(out)
