"""Dense feed-forward layers with the interface of the MoE layer: gated (SwiGLU and its kin, Shazeer 2020), and the
plain one of Transformers and Conformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from moe_jax.layers.param import Module, Rngs, fan_in, linear, param
from moe_jax.sharding import constrain
from moe_jax.types import Array, TokenInfo

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True), "relu": jax.nn.relu}


def activation(name: str) -> Callable[[Array], Array]:
    """Raises ValueError for an unknown one."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class DenseFfn(Module):
    """Args:
    hidden: F, units.
    activation: of the gate (`ACTIVATIONS`).
    """

    def __init__(self, d: int, *, hidden: int, activation: str = "silu", rngs: Rngs):
        self.hidden, self.activation = hidden, activation
        self.gate = param(rngs, (d, hidden), ("embed", "mlp"), fan_in())
        self.up = param(rngs, (d, hidden), ("embed", "mlp"), fan_in())
        self.down = param(rngs, (hidden, d), ("mlp", "embed"), fan_in())

    def __call__(self, x_BxLxD: Array, info: TokenInfo, key: Array | None = None) -> tuple[Array, None]:
        """x -> (y, no statistics); a dense layer has nothing to route."""
        x_BxLxD = jnp.where(info.valid_BxL[..., None], x_BxLxD, 0)  # NaN in padding must not reach the gradient
        gate_BxLxF = activation(self.activation)(linear(x_BxLxD, self.gate[...]))
        h_BxLxF = gate_BxLxF * linear(x_BxLxD, self.up[...])
        y_BxLxD = linear(constrain(h_BxLxF, "batch", None, "mlp"), self.down[...])
        return constrain(y_BxLxD, "batch", None, None), None


class PlainFfn(Module):
    """Two matrices with biases.

    Args:
      hidden: F, units.
      activation: between them (`ACTIVATIONS`); "silu" is the Conformer's swish.
    """

    def __init__(self, d: int, *, hidden: int, activation: str = "silu", rngs: Rngs):
        self.hidden, self.activation = hidden, activation
        zeros = jax.nn.initializers.zeros
        self.up = param(rngs, (d, hidden), ("embed", "mlp"), fan_in())
        self.up_bias = param(rngs, (hidden,), ("mlp",), zeros)
        self.down = param(rngs, (hidden, d), ("mlp", "embed"), fan_in())
        self.down_bias = param(rngs, (d,), (None,), zeros)

    def __call__(self, x_BxLxD: Array, info: TokenInfo, key: Array | None = None) -> tuple[Array, None]:
        x_BxLxD = jnp.where(info.valid_BxL[..., None], x_BxLxD, 0)
        h_BxLxF = activation(self.activation)(linear(x_BxLxD, self.up[...], self.up_bias[...]))
        y_BxLxD = linear(constrain(h_BxLxF, "batch", None, "mlp"), self.down[...], self.down_bias[...])
        return constrain(y_BxLxD, "batch", None, None), None
