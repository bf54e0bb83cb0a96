"""Scaling laws of cost: how time and memory of the MoE layer grow, one variable at a time.

    python -m benchmarks.scaling --json scaling.json --plot plots      # about 6 minutes on two cores

"ours" is the exponent a of cost ~ variable^a, by least squares in log-log, "±" its standard error, "rival" the law's;
"ratio" is 2^(ours - rival): by how much more than the law a doubling multiplies the cost. "upper half" is the exponent
over the larger half of the values, where it differs: there the law bends. "forward" and "both" as in
`benchmarks.moe_layer`, each in time and in temporary memory.

The laws, of T tokens, k choices, E experts, width d and hidden = 2 d units an expert:

    time     three products of T k rows with d x 2 d matrices, three times that with a gradient: T^1 k^1 d^2 E^0, so
             long as an expert has many rows. Its weights (E d^2 of them) are read, and with a gradient cleared and
             written, however few the rows: below some 100 rows an expert (E above 32 at T = 2048) time grows with E,
             and below T = 1024 hardly with T.
    memory   rows of width d and 2 d: T^1 k^1 d^1 E^0. Gradients of weights are results, not temporary. Besides,
             "forward" copies the matrices of one expert (d^2: seen from d = 512), "both" holds the gradients of one
             matrix of all experts twice for a while (E d^2: seen from E = 128).
    devices  per device, of a fixed batch and `slots`: over the data axis activations and FLOPs divide (-1), but not
             weights, most of the arguments (0), nor their gradients before they are summed, which show from 8 devices;
             over the expert axis all divide (-1). Besides those gradients `dropless` holds less than half as much, so
             that they show sooner (12 of 17 MiB a device at 8 devices): its memory is over the law.

Devices are virtual CPUs, a process for each number of them. They share the cores, so their time says nothing: memory
and FLOPs are those of the compiled program.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from markupsafe import Markup

from benchmarks.measure import interleaved, main, program, unpadded
from benchmarks.moe_layer import both, forward, inputs
from moe_jax import sharding, tree, xla
from moe_jax.layers.param import Rngs
from moe_jax.moe import dispatch
from moe_jax.moe.layer import MoeFfn
from moe_jax.moe.routers import TopK
from moe_jax.report import svg

ROOT = Path(__file__).resolve().parents[1]
TARGET = 2**0.1  # an exponent may exceed its law by a tenth
DEVICES = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Shape:
    T: int = 2048
    d: int = 256
    E: int = 8
    k: int = 2


@dataclasses.dataclass(frozen=True)
class Sweep:
    """`variable` of `shape` takes the `values`; `time` and `memory` are the laws' exponents."""

    variable: str
    values: tuple[int, ...]
    time: float
    memory: float
    shape: Shape = Shape()


SWEEPS = {
    "tokens": Sweep("T", (128, 256, 512, 1024, 2048, 4096, 8192), 1, 1),
    "experts": Sweep("E", (4, 8, 16, 32, 64, 128, 256), 0, 0),
    "experts-T8192": Sweep("E", (4, 8, 16, 32, 64), 0, 0, Shape(T=8192)),
    "choices": Sweep("k", (1, 2, 4, 8), 1, 1, Shape(E=16)),
    "width": Sweep("d", (64, 128, 256, 512, 1024), 2, 1),
}


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(exponent, standard error) of y ~ x^exponent. Needs three points, all above 0."""
    (slope, _), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    return float(slope), float(np.sqrt(covariance[0, 0]))


def law(case: str, points: Mapping[int, float], exponent: float, unit: str) -> dict[str, Any]:
    """A row: what was fitted to `points`, value of the variable -> cost, beside the law's exponent."""
    x, y = list(points), list(points.values())
    found, error = fit(x, y)
    upper = float(np.polyfit(np.log(x[len(x) // 2 :]), np.log(y[len(y) // 2 :]), 1)[0])
    bends = abs(upper - found) > max(2 * error, 0.05)
    more = {"target": TARGET, "±": error, "upper half": upper if bends else None, "unit": unit, "points": dict(points)}
    return {"case": case, "ours": found, "rival": exponent, "ratio": 2 ** (found - exponent), **more}


def layer(shape: Shape, dispatcher: dispatch.Dispatcher = dispatch.dropless) -> MoeFfn:
    router = partial(TopK, k=shape.k)
    return MoeFfn(
        shape.d,
        num_experts=shape.E,
        hidden=2 * shape.d,
        router=router,
        dispatch=dispatcher,
        rngs=Rngs(params=0),
    )


def swept(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """All points take turns, so that a drift of the machine bends no law."""
    programs = {}
    for value in sweep.values:
        shape = dataclasses.replace(sweep.shape, **{sweep.variable: value})
        x, info = inputs(shape.T, shape.d)
        moe = layer(shape)
        programs["forward", value] = program(forward, moe, x, info)
        programs["both", value] = program(both, moe, x, info, jnp.ones_like(x))
    times = interleaved({f"{name} {value}": p.run for (name, value), p in programs.items()}, rounds=5)
    for name in ("forward", "both"):
        milliseconds = {value: 1e3 * times[f"{name} {value}"] for value in sweep.values}
        yield law(f"{name}, time", milliseconds, sweep.time, "ms")
    for name in ("forward", "both"):
        mebibytes = {value: programs[name, value].temporary / 2**20 for value in sweep.values}
        yield law(f"{name}, memory", mebibytes, sweep.memory, "MiB")


# --- devices ----------------------------------------------------------------------------------------------------------

# Layout -> (mesh, dispatch, the laws of what is reported).
LAYOUTS: dict[str, tuple[Callable[..., Any], dispatch.Dispatcher, dict[str, float]]] = {
    "data": (sharding.make_mesh, dispatch.slots, {"memory": -1, "arguments": 0, "FLOPs": -1}),
    "expert": (
        lambda: sharding.make_mesh(data=1, expert=jax.device_count()),
        dispatch.slots,
        {"memory": -1, "arguments": -1, "FLOPs": -1},
    ),
    "data, dropless": (sharding.make_mesh, dispatch.dropless, {"memory": -1}),
}
UNITS = {"memory": "MiB", "arguments": "MiB", "FLOPs": "GFLOP"}


def per_device(layout: str, shape: Shape = Shape(), rows: int = 8) -> dict[str, float]:
    """Of a device, of forward and backward over all devices of this process, in `UNITS`."""
    make_mesh, dispatcher, _ = LAYOUTS[layout]
    mesh, moe = make_mesh(), layer(shape, dispatcher)
    table = tree.flatten(moe)
    lies = sharding.shardings(tree.axes(moe), table, mesh)
    table = {path: jax.device_put(w, lies[path]) for path, w in table.items()}
    x = np.ones((rows, shape.T // rows, shape.d), np.float32)
    x, dy, info = sharding.put_batch((x, x, unpadded(*x.shape[:2])), mesh)

    def gradients(table: Any, x: Any, info: Any, dy: Any) -> Any:
        return both(tree.unflatten(moe, table), x, info, dy)

    with sharding.use(mesh):
        compiled = jax.jit(gradients, compiler_options=xla.options()).lower(table, x, info, dy).compile()
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    found = {"memory": memory.temp_size_in_bytes, "arguments": memory.argument_size_in_bytes}
    return {name: size / 2**20 for name, size in found.items()} | {"FLOPs": cost["flops"] / 1e9}


def print_all() -> None:
    """What a child process says, as one line of JSON: layout -> `per_device`."""
    print(json.dumps({layout: per_device(layout) for layout in LAYOUTS}))


def on_devices() -> Iterator[dict[str, Any]]:
    """Needs a process for each number of devices: a running one cannot change it."""
    found = {}
    for count in DEVICES:
        command = [sys.executable, "-c", "from benchmarks import scaling; scaling.print_all()"]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
        found[count] = json.loads(done.stdout.splitlines()[-1])
    for layout, (_, _, laws) in LAYOUTS.items():
        for name, exponent in laws.items():
            points = {count: found[count][layout][name] for count in DEVICES}
            yield law(f"{layout}: {name}", points, exponent, UNITS[name])


# --- drawing ----------------------------------------------------------------------------------------------------------

COLOURS = ("#2b5f96", "#b23a2c", "#1d7548", "#8a5a00", "#7a3e9d", "#2a8c8c", "#62676d")
STYLE = (
    ".grid{stroke:#e4e4de}.tick,.name{fill:#62676d;font:10px system-ui,sans-serif}.line{fill:none;stroke-width:1.6}"
    ".law{stroke:#62676d;stroke-dasharray:.1 4;stroke-width:2;stroke-linecap:round}.dot.law{display:none}"
)
LINE = 14  # of the legend, in pixels


def draw(case: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A picture of its own: each cost relative to that of the least value, and (dotted) the laws."""
    x = list(rows[0]["points"])
    series, legend, style = [], Markup(""), STYLE
    for n, row in enumerate(rows):
        y = list(row["points"].values())
        series.append(svg.Series(row["case"], f"c{n}", [(math.log2(a), b / y[0]) for a, b in zip(x, y, strict=True)]))
        style += f".c{n}{{stroke:{COLOURS[n]}}}.dot.c{n},.name.c{n}{{fill:{COLOURS[n]};stroke:none}}"
        text = f"{row['case']}: {row['ours']:.2f} ± {row['±']:.2f}, law {row['rival']:g}"
        legend += Markup('<text class="name c{}" x="{}" y="{}">{}</text>').format(n, svg.LEFT, LINE * (n + 2), text)
    for exponent in sorted({row["rival"] for row in rows}):
        series.append(svg.Series("law", "law", [(math.log2(a), (a / x[0]) ** exponent) for a in (x[0], x[-1])]))
    values = [v for one in series for _, v in one.points]
    chart = svg.line_chart(
        series,
        x_range=(math.log2(x[0]), math.log2(x[-1])),
        y_range=(min(values) / 1.1, max(values) * 1.1),
        log_y=True,
        label=f"{case}: cost relative to that of the least value",
    )
    top = LINE * (len(rows) + 2)
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {all}" width="{twice}"><style>{style}</style>'
        '<rect width="100%" height="100%" fill="#fff"/><text class="name" x="{left}" y="{line}">{title}</text>{legend}'
        '<svg y="{top}" width="{width}" height="{height}">{chart}</svg></svg>\n'
    ).format(
        width=svg.WIDTH,
        all=top + svg.HEIGHT,
        twice=2 * svg.WIDTH,
        style=Markup(style),
        left=svg.LEFT,
        line=LINE,
        title=f"cost over log2({case}), relative to the first",
        legend=legend,
        top=top,
        height=svg.HEIGHT,
        chart=chart,
    )


CASES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {n: partial(swept, sweep) for n, sweep in SWEEPS.items()}
CASES["devices"] = on_devices

if __name__ == "__main__":
    main(str(__doc__), CASES, draw)
