"""The values that flow through the code base.

Letters name dims once, here, and suffix every array (`x_BxLxD`):

    B rows    L positions (tokens or frames)    S source positions    D model    N heads    H head dim
    F ffn hidden    E experts    K choices    C slots    V vocab    T task families    M models being merged
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

Array = jax.Array
T = TypeVar("T")
Metrics = dict[str, Any]  # name -> scalar or small array; sums that the caller divides (see `losses.py`)


@dataclass_transform(frozen_default=True)
def value(cls: type[T]) -> type[T]:
    """A frozen dataclass that is a JAX pytree."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@value
class TokenInfo:
    """Side inputs: they ride beside `x` through every layer and never enter attention or norms as data.

    Attributes:
      task_BxL: int32, the family of each position (0 at padding). Packed rows mix families.
      valid_BxL: bool, False at padding: such a position never routes and never enters a loss.
      segment_BxL: int32, which example of a packed row (from 1); positions of two segments never meet.
      position_BxL: int32, the position within the segment, from 0.
      token_BxL: int32, the id of what is read there; None outside of models of tokens, which set it.
    """

    task_BxL: Array
    valid_BxL: Array
    segment_BxL: Array
    position_BxL: Array
    token_BxL: Array | None = None


@value
class Source:
    """What an encoder reads beside a batch's rows; its segments are those of the row that it belongs to.

    Attributes: tokens_BxS (int32), info (`TokenInfo` of them).
    """

    tokens_BxS: Array
    info: TokenInfo


@value
class Batch:
    """One step's data.

    Attributes:
      tokens_BxL: int32, what the model reads.
      targets_BxL: int32, the next token of the same segment.
      weights_BxL: float32, 1 where the target is text that the model must write, else 0.
      info: `TokenInfo` of `tokens_BxL`.
      source: of an encoder-decoder, whose rows hold only what is written (`packing.to_pairs`); else None.
    """

    tokens_BxL: Array
    targets_BxL: Array
    weights_BxL: Array
    info: TokenInfo
    source: Source | None = None


@value
class Utterances:
    """One step's data for a recogniser of speech.

    Attributes:
      features_BxTxC: log-mel frames; what lies behind `frames_B` is padding.
      frames_B: int32.
      tokens_BxU: int32, what was said; 0 at padding (and, in CTC, the blank).
      task_B: int32, the family.
      weight_B: float32, what it counts in evaluation: 0 where it only fills the batch (default: all count). Training
        counts all.
    """

    features_BxTxC: Array
    frames_B: Array
    tokens_BxU: Array
    task_B: Array
    weight_B: Array | None = None

    @property
    def valid_BxT(self) -> Array:
        return jnp.arange(self.features_BxTxC.shape[1]) < self.frames_B[:, None]

    @property
    def weights_BxL(self) -> Array:
        """[B, 1]: an utterance weighs 1, whatever its length."""
        return jnp.ones((self.frames_B.shape[0], 1))


@value
class RoutingDecision:
    """Which experts a position goes to, and with which weights.

    Attributes:
      expert_BxLxK: int32 in [0, E]; E is nobody (padding, or fewer than K experts).
      weight_BxLxK: float32; 0 for nobody.
      logits_BxLxE: float32 router logits, before any forcing or bias.
      target_BxLxE: bool, the experts that a task map asks for; None without a map.
    """

    expert_BxLxK: Array
    weight_BxLxK: Array
    logits_BxLxE: Array
    target_BxLxE: Array | None = None


@value
class RouterStats:
    """Sufficient statistics of one MoE layer over one batch: all are sums over valid positions, so that they add
    over batches and hosts; `lax.scan` stacks them over layers.

    Attributes:
      load_E: assignments to each expert (no gradient).
      prob_E: sum of the softmax of the router's logits; carries the gradient of the balance loss.
      z: sum of squared logsumexp of the logits (ST-MoE).
      entropy: sum of the entropy of the router's softmax, in nats (no gradient).
      dropped: assignments lost to capacity (no gradient).
      task_load_TxE: assignments by family (no gradient).
      count: number of valid positions.
      target_nll: sum of -log probability of all experts that a task map asks for; carries a gradient.
      target_T: number of positions of each family for which a task map asks.
      found_T: those of them that have an expert that it asks for (no gradient).
    """

    load_E: Array
    prob_E: Array
    z: Array
    entropy: Array
    dropped: Array
    task_load_TxE: Array
    count: Array
    target_nll: Array | float = 0.0
    target_T: Array | float = 0.0
    found_T: Array | float = 0.0
