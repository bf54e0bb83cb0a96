"""The dense gated feed-forward layer (SwiGLU, Shazeer 2020), with the interface of the MoE layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.layers.param import Module, Rngs, fan_in, linear, param
from moe_jax.sharding import constrain
from moe_jax.types import Array, TokenInfo


class DenseFfn(Module):
    def __init__(self, d: int, *, hidden: int, rngs: Rngs):
        self.hidden = hidden
        self.gate = param(rngs, (d, hidden), ("embed", "mlp"), fan_in())
        self.up = param(rngs, (d, hidden), ("embed", "mlp"), fan_in())
        self.down = param(rngs, (hidden, d), ("mlp", "embed"), fan_in())

    def __call__(self, x_BxLxD: Array, info: TokenInfo, key: Array | None = None) -> tuple[Array, None]:
        """x -> (y, no statistics); a dense layer has nothing to route."""
        x_BxLxD = jnp.where(info.valid_BxL[..., None], x_BxLxD, 0)  # NaN in padding must not reach the gradient
        h_BxLxF = jax.nn.silu(linear(x_BxLxD, self.gate[...])) * linear(x_BxLxD, self.up[...])
        return linear(constrain(h_BxLxF, "batch", None, "mlp"), self.down[...]), None
