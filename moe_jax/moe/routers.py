"""Routers decide which experts a position goes to. Most override `logits` or `select` alone.

`key=None` is evaluation and decoding; a key is training. Selection, softmax, masking and jitter are shared. Losses
never live here: the decision carries its logits, `moe.layer` turns them into statistics, `losses.py` into losses.
Those that look at the task are in `task_routers.py`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.layers.param import Module, Rngs, normal, param
from moe_jax.sharding import top_k
from moe_jax.types import Array, RouterStats, RoutingDecision, TokenInfo

MAX_TASKS = 64  # the shape of every task table (tasks/families.py: MAX_FAMILIES)
WEIGHTS = ("chosen", "full", "equal")


def chosen(score_BxLxE: Array, expert_BxLxK: Array) -> Array:
    """score_BxLxK of the chosen experts; 0 for nobody (E).

    By comparing, not by index: gathering single numbers took XLA:TPU three times as long as a small dense layer takes
    (benchmarks/tpu_aot.py), and the way back would be a scatter.
    """
    mine_BxLxKxE = jax.nn.one_hot(expert_BxLxK, score_BxLxE.shape[-1], dtype=bool)
    return jnp.where(mine_BxLxKxE, score_BxLxE[..., None, :], 0).sum(-1)


def fixed(expert_BxLxK: Array, info: TokenInfo, num_experts: int) -> RoutingDecision:
    """The decision of a router that learns nothing: equal weights, and logits that say who was chosen."""
    expert = jnp.where(info.valid_BxL[..., None], expert_BxLxK, num_experts)
    real = expert < num_experts
    mine_BxLxE = jax.nn.one_hot(expert, num_experts, dtype=bool).any(2)
    return RoutingDecision(
        expert_BxLxK=expert,
        weight_BxLxK=real / jnp.maximum(real.sum(-1, keepdims=True), 1).astype(jnp.float32),
        logits_BxLxE=jnp.where(info.valid_BxL[..., None] & ~mine_BxLxE, -20.0, 0.0),
    )


class Router(Module):
    """Top-k of a linear gate.

    Args:
      d: model width.
      num_experts: E.
      k: choices a position.
      weights: how the chosen are weighed: "chosen", the softmax over their logits (Mixtral, WeNet, NeKo: top-k first,
        then softmax); "full", their probabilities in the softmax over all, not made to add up to 1 (Switch,
        Qwen1.5-MoE); "equal", 1 / k, with which only auxiliary losses teach the gate.
      jitter: standard deviation of the Gaussian noise on the logits while training.

    A router that looks at later positions says `causal = False`; decoder-only models refuse it.
    """

    causal = True

    def __init__(
        self, d: int, num_experts: int, *, k: int = 2, weights: str = "chosen", jitter: float = 0.0, rngs: Rngs
    ):
        if not 1 <= k <= num_experts:
            raise ValueError(f"k={k} must be between 1 and num_experts={num_experts}")
        if weights not in WEIGHTS:
            raise ValueError(f"unknown weights {weights!r}; known: {', '.join(WEIGHTS)}")
        self.num_experts, self.k, self.weights, self.jitter = num_experts, k, weights, jitter
        self.gate = param(rngs, (d, num_experts), ("embed", None), normal(0.02))

    def logits(self, x_BxLxD: Array, info: TokenInfo) -> Array:
        """float32 logits_BxLxE."""
        return x_BxLxD.astype(jnp.float32) @ self.gate[...].astype(jnp.float32)

    def select(self, logits_BxLxE: Array, info: TokenInfo, key: Array | None) -> Array:
        """expert_BxLxK; E is nobody."""
        return top_k(logits_BxLxE, self.k)

    def weigh(self, logits_BxLxE: Array, expert_BxLxK: Array) -> Array:
        """weight_BxLxK."""
        if self.weights == "equal":
            return jnp.full(expert_BxLxK.shape, 1 / expert_BxLxK.shape[-1])
        if self.weights == "full":
            return chosen(jax.nn.softmax(logits_BxLxE, axis=-1), expert_BxLxK)
        return jax.nn.softmax(chosen(logits_BxLxE, expert_BxLxK), axis=-1)

    def after_step(self, stats: RouterStats) -> Router:
        """The router for the next step; only balancing without a loss changes anything here."""
        return self

    def __call__(self, x_BxLxD: Array, info: TokenInfo, key: Array | None = None) -> RoutingDecision:
        valid = info.valid_BxL[..., None]
        logits = self.logits(jnp.where(valid, x_BxLxD, 0), info)
        if key is not None and self.jitter:
            key, noise = jax.random.split(key)
            logits += self.jitter * jax.random.normal(noise, logits.shape)
        expert = self.select(logits, info, key)
        weight = self.weigh(logits, expert)
        return RoutingDecision(
            expert_BxLxK=jnp.where(valid, expert, self.num_experts),
            weight_BxLxK=jnp.where(valid, weight, 0),
            logits_BxLxE=jnp.where(valid, logits, 0),
        )


TopK = Router


class Switch(Router):
    """Top-1 with the probability of the full softmax as weight (Fedus et al. 2022), so that the gate has a gradient."""

    def __init__(self, d: int, num_experts: int, *, jitter: float = 0.0, rngs: Rngs):
        super().__init__(d, num_experts, k=1, weights="full", jitter=jitter, rngs=rngs)


class Balance(nnx.Variable):
    """State that steps change but no gradient does."""


class BiasBalanced(Router):
    """Balance without a loss (DeepSeek, arXiv 2408.15664): a bias enters the choice, never the weight; after each
    step it moves by `rate` towards the experts that had too few tokens."""

    def __init__(self, d: int, num_experts: int, *, k: int = 2, jitter: float = 0.0, rate: float = 1e-3, rngs: Rngs):
        super().__init__(d, num_experts, k=k, jitter=jitter, rngs=rngs)
        self.rate = rate
        self.bias = Balance(jnp.zeros((num_experts,), jnp.float32), axes=(None,))

    def select(self, logits_BxLxE: Array, info: TokenInfo, key: Array | None) -> Array:
        return top_k(logits_BxLxE + self.bias[...], self.k)

    def after_step(self, stats: RouterStats) -> BiasBalanced:
        """b += rate * sign(mean load - load); works on stacked layers too (leading axes)."""
        load = stats.load_E
        step = self.rate * jnp.sign(load.mean(-1, keepdims=True) - load)
        router = jax.tree.map(lambda leaf: leaf, self)
        router.bias[...] = self.bias[...] + step
        return router


# --- routers that look at a whole segment -----------------------------------------------------------------------------


def same_segment(info: TokenInfo) -> Array:
    """same_BxLxL: whether two positions belong to the same segment; padding belongs to none."""
    segment, valid = info.segment_BxL, info.valid_BxL
    return (segment[:, :, None] == segment[:, None]) & valid[:, :, None] & valid[:, None]


class SentenceLevel(Router):
    """All positions of a segment go the same way: the gate sees the segment's mean (Kudugunta et al. 2021, whose
    sentences these are). There is no jitter, which would part them."""

    causal = False

    def __init__(self, d: int, num_experts: int, *, k: int = 2, weights: str = "chosen", rngs: Rngs):
        super().__init__(d, num_experts, k=k, weights=weights, rngs=rngs)

    def logits(self, x_BxLxD: Array, info: TokenInfo) -> Array:
        same = same_segment(info).astype(jnp.float32)
        return same @ super().logits(x_BxLxD, info) / jnp.maximum(same.sum(-1, keepdims=True), 1)


class ExpertChoice(Router):
    """Experts choose positions (Zhou et al. 2022): each takes the C = ceil(capacity * length / E) of a segment that
    have its highest probabilities, which are their weights. A position may have any number of experts, and none.

    The paper chooses among all tokens of a batch; within segments examples packed into a row do not compete (our
    choice). K is E, most of it nobody: a dispatch with `slots` has no use for it.

    Args:
      capacity: mean number of experts a position.
    """

    causal = False

    def __init__(self, d: int, num_experts: int, *, capacity: float = 2.0, jitter: float = 0.0, rngs: Rngs):
        if not 0 < capacity <= num_experts:
            raise ValueError(f"capacity={capacity} must be above 0 and at most num_experts={num_experts}")
        super().__init__(d, num_experts, k=num_experts, weights="full", jitter=jitter, rngs=rngs)
        self.capacity = capacity

    def select(self, logits_BxLxE: Array, info: TokenInfo, key: Array | None) -> Array:
        prob, same = jax.nn.softmax(logits_BxLxE, axis=-1), same_segment(info)
        mine, other = prob[:, :, None], prob[:, None]  # [B, L, 1, E] and [B, 1, L, E]: XLA makes no [B, L, L, E]
        place = jnp.arange(prob.shape[1])
        first = (other > mine) | ((other == mine) & (place < place[:, None])[..., None])
        rank_BxLxE = (first & same[..., None]).sum(2)
        taken_BxL = jnp.ceil(self.capacity * same.sum(-1) / self.num_experts)
        return jnp.where(rank_BxLxE < taken_BxL[..., None], jnp.arange(self.num_experts), self.num_experts)


# --- routers that learn nothing ---------------------------------------------------------------------------------------

HASHED = 1 << 16  # ids in a hash table, at least; others begin again


@functools.cache
def hash_table(num_experts: int, seed: int) -> np.ndarray:
    """expert_NxE: row n permutes the experts over the ids n * E to n * E + E - 1, so that any vocabulary is balanced;
    and where ids are sorted by frequency, as those of tokenisers mostly are, so are the experts' tokens, roughly."""
    rows = -(-HASHED // num_experts)
    random = np.random.Philox(key=seed).random_raw(rows * num_experts)
    return np.argsort(random.reshape(rows, num_experts), axis=1, kind="stable").astype(np.int32)


class Hash(Module):
    """By token id (Roller et al. 2021: a fixed, balanced hash): nothing is learnt, and position plays no part.

    Args:
      k: choices a position, of equal weight; the paper has one.
      seed: of the table.

    Raises ValueError when called without `TokenInfo.token_BxL`, which models of tokens set.
    """

    def __init__(self, d: int, num_experts: int, *, k: int = 1, seed: int = 0, rngs: Rngs | None = None):
        if not 1 <= k <= num_experts:
            raise ValueError(f"k={k} must be between 1 and num_experts={num_experts}")
        self.num_experts, self.k, self.seed = num_experts, k, seed

    def after_step(self, stats: RouterStats) -> Hash:
        return self

    def __call__(self, x_BxLxD: Array, info: TokenInfo, key: Array | None = None) -> RoutingDecision:
        if info.token_BxL is None:
            raise ValueError("Hash routes by token id, but the model gives no TokenInfo.token_BxL; use another router")
        table_NxE, token_BxLx1 = hash_table(self.num_experts, self.seed), info.token_BxL[..., None]
        row = token_BxLx1 // self.num_experts % len(table_NxE)
        column_BxLxK = (token_BxLx1 + jnp.arange(self.k)) % self.num_experts
        return fixed(jnp.asarray(table_NxE)[row, column_BxLxK], info, self.num_experts)
