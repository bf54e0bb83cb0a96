"""What a run leaves for its experiment's table, in `results/<experiment>/runs/<run>.json.gz`: scores, and what paired
tests need of each test line. It is committed: a table is made of runs on several machines and days, and anyone can
make it again without training."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_jax import partfile

ROOT = Path(__file__).resolve().parents[1]


def path(experiment: str, run: str) -> Path:
    return ROOT / "results" / experiment / "runs" / f"{run}.json.gz"


def write(experiment: str, run: str, found: Any) -> None:
    """The same bytes for the same `found`."""
    at = path(experiment, run)
    at.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    partfile.write_bytes(at, gzip.compress(text.encode(), mtime=0))


def read(experiment: str, run: str) -> Any | None:
    """None where there is no such run."""
    at = path(experiment, run)
    return json.loads(gzip.decompress(at.read_bytes())) if at.exists() else None


def once(experiment: str, run: str, make: Callable[[], dict[str, Any]], of: str | None = None) -> Any:
    """What is kept of the run, made and kept where it is not. `of`: what it is made of (`digest`), kept with it.

    Raises ValueError for one that is kept of something else."""
    found = read(experiment, run)
    if found is None:
        found = make() | ({} if of is None else {"of": of})
        write(experiment, run, found)
    _same(of, found.get("of"), path(experiment, run))
    return found


def digest(file: str | Path, *settings: str) -> str:
    """Of what a run is made: a file's bytes, and settings."""
    return hashlib.sha256(
        "\n".join([hashlib.sha256(Path(file).read_bytes()).hexdigest(), *settings]).encode()
    ).hexdigest()


def claim(folder: Path, of: str) -> None:
    """Marks a folder as made of that. Raises ValueError where it was made of something else."""
    mark = folder / "of.txt"
    _same(of, mark.read_text() if mark.exists() else None, folder)
    folder.mkdir(parents=True, exist_ok=True)
    partfile.write_text(mark, of)


def _same(of: str | None, was: str | None, where: Path) -> None:
    if of and was and of != was:
        raise ValueError(f"{where}: is of another list or other settings; remove it, or call this one otherwise")
