"""Test sets that nothing was trained or tuned on, corrected by checkpoints, into `results/zero_shot/table.json`.

    python -m benchmarks.zero_shot --data FOLDER --checkpoints runs/neko/neko-0 runs/neko/dense-0

FOLDER holds the sets, such as HyPoradise's test files (`test_cv.json`, ...; `.gz` and `.xz` too). A run folder is named
`<arm>-<seed>` (`benchmarks.arms`); of another folder or file the name is the arm. `--predictions` adds what other
systems wrote, as in `moe-jax score`. Corrections stay in runs/zero_shot, by the fingerprint of the weights: what is
finished is not done again.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_jax import cli, formats, launch, partfile, score
from moe_jax.main import report
from moe_jax.metrics.normalisers import HYPO2TRANS, SPEECH

ROOT = Path(__file__).resolve().parents[1]


def system(checkpoint: Path) -> score.System:
    """("neko", 0) of `runs/neko/neko-0`."""
    name = checkpoint.resolve().name
    found = re.fullmatch(r"(.+)-(\d+)", name)
    return (found[1], int(found[2])) if found else (name, None)


def corrected(
    checkpoint: Path, sets: score.Sets, cache: Path, load: Callable[[str], score.Correct] = cli.scored
) -> tuple[score.Texts, score.Texts]:
    """`score.corrected`, a set at a time, each kept in `cache`; the model is loaded where there is something to do."""
    weights = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    key = hashlib.sha256(weights.read_bytes())
    correct: score.Correct | None = None
    guarded: dict[str, list[str]] = {}
    free: dict[str, list[str]] = {}
    for name, records in sets.items():
        digest = key.copy()
        digest.update("\n".join(r.raw for r in records).encode())
        path = cache / f"{name}-{digest.hexdigest()[:16]}.jsonl"
        if not path.exists():
            correct = correct or load(str(checkpoint))
            made, unguarded = score.corrected(correct, {name: records})
            partfile.write_text(path, score.to_jsonl(records, made[name], unguarded[name]))
        guarded[name] = score.read_predictions(path, len(records), ("corrected",))
        free[name] = score.read_predictions(path, len(records), ("unguarded",))
    return guarded, free


def table(sets: score.Sets, systems: dict[score.System, score.Texts], command: str) -> dict[str, Any]:
    """The evidence: under our normaliser, and as HyPoradise's authors score."""
    rows = [row for n in (SPEECH, HYPO2TRANS) for row in score.score(sets, systems, family="asr", normaliser=n)]
    meta = {"command": command, "date": datetime.date.today().isoformat()}
    return {"experiment": "zero_shot", "meta": meta, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="a file a test set")
    parser.add_argument("--checkpoints", type=Path, nargs="*", default=[], help="run folders or safetensors files")
    parser.add_argument("--predictions", nargs="+", action="extend", default=[], metavar="NAME=FILE")
    args = parser.parse_args()
    try:
        files = sorted(path for path in args.data.iterdir() if formats.by_extension(path) not in (None, "text"))
        if not files:
            raise ValueError(f"{args.data}: holds no test sets; give a folder with some")
        sets = score.read_sets(files, "asr")
        systems = score.predictions(args.predictions, sets)
        cache = ROOT / "runs" / "zero_shot"
        cache.mkdir(parents=True, exist_ok=True)
        score.joined(systems, *(score.ours(system(c), {}, {}) for c in args.checkpoints))  # names clash before the work
        mine = [score.ours(system(c), *corrected(c, sets, cache)) for c in args.checkpoints]
    except Exception as error:
        sys.exit(report(error))
    given = [f"--checkpoints {' '.join(map(str, args.checkpoints))}"] if args.checkpoints else []
    given += [f"--predictions {' '.join(args.predictions)}"] if args.predictions else []
    out = ROOT / "results" / "zero_shot" / "table.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m benchmarks.zero_shot --data FOLDER", *given])
    partfile.write_text(out, json.dumps(table(sets, score.joined(*mine, systems), command), indent=1) + "\n")
    print(f"{out.relative_to(ROOT)} written; now python -m benchmarks.results")


if __name__ == "__main__":
    launch.command()
    main()
