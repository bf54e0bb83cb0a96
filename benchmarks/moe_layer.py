"""The MoE layer against a dense feed-forward layer of equal active FLOPs, in time and in temporary memory.

    python -m benchmarks.moe_layer                    # about 10 minutes on two cores; --only "T2048 d512" for some
    python -m benchmarks.moe_layer --json moe.json

Cases are tokens T, width d, experts E, choices k, and hidden = 2 d units an expert; the rival has 2 k d. "forward" is
evaluation, "both" a training step's forward and backward with respect to weights and input, "memory" the temporary
bytes of "both". "skewed" sends half of all tokens to one expert. At T of a decoding step the rival adds up as many
bytes as the experts have that are touched, from one array: less no program can do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import interleaved, main, program, row, unpadded
from moe_jax import tree
from moe_jax.layers.ffn import DenseFfn
from moe_jax.layers.param import Rngs
from moe_jax.moe.layer import MoeFfn
from moe_jax.moe.routers import TopK
from moe_jax.types import TokenInfo

SHAPES = [(2048, 256, 8, 2), (2048, 512, 4, 1), (2048, 512, 8, 2), (2048, 512, 16, 2), (2048, 1024, 8, 2)]
SHAPES += [(512, 256, 8, 2), (256, 256, 8, 2), (4096, 192, 4, 2)]
FEW = [(1, 512, 8, 2), (8, 512, 8, 2), (32, 256, 8, 2), (32, 512, 8, 2)]
FORWARD, BOTH, MEMORY, READ = 1.10, 1.25, 1.5, 1.3  # targets


def inputs(T: int, d: int) -> tuple[jax.Array, TokenInfo]:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, d)), jnp.float32)
    return x, unpadded(1, T)


def layers(d: int, E: int, k: int, skewed: bool = False) -> tuple[MoeFfn, DenseFfn]:
    moe = MoeFfn(d, num_experts=E, hidden=2 * d, router=partial(TopK, k=k), rngs=Rngs(params=0))
    if skewed:  # the first input is the same for all; it prefers the first expert
        gate = tree.flatten(moe)["router/gate"]
        moe = tree.unflatten(moe, tree.flatten(moe) | {"router/gate": gate.at[0, 0].set(2.0)})
    return moe, DenseFfn(d, hidden=2 * d * k, rngs=Rngs(params=0))


def forward(layer: Any, x: jax.Array, info: TokenInfo) -> jax.Array:
    return layer(x, info)[0]


def both(layer: Any, x: jax.Array, info: TokenInfo, dy: jax.Array) -> Any:
    """Gradients of weights and input."""

    def loss(table: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return (tree.unflatten(layer, table)(x, info, jax.random.key(0))[0] * dy).sum()

    return jax.grad(loss, argnums=(0, 1))(tree.flatten(layer), x)


def against_dense(T: int, d: int, E: int, k: int, skewed: bool = False) -> Iterator[dict[str, Any]]:
    x, info = inputs(T, d)
    if skewed:
        x = x.at[..., 0].set(1.0)
    yield from compare(*layers(d, E, k, skewed), x, info, flops=2 * T * 3 * d * 2 * d * k)


def compare(moe: Any, dense: Any, x: jax.Array, info: TokenInfo, *, flops: int) -> Iterator[dict[str, Any]]:
    """`flops`: of the forward pass of either."""
    pair = {"moe": moe, "dense": dense}
    for name, function, args, work, target in (
        ("forward", forward, (x, info), flops, FORWARD),
        ("both", both, (x, info, jnp.ones_like(x)), 3 * flops, BOTH),
    ):
        made = {n: program(function, layer, *args) for n, layer in pair.items()}
        times = interleaved({n: p.run for n, p in made.items()})
        more = {"unit": "ms", "GFLOP": work / 1e9, "GFLOP/s": work / times["moe"] / 1e9}
        compile_s = {"compile s": made["moe"].compile_s}
        yield row(name, 1e3 * times["moe"], 1e3 * times["dense"], target, **more, **compile_s)
    yield row("memory", made["moe"].temporary / 2**20, made["dense"].temporary / 2**20, MEMORY, unit="MiB")


def against_reading(T: int, d: int, E: int, k: int) -> Iterator[dict[str, Any]]:
    x, info = inputs(T, d)
    moe, _ = layers(d, E, k)
    touched = min(E, T * k)
    weights = {n: w for n, w in tree.flatten(moe).items() if n.startswith("experts")}
    read = program(jnp.sum, jnp.concatenate([w[:touched].reshape(-1) for w in weights.values()]))
    ours = program(forward, moe, x, info)
    times = interleaved({"moe": ours.run, "read": read.run}, rounds=50)
    size = sum(w[:touched].nbytes for w in weights.values())
    more = {"unit": "ms", "MiB": size / 2**20, "GB/s": size / times["moe"] / 1e9}
    yield row("read", 1e3 * times["moe"], 1e3 * times["read"], READ, **more)


def name(T: int, d: int, E: int, k: int) -> str:
    return f"T{T} d{d} E{E} k{k}"


CASES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    name(*shape): partial(against_dense, *shape) for shape in SHAPES
}
CASES |= {f"{name(*shape)} skewed": partial(against_dense, *shape, skewed=True) for shape in SHAPES[2:3]}
CASES |= {name(*shape): partial(against_reading, *shape) for shape in FEW}

if __name__ == "__main__":
    main(str(__doc__), CASES)
