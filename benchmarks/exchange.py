"""Expert parallelism on eight virtual devices of this CPU: what each way of dispatch moves, holds and takes.

    python -m benchmarks.exchange --json exchange.json        # about 4 minutes on two cores

A case is a mesh and a load; a row is a dispatch of one MoE layer, forward and backward with respect to weights and
input. "ragged" is the dropless dispatch of one device, laid out by XLA; "slots" drops what is over its capacity, so
that it does less. Counts are those of the compiled program, "again" those of a turn beyond the first (`moe.exchange`);
MiB are of a device: "moved" is what it sends or gets, whichever is more, in one turn, and "temporary" what XLA holds.
The devices share the cores, so time says what is computed and copied, not how fast a network is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.measure import interleaved, main, program, unpadded
from benchmarks.moe_layer import both
from moe_jax import sharding, tree
from moe_jax.layers.param import Rngs
from moe_jax.moe import dispatch
from moe_jax.moe.layer import MoeFfn
from moe_jax.moe.routers import TopK

MESHES = ({"data": 2, "expert": 4}, {"data": 4, "expert": 2})
FORMS = {"slots": dispatch.slots, "exchanged": dispatch.exchanged, "ragged": dispatch.ragged}
SHAPE = (8, 512, 256, 8, 2)  # rows, length, width, experts, choices
KINDS = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
OP = re.compile(rf"= (.*?) ({'|'.join(KINDS)})\((.*)")
ARRAY = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")


def collectives(hlo: str) -> Iterator[tuple[str, bool, float]]:
    """(kind, whether it is in a loop, bytes that a device moves) of each collective operation of a compiled program."""
    entry = False
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            entry = line.startswith("ENTRY")
        if found := OP.search(line):
            shapes, kind, rest = found.groups()
            size = sum(_bytes(*array) for array in ARRAY.findall(shapes))
            n = 1 if kind == "collective-permute" else _members(rest)
            # Of a result of `size` bytes a device has 1 / n itself; of one that it shares with others, it gets n times.
            others = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
            yield kind, not entry, size * others.get(kind, (n - 1) / n)


def _bytes(dtype: str, dims: str) -> int:
    bits = int(re.sub(r"\D", "", dtype) or 8)
    return int(np.prod([int(d) for d in dims.split(",") if d])) * bits // 8


def _members(text: str) -> int:
    """How many devices a group has: {{0,1},{2,3}}, [2,2]<=[4] and mesh['a'=2,'b'=2] {'b'} all say two."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)", text):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(tiled[1])
    named = re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", text)
    if not named:
        raise ValueError(f"no groups of devices in: {text}")
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return int(np.prod([int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2])]))


def compare(sizes: dict[str, Any], skewed: bool, shape: tuple[int, ...] = SHAPE) -> Iterator[dict[str, Any]]:
    B, L, d, E, k = shape
    mesh = sharding.make_mesh(**sizes)
    x = np.random.default_rng(0).normal(size=(B, L, d)).astype(np.float32)
    made = {}
    for name, form in FORMS.items():
        layer = MoeFfn(d, num_experts=E, hidden=2 * d, router=partial(TopK, k=k), dispatch=form, rngs=Rngs(params=0))
        table = tree.flatten(layer)
        if skewed:  # the first input is the same for all; it prefers the first expert
            x[..., 0], table["router/gate"] = 1.0, table["router/gate"].at[0, 0].set(2.0)
        layout = sharding.shardings(tree.axes(layer), table, mesh)
        layer = tree.unflatten(layer, {path: jax.device_put(w, layout[path]) for path, w in table.items()})
        with sharding.use(mesh):
            batch = sharding.put_batch((x, jax.device_get(unpadded(B, L)), np.ones_like(x)), mesh)
            made[name] = program(both, layer, *batch)
    times = interleaved({name: p.run for name, p in made.items()})
    for name, p in made.items():
        count, moved = Counter(), 0.0
        for kind, again, size in collectives(p.hlo()):
            count[kind, again] += 1
            moved += size * (not again)
        each = {kind: f"{count[kind, False]} + {count[kind, True]}" for kind in KINDS}
        yield {
            "case": name,
            **each,
            "moved MiB": moved / 2**20,
            "temporary MiB": p.temporary / 2**20,
            "ms": 1e3 * times[name],
            "ratio": times[name] / times["slots"],
        }


CASES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    f"{sizes['data']}x{sizes['expert']} {load}": partial(compare, sizes, load == "skewed")
    for load in ("balanced", "skewed")
    for sizes in MESHES
}

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    main(str(__doc__), CASES)
