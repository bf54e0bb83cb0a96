"""Test sets that nothing was trained or tuned on, corrected by checkpoints, into `results/zero_shot/table.json`.

    python -m benchmarks.zero_shot --data FOLDER --checkpoints runs/neko/neko-0 runs/neko/dense-0
    python -m benchmarks.zero_shot --mixed a.test.jsonl b.test.jsonl --checkpoints runs/neko/neko-0 runs/neko/dense-0

FOLDER holds the sets, such as HyPoradise's test files (`test_cv.json`, ...; `.gz` and `.xz` too). `--mixed` takes files
whose records name their `task` and `source_set`, whatever the family: unseen sets of the families that were trained,
and unseen families; a set of the shipped corpus is left out, and of a longer one than `--lines` those lines come that a
hash of their text picks. That table is `results/unseen/table.json`. A run folder is named
`<arm>-<seed>` (`benchmarks.arms`); of another folder or file the name is the arm. `--predictions` adds what other
systems wrote, as in `moe-jax score`. Corrections stay in runs/zero_shot, by the fingerprint of the weights: what is
finished is not done again.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import hashlib
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax import cli, formats, launch, partfile, score
from moe_jax.formats import Record
from moe_jax.main import report
from moe_jax.metrics.normalisers import HYPO2TRANS, SPEECH, family_normaliser

ROOT = Path(__file__).resolve().parents[1]
Systems = Mapping[score.System, score.Texts]


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
        path = cache / f"{name.replace('/', '-')}-{digest.hexdigest()[:16]}.jsonl"
        if not path.exists():
            correct = correct or load(str(checkpoint))
            made, unguarded = score.corrected(correct, {name: records})
            partfile.write_text(path, score.to_jsonl(records, made[name], unguarded[name]))
        guarded[name] = score.read_predictions(path, len(records), ("corrected",))
        free[name] = score.read_predictions(path, len(records), ("unguarded",))
    return guarded, free


def table(sets: score.Sets, systems: Systems, command: str) -> dict[str, Any]:
    """The evidence: under our normaliser, and as HyPoradise's authors score."""
    rows = [row for n in (SPEECH, HYPO2TRANS) for row in score.score(sets, systems, family="asr", normaliser=n)]
    return {"experiment": "zero_shot", "meta": _meta(command), "rows": rows}


def unseen(sets: score.Sets, systems: Systems, command: str) -> dict[str, Any]:
    """The evidence of `mixed` sets: each family apart, under its own normaliser."""
    rows = []
    for family in dict.fromkeys(name.partition("/")[0] for name in sets):
        mine = {name: records for name, records in sets.items() if name.partition("/")[0] == family}
        rows += score.score(mine, systems, family=family, normaliser=family_normaliser(family))
    plain = [row for row in rows if not row["set"].startswith(score.DISTINCT)]
    return {"experiment": "unseen", "meta": _meta(command), "rows": plain}


def _meta(command: str) -> dict[str, str]:
    return {"command": command, "date": datetime.date.today().isoformat()}


def mixed(paths: Sequence[Path], lines: int, known: Collection[tuple[str, str]]) -> dict[str, list[Record]]:
    """`<family>/<set>` -> its records with references, at most `lines`: the choice is a hash's, not the order's.

    Sets of which `known` has the family and name are left out. The many small ones of text normalisation (`nemo-date`,
    `nemo-time`, ...) are one, and so are several languages of a set.

    Raises FormatError, in one line, for a record without reference, task or source set.
    """
    found: dict[str, list[Record]] = {}
    for path in paths:
        for record in formats.read(path):
            source = json.loads(record.raw).get("source_set")
            if record.reference is None or record.task is None or not isinstance(source, str):
                fix = "mixed sets need a reference, a task and a source_set in each record"
                raise formats.FormatError(path, record.line, "something is missing", fix)
            if (record.task, source) not in known:
                found.setdefault(f"{record.task}/{source.partition('nemo-')[0] or 'nemo'}", []).append(record)
    return {name: formats.sample(records, lines) for name, records in sorted(found.items())}


def shipped() -> set[tuple[str, str]]:
    """(family, set) of all that the shipped models saw."""
    files = sorted((ROOT / "tasks" / "data").glob("*.train.jsonl.gz"))
    rows = [json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
    return {(row["task"], row["source_set"]) for row in rows if "task" in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, metavar="FOLDER", help="a file a test set of speech")
    what.add_argument(
        "--mixed", type=Path, nargs="+", metavar="FILE", help="records that name their task and source_set"
    )
    parser.add_argument("--lines", type=int, default=300, help="of a mixed set at most (default: 300)")
    parser.add_argument("--checkpoints", type=Path, nargs="*", default=[], help="run folders or safetensors files")
    parser.add_argument("--predictions", nargs="+", action="extend", default=[], metavar="NAME=FILE")
    args = parser.parse_args()
    try:
        sets = mixed(args.mixed, args.lines, shipped()) if args.mixed else speech(args.data)
        systems = score.predictions(args.predictions, sets)
        cache = ROOT / "runs" / "zero_shot"
        cache.mkdir(parents=True, exist_ok=True)
        score.joined(systems, *(score.ours(system(c), {}, {}) for c in args.checkpoints))  # names clash before the work
        mine = [score.ours(system(c), *corrected(c, sets, cache)) for c in args.checkpoints]
    except Exception as error:
        sys.exit(report(error))
    given = [f"--mixed {' '.join(p.name for p in args.mixed)} --lines {args.lines}" if args.mixed else "--data FOLDER"]
    given += [f"--checkpoints {' '.join(map(str, args.checkpoints))}"] if args.checkpoints else []
    given += [f"--predictions {' '.join(args.predictions)}"] if args.predictions else []
    command = " ".join(["python -m benchmarks.zero_shot", *given])
    made = (unseen if args.mixed else table)(sets, score.joined(*mine, systems), command)
    out = ROOT / "results" / made["experiment"] / "table.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    partfile.write_text(out, json.dumps(made, indent=1) + "\n")
    print(f"{out.relative_to(ROOT)} written; now python -m benchmarks.results")


def speech(folder: Path) -> dict[str, list[Record]]:
    """A file a set."""
    files = sorted(path for path in folder.iterdir() if formats.by_extension(path) not in (None, "text"))
    if not files:
        raise ValueError(f"{folder}: holds no test sets; give a folder with some")
    return score.read_sets(files, "asr")


if __name__ == "__main__":
    launch.command()
    main()
