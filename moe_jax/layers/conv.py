"""Short causal depthwise convolution over the sequence: state in, state out.

A residual convolution of a few taps before attention lets a small model see its neighbours, so that copying (an
induction head needs "what followed this token") is learnt in one layer rather than two (Primer, So et al. 2021;
"Canon layers", Allen-Zhu 2025).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.layers.param import Module, Rngs, param
from moe_jax.types import Array, TokenInfo, value


@value
class ConvState:
    """The last `width - 1` inputs before the padding at the end: x_BxWxD, segment_BxW (0 = nothing)."""

    x_BxWxD: Array
    segment_BxW: Array


class CausalConv(Module):
    """y = x + sum_w tap_w * x shifted by w; taps never cross a segment and never read padding."""

    def __init__(self, d: int, *, width: int = 4, rngs: Rngs):
        self.width = width
        self.taps = param(rngs, (width, d), (None, "embed"), jax.nn.initializers.zeros)

    def state(self, batch: int, d: int, dtype=jnp.float32) -> ConvState:
        return ConvState(jnp.zeros((batch, self.width - 1, d), dtype), jnp.zeros((batch, self.width - 1), jnp.int32))

    def __call__(
        self, x_BxLxD: Array, info: TokenInfo, state: ConvState | None = None
    ) -> tuple[Array, ConvState | None]:
        B, L, D = x_BxLxD.shape
        segment = jnp.where(info.valid_BxL, info.segment_BxL, 0)
        past = state if state is not None else self.state(B, D, x_BxLxD.dtype)
        x = jnp.concatenate(
            [past.x_BxWxD.astype(x_BxLxD.dtype), jnp.where(info.valid_BxL[..., None], x_BxLxD, 0)], axis=1
        )
        seen = jnp.concatenate([past.segment_BxW, segment], axis=1)
        taps = self.taps[...].astype(x.dtype)
        y = x_BxLxD
        for back in range(self.width):
            start = self.width - 1 - back
            same = jax.lax.slice_in_dim(seen, start, start + L, axis=1) == segment
            y = y + jnp.where(same[..., None], jax.lax.slice_in_dim(x, start, start + L, axis=1), 0) * taps[back]
        if state is not None:
            # What a row ends with in padding does not come between its inputs and those of the next call.
            end_B = jnp.where(info.valid_BxL, jnp.arange(1, L + 1), 0).max(1)
            last = jax.vmap(lambda a, end: jax.lax.dynamic_slice_in_dim(a, end, self.width - 1))
            state = ConvState(last(x, end_B).astype(state.x_BxWxD.dtype), last(seen, end_B))
        return y, state
