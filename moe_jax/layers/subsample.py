"""Four frames of features to one vector: WeNet's conv2d subsampling."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.layers.param import Module, Rngs, fan_in, linear, param
from moe_jax.types import Array

RATE, WINDOW = 4, 7  # frames from one output to the next, and what an output is made of: frames 4 l to 4 l + 6


def length(frames: int) -> int:
    """How many outputs so many frames have."""
    return max(0, (frames - WINDOW) // RATE + 1)


class Subsample(Module):
    """Two 3 x 3 convolutions of stride 2 over time and frequency with ReLUs, and a product over what is left of
    frequency. It has no state: who streams gives the next call the last `WINDOW - RATE` frames again.

    Args:
      d: model width.
      mels: features of a frame.
      channels: of both convolutions (default: d, as WeNet, which in a small model is most of the work).
    """

    def __init__(self, d: int, *, mels: int = 80, channels: int | None = None, rngs: Rngs):
        self.mels, self.channels = mels, channels
        C = channels or d
        zeros = jax.nn.initializers.zeros
        left = ((mels - 1) // 2 - 1) // 2
        self.first = param(rngs, (9, C), (None, "embed"), fan_in())
        self.second = param(rngs, (9 * C, C), ("embed", "embed"), fan_in())
        self.first_bias, self.second_bias = (param(rngs, (C,), (None,), zeros) for _ in range(2))
        self.o = param(rngs, (left * C, d), ("mlp", "embed"), fan_in())
        self.o_bias = param(rngs, (d,), (None,), zeros)

    def __call__(self, x_BxTxC: Array, valid_BxT: Array) -> tuple[Array, Array]:
        """(y_BxLxD, valid_BxL): an output is valid if all that it is made of is."""
        x = jnp.where(valid_BxT[..., None], x_BxTxC, 0)[..., None]
        x = jax.nn.relu(linear(_patches(x), self.first[...], self.first_bias[...]))
        x = jax.nn.relu(linear(_patches(x), self.second[...], self.second_bias[...]))
        y = linear(x.reshape(*x.shape[:2], -1), self.o[...], self.o_bias[...])
        return y, valid_BxT[:, WINDOW - 1 :: RATE]


def _patches(x_BxTxCxD: Array) -> Array:
    """[B, (T - 1) // 2, (C - 1) // 2, 9 D]. A product with them is a convolution whose gradient takes a quarter of
    the time that XLA:CPU needs for its own."""
    T, C = ((n - 1) // 2 for n in x_BxTxCxD.shape[1:3])
    return jnp.concatenate(
        [x_BxTxCxD[:, i : i + 2 * T : 2, j : j + 2 * C : 2] for i in range(3) for j in range(3)], axis=-1
    )
