"""What a run does about updates that were left out, and about steps that hang."""

from __future__ import annotations

import collections
import faulthandler
import math
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from moe_jax.logs import Logs

LAG = 2  # steps that are not looked at yet, so that the device never waits for the host


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
    """Prints the stacks of all threads where no step was made for so many `seconds` (0: never), again and again."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def __enter__(self) -> Watchdog:
        return self

    def alive(self) -> None:
        """A step was made; before the first, which compiles, nothing is expected."""
        if self._seconds and sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=sys.__stderr__)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
