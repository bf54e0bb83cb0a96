"""Where the time of training steps goes: a trace to look at, and a table of its operations (docs/profiling.md)."""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from moe_jax import partfile

SKIP = 3  # steps before the first that is traced: compilation, and memory that is touched for the first time
TOP = 25  # rows of the table


@dataclasses.dataclass
class Steps:
    """Traces `count` steps of a run that starts at step `start`: a context, to be called before each step.

    Writes `folder`/operations.md, and the trace beside it.
    """

    folder: Path
    start: int
    count: int
    began: float | None = None

    def __call__(self, step: int, results: Any) -> None:
        """`results`: of the step before; a trace waits for them."""
        if self.count and step == self.start + SKIP:
            jax.block_until_ready(results)
            jax.profiler.start_trace(str(self.folder))
            self.began = time.perf_counter()
        elif step == self.start + SKIP + self.count:
            self._end(results)

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *error: object) -> None:
        self._end(None)  # a run may have fewer steps than were asked for

    def _end(self, results: Any) -> None:
        if self.began is None:
            return
        jax.block_until_ready(results)
        seconds, self.began = time.perf_counter() - self.began, None
        jax.profiler.stop_trace()
        partfile.write_text(self.folder / "operations.md", table(operations(self.folder), seconds))


def operations(folder: Path) -> dict[str, tuple[float, int]]:
    """Kind of operation -> (seconds by itself, without what runs inside it; how often), of the newest trace.

    Operations that differ in their number alone are one kind.
    """
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    seconds, count = Counter(), Counter()
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            events = [(e.start_ns, -e.duration_ns, name) for e in line.events if (name := _operation(e))]
            around: list[tuple[float, str]] = []  # (end, kind) of the operations that are running
            for start, minus, name in sorted(events):
                while around and around[-1][0] <= start:
                    around.pop()
                if around:
                    seconds[around[-1][1]] += minus / 1e9
                seconds[name] -= minus / 1e9
                count[name] += 1
                around.append((start - minus, name))
    return {name: (spent, count[name]) for name, spent in seconds.most_common()}


def _operation(event: Any) -> str | None:
    name = dict(event.stats).get("hlo_op")
    return re.sub(r"[.\d]+$", "", str(name)) if name else None


def table(found: dict[str, tuple[float, int]], seconds: float) -> str:
    """Markdown. The share is of `seconds`, the time that passed: operations that run side by side add up to more."""
    rows = [(name, *found[name]) for name in list(found)[:TOP]]
    rest = [spent for spent, _ in list(found.values())[TOP:]]
    rows += [(f"{len(rest)} others", sum(rest), 0)] if rest else []
    missing = seconds - sum(spent for spent, _ in found.values())
    rows += [("not in the trace", missing, 0)] if missing > 0 else []
    lines = ["| operation | ms | share | times |", "|---|--:|--:|--:|"]
    lines += [f"| {n} | {1e3 * t:,.1f} | {100 * t / seconds:.1f} % | {c or ''} |" for n, t, c in rows]
    return "\n".join([f"{1e3 * seconds:,.0f} ms on {jax.devices()[0].device_kind}", "", *lines]) + "\n"
