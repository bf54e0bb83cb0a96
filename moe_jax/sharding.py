"""The only file that knows a mesh.

Arrays name their dims in words (`embed`, `mlp`, `expert`, ... ; activations: `batch`); one table says on which mesh
axis a word lies. A word without a rule, a missing mesh axis, or a size that the axis does not divide means:
replicated. The axes, from those that say least to each other to those that say most:

    slice    whole slices of a pod, over the data-centre network: gradients are summed over it, nothing else crosses it
    data     parameters are replicated, gradients summed
    fsdp     parameters, gradients and optimiser state are split; a layer's matrices are gathered when it is computed
    expert   each device has its share of the experts; tokens travel to them and back
    model    heads, units and the vocabulary are split; activations are summed in each layer

All but `model` divide the batch.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("slice", "data", "fsdp", "expert", "model")
MACROS = dict(zip(AXES, ("SLICES", "DATA_AXIS", "FSDP_AXIS", "EXPERT_AXIS", "MODEL_AXIS"), strict=True))  # gin/mesh

RULES: Mapping[str, str | tuple[str, ...]] = {
    "batch": ("slice", "data", "fsdp", "expert"),  # experts exchange tokens inside a batch: their axis carries data too
    "group": ("slice", "data", "fsdp"),  # groups of tokens while they visit the experts
    "expert": "expert",
    "embed": "fsdp",
    "heads": "model",
    "mlp": "model",
    "vocab": "model",
}

_context: contextvars.ContextVar[tuple[Mesh, Mapping] | None] = contextvars.ContextVar("mesh", default=None)


def make_mesh(
    data: int = -1,
    expert: int = 1,
    model: int = 1,
    *,
    fsdp: int = 1,
    slices: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices (or those given); one of `data` and `fsdp` may be -1 and takes what the others leave.

    Axes of TPUs follow the wires between them, and `slices` the slices that they say they are of.

    Raises ValueError where the sizes do not multiply to the number of devices, or where slices are not as given.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, (slices, data, fsdp, expert, model), strict=True))
    found = f"{len(devices)} device" + "s" * (len(devices) != 1)
    for axis, n in sizes.items():
        if n < 1 and not (n == -1 and axis in ("data", "fsdp")):
            raise ValueError(f"mesh {axis}={n}: give a number of devices; only data or fsdp may be -1")
    others = int(np.prod([n for n in sizes.values() if n != -1]))
    open_ = [axis for axis, n in sizes.items() if n == -1]
    if len(open_) > 1:
        raise ValueError("only one of DATA_AXIS and FSDP_AXIS may be -1: it takes what the other leaves")
    if open_ and len(devices) % others:
        large = [axis for axis in sizes if sizes[axis] > 1]
        said = " x ".join(f"{axis}={sizes[axis]}" for axis in large)
        flags = " ".join(f"--gin.{MACROS[axis]}=1" for axis in large)
        raise ValueError(f"{said} does not divide {found}: {flags}, or another number that divides them")
    if open_:
        sizes[open_[0]] = len(devices) // others
    shape = tuple(sizes.values())
    if int(np.prod(shape)) != len(devices):
        said = " x ".join(f"{axis}={n}" for axis, n in sizes.items() if n != 1 or axis == "data")
        raise ValueError(
            f"mesh {said} needs {int(np.prod(shape))} devices, this host sees {len(devices)}: "
            "change the mesh file, or use -1 for data or fsdp"
        )
    return Mesh(_wired(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _wired(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Devices in `shape`, neighbours where axes talk most. Raises ValueError for other slices than there are."""
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if found != shape[0]:
        raise ValueError(f"mesh slice={shape[0]}, but these devices are of {found}: change SLICES in the mesh file")
    if found == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across = (found, *(1,) * (len(shape) - 1))
    return mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), across, devices, allow_split_physical_axes=True)


@contextlib.contextmanager
def use(mesh: Mesh | None, rules: Mapping = RULES) -> Generator[None]:
    """Within the block `constrain` acts; without a mesh it is the identity."""
    token = _context.set(None if mesh is None else (mesh, rules))
    try:
        yield
    finally:
        _context.reset(token)


def within(method: Callable) -> Callable:
    """A method of what has a `mesh`: it runs within it."""

    @functools.wraps(method)
    def on(self: Any, *args: Any) -> Any:
        with use(self.mesh):
            return method(self, *args)

    return on


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


def whole(x: jax.Array) -> jax.Array:
    """The same on every device, so that any host can look at it; the identity outside `use`."""
    return constrain(x)


def mesh() -> Mesh | None:
    """That of `use`."""
    active = _context.get()
    return active[0] if active else None


def kind() -> tuple[str, str]:
    """Platform ("cpu", "gpu", "tpu") and kind of the devices that a program is made for: the mesh's, which need not be
    of this machine; the default ones outside `use`."""
    active = _context.get()
    device = active[0].devices.flat[0] if active else jax.devices()[0]
    return device.platform, device.device_kind


def cores() -> int:
    """Of the CPU, that this process may compute on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices(word: str) -> int:
    """Among how many devices a dim called so is split; 1 outside `use`."""
    active = _context.get()
    if active is None:
        return 1
    mesh, rules = active
    return _devices(mesh, rules[word])


def _devices(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    return int(np.prod([mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes)]))


def on_each_device(function: Callable, words: Sequence[Any], out: str) -> Callable:
    """`function` of each device's own part of its arguments, each split along its leading dim, which is called so
    (None: whole; a list: the partitions of a list of arrays); outside `use` the function itself.

    Raises ValueError, when called, for a dim that does not divide.

    Devices differ along the axes of "batch"; what lies along others (`model`) is left to XLA.
    """
    active = _context.get()
    if active is None:
        return function
    mesh, rules = active
    # An axis of one device is not left to it: where any is, XLA:CPU aborts at a sum of bfloat16 (jaxlib 0.10).
    mine = {axis for axis, size in mesh.shape.items() if axis in rules["batch"] or size == 1}
    spec_of = lambda word: word if isinstance(word, list) else PartitionSpec(rules[word] if word else None)  # noqa: E731
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(map(spec_of, words)),
        out_specs=spec_of(out),
        axis_names=mine,
        check_vma=False,  # loops start from zeros, which are the same on all devices
    )


def with_parameters(
    function: Callable, parameters: Any, word: str | None, words: Sequence[str | None], out: str
) -> Callable:
    """`on_each_device` of `function(parameters, *args)`, of parameters split along the dims called `word` and otherwise
    whole; `words` are those of `args`.

    What FSDP splits is gathered on the device, not before: its gradient is then scattered as it is summed, which sends
    half of what summing all of it everywhere does. Without rematerialisation it is kept whole for the gradient.
    """
    active = _context.get()
    if active is None:
        return functools.partial(function, parameters)
    mesh, rules = active
    kept = (word, "embed")
    parts: list[PartitionSpec] = []
    for leaf in jax.tree.leaves(parameters, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        arrays = jax.tree.leaves(leaf)
        names = [w if w in kept else None for w in getattr(leaf, "axes", ())]
        if isinstance(leaf, nnx.Variable) and len(arrays) == 1 and names:
            parts.append(spec(names, arrays[0].shape, mesh, rules))
        else:
            parts += [PartitionSpec(rules[word] if word else None)] * len(arrays)
    arrays, form = jax.tree.flatten(parameters)

    def whole(array: jax.Array, part: PartitionSpec) -> jax.Array:
        for dim, axis in enumerate(part):
            if axis is not None and axis == rules["embed"]:
                array = jax.lax.all_gather(array, axis, axis=dim, tiled=True)
        return array

    def run(arrays: list[jax.Array], *args: Any) -> Any:
        return function(jax.tree.unflatten(form, map(whole, arrays, parts)), *args)

    return functools.partial(on_each_device(run, (parts, *words), out), arrays)


def top_k(x: jax.Array, k: int) -> jax.Array:
    """Where the k largest of the last dim are, of an array whose first dim is the batch.

    Each device looks at its own rows: left to itself XLA:CPU gathers all of them on every device first.
    """
    largest_k = lambda x: jax.lax.top_k(x, k)[1]  # noqa: E731
    if len(x) % devices("batch"):
        return largest_k(x)
    return on_each_device(largest_k, ("batch",), "batch")(jax.lax.stop_gradient(x))


def swap(x: jax.Array) -> jax.Array:
    """On each device: part i of x goes to device i of the expert group, and what comes is in order of the senders."""
    return jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)


def largest(x: jax.Array) -> jax.Array:
    """On each device: the largest of all devices that share a batch."""
    return jax.lax.pmax(x, RULES["batch"])


def shardings(axes: Mapping[str, Sequence[str | None]], shapes: Mapping[str, Any], mesh: Mesh):
    """path -> NamedSharding for parameters whose `axes` name their dims."""
    return {path: placement(axes.get(path, ()), leaf.shape, mesh) for path, leaf in shapes.items()}


def placement(words: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Of an array of which the last of `words` name the dims, however many it has."""
    return NamedSharding(mesh, spec(words[max(0, len(words) - len(shape)) :], shape, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def part_of_batch(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Which part of each batch a process (this one) brings, of how many.

    Processes whose devices differ along `model` alone hold the same rows, and so bring the same part.

    Raises ValueError where processes have some of their rows in common and others not, or this one has no device.
    """
    process = jax.process_index() if process is None else process
    batch_axes = [mesh.shape[axis] for axis in RULES["batch"]]
    devices = mesh.devices.reshape(int(np.prod(batch_axes)), -1)  # `model` is the last axis
    held: dict[int, set[int]] = {}
    for place, replicas in enumerate(devices):
        for device in replicas:
            held.setdefault(device.process_index, set()).add(place)
    if process not in held:
        raise ValueError("this host has no device of the mesh: change the mesh file")
    parts = sorted({tuple(sorted(places)) for places in held.values()})
    if sum(map(len, parts)) != len(devices) or len({*map(len, parts)}) > 1:
        raise ValueError("hosts have some rows of a batch in common and others not: change MODEL_AXIS in the mesh file")
    return parts.index(tuple(sorted(held[process]))), len(parts)


def full(rows: int, mesh: Mesh | None) -> int:
    """So many rows, or the few more that divide over the devices which share a batch."""
    devices = _devices(mesh, RULES["batch"]) if mesh else 1
    return -(-rows // devices) * devices


def asked(axes: str | None) -> Mesh | None:
    """A mesh as commands are told of it, "fsdp=4,expert=2"; what it does not say is 1, and -1 is all that is left.

    Raises ValueError for what is none.
    """
    sizes: dict[str, int] = {}
    for one in (axes or "").split(",") if axes else ():
        axis, equals, size = one.strip().partition("=")
        if axis not in AXES[1:] or not equals or not re.fullmatch(r"-?\d+", size):
            known = ", ".join(AXES[1:])
            raise ValueError(f"--mesh {axes}: {one.strip()!r} is no axis and its size, as fsdp=4 is; axes: {known}")
        sizes[axis] = int(size)
    return several(functools.partial(make_mesh, **{"data": 1, **sizes})) if sizes else None


def several(mesh: Callable[[], Mesh] | None) -> Mesh | None:
    """The mesh that is made; None where it is of one device, or there is none to make."""
    made = mesh() if mesh else None
    return made if made and made.size > 1 else None


def put_batch(batch, mesh: Mesh):
    """Host rows -> one global array a leaf; every process brings the rows of its `part_of_batch`.

    Raises ValueError where the rows do not divide over the devices that share a batch.
    """
    sharding, (_, parts) = batch_sharding(mesh), part_of_batch(mesh)
    rows, devices = len(jax.tree.leaves(batch)[0]) * parts, _devices(mesh, RULES["batch"])
    if rows % devices:
        axes = " x ".join(axis for axis in RULES["batch"] if mesh.shape[axis] > 1)
        raise ValueError(f"{rows} rows do not divide over {devices} devices ({axes}): change batch_size or the mesh")

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:]))

    return jax.tree.map(put, batch)
