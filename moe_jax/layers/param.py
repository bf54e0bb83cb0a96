"""Parameters and norms: plain pytrees of `nnx.Param` that carry the names of their dims.

NNX runs in its tree mode (the announced default): modules are pytrees, and every transform is JAX's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.types import Array

nnx.set_graph_mode(False)
nnx.set_graph_updates(False)

Rngs = nnx.Rngs
Module = nnx.Module
Initializer = Callable[..., Array]


def fan_in(stacked: int = 0) -> Initializer:
    """Truncated normal with variance 1 / inputs, for matrices (..., in, out) stacked on `stacked` leading dims."""
    leading = tuple(range(stacked))
    return jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", -2, -1, leading)


def normal(stddev: float) -> Initializer:
    return jax.nn.initializers.normal(stddev)


def param(rngs: Rngs, shape: Sequence[int], axes: Sequence[str | None], init: Initializer) -> nnx.Param:
    """A float32 parameter; `axes` names each dim for sharding, merging and reports."""
    if len(shape) != len(axes):
        raise ValueError(f"{len(shape)} dims but {len(axes)} names: {tuple(shape)} vs {tuple(axes)}")
    return nnx.Param(init(rngs.params(), tuple(shape), jnp.float32), axes=tuple(axes))


def linear(x: Array, w_IxO: Array, bias_O: Array | None = None) -> Array:
    """x @ w + bias over the last dim of x, as one flat product: of a product with two leading dims XLA:CPU writes a
    slow, transposing backward pass (an FFN's gradient takes 1.7 times as long)."""
    y = (x.reshape(-1, x.shape[-1]) @ w_IxO).reshape(*x.shape[:-1], w_IxO.shape[-1])
    return y if bias_O is None else y + bias_O


class LayerNorm(Module):
    """Layer norm with a scale and a bias (Ba et al. 2016), computed in float32."""

    def __init__(self, d: int, *, eps: float = 1e-5, rngs: Rngs):
        self.scale = param(rngs, (d,), (None,), jax.nn.initializers.ones)
        self.bias = param(rngs, (d,), (None,), jax.nn.initializers.zeros)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        h = x.astype(jnp.float32)
        h = h - jnp.mean(h, axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        return (h * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in float32."""

    def __init__(self, d: int, *, eps: float = 1e-6, rngs: Rngs):
        self.scale = param(rngs, (d,), (None,), jax.nn.initializers.ones)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        return (h * self.scale[...]).astype(x.dtype)
