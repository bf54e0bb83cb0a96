"""Where the time of a run goes, over all the processes that it took: `goodput.json` in its folder."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from moe_jax.partfile import write_text

KINDS = ("start", "compile", "compute", "input", "validate", "save", "lost", "down")


class Goodput:
    """A clock that is told what comes now.

    Seconds by kind: `start`, until the first step (restoring included); `compile`, the first step of each shape of
    batch; `compute`, steps; `input`, waiting for data; `validate`; `save`; `lost`: steps that a process made and no
    checkpoint held; and `down`: from what a process that did not end by itself wrote last to the start of the next.
    """

    def __init__(self, folder: Path, *, enabled: bool = True):
        self.path, self.enabled = folder / "goodput.json", enabled
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.processes, self._unsaved, self._pending = 1, 0.0, 0.0
        if self.path.exists():
            was = json.loads(self.path.read_text("utf-8"))
            self.seconds |= {kind: float(was["seconds"].get(kind, 0)) for kind in KINDS}
            self.processes = int(was["processes"]) + 1
            self.seconds["lost"] += was["unsaved"]
            self.seconds["compute"] -= was["unsaved"]
            self.seconds["down"] += max(0.0, time.time() - (was.get("at") or math.inf))
        self._kind, self._since = "start", time.monotonic()

    def now(self, kind: str) -> None:
        """From now on it is this."""
        moment = time.monotonic()
        spent = moment - self._since
        self.seconds[self._kind] += spent
        self._unsaved += spent if self._kind == "compute" else 0.0
        self._kind, self._since = kind, moment

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._pending > 0

    def saving(self) -> None:
        """A checkpoint of all steps is being written."""
        self.now(self._kind)
        self._pending = self._unsaved

    def saved(self) -> None:
        """It holds them: what comes after this is not lost."""
        self._unsaved, self._pending = self._unsaved - self._pending, 0.0
        self.write()

    def write(self, *, ended: bool = False) -> None:
        """Keeps the account on disk; `ended`: what comes next, if anything, is no time that this run was down."""
        self.now(self._kind)
        if self.enabled:
            said = {"seconds": self.seconds, "processes": self.processes, "unsaved": self._unsaved}
            at = None if ended else time.time()
            write_text(self.path, json.dumps({**said, "at": at, "goodput": self.share}, indent=1) + "\n")

    @property
    def share(self) -> float:
        """The share of all time in which steps were made that stayed."""
        return self.seconds["compute"] / max(sum(self.seconds.values()), 1e-9)
