"""Experts: the feed-forward network of each expert, written once for all layouts (`grouped.Experts`).

The dispatch brings the product, so an expert knows nothing of routing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.nn.initializers import zeros

from moe_jax.layers import ffn
from moe_jax.layers.param import Module, Rngs, fan_in, param
from moe_jax.moe.grouped import Matmul
from moe_jax.types import Array


class Gated(Module):
    """Experts that are `layers.ffn.DenseFfn`s; weights are fused over experts (E, in, out)."""

    def __init__(self, d: int, num_experts: int, *, hidden: int, activation: str = "silu", rngs: Rngs):
        self.hidden, self.activation = hidden, activation
        self.gate = param(rngs, (num_experts, d, hidden), ("expert", "embed", "mlp"), fan_in(1))
        self.up = param(rngs, (num_experts, d, hidden), ("expert", "embed", "mlp"), fan_in(1))
        self.down = param(rngs, (num_experts, hidden, d), ("expert", "mlp", "embed"), fan_in(1))

    def first(self, rows: Array, matmul: Matmul) -> tuple[Array, ...]:
        return matmul(rows, self.gate[...]), matmul(rows, self.up[...])

    def second(self, kept: tuple[Array, ...], matmul: Matmul) -> Array:
        gate, up = kept
        return matmul(ffn.activation(self.activation)(gate) * up, self.down[...])


class Bottleneck(Module):
    """Task adapters (Houlsby et al. 2019; Bapna & Firat 2019): down to `hidden` units, ReLU, and up again. They begin
    as nothing: behind a residual, a layer with adapters is the layer without."""

    def __init__(self, d: int, num_experts: int, *, hidden: int, rngs: Rngs):
        self.hidden = hidden
        self.down = param(rngs, (num_experts, d, hidden), ("expert", "embed", "mlp"), fan_in(1))
        self.up = param(rngs, (num_experts, hidden, d), ("expert", "mlp", "embed"), jax.nn.initializers.zeros)

    def first(self, rows: Array, matmul: Matmul) -> tuple[Array, ...]:
        return (matmul(rows, self.down[...]),)

    def second(self, kept: tuple[Array, ...], matmul: Matmul) -> Array:
        return matmul(jax.nn.relu(kept[0]), self.up[...])


class Plain(Module):
    """Experts that are `layers.ffn.PlainFfn`s (WeNet's, arXiv 2404.16407). A bias is a matrix of one row, which each of
    its expert's rows is multiplied with: a dispatch knows no other way to reach an expert's own arrays."""

    def __init__(self, d: int, num_experts: int, *, hidden: int, activation: str = "silu", rngs: Rngs):
        self.hidden, self.activation = hidden, activation
        self.up = param(rngs, (num_experts, d, hidden), ("expert", "embed", "mlp"), fan_in(1))
        self.up_bias = param(rngs, (num_experts, 1, hidden), ("expert", None, "mlp"), zeros)
        self.down = param(rngs, (num_experts, hidden, d), ("expert", "mlp", "embed"), fan_in(1))
        self.down_bias = param(rngs, (num_experts, 1, d), ("expert", None, None), zeros)

    def first(self, rows: Array, matmul: Matmul) -> tuple[Array, ...]:
        return (matmul(rows, self.up[...]) + _own(self.up_bias[...], rows, matmul),)

    def second(self, kept: tuple[Array, ...], matmul: Matmul) -> Array:
        rows = ffn.activation(self.activation)(kept[0])
        return matmul(rows, self.down[...]) + _own(self.down_bias[...], rows, matmul)


def _own(bias_Ex1xO: Array, rows: Array, matmul: Matmul) -> Array:
    return matmul(jnp.ones((*rows.shape[:-1], 1), rows.dtype), bias_Ex1xO)
