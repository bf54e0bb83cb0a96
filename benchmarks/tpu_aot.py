"""The MoE layer and the training step compiled for TPUs, on a machine without one, beside dense ones of equal FLOPs.

    pip install -e '.[tpu-aot]'                       # libtpu holds the compiler
    python -m benchmarks.tpu_aot --json tpu.json      # about 20 minutes on two cores; --only v5e for some

Nothing runs. A row is what the compiler says of two programs in bfloat16: estimated milliseconds, and of each program
temporary bytes a chip, FLOPs, bytes moved, and how many collectives. What the estimate is worth:

- a Pallas kernel counts by the work that it declares. Megablox declares to read an expert's matrices for every tile of
  its rows, though they may stay, and nothing of what its tiles cover beyond the rows. "by tiles" is the ratio with
  that put right for a balanced load: what the tiles compute and move (`megablox.work`, with the steps' own cost as
  the compiler schedules it) at the chip's peak and the compiler's bytes a second;
- collectives and the choice of overlapping them are in it as the compiler models them, imbalance between chips is not;
- an operation that the compiler cannot estimate (start and end of work handed to another core) takes no time.

"layer" is a MoE layer on one chip, forward and with gradients of weights and input, by each grouped product; its rival
is dense, with as many active FLOPs. "step" is a training step of the corrector with AdamW on 64 chips, by data and by
expert; layers are written out, because the compiler counts the body of a loop once. "peer" is the layer of MaxText with
each of its grouped products; the rival is MaxText. It wants its sources, as its releases on PyPI want another jax:

    git clone https://github.com/AI-Hypercomputer/maxtext && git -C maxtext checkout e591f30
    pip install aqtp drjax grain omegaconf pathwaysutils qwix tokamax transformers    # and PYTHONPATH=maxtext/src
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from benchmarks.measure import main, row
from benchmarks.moe_layer import forward
from moe_jax import optim, sharding, train, tree, xla
from moe_jax.layers.attention import Attention
from moe_jax.layers.ffn import DenseFfn
from moe_jax.layers.param import Rngs
from moe_jax.models.corrector import Corrector
from moe_jax.moe import dispatch, grouped, megablox
from moe_jax.moe.layer import MoeFfn
from moe_jax.moe.routers import TopK
from moe_jax.types import Batch, TokenInfo

CHIP = {"v5p": "v5:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}  # the smallest topologies; one chip of them is used
POD = {"v5p": "v5:4x4x4", "v5e": "v5e:8x8", "v6e": "v6e:8x8"}
TARGET = 1.25
PRODUCTS: dict[str, grouped.Product] = {
    "megablox": grouped.megablox,
    "mixed": grouped.mixed,
    "ragged_dot": grouped.ragged_dot,
}
# Dispatches that lay tokens out over the mesh by experts, for the whole step.
DISPATCHES: dict[str, dispatch.Dispatcher] = {"slots": dispatch.slots}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a layer: T tokens in rows of L; `hidden` units an expert."""

    d: int
    hidden: int
    E: int
    k: int
    T: int = 8192
    L: int = 2048

    @property
    def name(self) -> str:
        return f"T{self.T} d{self.d} hidden {self.hidden} E{self.E} k{self.k}"

    @property
    def flops(self) -> int:
        """Of the forward pass of the active experts."""
        return 6 * self.T * self.k * self.d * self.hidden


SHAPES = [Shape(4096, 14336, 8, 2), Shape(2048, 1024, 64, 8), Shape(1024, 2048, 8, 2)]


# --- what the compiler says -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one chip: seconds, temporary bytes, FLOPs and bytes as the compiler counts them, collectives by name, and what
    each Pallas kernel declares as its (FLOPs, bytes)."""

    seconds: float
    temporary: int
    flops: float
    bytes: float
    collectives: dict[str, int]
    kernels: list[tuple[int, int]]
    compile_s: float


def devices(topology: str) -> list[Any]:
    """Of a TPU that is not here."""
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("this benchmark needs libtpu, the compiler for TPUs: pip install -e '.[tpu-aot]'")
    # No chip is asked for its place in a pod, and none is used, so there is nothing to lock.
    found = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8"}
    os.environ.update({"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **found, **os.environ})
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def estimate(function: Callable, *args: Any, peak: float) -> Estimate:
    """Of `function` for arguments that are shapes with shardings.

    `peak`: FLOP/s of a chip. An operation of unknown time counts -1 second: whole seconds are taken out such that what
    stays can be (shapes here take less than one second more than at the peak).
    """
    began = time.perf_counter()
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    compiled = jitted.lower(*args).compile()
    took = time.perf_counter() - began
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    least = cost["flops"] / peak
    seconds = least + (cost["optimal_seconds"] - least) % 1.0
    hlo = compiled.as_text()
    seen = (cost["flops"], cost["bytes accessed"], collectives(hlo), kernels(hlo))
    return Estimate(seconds, memory.temp_size_in_bytes, *seen, took)


def collectives(hlo: str) -> dict[str, int]:
    """How many of each an optimised program holds; the halves of an asynchronous one count once."""
    names = "all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|ragged-all-to-all|reduce-scatter"
    return dict(sorted(Counter(re.findall(rf"[\])}}] ({names})(?:-start)?\(", hlo)).items()))


def kernels(hlo: str) -> list[tuple[int, int]]:
    """(FLOPs, bytes) that each Pallas kernel of an optimised program declares."""
    declared = r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"\d+","bytes_accessed":"(\d+)"'
    return [(int(flops), int(moved)) for flops, moved in re.findall(declared, hlo)]


@functools.cache
def rates(device: Any) -> tuple[float, float]:
    """FLOP/s and byte/s by which the compiler estimates a kernel: from kernels that declare much of one alone."""
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=SingleDeviceSharding(device))

    def copy(x_ref: Any, y_ref: Any) -> None:
        y_ref[...] = x_ref[...]

    def rate(flops: int, moved: int) -> float:
        declared = pallas.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved)
        call = pallas.pallas_call(copy, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), cost_estimate=declared)
        cost: Any = jax.jit(call).lower(x).compile().cost_analysis()
        return max(flops, moved) / cost["optimal_seconds"]

    return rate(10**13, 0), rate(0, 10**11)


def peak(device: Any) -> float:
    return next(flops for kind, flops in xla.PEAK_FLOPS.items() if device.device_kind.startswith(kind))


def beside(case: str, ours: Estimate, rival: Estimate, target: float | None, **more: Any) -> dict[str, Any]:
    pair: dict[str, Any] = {}
    for name, scale in (("temporary", 2**-20), ("flops", 1e-9), ("bytes", 1e-9)):
        unit = {"temporary": "MiB", "flops": "GFLOP", "bytes": "GB"}[name]
        pair |= {unit: getattr(ours, name) * scale, f"rival {unit}": getattr(rival, name) * scale}
    both = {"collectives": ours.collectives, "rival collectives": rival.collectives}
    pair |= {name: ", ".join(f"{n} {c}" for c, n in found.items()) for name, found in both.items()}
    times = (1e3 * ours.seconds, 1e3 * rival.seconds)
    return row(case, *times, target, unit="ms", **more, **pair, **{"compile s": ours.compile_s})


# --- the layer on one chip --------------------------------------------------------------------------------------------


def placed(like: Any, where: Any) -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), like)


def abstract(make: Callable[[], Any], where: Any) -> Any:
    """The layer that `make` makes, as shapes in the types of training in bfloat16."""

    def cast() -> Any:
        made = make()
        return train.compute(made, tree.flatten(made), "bfloat16")

    return placed(jax.eval_shape(cast), where)


def token_info(rows: int, length: int, where: Any) -> TokenInfo:
    ints: Any = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=where)
    bools: Any = jax.ShapeDtypeStruct((rows, length), bool, sharding=where)
    return TokenInfo(ints, bools, ints, ints)


def both(call: Callable, layer: Any, x: jax.Array, dy: jax.Array, *rest: Any) -> Any:
    """Gradients of weights and input; `call(layer, x, *rest)` -> y."""
    return jax.grad(lambda layer, x: (call(layer, x, *rest) * dy).sum(), argnums=(0, 1), allow_int=True)(layer, x)


def inputs(shape: Shape, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((shape.T // shape.L, shape.L, shape.d), jnp.bfloat16, sharding=where)


def of_layer(shape: Shape, device: Any, kind: str, direction: str) -> Estimate:
    """`kind`: dense, or the grouped product of a MoE layer; `direction`: forward, or both."""
    where = SingleDeviceSharding(device)

    def make() -> Any:
        if kind == "dense":
            return DenseFfn(shape.d, hidden=shape.k * shape.hidden, rngs=Rngs(params=0))
        way = partial(dispatch.dropless, product=PRODUCTS[kind])
        sizes: dict[str, Any] = dict(num_experts=shape.E, hidden=shape.hidden, router=partial(TopK, k=shape.k))
        return MoeFfn(shape.d, **sizes, dispatch=way, evaluation=way, rngs=Rngs(params=0))

    made, x, info = abstract(make, where), inputs(shape, where), token_info(shape.T // shape.L, shape.L, where)
    if direction == "forward":
        return estimate(forward, made, x, info, peak=peak(device))
    return estimate(partial(both, forward), made, x, x, info, peak=peak(device))


def by_tiles(shape: Shape, gradients: bool) -> Iterator[tuple[int, int]]:
    """(FLOPs, bytes) of each of our kernels."""
    for i, o in ((shape.d, shape.hidden), (shape.d, shape.hidden), (shape.hidden, shape.d)):
        for *columns, weights in [(i, o, False)] + gradients * [(o, i, False), (i, o, True)]:
            sizes = (shape.T * shape.k, *columns, shape.E, 2)
            yield megablox.work(*sizes, megablox.tiling(*sizes, weights=weights), weights=weights)


def layer(chip: str, shape: Shape) -> Iterator[dict[str, Any]]:
    device = devices(CHIP[chip])[0]
    declared_rate, byte_rate = rates(device)

    def seconds(kernels: Iterable[tuple[int, int]], flop_rate: float) -> float:
        return sum(max(flops / flop_rate, moved / byte_rate) for flops, moved in kernels)

    for direction, passes in (("forward", 1), ("both", 3)):
        dense = of_layer(shape, device, "dense", direction)
        for kind in PRODUCTS:
            ours = of_layer(shape, device, kind, direction)
            more = {"of peak": passes * shape.flops / ours.seconds / peak(device)}
            if kind == "megablox":
                put_right = seconds(by_tiles(shape, direction == "both"), peak(device))
                put_right -= seconds(ours.kernels, declared_rate)
                more["by tiles"] = (ours.seconds + put_right) / dense.seconds
            yield beside(f"{direction}, {kind}", ours, dense, TARGET, **more)


# --- a training step on 64 chips --------------------------------------------------------------------------------------


def corrector(ffn: Callable) -> Callable:
    """4 layers of width 2,048."""
    sizes: dict[str, Any] = dict(d=2048, layers=4, unroll=4, conv_width=4, remat="dots")
    return partial(Corrector, **sizes, attention=partial(Attention, heads=16, kv_heads=8, block=1024), ffn=ffn)


def step_estimate(chip: str, ffn: Callable, *, rows: int = 128, length: int = 2048, vocab: int = 32_000) -> Estimate:
    """Of `train.make_step` as the trainer runs it, on a mesh of 8 x 8 chips (data x expert)."""
    chips = devices(POD[chip])
    mesh = sharding.make_mesh(data=8, expert=8, devices=chips)
    model = jax.eval_shape(lambda: train.build(corrector(ffn), vocab=vocab, seed=0))
    transform = optim.adamw(lambda step: 1e-4)
    where = sharding.batch_sharding(mesh)
    info = token_info(rows, length, where)
    weights: Any = jax.ShapeDtypeStruct((rows, length), jnp.float32, sharding=where)
    batch = Batch(info.task_BxL, info.task_BxL, weights, info)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    step = train.make_step(model, transform, seed=0, micro=1, dtype="bfloat16", max_targets=length)
    with sharding.use(mesh):
        params, opt, _ = train.layout(model, transform, mesh)
        return estimate(step, params, opt, number, batch, peak=peak(chips[0]))


def step(chip: str) -> Iterator[dict[str, Any]]:
    dense = step_estimate(chip, partial(DenseFfn, hidden=8192))
    for name, way in DISPATCHES.items():
        ours = step_estimate(chip, partial(MoeFfn, num_experts=8, hidden=4096, router=TopK, dispatch=way))
        yield beside(f"{name} 64 chips d2048 E8 k2", ours, dense, TARGET)


# --- MaxText's layer --------------------------------------------------------------------------------------------------

THEIRS = {
    "megablox": dict(megablox=True, use_tokamax_gmm=False),
    "tokamax": dict(megablox=True, use_tokamax_gmm=True),
    "ragged_dot": dict(megablox=False, use_tokamax_gmm=False),
}


def theirs(shape: Shape, device: Any, **product: bool) -> tuple[Any, Any, Any]:
    """Its routed MoE block in bfloat16 as shapes, the mesh of one chip, and what its words for dims mean there."""
    pyconfig, initializers, moe = (
        importlib.import_module(f"maxtext.{name}") for name in ("configs.pyconfig", "layers.initializers", "layers.moe")
    )
    settings: dict[str, Any] = dict(
        run_name="aot",
        enable_checkpointing=False,
        skip_jax_distributed_system=True,
        log_config=False,
        base_emb_dim=shape.d,
        base_mlp_dim=shape.hidden,
        base_moe_mlp_dim=shape.hidden,
        decoder_block="mixtral",
        num_experts=shape.E,
        num_experts_per_tok=shape.k,
        per_device_batch_size=shape.T // shape.L,
        max_target_length=shape.L,
        dtype="bfloat16",
        weight_dtype="bfloat16",
    )
    config = pyconfig.initialize([None, str(Path(str(pyconfig.__file__)).with_name("base.yml"))], **settings, **product)
    mesh = Mesh(np.array(device).reshape([1] * len(config.mesh_axes)), config.mesh_axes)
    types: dict[str, Any] = dict(dtype=jnp.bfloat16, weight_dtype=jnp.bfloat16)
    init = initializers.nd_dense_init(1.0, "fan_in", "truncated_normal")
    sizes = (shape.E, shape.k, mesh, init, ("embed", None))
    with jax.set_mesh(mesh):
        made = jax.eval_shape(
            lambda: moe.RoutedMoE(config, *sizes, intermediate_dim=shape.hidden, rngs=Rngs(params=0), **types)
        )
    return placed(made, NamedSharding(mesh, PartitionSpec())), mesh, config.logical_axis_rules


def peer(chip: str, shape: Shape) -> Iterator[dict[str, Any]]:
    device = devices(CHIP[chip])[0]
    try:
        from absl import flags
        from flax.linen import partitioning

        found = {name: theirs(shape, device, **product) for name, product in THEIRS.items()}
    except ImportError as error:
        print(f"{chip} peer {shape.name} skipped, it needs MaxText as this file says: {error}", file=sys.stderr)
        return
    flags.FLAGS.mark_as_parsed()  # tokamax would read our command line
    call = lambda layer, x: layer(x)[0]  # noqa: E731
    for direction, function in (("forward", call), ("both", partial(both, call))):
        ours = of_layer(shape, device, "megablox", direction)
        for name, (made, mesh, rules) in found.items():
            where = NamedSharding(mesh, PartitionSpec())
            args = (inputs(shape, where),) * (2 if direction == "both" else 1)
            # tokamax looks at the default device to see whether its kernels are for it.
            with jax.default_device(device), jax.set_mesh(mesh), partitioning.axis_rules(rules):
                rival = estimate(function, made, *args, peak=peak(device))
            yield beside(f"{direction}, MaxText {name}", ours, rival, None)


CASES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    f"{chip} layer {shape.name}": partial(layer, chip, shape) for chip in CHIP for shape in SHAPES
}
CASES |= {f"{chip} step": partial(step, chip) for chip in POD}
CASES |= {f"{chip} peer {shape.name}": partial(peer, chip, shape) for chip in CHIP for shape in SHAPES[:2]}

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # or JAX would look for chips
    jax.config.update("jax_enable_compilation_cache", False)  # what is kept is only read where the chips are
    main(str(__doc__), CASES)
