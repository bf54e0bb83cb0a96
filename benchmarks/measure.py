"""Rivals timed side by side: what the benchmarks share.

A machine drifts by tens of percent within minutes; a ratio of two programs that take turns (A B A B ...) does not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from moe_jax import launch, partfile, xla
from moe_jax.types import TokenInfo


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program and its arguments.

    Attributes:
      temporary: bytes that XLA allocates while it runs, besides arguments and results.
      compile_s: seconds to trace and to compile it.
      hlo: its text, as it was compiled.
    """

    run: Callable[[], Any]
    temporary: int
    compile_s: float
    hlo: Callable[[], str]


def program(function: Callable, *args: Any) -> Program:
    """`function` compiled for `args`, as the trainer compiles."""
    began = time.perf_counter()
    compiled = jax.jit(function, compiler_options=xla.options()).lower(*args).compile()
    took = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    run, hlo = lambda: jax.block_until_ready(compiled(*args)), lambda: str(compiled.as_text())
    return Program(run, memory.temp_size_in_bytes, took, hlo)


def unpadded(rows: int, length: int) -> TokenInfo:
    """Of rows that are one segment each, of one family, full to the end."""
    ones = jnp.ones((rows, length), jnp.int32)
    return TokenInfo(ones, ones > 0, ones, jnp.broadcast_to(jnp.arange(length), (rows, length)))


@contextlib.contextmanager
def apart(make: Callable[..., Callable], *args: Any) -> Generator[Callable]:
    """What `make(*args)` gives, to be called in a process of its own: allocators and threads of rivals never meet."""
    with ProcessPoolExecutor(1, get_context("spawn"), _begin, (make, args)) as pool:
        yield lambda *given: pool.submit(_call, *given).result()


_made: list[Callable] = []


def _begin(make: Callable[..., Callable], args: Sequence[Any]) -> None:
    _made.append(make(*args))


def _call(*given: Any) -> Any:
    return _made[0](*given)


def interleaved(
    rivals: Mapping[str, Callable[[], Any]], *, seconds: float = 2.0, rounds: int = 7, rouse: int = 0
) -> dict[str, float]:
    """Median seconds of a call of each; every rival in each round, about `seconds` and at least `rounds` rounds.

    With `rouse` so many calls that are not timed come first in each round: what a process finds in memory after a rest
    is not what it has while it works.
    """
    spent = 0.0
    for call in rivals.values():
        call()  # first touch of memory, caches of code
    times: dict[str, list[float]] = {name: [] for name in rivals}
    while spent < seconds or len(next(iter(times.values()))) < rounds:
        for name, call in rivals.items():
            for _ in range(rouse):
                call()
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
            spent += times[name][-1]
    return {name: median(found) for name, found in times.items()}


def row(case: str, ours: float, rival: float, target: float | None, **more: Any) -> dict[str, Any]:
    """A row of a table: time or memory of ours and of the rival; the smaller the ratio, the better."""
    return {"case": case, "ours": ours, "rival": rival, "ratio": ours / rival, "target": target, **more}


def others(path: Path, cases: Collection[str], about: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """(rows of a file that are of these cases and of such a machine, the commands that made it)."""
    empty: dict[str, Any] = {"rows": [], "machine": {}, "command": ""}
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else empty
    if {**found["machine"], "peak_gflops": 0} != {**about, "peak_gflops": 0}:
        return [], ""
    rows = [r for r in found["rows"] if r["case"].partition(": ")[0] in cases]
    return rows, found["command"] if rows else ""


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "processor": processor(),
        "peak_gflops": round(xla.peak_flops() / 1e9, 1),
        "jax": jax.__version__,
    }


def processor() -> str:
    """The model of the CPU where the system says it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table, a column a key; numbers to three digits, and a mark where a target is missed.

    What is itself a mapping is for the file alone.
    """

    def cell(key: str, value: Any, of: Mapping[str, Any]) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
            missed = key == "ratio" and of.get("target") is not None and value > of["target"]
            return f"{text} (missed)" if missed else text
        return str(value)

    keys = list(dict.fromkeys(k for r in rows for k, value in r.items() if not isinstance(value, Mapping)))
    lines = [keys, ["---"] + ["--:"] * (len(keys) - 1)]
    lines += [[cell(k, r.get(k), r) for k in keys] for r in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(
    doc: str,
    cases: Mapping[str, Callable[..., Iterable[dict[str, Any]]]],
    draw: Callable[[str, list[dict[str, Any]]], str] | None = None,
    given: str | None = None,
) -> None:
    """The command line of a benchmark: `--only` some cases, `--json` a file; each case gives rows. With `draw`, (case,
    rows) -> SVG, also `--plot` a folder. With `given`, what it is, also a path, which each case is called with.
    """
    launch.command()
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows there; with --only, beside other cases")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    if given:
        parser.add_argument("path", help=given)
    if draw:
        parser.add_argument("--plot", type=Path, help="draw each case in this folder")
    args = parser.parse_args()
    chosen = {name: make for name, make in cases.items() if args.only in name}
    if not chosen:
        parser.error(f"no case contains {args.only!r}; there are: {', '.join(cases)}")
    about, paths = machine(), [args.path] if given else []
    spec = sys.modules["__main__"].__spec__
    command = f"python -m {spec.name}" if spec else sys.argv[0]
    command += "".join(f" {path}" for path in paths)
    command += f" --only {args.only!r}" if args.only else ""
    kept, before = others(args.json, cases.keys() - chosen, about) if args.json and args.only else ([], "")
    rows: list[dict[str, Any]] = []
    command = f"{before}; {command}" if kept and command not in before.split("; ") else before or command
    made = {"command": command, "date": f"{datetime.date.today()}", "machine": about}
    for name, make in tqdm(chosen.items(), unit="case"):
        found: list[dict[str, Any]] = []
        for one in make(*paths):
            found.append(one)
            rows.append({**one, "case": f"{name}: {one['case']}"})
            if args.json:  # what is measured stays where what follows is stopped
                both = sorted([*kept, *rows], key=lambda r: [*cases].index(r["case"].partition(": ")[0]))
                partfile.write_text(args.json, json.dumps({**made, "rows": both}, indent=1) + "\n")
        if draw and args.plot:
            args.plot.mkdir(parents=True, exist_ok=True)
            partfile.write_text(args.plot / f"{name}.svg", draw(name, found))
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(markdown(rows))
