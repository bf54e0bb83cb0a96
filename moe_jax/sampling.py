"""Drawing the next token: temperature, then top-k, then top-p, in the order of `transformers`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw from a distribution p.

    Attributes:
      temperature: p to the power 1 / temperature; 0 takes the likeliest token.
      top_k: of so many likeliest tokens alone (Fan et al. 2018); 0: of all.
      top_p: of the fewest likeliest tokens that have this probability together (Holtzman et al. 2020); 1: of all.

    Raises ValueError for what is no such number.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < float("inf") and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ValueError(f"{self}: temperature and top_k must not be negative, top_p must be above 0 and at most 1")


def keys(seed: int, record_B: Array, samples: int) -> Array:
    """key_R, R = B * samples: that of each sample of each record, whatever else is in the batch."""
    of_record = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), record_B)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(of_record, jnp.arange(samples)).reshape(-1)


def draw(logp_RxV: Array, key_R: Array, count_R: Array, sampling: Sampling) -> Array:
    """token_R: the next one of each row. `count_R`: tokens that it has; each draws with noise of its own."""
    if sampling.temperature == 0:
        return logp_RxV.argmax(-1)
    # Sorted, so that both cuts are at a rank; the largest of logp + temperature * Gumbel noise is a draw.
    logp, token = jax.lax.top_k(logp_RxV, min(sampling.top_k or logp_RxV.shape[-1], logp_RxV.shape[-1]))
    p = jax.nn.softmax(logp / sampling.temperature)
    inside = jnp.cumsum(p, axis=-1) - p < sampling.top_p
    noise = jax.vmap(lambda key, count: jax.random.gumbel(jax.random.fold_in(key, count), p.shape[1:]))(key_R, count_R)
    rank = jnp.where(inside, logp + sampling.temperature * noise, -jnp.inf).argmax(-1)
    return jnp.take_along_axis(token, rank[:, None], axis=-1)[:, 0]
