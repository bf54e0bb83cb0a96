"""Experts: the feed-forward network of each expert, written once for all layouts.

`(rows, matmul) -> rows`: the dispatch brings the product, so an expert knows nothing of routing.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from moe_jax.layers.param import Module, Rngs, fan_in, param
from moe_jax.types import Array

Matmul = Callable[[Array, Array], Array]


class Gated(Module):
    """SwiGLU experts; weights are fused over experts (E, in, out)."""

    def __init__(self, d: int, num_experts: int, *, hidden: int, rngs: Rngs):
        self.hidden = hidden
        self.gate = param(rngs, (num_experts, d, hidden), ("expert", "embed", "mlp"), fan_in(1))
        self.up = param(rngs, (num_experts, d, hidden), ("expert", "embed", "mlp"), fan_in(1))
        self.down = param(rngs, (num_experts, hidden, d), ("expert", "mlp", "embed"), fan_in(1))

    def __call__(self, rows: Array, matmul: Matmul) -> Array:
        return matmul(jax.nn.silu(matmul(rows, self.gate[...])) * matmul(rows, self.up[...]), self.down[...])
