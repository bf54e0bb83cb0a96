"""Attention of a decoder to what an encoder made."""

from __future__ import annotations

import jax.numpy as jnp

from moe_jax.layers.attention import NEG, attend
from moe_jax.layers.param import Module, Rngs, fan_in, linear, param
from moe_jax.sharding import constrain
from moe_jax.types import Array, TokenInfo


class CrossAttention(Module):
    """Args:
    d: model width, of both sides.
    heads: N, a divisor of d.
    """

    def __init__(self, d: int, *, heads: int = 4, rngs: Rngs):
        self.heads = heads
        self.q, self.k, self.v = (param(rngs, (d, d), ("embed", "heads"), fan_in()) for _ in range(3))
        self.o = param(rngs, (d, d), ("heads", "embed"), fan_in())

    def __call__(self, x_BxLxD: Array, info: TokenInfo, memory_BxSxD: Array, seen_BxS: Array) -> Array:
        """Every position sees the memory of its row, where it is to be seen."""

        def heads(x: Array, w_DxD: Array) -> Array:
            y = constrain(linear(x, w_DxD), "batch", None, "heads")
            return y.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)

        q = heads(jnp.where(info.valid_BxL[..., None], x_BxLxD, 0), self.q[...])
        memory = jnp.where(seen_BxS[..., None], memory_BxSxD, 0)
        bias_BxLxS = jnp.where(seen_BxS, 0.0, NEG)[:, None].repeat(q.shape[2], axis=1)
        y = attend(q, heads(memory, self.k[...]), heads(memory, self.v[...]), bias_BxLxS)
        y = y.swapaxes(1, 2).reshape(x_BxLxD.shape)
        return constrain(linear(y, self.o[...]), "batch", None, None)
