"""Logs of a run: JSON lines that a resumed run continues exactly, and TensorBoard events.

metrics.jsonl holds what depends on (configuration, seed, step) alone; speed.jsonl what a clock measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


class Logs:
    """Appends to a run's logs; lines after `step` (from a run that died later) are cut off first."""

    def __init__(self, folder: Path, step: int, *, enabled: bool = True):
        self.enabled = enabled
        if not enabled:
            return
        from tensorboardX import SummaryWriter

        for name in ("metrics.jsonl", "speed.jsonl"):
            truncate(folder / name, step)
        self.files = {n: open(folder / f"{n}.jsonl", "a", encoding="utf-8") for n in ("metrics", "speed")}  # noqa: SIM115
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def metrics(self, step: int, scalars: Mapping[str, float]) -> None:
        self._write("metrics", step, scalars)

    def speed(self, step: int, scalars: Mapping[str, float]) -> None:
        self._write("speed", step, scalars)

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
