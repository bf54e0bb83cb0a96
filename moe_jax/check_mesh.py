"""`moe-jax check-mesh`: what a training step needs on machines that are not here, before they are paid for.

The step is compiled as the trainer runs it, for the asked devices. For TPUs the compiler is the real one (libtpu,
which needs no TPU); for GPUs, and where libtpu is not installed, as many virtual CPU devices stand in, and memory is
then what XLA's CPU compiler plans. FLOPs are counted by hand (products with weights and of attention; three passes,
four where activations are computed again), bytes between devices from the program's collectives, each as often as its
loop runs. What of them goes to other hosts or slices is charged at the network's rate, as if each of a group's chips
of a host had one of as many rings. Between TPU slices, whose exchange is not in the program, it is an estimate: a sum
of gradients. Times are at the rates of data sheets: at least the largest of computing, reading memory and sending; at
most, if nothing overlapped, their sum.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from moe_jax import optim, sharding, train, tree
from moe_jax.adapters import EVERYTHING, Adapters, differentiated, trained
from moe_jax.data import Prepared
from moe_jax.partfile import write_text
from moe_jax.types import Batch, TokenInfo

GiB, MiB = 2**30, 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """From the vendors' data sheets. `link`: bytes a second that one chip sends to others of its slice or host, over
    all its wires; `network`: to other slices or hosts, where it is our assumption (25 GB/s a host of 4 or 8 chips for
    TPUs, a 400 Gb/s card a GPU)."""

    memory: int
    flops: float
    reads: float
    link: float
    network: float
    topology: str | None = None  # as libtpu calls it
    cores: int = 1  # that the name counts for one chip
    cube: bool = False  # wired in three dimensions
    host: int | None = None  # how many are wired to each other, where no more than a host's are


CHIPS = {
    "v4": Chip(32 * GiB, 275e12, 1228e9, 300e9, 6.25e9, "v4", 2, True),
    "v5e": Chip(16 * GiB, 197e12, 819e9, 200e9, 3.125e9, "v5e"),
    "v5p": Chip(95 * GiB, 459e12, 2765e9, 600e9, 6.25e9, "v5", 2, True),
    "v6e": Chip(32 * GiB, 918e12, 1640e9, 448e9, 3.125e9, "v6e"),
    "a100": Chip(80 * 10**9, 312e12, 2039e9, 300e9, 50e9, host=8),
    "h100": Chip(80 * 10**9, 989e12, 3350e9, 450e9, 50e9, host=8),
    "h200": Chip(141 * 10**9, 989e12, 4800e9, 450e9, 50e9, host=8),
}
ALIASES = {"v5litepod": "v5e"}  # as gcloud says
SHARE = 0.95  # of a chip's memory: the rest is the runtime's


# --- devices that are not here ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Machines:
    name: str
    chip: Chip
    chips: int  # of a slice; of a host, for GPUs
    slices: int = 1

    @property
    def on_tpu(self) -> bool:
        return self.chip.topology is not None


def machines(name: str) -> Machines:
    """Of "v5p-128" (TensorCores: 64 chips), "v6e-16" (chips), "2xv5p-128" (slices of it), "h100-8" (a host),
    "2xh100-8" (two).

    Raises ValueError, in one line.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)-(\d+)", name.lower())
    kind = ALIASES.get(found[2], found[2]) if found else None
    if not found or kind not in CHIPS:
        known = ", ".join([*CHIPS, *ALIASES])
        raise ValueError(f"--topology={name}: not of the form v5p-128, 2xv5p-128 or h100-8; known: {known}")
    slices, chip, count = int(found[1] or 1), CHIPS[kind], int(found[3])
    if count < chip.cores or count % chip.cores or slices < 1:
        raise ValueError(f"--topology={name}: {kind} counts {chip.cores} cores a chip; give a multiple of them")
    chips = count // chip.cores
    if chip.host and chips > chip.host:
        hosts = f"{-(-slices * chips // chip.host)}x{kind}-{chip.host}"
        raise ValueError(f"--topology={name}: a host has {chip.host} GPUs; of several hosts write {hosts}")
    if chip.topology and chips & (chips - 1):
        raise ValueError(f"--topology={name}: {chips} chips a slice; only powers of two can be compiled for")
    return Machines(name, chip, chips, slices)


def devices(where: Machines) -> list[Any]:
    """TPUs as libtpu describes them; for others, and without it, virtual ones of this CPU. Before anything else asks
    for a device.

    Raises ValueError, in one line, where libtpu does not know the topology.
    """
    total = where.chips * where.slices
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    if compiler(where) == "CPU":
        jax.config.update("jax_num_cpu_devices", total)
        if len(jax.devices()) != total:
            raise ValueError(f"this process has {len(jax.devices())} devices already; check meshes in one of its own")
        return jax.devices()
    # No chip is asked for its place in a pod, and none is used, so there is nothing to lock.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8"}
    os.environ.update({"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3", **quiet, **os.environ})
    shape = "x".join(map(str, wired(where.chips, 3 if where.chip.cube else 2)))
    options = {"num_slices": where.slices} if where.slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{where.chip.topology}:{shape}", **options)
        return list(found.devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology={where.name}: libtpu does not know {shape}: {_first_line(error)}") from None


def compiler(where: Machines) -> str:
    return "TPU" if where.on_tpu and importlib.util.find_spec("libtpu") else "CPU"


def wired(chips: int, dims: int) -> list[int]:
    """A power of two as near to a square or a cube as can be, the smallest first; two dims where so few are enough."""
    exponent = int(math.log2(chips))
    shape = sorted(2 ** (exponent // dims + (i < exponent % dims)) for i in range(dims))
    return sorted(shape, reverse=dims == 3 and chips < 8)


# --- the step ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the trainer would be called with."""

    model: Callable
    optimizer: Callable
    mesh: Callable
    batch: Any  # of one row, as shapes
    vocab: int
    max_targets: int
    batch_size: int
    micro: int = 1
    dtype: str = "float32"
    adapters: Adapters = EVERYTHING
    spike: float = 0.0


def plan(
    given: Mapping[str, Any],
    prepared: Mapping[str, Any] | None,
    length: int | None = None,
    vocab: int | None = None,
    max_targets: int | None = None,
) -> Plan:
    """From what gin binds of `train.train` and of the job that prepares its data, which need not have run.

    Raises ValueError, in one line, where a size is known from nowhere.
    """
    data = Path(given["data"])
    if (data / "meta.json").exists():
        rows = given.get("read", Prepared.open)(str(data))
        length, vocab = length or rows.meta["length"], vocab or rows.tokeniser.vocab_size
        max_targets = max_targets or rows.meta["max_targets"]
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows.batch(0, seed=0, batch_size=1))
    elif "read" in given:
        raise ValueError(f"{data}: not there; prepare the data first (run the same gin file with --gin.STEPS=0)")
    else:
        length = length or (prepared or {}).get("length", 256)
        vocab = vocab or _vocab((prepared or {}).get("tokeniser"))
        one = None
    if one is None or length != jax.tree.leaves(one)[0].shape[0]:
        row: Any = lambda dtype: jax.ShapeDtypeStruct((length,), dtype)  # noqa: E731
        info = TokenInfo(row(jnp.int32), row(jnp.bool_), row(jnp.int32), row(jnp.int32))
        one = Batch(row(jnp.int32), row(jnp.int32), row(jnp.float32), info)
    taken = {"micro": "micro_batches", "dtype": "dtype", "adapters": "adapters", "spike": "spike"}
    return Plan(
        model=given["model"],
        optimizer=given["optimizer"],
        mesh=given.get("mesh", sharding.make_mesh),
        batch=one,
        vocab=vocab,
        max_targets=max_targets or length,
        batch_size=given.get("batch_size", 16),
        **{ours: given[theirs] for ours, theirs in taken.items() if theirs in given},
    )


def _vocab(tokeniser: str | None) -> int:
    from moe_jax.text.tokeniser import Tokeniser

    if tokeniser is None or not Path(tokeniser).exists():
        raise ValueError(f"{tokeniser or 'the tokeniser'}: not there; give --vocab and --length")
    return Tokeniser.load(tokeniser).vocab_size


def compiled(plan: Plan, mesh: Any, batch_size: int) -> tuple[Any, Any]:
    """(the model as shapes, the step compiled for a mesh). Raises JaxRuntimeError where the compiler gives up."""
    model = jax.eval_shape(lambda: train.build(plan.model, vocab=plan.vocab, seed=0))
    transform = optim.guarded(plan.optimizer(), spike=plan.spike)
    where = sharding.batch_sharding(mesh)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape), x.dtype, sharding=where), plan.batch)
    number: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    with sharding.use(mesh):
        params, opt, frozen = train.layout(model, transform, mesh, plan.adapters)
        step = train.make_step(
            model,
            transform,
            seed=0,
            micro=plan.micro,
            dtype=plan.dtype,
            max_targets=plan.max_targets,
            adapters=plan.adapters,
        )
        return model, step.lower(params, opt, number, rows, frozen).compile()


def flops(model: Any, plan: Plan, moving: Collection[str]) -> float:
    """Of one row's training step: products with weights by hand, as in the trainer's utilisation, and attention's."""
    length = jax.tree.leaves(plan.batch)[0].shape[0]
    again = getattr(model, "remat", "none") == "full"
    products = (4 + 2 * again) * train.active_params(model) + 2 * train.active_params(model, moving)
    queries = [x.shape for path, x in tree.flatten(model).items() if path.endswith("attention/q")]  # [layers, D, heads]
    attention = (3 + again) * 2 * length * sum(math.prod(shape[:-2]) * shape[-1] for shape in queries)
    return length * (products + attention)  # causal: half of 4 * length * width a position and pass


# --- what the program moves -------------------------------------------------------------------------------------------

NAMES = "all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|ragged-all-to-all|reduce-scatter"
_COLLECTIVE = re.compile(rf"= (?P<type>.*?)[ ](?P<name>{NAMES})(?P<start>-start)?\(")
_SIZES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8}
_SIZES |= {"s32": 4, "u32": 4, "f32": 4, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One of an optimised program. `times`: how often its loops run it; `sent`: bytes a device, each time, if it is
    done in a ring (an all-reduce sends everything twice); `across`: those of them that go to another host or slice."""

    name: str
    axes: tuple[str, ...]
    times: int
    sent: float
    across: float = 0.0


def collectives(hlo: str, mesh: Any, parts: int = 1) -> list[Collective]:
    """Those between several devices, of which so many equal parts (hosts or slices) are one after the other in the
    mesh; the halves of an asynchronous one count once."""
    times = _times(hlo)
    out = []
    for computation, lines in _computations(hlo).items():
        for line in lines:
            if not (found := _COLLECTIVE.search(line)):
                continue
            group = _group(line, mesh.devices.size)
            axes = _axes(group, tuple(mesh.devices.shape), mesh.axis_names)
            if not axes:
                continue
            shapes = [_bytes(shape) for shape in re.findall(r"\w+\[[\d,]*\]", found["type"])]
            moved = sum(shapes)
            if found["start"] and found["name"] in ("all-gather", "collective-permute", "reduce-scatter"):
                moved = min(shapes) if found["name"] == "reduce-scatter" else max(shapes)  # it names its operand too
            n = len(group)
            share = {"all-gather": (n - 1) / n, "all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1.0}
            share |= dict.fromkeys(("all-to-all", "ragged-all-to-all"), (n - 1) / n)
            sent = moved * share.get(found["name"], 1.0)
            of = group // (mesh.devices.size // parts)  # the part of each
            near = int((of == of[0]).sum())
            away = 0.0 if near == n else 1.0 / near  # of so many rings each is a chip's to send on
            if "all-to-all" in found["name"]:
                away = (n - near) / (n - 1)
            out.append(Collective(found["name"], axes, times.get(computation, 1), sent, sent * away))
    return out


def counts(found: Sequence[Collective]) -> dict[str, int]:
    """ "all-reduce over data" -> how many a step runs."""
    out: dict[str, int] = defaultdict(int)
    for one in found:
        out[f"{one.name} over {'+'.join(one.axes)}"] += one.times
    return dict(sorted(out.items()))


def _computations(hlo: str) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    name = ""
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            name = "ENTRY" if line.startswith("ENTRY") else head[1]
            out[name] = []
        elif name:
            out[name].append(line)
    return out


def _times(hlo: str) -> dict[str, int]:
    """computation -> how often a step runs it. Loops whose length only data tell are left out: here these are the
    further turns of an exchange between experts' devices that is out of balance."""
    bodies = _computations(hlo)
    out: dict[str, int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
        out[name] += times
        for line in bodies.get(name, ()):
            n = _trips(line, bodies) if " while(" in line else 1
            for called in re.findall(r"(?:calls|to_apply|body|branch_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)", line):
                for each in called.split(", "):
                    visit(each.lstrip("%"), times * n)

    visit("ENTRY", 1)
    return out


def _trips(line: str, bodies: Mapping[str, Sequence[str]]) -> int:
    """Of a `while`: said by the compiler, or by a condition `i < constant`; else 0."""
    if said := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(said[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    text = "\n".join(bodies.get(condition[1], ()) if condition else ())
    if not (until := re.search(r"ROOT .* compare\(.*?%([\w.\-]+)\), direction=LT", text)):
        return 0
    constant = re.search(rf"%{re.escape(until[1])} = \S+ constant\((\d+)\)", text)
    return int(constant[1]) if constant else 0


def _group(line: str, total: int) -> np.ndarray:
    """The devices, as places in the mesh, of one group that talks."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return np.array([int(pairs[1]), int(pairs[2])])
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", line
    ):
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = _ids(named[2] or str(total), named[3]).reshape(tuple(sizes.values()))
        inside, places = [], []  # which of the dims vary in a group; dims, with parts of axes for themselves
        for axis, n in sizes.items():
            said = re.search(rf"'{axis}'(?::\((\d+)\)(\d+))?", named[4])
            before, own = (int(said[1] or 1), int(said[2] or n)) if said else (n, 1)
            places += [before, own, n // (before * own)]
            inside += [False, True, False]
        ids = ids.reshape(places)[tuple(slice(None) if own else 0 for own in inside)]
        return ids.reshape(-1)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return _ids(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))[0]
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return np.array([int(n) for n in listed[1].split(",")])
    return np.arange(total)


def _ids(dims: str, order: str | None) -> np.ndarray:
    """Numbers from 0 in the shape "2,4", transposed by "1,0"."""
    shape = [int(n) for n in dims.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _axes(group: np.ndarray, shape: tuple[int, ...], names: Sequence[str]) -> tuple[str, ...]:
    """Along which the group's devices differ."""
    places = np.stack(np.unravel_index(group, shape))
    return tuple(name for name, along in zip(names, places, strict=True) if len(set(along.tolist())) > 1)


def _bytes(shape: str) -> int:
    kind, _, dims = shape.rstrip("]").partition("[")
    return _SIZES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)


# --- the report -------------------------------------------------------------------------------------------------------


def measure(plan: Plan, where: Machines, mesh: Any, batch_size: int) -> dict[str, Any]:
    """Of one batch size, a device: bytes of memory, FLOPs, bytes sent by axis, and seconds of each."""
    model, program = compiled(plan, mesh, batch_size)
    memory = program.memory_analysis()
    state = memory.argument_size_in_bytes
    found = collectives(program.as_text(), mesh, where.slices)
    sent: dict[str, float] = defaultdict(float)
    for one in found:
        sent["+".join(one.axes)] += one.times * one.sent
    params = train.layout(model, plan.optimizer(), mesh, plan.adapters)[0]
    work = flops(model, plan, differentiated(dict.fromkeys(params))) * batch_size / mesh.devices.size
    chip = where.chip
    across = sum(one.times * one.across for one in found)
    inside = sum(sent.values()) - across
    estimated = where.on_tpu and where.slices > 1 and not across
    if estimated:
        across = sent["slice"] = gradients(params) * 2 * (where.slices - 1) / where.slices
    read = 2 * (state + memory.temp_size_in_bytes)  # written once and read once, at the least
    seconds = {"computing": work / chip.flops, "memory": read / chip.reads, "links": inside / chip.link}
    seconds |= {"network": across / chip.network} if across else {}
    return {
        "batch": batch_size,
        "state": state,
        "temporary": memory.temp_size_in_bytes,
        "flops": work,
        "sent": dict(sent),
        "across": across,
        "estimated": estimated,
        "collectives": counts(found),
        "seconds": seconds,
        "parameters": sum(x.size for x in tree.flatten(model).values()),
    }


def gradients(params: Mapping[str, Any]) -> int:
    """Bytes that a device has of them: of what moves, laid out as its parameters are."""
    moving = (params[path] for path in trained(params))
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in moving)


def largest(first: Mapping[str, Any], second: Mapping[str, Any], room: float, multiple: int) -> int:
    """The largest batch, a multiple, whose memory fits if it grows from the first to the second as it does beyond."""
    slope = max((second["used"] - first["used"]) / (second["batch"] - first["batch"]), 1.0)
    return int((first["batch"] + (room - first["used"]) / slope) // multiple) * multiple


def check(plan: Plan, where: Machines, once: bool = False) -> dict[str, Any]:
    """Compiles for the asked batch size; unless `once`, for another, and for the largest that should fit.

    Raises ValueError, in one line, for a mesh that the machines do not make.
    """
    mesh = functools.partial(plan.mesh, devices=devices(where))()
    multiple = plan.micro * math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
    room = SHARE * where.chip.memory
    if plan.batch_size % multiple:
        more = -(-plan.batch_size // multiple) * multiple
        said = f"batch_size={plan.batch_size} does not divide over {plan.micro} micro batches and the mesh's devices"
        raise ValueError(f"{said}: give a multiple of {multiple}, such as --gin.BATCH={more}")
    asked = _tried(plan, where, mesh, plan.batch_size, room)
    about = {"topology": where.name, "devices": mesh.devices.size, "room": room, "multiple": multiple, "once": once}
    about["mesh"] = {axis: n for axis, n in mesh.shape.items() if n > 1}
    about["compiler"] = compiler(where)
    tried = [asked] if once else _searched(plan, where, mesh, asked, room, multiple)
    best = max((one for one in tried if one["fits"]), key=lambda one: one["batch"], default=None)
    about |= {"largest": best and best["batch"], "largest_used": best and best["used"]}
    return about | {"step": asked, "least": min(tried, key=lambda one: one["batch"])}


def _searched(
    plan: Plan, where: Machines, mesh: Any, asked: Mapping[str, Any], room: float, multiple: int
) -> list[Mapping[str, Any]]:
    """All that was compiled in search of the largest batch that fits: the asked one; where the compiler gave up half
    of it, and so on; another, and what a line through two says."""
    seen = {asked["batch"]: asked}

    def tried(size: int) -> Mapping[str, Any]:
        seen[size] = _tried(plan, where, mesh, size, room)
        return seen[size]

    def down(size: int) -> int:
        return max(size // 2 // multiple, 1) * multiple

    one = asked
    while one["state"] is None and one["batch"] > multiple:
        one = tried(down(one["batch"]))
    if one["state"] is None:
        return list(seen.values())
    if len([x for x in seen.values() if x["used"] is not None]) < 2:  # of a failure the compiler may say it too
        size = down(one["batch"]) if one["batch"] >= 2 * multiple else 2 * one["batch"]
        if size not in seen:
            tried(size)
    known = sorted((x for x in seen.values() if x["used"] is not None), key=lambda x: x["batch"])[:2]
    guess = largest(*known, room, multiple) if len(known) == 2 else one["batch"] + multiple
    for _ in range(4):
        low = max((x["batch"] for x in seen.values() if x["fits"]), default=0)
        high = min((x["batch"] for x in seen.values() if not x["fits"] and x["batch"] > low), default=math.inf)
        guess = guess if guess < high else int(high) - multiple
        if guess <= low or tried(guess)["fits"]:
            break
        guess -= max(guess // 10 // multiple, 1) * multiple
    return list(seen.values())


def _tried(plan: Plan, where: Machines, mesh: Any, batch_size: int, room: float) -> dict[str, Any]:
    """What `measure` finds; of a program that the compiler finds too large, what it says of it."""
    print(f"compiling for a batch of {batch_size}", file=sys.stderr, flush=True)
    try:
        found = measure(plan, where, mesh, batch_size)
    except jax.errors.JaxRuntimeError as error:
        said = _first_line(error)
        if not _too_large(said):
            raise
        used = re.search(r"[Uu]sed ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", said)
        figures = {"used": _read(used[1]), "available": _read(used[2])} if used else {"used": None, "available": None}
        return {"batch": batch_size, "state": None, "fits": False, "said": said, **figures}
    used = found["state"] + found["temporary"]
    return found | {"used": used, "fits": used <= room}


def _too_large(said: str) -> bool:
    """Whether an error of the compiler is that a chip's memory is too small. That a kernel's vector or scalar memory
    is (vmem, smem) is another matter, which a smaller batch seldom mends."""
    space = re.search(r"memory space (\w+)|\b(vmem|smem|sflag)\b", said)
    if space and (space[1] or space[2]) != "hbm":
        return False
    return bool(space) or ("RESOURCE_EXHAUSTED" in said and bool(re.search("(?i)out of memory|hbm|allocat", said)))


def _read(size: str) -> float:
    """ "15.48G" -> bytes."""
    return float(size.rstrip("KMGT")) * 1024 ** ("KMGT".find(size[-1]) + 1)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def report(found: Mapping[str, Any]) -> str:
    step, room = found["step"], found["room"]
    axes = " x ".join(f"{axis} {n}" for axis, n in found["mesh"].items()) or "one device"
    lines = [f"{found['topology']}: {found['devices']} chips as {axes}; batch {step['batch']}"]
    if step["state"] is None:
        if step["used"] is not None:
            used, available = step["used"] / GiB, step["available"] / GiB
            lines.append(f"memory a chip   {used:,.2f} GiB, as the compiler says; there are {available:,.2f} to use")
        return "\n".join([*lines, f"the compiler gave up: {step['said']}", _verdict(found)])
    lines += [
        f"parameters      {step['parameters'] / 1e9:,.2f} billion",
        f"memory a chip   {step['used'] / GiB:,.2f} GiB: {step['state'] / GiB:,.2f} of parameters, optimiser and "
        f"batch, {step['temporary'] / GiB:,.2f} while computing; there are {room / GiB:,.1f} to use",
        f"FLOPs a chip    {step['flops'] / 1e12:,.2f} TFLOP",
    ]
    for axis, sent in sorted(step["sent"].items()):
        lines.append(f"sent a chip     {sent / MiB:,.1f} MiB over {axis}")
    for name, n in step["collectives"].items():
        lines.append(f"                {n} {name}")
    if step["estimated"]:
        lines.append("                (over slice: an estimate, of gradients summed in a ring)")
    elif step["across"]:
        lines.append(f"                ({step['across'] / MiB:,.1f} MiB of that to other hosts or slices)")
    parts = ", ".join(f"{name} {1e3 * s:,.2f}" for name, s in step["seconds"].items())
    low, high = max(step["seconds"].values()), sum(step["seconds"].values())
    lines.append(f"step            {1e3 * low:,.1f} ms if all overlaps, {1e3 * high:,.1f} if nothing does ({parts})")
    if found["compiler"] == "CPU":
        why = "" if not machines(found["topology"]).on_tpu else "; pip install 'moe_jax[tpu-aot]' for that of TPUs"
        lines.append(f"                (compiled for virtual CPU devices: memory is another compiler's{why})")
    return "\n".join([*lines, _verdict(found)])


def _verdict(found: Mapping[str, Any]) -> str:
    """Whether the step fits, what is too much, and the largest batch that does."""
    step, least = found["step"], found["least"]
    said = "fits"
    if not step["fits"]:
        room = found["room"] if step["state"] is not None else step["available"]
        over = f": {(step['used'] - room) / GiB:,.2f} GiB too much" if step["used"] is not None else ""
        said = f"does NOT fit{over}"
    if found["once"]:
        return said
    if found["largest"]:
        used = f"{found['largest_used'] / GiB:,.2f} GiB a chip"
        return f"{said}; the largest batch that fits is {found['largest']} ({used}; multiples of {found['multiple']})"
    takes = f"takes {least['used'] / GiB:,.2f} GiB a chip" if least["used"] is not None else "is too large"
    return f"{said}; no batch fits: {least['batch']} {takes} (multiples of {found['multiple']})"


# --- command line -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--gin_file", action="append", default=[], required=True, help="that trains; may be repeated")
    add("--gin_bindings", action="append", default=[], metavar="NAME=VALUE", help="or --gin.NAME=VALUE")
    add("--topology", required=True, help="v5p-128 (64 chips), v6e-16, 2xv5p-128 (two slices), 2xh100-8 (two hosts)")
    add("--length", type=int, help="tokens a row (default: as the data are, or will be, prepared)")
    add("--vocab", type=int, help="of the tokeniser (default: the data's)")
    add("--max_targets", type=int, help="tokens that a row writes at most (default: the data's, or all)")
    add("--once", action="store_true", help="compile for this batch size alone, look for no larger one")
    add("--json", metavar="FILE", help="write the findings there too")


def main(args: argparse.Namespace, given: Mapping[str, Any], prepared: Mapping[str, Any] | None) -> int:
    """Runs `moe-jax check-mesh`. Returns 0, or 1 where the step does not fit."""
    where = machines(args.topology)
    found = check(plan(given, prepared, args.length, args.vocab, args.max_targets), where, args.once)
    print(report(found))
    if args.json:
        write_text(Path(args.json), json.dumps(found, indent=1) + "\n")
    return 0 if found["step"]["fits"] else 1
