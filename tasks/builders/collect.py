"""Sort files of many tasks into a corpus folder: one file a family and split, as MOE_JAX_DATA wants them.

    python -m moe_jax.tasks.builders.collect all.train.jsonl.xz all.valid.jsonl.xz all.test.jsonl.xz --output corpus
    MOE_JAX_DATA=corpus python -m moe_jax.main --gin_file=...

Files are of any format that `moe_jax.formats` reads and whose rows say their "task"; the split is in the file's name.
A row whose reference is, in its letters, that of a test row is in no valid or train file of any task, and one of a
valid row in no train file: such rows are left out, and counted. Rows come as they are; nothing is sampled.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from moe_jax import formats
from moe_jax.tasks.builders.splits import letters
from moe_jax.tasks.families import family_id

SPLITS = ("test", "valid", "train")  # in this order: what an earlier one holds, a later one must not
KEPT, LEFT_OUT = "kept", "left out"

Counts = Counter[tuple[str, str, str, str]]  # (family, set, split, KEPT or LEFT_OUT)


def collect(paths: Sequence[Path], folder: Path) -> Counts:
    """Writes `folder`, aside and then renamed, and counts rows.

    Raises ValueError, in one line, for a file or row that cannot be used, or if the folder exists; nothing is left.
    """
    if folder.exists():
        raise ValueError(f"{folder}: exists already; choose another folder, or remove this one")
    splits = [split_of(path) for path in paths]
    in_order = sorted(zip(splits, paths, strict=True), key=lambda pair: SPLITS.index(pair[0]))
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    aside.mkdir(parents=True)
    counts: Counts = Counter()
    seen: dict[str, str] = {}  # a reference's letters -> the first split that has it
    files: dict[str, gzip.GzipFile] = {}
    try:
        with contextlib.ExitStack() as stack:
            for split, path in in_order:
                for family, source_set, reference, line in rows(path):
                    allowed = seen.setdefault(letters(reference) or reference, split) == split
                    counts[family, source_set, split, KEPT if allowed else LEFT_OUT] += 1
                    if not allowed:
                        continue
                    name = f"{family}.{split}.jsonl.gz"
                    if name not in files:
                        raw = stack.enter_context((aside / name).open("wb"))
                        files[name] = stack.enter_context(gzip.GzipFile("", "wb", 6, raw, mtime=0))
                    files[name].write(line.encode() + b"\n")
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return counts


def split_of(path: Path) -> str:
    """The split that a file's name tells, as in `open.train.jsonl.xz`. Raises ValueError without just one."""
    found = [split for split in SPLITS if split in path.name.split(".")]
    if len(found) != 1:
        raise ValueError(
            f"{path}: cannot tell the split from its name; call it something.train.jsonl, or valid or test"
        )
    return found[0]


def rows(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """(family, set, reference, a line of JSON) of each row. Raises ValueError, in one line."""
    for record in tqdm(formats.read(path), desc=path.name, unit=" rows", mininterval=1, disable=None):
        if record.reference is None or record.task is None:
            raise ValueError(f'{path}:{record.line}: a row needs "task" and "reference"; add them')
        try:
            family_id(record.task)
        except ValueError as error:
            raise ValueError(f"{path}:{record.line}: {error}") from None
        row = json.loads(record.raw)
        yield record.task, str(row.get("source_set", "unnamed")), record.reference, json.dumps(row, ensure_ascii=False)


def table(counts: Counts) -> str:
    """Rows by family and set; of each split how many, and how many were left out."""
    lines = [f"{'family':8} {'set':28} " + " ".join(f"{split:>9}" for split in reversed(SPLITS)) + "   left out"]
    for family, source_set in sorted({key[:2] for key in counts}):
        kept = " ".join(f"{counts[family, source_set, split, KEPT]:9,}" for split in reversed(SPLITS))
        left_out = sum(counts[family, source_set, split, LEFT_OUT] for split in SPLITS)
        lines.append(f"{family:8} {source_set:28} {kept} {left_out:10,}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    args = parser.parse_args()
    try:
        print(table(collect(args.files, args.output)))
    except ValueError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error.filename or args.output}: {error.strerror}")


if __name__ == "__main__":
    main()
