"""What a run leaves for its experiment's table, in `results/<experiment>/runs/<run>.json.gz`: scores, and what paired
tests need of each test line. It is committed: a table is made of runs on several machines and days, and anyone can
make it again without training."""

from __future__ import annotations

import gzip
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


def once(experiment: str, run: str, make: Callable[[], Any]) -> Any:
    """What is kept of the run, made and kept where it is not."""
    found = read(experiment, run)
    if found is None:
        found = make()
        write(experiment, run, found)
    return found
