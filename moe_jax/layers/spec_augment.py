"""What hides parts of the features while training: SpecAugment and WeNet's SpecSub, functions of a key."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.types import Array


def spec_augment(
    x_BxTxC: Array,
    frames_B: Array,
    key: Array,
    *,
    times: int = 2,
    bands: int = 2,
    max_time: int = 50,
    max_band: int = 10,
    substitutions: int = 0,
    max_substitution: int = 30,
) -> Array:
    """Features, normalised to mean 0, with parts at their mean (Park et al. 2019; defaults as WeNet's, which has 3
    substitutions in U2++).

    Args:
      times, max_time: stretches of 1 to `max_time` frames, each beginning anywhere.
      bands, max_band: the same of features.
      substitutions, max_substitution: stretches in whose place earlier frames stand (SpecSub).
    """
    B, T, C = x_BxTxC.shape
    keys = jax.random.split(key, 6)

    def spans(start_key: Array, size_key: Array, number: int, end_B: Array, largest: int) -> tuple[Array, Array]:
        shape = (B, number)
        start = (jax.random.uniform(start_key, shape) * end_B[:, None]).astype(jnp.int32)
        return start, jax.random.randint(size_key, shape, 1, largest + 1)

    def within(start: Array, size: Array, length: int) -> Array:
        return (jnp.arange(length) >= start[..., None]) & (jnp.arange(length) < (start + size)[..., None])

    hidden_BxT = within(*spans(keys[0], keys[1], times, frames_B, max_time), T).any(1)
    hidden_BxC = within(*spans(keys[2], keys[3], bands, jnp.full(B, C), max_band), C).any(1)
    x_BxTxC = jnp.where(hidden_BxT[:, :, None] | hidden_BxC[:, None], 0, x_BxTxC)
    if substitutions:
        first, second = jax.random.split(keys[4])
        start, size = spans(first, second, substitutions, frames_B, max_substitution)
        back = (jax.random.uniform(keys[5], start.shape) * (start + 1)).astype(jnp.int32)
        back_BxT = jnp.where(within(start, size, T), back[..., None], 0).max(1)
        x_BxTxC = jnp.take_along_axis(x_BxTxC, (jnp.arange(T) - back_BxT)[..., None], axis=1)
    return x_BxTxC
