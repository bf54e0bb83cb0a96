"""Routers decide which experts a position goes to. Most override `logits` or `select` alone.

`key=None` is evaluation and decoding; a key is training. Selection, softmax, masking and jitter are shared. Losses
never live here: the decision carries its logits, `moe.layer` turns them into statistics, `losses.py` into losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.param import Module, Rngs, normal, param
from moe_jax.types import Array, RouterStats, RoutingDecision, TokenInfo

MAX_TASKS = 64  # the shape of every task table (tasks/families.py: MAX_FAMILIES)


def chosen(score_BxLxE: Array, expert_BxLxK: Array) -> Array:
    """score_BxLxK of the chosen experts; 0 for nobody (E).

    By comparing, not by index: gathering single numbers took XLA:TPU three times as long as a small dense layer takes
    (benchmarks/tpu_aot.py), and the way back would be a scatter.
    """
    mine_BxLxKxE = jax.nn.one_hot(expert_BxLxK, score_BxLxE.shape[-1], dtype=bool)
    return jnp.where(mine_BxLxKxE, score_BxLxE[..., None, :], 0).sum(-1)


class Router(Module):
    """Top-k of a linear gate, softmax over the chosen logits (Mixtral, WeNet, NeKo: top-k first, then softmax).

    Args:
      d: model width.
      num_experts: E.
      k: choices a position.
      jitter: standard deviation of the Gaussian noise on the logits while training.
    """

    def __init__(self, d: int, num_experts: int, *, k: int = 2, jitter: float = 0.0, rngs: Rngs):
        if not 1 <= k <= num_experts:
            raise ValueError(f"k={k} must be between 1 and num_experts={num_experts}")
        self.num_experts, self.k, self.jitter = num_experts, k, jitter
        self.gate = param(rngs, (d, num_experts), ("embed", None), normal(0.02))

    def logits(self, x_BxLxD: Array, info: TokenInfo) -> Array:
        """float32 logits_BxLxE."""
        return x_BxLxD.astype(jnp.float32) @ self.gate[...].astype(jnp.float32)

    def select(self, logits_BxLxE: Array, info: TokenInfo, key: Array | None) -> Array:
        """expert_BxLxK."""
        return jax.lax.top_k(logits_BxLxE, self.k)[1]

    def weigh(self, logits_BxLxE: Array, expert_BxLxK: Array) -> Array:
        """weight_BxLxK."""
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
        super().__init__(d, num_experts, k=1, jitter=jitter, rngs=rngs)

    def weigh(self, logits_BxLxE: Array, expert_BxLxK: Array) -> Array:
        return chosen(jax.nn.softmax(logits_BxLxE, axis=-1), expert_BxLxK)


TaskMap = Mapping[int, int] | Sequence[int] | None


def task_table(experts: TaskMap, num_experts: int) -> tuple[int, ...]:
    """expert_T: the expert of each task id; tasks without an entry go to (id - 1) mod E, id 0 (unknown) to expert 0.

    Raises ValueError for a task id or an expert out of range.
    """
    table = [max(t - 1, 0) % num_experts for t in range(MAX_TASKS)]
    items = experts.items() if isinstance(experts, Mapping) else list(enumerate(experts or ()))[1:]
    for task, expert in items:
        if not 1 <= task < MAX_TASKS:
            raise ValueError(f"task map: task id {task} is outside 1..{MAX_TASKS - 1}")
        if not 0 <= expert < num_experts:
            raise ValueError(f"task map: task {task} -> expert {expert}, but there are experts 0..{num_experts - 1}")
        table[task] = int(expert)
    return tuple(table)


class TaskMapped(Router):
    """NeKo (arXiv 2411.05945): in training the task's mapped expert takes one slot, the router's best other experts
    the rest; at inference the task is unknown and routing is free.

    The weights are the softmax over the chosen logits (our reading; the paper leaves it open), so the gate learns to
    score the mapped expert high, which is what makes free routing find it.

    Args:
      experts: task id -> expert; default (id - 1) mod E.
    """

    def __init__(
        self,
        d: int,
        num_experts: int,
        *,
        k: int = 2,
        jitter: float = 0.0,
        experts: TaskMap = None,
        rngs: Rngs,
    ):
        super().__init__(d, num_experts, k=k, jitter=jitter, rngs=rngs)
        self.experts = task_table(experts, num_experts)

    def mapped(self, info: TokenInfo) -> Array:
        """expert_BxL: the expert that each position's task is mapped to."""
        return jnp.asarray(self.experts, jnp.int32)[info.task_BxL]

    def select(self, logits_BxLxE: Array, info: TokenInfo, key: Array | None) -> Array:
        if key is None:
            return super().select(logits_BxLxE, info, key)
        forced = jax.nn.one_hot(self.mapped(info), self.num_experts, dtype=bool)
        # A known task's expert comes first; an unknown task (id 0) is routed freely even while training.
        known = (info.task_BxL > 0)[..., None]
        return jax.lax.top_k(jnp.where(forced & known, jnp.inf, logits_BxLxE), self.k)[1]

    def __call__(self, x_BxLxD: Array, info: TokenInfo, key: Array | None = None) -> RoutingDecision:
        decision = super().__call__(x_BxLxD, info, key)
        if key is None:
            return decision
        known = info.valid_BxL & (info.task_BxL > 0)
        return dataclasses.replace(decision, target_BxL=jnp.where(known, self.mapped(info), -1))


class TaskBiased(Router):
    """The gate sees the task: logits = x W + b_task (after Gupta et al. 2022, whose exact gate is not known to us).

    Args:
      unknown_rate: share of training rows whose task is hidden, so that the gate also works without one.
    """

    def __init__(
        self,
        d: int,
        num_experts: int,
        *,
        k: int = 2,
        jitter: float = 0.0,
        unknown_rate: float = 0.1,
        rngs: Rngs,
    ):
        super().__init__(d, num_experts, k=k, jitter=jitter, rngs=rngs)
        self.unknown_rate = unknown_rate
        self.task = param(rngs, (MAX_TASKS, num_experts), ("task", None), normal(0.02))

    def logits(self, x_BxLxD: Array, info: TokenInfo) -> Array:
        bias = jnp.where((info.task_BxL > 0)[..., None], self.task[...][info.task_BxL], 0)
        return super().logits(x_BxLxD, info) + bias.astype(jnp.float32)

    def __call__(self, x_BxLxD: Array, info: TokenInfo, key: Array | None = None) -> RoutingDecision:
        if key is not None and self.unknown_rate:
            key, hide = jax.random.split(key)
            hidden = jax.random.bernoulli(hide, self.unknown_rate, (x_BxLxD.shape[0], 1))
            info = TokenInfo(jnp.where(hidden, 0, info.task_BxL), info.valid_BxL, info.segment_BxL, info.position_BxL)
        return super().__call__(x_BxLxD, info, key)


class ByTask(Module):
    """Static: every position of a task goes to the task's expert, with weight 1. Nothing is learnt; the task must be
    known (an unknown one goes to expert 0). A router without parameters is also how a task adapter is chosen."""

    def __init__(self, d: int, num_experts: int, *, experts: TaskMap = None, rngs: Rngs | None = None):
        self.num_experts, self.k = num_experts, 1
        self.experts = task_table(experts, num_experts)

    def after_step(self, stats: RouterStats) -> ByTask:
        return self

    def __call__(self, x_BxLxD: Array, info: TokenInfo, key: Array | None = None) -> RoutingDecision:
        expert = jnp.asarray(self.experts, jnp.int32)[info.task_BxL]
        valid = info.valid_BxL
        chosen = jax.nn.one_hot(expert, self.num_experts, dtype=jnp.float32)
        return RoutingDecision(
            expert_BxLxK=jnp.where(valid, expert, self.num_experts)[..., None],
            weight_BxLxK=valid[..., None].astype(jnp.float32),
            logits_BxLxE=jnp.where(valid[..., None] & (chosen > 0), 0.0, -20.0) * valid[..., None],
        )


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
        return jax.lax.top_k(jax.lax.stop_gradient(logits_BxLxE + self.bias[...]), self.k)[1]

    def after_step(self, stats: RouterStats) -> BiasBalanced:
        """b += rate * sign(mean load - load); works on stacked layers too (leading axes)."""
        load = stats.load_E
        step = self.rate * jnp.sign(load.mean(-1, keepdims=True) - load)
        router = jax.tree.map(lambda leaf: leaf, self)
        router.bias[...] = self.bias[...] + step
        return router
