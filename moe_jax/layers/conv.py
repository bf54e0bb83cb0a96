"""Causal depthwise convolutions over the sequence: state in, state out.

A short residual convolution of a few taps before attention lets a small model see its neighbours, so that copying (an
induction head needs "what followed this token") is learnt in one layer rather than two (Primer, So et al. 2021;
"Canon layers", Allen-Zhu 2025).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.layers.param import LayerNorm, Module, Rngs, fan_in, linear, normal, param
from moe_jax.types import Array, TokenInfo, value


@value
class ConvState:
    """The last `width - 1` inputs before the padding at the end: x_BxWxD, segment_BxW (0 = nothing)."""

    x_BxWxD: Array
    segment_BxW: Array


class Causal(Module):
    """A convolution over `width` inputs: what its state holds of them."""

    width: int

    def state(self, batch: int, d: int, dtype=jnp.float32) -> ConvState:
        return ConvState(jnp.zeros((batch, self.width - 1, d), dtype), jnp.zeros((batch, self.width - 1), jnp.int32))


class CausalConv(Causal):
    """y = x + sum_w tap_w * x shifted by w; taps never cross a segment and never read padding."""

    def __init__(self, d: int, *, width: int = 4, rngs: Rngs):
        self.width = width
        self.taps = param(rngs, (width, d), (None, None), jax.nn.initializers.zeros)

    def __call__(
        self, x_BxLxD: Array, info: TokenInfo, state: ConvState | None = None
    ) -> tuple[Array, ConvState | None]:
        past = state if state is not None else self.state(*x_BxLxD.shape[::2], x_BxLxD.dtype)
        x, windows = _windows(x_BxLxD, info, past)
        taps = self.taps[...].astype(x.dtype)
        y = x_BxLxD
        for tap, (same, span) in zip(taps, windows, strict=True):
            y = y + jnp.where(same, x[:, span], 0) * tap
        return y, None if state is None else _next(x, info, past)


class ConformerConv(Causal):
    """The Conformer's convolution, causal, as WeNet has it (`causal: true`, `cnn_module_norm: layer_norm`): pointwise
    to a gated linear unit, depthwise, layer norm, swish, pointwise. The zeros before the first input go through the
    first pointwise product, as its cached inputs do: the state is what was read, not what was made of it."""

    def __init__(self, d: int, *, width: int = 15, rngs: Rngs):
        self.width = width
        zeros = jax.nn.initializers.zeros
        self.gate = param(rngs, (d, 2 * d), ("embed", "mlp"), fan_in())
        self.gate_bias = param(rngs, (2 * d,), ("mlp",), zeros)
        self.taps = param(rngs, (width, d), (None, None), normal(width**-0.5))
        self.taps_bias = param(rngs, (d,), (None,), zeros)
        self.norm = LayerNorm(d, rngs=rngs)
        self.o = param(rngs, (d, d), ("embed", "embed"), fan_in())
        self.o_bias = param(rngs, (d,), (None,), zeros)

    def __call__(
        self, x_BxLxD: Array, info: TokenInfo, state: ConvState | None = None
    ) -> tuple[Array, ConvState | None]:
        past = state if state is not None else self.state(*x_BxLxD.shape[::2], x_BxLxD.dtype)
        x, windows = _windows(x_BxLxD, info, past)
        gated, of_nothing = (self._gated(a) for a in (x, jnp.zeros_like(x[:1, :1])))
        y = self.taps_bias[...]
        for tap, (same, span) in zip(self.taps[...], windows, strict=True):
            y = y + jnp.where(same, gated[:, span], of_nothing) * tap
        y = linear(jax.nn.silu(self.norm(y)), self.o[...], self.o_bias[...])
        return y, None if state is None else _next(x, info, past)

    def _gated(self, x: Array) -> Array:
        a, b = jnp.split(linear(x, self.gate[...], self.gate_bias[...]), 2, axis=-1)
        return a * jax.nn.sigmoid(b)


def _segment(info: TokenInfo) -> Array:
    return jnp.where(info.valid_BxL, info.segment_BxL, 0)


def _windows(x_BxLxD: Array, info: TokenInfo, past: ConvState) -> tuple[Array, list[tuple[Array, slice]]]:
    """(inputs after those of the state, padding as zeros; for each tap, that of the present first: whether what it
    reads is of the same segment [B, L, 1], and where that lies)."""
    L, W = x_BxLxD.shape[1], past.x_BxWxD.shape[1]
    x = jnp.concatenate([past.x_BxWxD.astype(x_BxLxD.dtype), jnp.where(info.valid_BxL[..., None], x_BxLxD, 0)], axis=1)
    segment = _segment(info)
    seen = jnp.concatenate([past.segment_BxW, segment], axis=1)
    spans = [slice(W - back, W - back + L) for back in range(W + 1)]
    return x, [((seen[:, span] == segment)[..., None], span) for span in spans]


def _next(x: Array, info: TokenInfo, past: ConvState) -> ConvState:
    """What a row ends with in padding does not come between its inputs and those of the next call."""
    L, W = info.valid_BxL.shape[1], past.x_BxWxD.shape[1]
    end_B = jnp.where(info.valid_BxL, jnp.arange(1, L + 1), 0).max(1)
    last = jax.vmap(lambda a, end: jax.lax.dynamic_slice_in_dim(a, end, W))
    seen = jnp.concatenate([past.segment_BxW, _segment(info)], axis=1)
    return ConvState(last(x, end_B).astype(past.x_BxWxD.dtype), last(seen, end_B))
