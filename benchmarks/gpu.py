"""Grouped matrix products and the MoE layer in bfloat16 at the shapes of published models: for a GPU.

    pip install -e '.[gpu]'
    python -m benchmarks.gpu --json gpu.json          # about 3 minutes on an H100; --only mixtral for some

"product" is one product of all rows with their experts' matrices, "gradients" its two gradients, by each way that
`moe.grouped` knows for GPUs; the rival is a dense product of as many rows with one matrix of the same size, so that the
ratio is one of rates: 1.67 is 60 % of the dense one. "layer" is a MoE layer with the default dispatch beside a dense
one of equal active FLOPs, forward and with gradients of weights and input. "memory" is temporary, of the gradients.
"skewed" sends half of all rows to one expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import interleaved, main, program, row, unpadded
from benchmarks.moe_layer import compare
from moe_jax import train, tree
from moe_jax.layers.ffn import DenseFfn
from moe_jax.layers.param import Rngs
from moe_jax.moe import grouped
from moe_jax.moe.layer import MoeFfn
from moe_jax.moe.routers import TopK

RATE = 1 / 0.6  # target: the share of a dense product's rate
WAYS = {"tokamax": grouped.tokamax, "ragged_dot": grouped.ragged_dot}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a layer: T tokens of width d, E experts of `hidden` units, k choices."""

    T: int
    d: int
    hidden: int
    E: int
    k: int


SHAPES = {
    "mixtral": Shape(8192, 4096, 14336, 8, 2),
    "small experts": Shape(16384, 2048, 1408, 64, 6),
    "few rows": Shape(256, 2048, 1408, 64, 6),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class One:
    """`grouped.Experts` of a single matrix each."""

    w_ExIxO: jax.Array

    def first(self, rows: jax.Array, matmul: grouped.Matmul) -> tuple[jax.Array, ...]:
        return (matmul(rows, self.w_ExIxO),)

    def second(self, kept: tuple[jax.Array, ...], matmul: grouped.Matmul) -> jax.Array:
        return kept[0]


def loads(rows: int, experts: int, skewed: bool) -> np.ndarray:
    """How many rows each expert has: about the same, or the first has half of them."""
    share = np.random.default_rng(0).dirichlet(np.full(experts, 50.0))
    share = np.append(0.5, share[1:] / share[1:].sum() / 2) if skewed else share
    size = np.floor(share * rows).astype(np.int32)
    size[-1] += rows - size.sum()
    return size


def rates(shape: Shape, skewed: bool = False) -> Iterator[dict[str, Any]]:
    R, d, hidden = shape.T * shape.k, shape.d, shape.hidden
    keys = jax.random.split(jax.random.key(0), 4)
    x, dy = (jax.random.normal(key, (R, n), jnp.bfloat16) for key, n in zip(keys, (d, hidden), strict=False))
    one = jax.random.normal(keys[2], (d, hidden), jnp.bfloat16)
    many = jax.random.normal(keys[3], (shape.E, d, hidden), jnp.bfloat16)
    size = jnp.asarray(loads(R, shape.E, skewed))

    def through(way: grouped.Product, w: jax.Array, x: jax.Array) -> jax.Array:
        # The same rows for every way: what a way wants behind them is no work of its product.
        group = way(size, R)
        return group.apply(One(w), jnp.pad(x, ((0, group.spare), (0, 0))))[:R]

    def gradients(product: Callable, w: jax.Array, x: jax.Array, dy: jax.Array) -> Any:
        return jax.vjp(product, w, x)[1](dy)

    products: dict[str, tuple[Callable, jax.Array]] = {"dense": (lambda w, x: x @ w, one)}
    products |= {name: (partial(through, way), many) for name, way in WAYS.items()}
    flops = 2 * R * d * hidden
    for name, work, make in (
        ("product", flops, lambda product, w: program(product, w, x)),
        ("gradients", 2 * flops, lambda product, w: program(partial(gradients, product), w, x, dy)),
    ):
        made = {way: make(*product) for way, product in products.items()}
        times = interleaved({way: p.run for way, p in made.items()}, rounds=20)
        for way in WAYS:
            more = {"unit": "ms", "TFLOP/s": work / times[way] / 1e12, "dense TFLOP/s": work / times["dense"] / 1e12}
            more |= {"temporary MiB": made[way].temporary / 2**20}
            target = RATE if way == "tokamax" else None
            yield row(f"{name}, {way}", 1e3 * times[way], 1e3 * times["dense"], target, **more)


def layers(shape: Shape) -> Iterator[dict[str, Any]]:
    T, d = shape.T, shape.d
    moe = MoeFfn(d, num_experts=shape.E, hidden=shape.hidden, router=partial(TopK, k=shape.k), rngs=Rngs(params=0))
    dense = DenseFfn(d, hidden=shape.hidden * shape.k, rngs=Rngs(params=0))
    pair = (train.compute(layer, tree.flatten(layer), "bfloat16") for layer in (moe, dense))
    x = jax.random.normal(jax.random.key(0), (1, T, d), jnp.bfloat16)
    yield from compare(*pair, x, unpadded(1, T), flops=2 * T * 3 * d * shape.hidden * shape.k)


CASES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {}
for _name, _shape in SHAPES.items():
    CASES[f"{_name} products"] = partial(rates, _shape)
    CASES[f"{_name} products, skewed"] = partial(rates, _shape, skewed=True)
    CASES[f"{_name} layer"] = partial(layers, _shape)

if __name__ == "__main__":
    main(str(__doc__), CASES)
