"""What a run does about updates that were left out, and about steps that hang."""

from __future__ import annotations

import collections
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from moe_jax.logs import Logs

LAG = 2  # steps that are not looked at yet, so that the device never waits for the host
STARTING = 4  # times as long as a step may take what comes before the first


class Health:
    """Names the updates that `optim.guarded` left out, and ends the run after `patience` of them in a row.

    Args:
      rows_of: step -> rows of its batch.
    """

    def __init__(self, logs: Logs, rows_of: Callable[[int], list[int]], patience: int):
        self._logs, self._rows_of, self._patience = logs, rows_of, patience
        self.well = True  # whether the last update that was looked at was followed
        self._waiting: collections.deque[tuple[int, Any, Any, Any]] = collections.deque()

    def saw(self, step: int, in_row: Any, norm: Any, loss: Any) -> None:
        """`step` was made: how many updates in a row were left out, the last of them its own, the gradient's norm and
        the loss; arrays, which are looked at when the device must have them.

        Raises FloatingPointError.
        """
        self._waiting.append((step, in_row, norm, loss))
        while len(self._waiting) > LAG:
            self._look(*self._waiting.popleft())

    def settle(self) -> None:
        """Looks at all of them."""
        while self._waiting:
            self._look(*self._waiting.popleft())

    def _look(self, step: int, in_row: Any, norm: Any, loss: Any) -> None:
        number, size = int(in_row), float(norm)
        self.well = not number
        if self.well:
            return
        rows = self._rows_of(step - 1)
        why = f"its norm is {size:.3g}" if math.isfinite(size) else "not finite"
        why = why if math.isfinite(float(loss)) or not math.isfinite(size) else "the loss is not finite"
        self._logs.skipped(step, rows)
        self._logs.metrics(step, {"skipped": number, **({"norm": size} if math.isfinite(size) else {})})
        if self._logs.enabled:
            some = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
            print(f"step {step}: the gradient is left out ({why}); rows of the data: {some}", file=sys.stderr)
        if number >= self._patience:
            raise FloatingPointError(
                f"{number} gradients in a row, up to step {step}, could not be followed (the last: {why}): "
                "lower the learning rate or look at those rows of the data; the last checkpoint is as it was"
            )


class Watchdog:
    """Prints the stacks of all threads where no step was made for so many `seconds` (0: never), again and again.

    Where none was made for `abort_after` seconds (0: never) the process ends with 134 (SIGABRT), so that whoever
    started it can start it again. Before the first step, while data are opened, a checkpoint is read and programs are
    compiled, both are `STARTING` times as long.
    """

    def __init__(self, seconds: float, abort_after: float = 0.0):
        self._seconds, self._abort_after = seconds, abort_after
        self._deadline, self._over = math.inf, threading.Event()

    def __enter__(self) -> Watchdog:
        self._arm(STARTING)
        if self._abort_after:
            threading.Thread(target=self._abort, name="watchdog", daemon=True).start()
        return self

    def alive(self) -> None:
        """A step was made, or what may take as long."""
        self._arm(1)

    def _arm(self, times: int) -> None:
        if self._seconds and sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(times * self._seconds, repeat=True, file=sys.__stderr__)
        self._deadline = time.monotonic() + times * self._abort_after

    def _abort(self) -> None:
        """What hangs in JAX waits without Python's lock, so that this thread runs."""
        while (left := self._deadline - time.monotonic()) > 0:
            if self._over.wait(left):
                return
        if sys.__stderr__ is not None:
            print(f"no step for {self._abort_after:g} s, or none at the start: the process ends", file=sys.__stderr__)
            faulthandler.dump_traceback(file=sys.__stderr__)
        os.abort()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
