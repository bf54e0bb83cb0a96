"""The only file that knows a mesh.

Arrays name their dims in words (`embed`, `mlp`, `expert`, ... ; activations: `batch`); one table says on which mesh
axis a word lies. A word without a rule, a missing mesh axis, or a size that the axis does not divide means:
replicated.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "expert", "model")

RULES: Mapping[str, str | tuple[str, ...]] = {
    "batch": ("data", "expert"),  # experts exchange tokens inside the data batch: the expert axis carries data too
    "group": "data",  # groups of tokens while they visit the experts
    "expert": "expert",
    "heads": "model",
    "mlp": "model",
    "vocab": "model",
}

_context: contextvars.ContextVar[tuple[Mesh, Mapping] | None] = contextvars.ContextVar("mesh", default=None)


def make_mesh(data: int = -1, expert: int = 1, model: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (or those given); `data=-1` takes what the other axes leave.

    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    devices = devices or jax.devices()
    if data == -1:
        data = len(devices) // (expert * model)
    if data * expert * model != len(devices) or data < 1:
        raise ValueError(
            f"mesh data={data} x expert={expert} x model={model} needs {data * expert * model} devices, "
            f"this host sees {len(devices)}: change the mesh file or use data=-1"
        )
    return Mesh(np.array(devices).reshape(data, expert, model), AXES, axis_types=(AxisType.Auto,) * 3)


@contextlib.contextmanager
def use(mesh: Mesh | None, rules: Mapping = RULES) -> Generator[None]:
    """Within the block `constrain` acts; without a mesh it is the identity."""
    token = _context.set(None if mesh is None else (mesh, rules))
    try:
        yield
    finally:
        _context.reset(token)


def spec(words: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Mapping = RULES) -> PartitionSpec:
    """The partition of an array whose trailing dims are called `words` (leading, stacked dims are replicated)."""
    words = (None,) * (len(shape) - len(words)) + tuple(words)
    parts, taken = [], set()
    for word, size in zip(words, shape, strict=True):
        axes = rules.get(word, ()) if word else ()
        axes = (axes,) if isinstance(axes, str) else axes
        axes = tuple(a for a in axes if a not in taken and mesh.shape.get(a, 1) > 1)
        if not axes or size % int(np.prod([mesh.shape[a] for a in axes])):
            parts.append(None)
            continue
        taken.update(axes)
        parts.append(axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*parts)


def constrain(x: jax.Array, *words: str | None) -> jax.Array:
    """Ask XLA to lay `x` out by its words; the identity outside `use`."""
    active = _context.get()
    if active is None:
        return x
    mesh, rules = active
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(words, x.shape, mesh, rules)))


def devices(word: str) -> int:
    """Among how many devices a dim called so is split; 1 outside `use`."""
    active = _context.get()
    if active is None:
        return 1
    mesh, rules = active
    axes = rules[word]
    return int(np.prod([mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes)]))


def on_each_device(function: Callable, words: Sequence[str | None], out: str) -> Callable:
    """`function` of each device's own part of its arguments, each split along its leading dim, which is called so
    (None: whole); outside `use` the function itself. Raises ValueError, when called, for a dim that does not divide.

    Devices differ along the axes of "batch"; what lies along others (`model`) is left to XLA.
    """
    active = _context.get()
    if active is None:
        return function
    mesh, rules = active
    # An axis of one device is not left to it: where any is, XLA:CPU aborts at a sum of bfloat16 (jaxlib 0.10).
    mine = {axis for axis, size in mesh.shape.items() if axis in rules["batch"] or size == 1}
    spec_of = lambda word: PartitionSpec(rules[word] if word else None)  # noqa: E731
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(map(spec_of, words)),
        out_specs=spec_of(out),
        axis_names=mine,
        check_vma=False,  # loops start from zeros, which are the same on all devices
    )


def swap(x: jax.Array) -> jax.Array:
    """On each device: part i of x goes to device i of the expert group, and what comes is in order of the senders."""
    return jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)


def largest(x: jax.Array) -> jax.Array:
    """On each device: the largest of all devices that share a batch."""
    return jax.lax.pmax(x, RULES["batch"])


def shardings(axes: Mapping[str, Sequence[str | None]], shapes: Mapping[str, Any], mesh: Mesh):
    """path -> NamedSharding for parameters whose `axes` name their dims."""
    return {path: NamedSharding(mesh, spec(axes.get(path, ()), leaf.shape, mesh)) for path, leaf in shapes.items()}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch, mesh: Mesh):
    """Host rows -> one global array a leaf; every process brings its own rows.

    Raises ValueError where the rows do not divide over the devices that share a batch.
    """
    sharding = batch_sharding(mesh)
    rows, devices = len(jax.tree.leaves(batch)[0]) * jax.process_count(), mesh.shape["data"] * mesh.shape["expert"]
    if rows % devices:
        raise ValueError(
            f"{rows} rows do not divide over {devices} devices (data x expert): change batch_size or the mesh"
        )
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
