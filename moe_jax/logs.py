"""Logs of a run: JSON lines that a resumed run continues exactly, and TensorBoard events.

metrics.jsonl holds what depends on (configuration, seed, step) alone; speed.jsonl what a clock measured; skipped.jsonl,
where there is anything to say, the rows of batches whose update was left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO


class Logs:
    """Appends to a run's logs; lines after `step` (from a run that died later) are cut off first."""

    def __init__(self, folder: Path, step: int, *, enabled: bool = True):
        self.enabled = enabled
        if not enabled:
            return
        from tensorboardX import SummaryWriter

        for name in ("metrics.jsonl", "speed.jsonl", "skipped.jsonl"):
            truncate(folder / name, step)
        self._folder, self.files = folder, {name: _opened(folder, name) for name in ("metrics", "speed")}
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def metrics(self, step: int, scalars: Mapping[str, float]) -> None:
        self._write("metrics", step, scalars)

    def speed(self, step: int, scalars: Mapping[str, float]) -> None:
        self._write("speed", step, scalars)

    def skipped(self, step: int, rows: Sequence[int]) -> None:
        """The rows of the batch whose update, that of `step`, was left out."""
        if self.enabled:
            file = self.files.get("skipped") or _opened(self._folder, "skipped")
            self.files["skipped"] = file
            file.write(json.dumps({"step": step, "rows": list(rows)}) + "\n")
            file.flush()

    def sync(self) -> None:
        """Everything reaches the disk: where it is a bucket, files are there for others from then on."""
        if self.enabled:
            for file in self.files.values():
                os.fsync(file.fileno())
            self.board.flush()

    def _write(self, name: str, step: int, scalars: Mapping[str, float]) -> None:
        if not self.enabled:
            return
        self.files[name].write(json.dumps({"step": step, **scalars}) + "\n")
        self.files[name].flush()
        for key, x in scalars.items():
            self.board.add_scalar(key if "/" in key else f"{name}/{key}", x, step)

    def close(self) -> None:
        if self.enabled:
            for file in self.files.values():
                file.close()
            self.board.close()


def _opened(folder: Path, name: str) -> TextIO:
    return open(folder / f"{name}.jsonl", "a", encoding="utf-8")


def truncate(path: Path, step: int) -> None:
    """Drop lines of later steps, and a last line that a crash tore."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            break
    aside = path.with_name(path.name + ".part")
    aside.write_text("".join(kept), "utf-8")
    os.replace(aside, path)
