"""Weights held in fewer bytes for inference: bfloat16, or int8 with a scale for each output channel.

A product reads its matrix in float32, made where it is needed; activations, caches and sums stay float32. What is held
smaller are the matrices of attention, feed-forward layers and experts, told by the names of their dims; norms, the taps
of convolutions and routers (whose small differences decide who computes) stay as they are. Tables of the vocabulary
become bfloat16 but not int8: their rows are read one by one, and a few far out would set the scale of a whole column.

It saves memory, not time. On CPU XLA makes float32 of them before the loop of a search, which then takes as long as
ever and has both in memory: 16 + 61 MB of a mixture of experts that takes 60 + 61 in float32 (there `programs.apart`
copies). Prompts and scores make one layer's at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import tree
from moe_jax.types import Array, value


@value
class Held:
    """A matrix ...xIxO in fewer bytes; `[...]` is it in float32. scale: float32, ...x1xO."""

    values: Array
    scale: Array | None = None

    def __getitem__(self, index: Any) -> Array:
        w = self.values[...].astype(jnp.float32)
        return (w if self.scale is None else w * self.scale[...])[index]


def bfloat16(w: Array) -> Held:
    return Held(w.astype(jnp.bfloat16))


def int8(w: Array) -> Held:
    """Symmetric: the largest weight of each output channel becomes 127 or -127; rounding to the nearest."""
    scale = jnp.maximum(jnp.abs(w).max(-2, keepdims=True), jnp.finfo(jnp.float32).tiny) / 127
    return Held(jnp.round(w / scale).astype(jnp.int8), scale)


HOLD: dict[str, tuple[Callable[[Array], Held], Sequence[str | None]]] = {
    "bfloat16": (bfloat16, (None,)),
    "int8": (int8, (None, "vocab")),
}


def hold(model: Any, weights: str) -> Any:
    """`model` with its matrices held as `weights`, one of float32, bfloat16 and int8. Raises ValueError for others."""
    if weights == "float32":
        return model
    if weights not in HOLD:
        raise ValueError(f"unknown weights {weights!r}; known: float32, {', '.join(HOLD)}")
    to, without = HOLD[weights]
    words = tree.axes(model)
    matrix = lambda name: len(words[name]) > 1 and not set(without) & set(words[name])  # noqa: E731
    return tree.unflatten(model, {name: to(x) if matrix(name) else x for name, x in tree.flatten(model).items()})


def size(model: Any) -> int:
    """Bytes of all its arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(model))
