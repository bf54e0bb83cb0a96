"""Routers that look at the task: `TaskMapped` and `ByTask` by a map that is given, `TaskBiased` and `TaskLevel` by what
they learn.

Task ids are those of the data: families (tasks/families.py) or data sets, from 1 to `MAX_TASKS` - 1; 0 is unknown.

As gates of experiments/task_moe these are an interpretation of Task-Based MoE (arXiv 2308.15772), of which only the
abstract is known to us.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.layers.param import Module, Rngs, normal, param
from moe_jax.moe.routers import MAX_TASKS, Router, fixed
from moe_jax.sharding import top_k
from moe_jax.types import Array, RouterStats, RoutingDecision, TokenInfo

FAR = -1e9  # a logit that is never chosen, and weighs nothing

TaskMap = Mapping[int, int | Sequence[int]] | Sequence[int | Sequence[int]] | None


def task_table(experts: TaskMap, num_experts: int, fill: bool = True) -> tuple[tuple[int, ...], ...]:
    """The experts of each task id: one or several, or none if the map says []. Tasks without an entry have
    (id - 1) mod E, or none if they are not to be filled in; id 0 (unknown) has none.

    Raises ValueError for a task id or an expert out of range.
    """
    table = [(), *((task % num_experts,) if fill else () for task in range(MAX_TASKS - 1))]
    items = experts.items() if isinstance(experts, Mapping) else list(enumerate(experts or ()))[1:]
    for task, given in items:
        if type(task) is not int or not 1 <= task < MAX_TASKS:
            raise ValueError(f"task map: task id {task} is outside 1..{MAX_TASKS - 1}")
        several: list[Any] = [*given] if isinstance(given, list | tuple) else [given]
        for expert in several:
            if type(expert) is not int or not 0 <= expert < num_experts:
                raise ValueError(
                    f"task map: task {task} -> expert {expert!r}, but there are experts 0..{num_experts - 1}"
                )
        table[task] = tuple(sorted(set(several)))
    return tuple(table)


def _mask(experts: Sequence[Sequence[int]], num_experts: int) -> np.ndarray:
    """mask_TxE of a `task_table`."""
    table_TxE = np.zeros((MAX_TASKS, num_experts), bool)
    for task, found in enumerate(experts):
        table_TxE[task, list(found)] = True
    return table_TxE


class TaskMapped(Router):
    """NeKo (arXiv 2411.05945): in training the task's mapped expert takes one slot, the router's best other expert
    the other; at inference the task is unknown and routing is free.

    The paper leaves open how the two are weighed. By default (our reading) by the softmax over their logits, so the
    gate learns to score the mapped expert high, which is what makes free routing find it. Several tasks may share an
    expert; of a task with several experts those that the router likes best take the forced slots (ours).

    Args:
      k: choices a position at inference.
      weights: see `Router`.
      experts: task id -> expert or experts; default (id - 1) mod E. A task of none is routed freely.
      forced: slots for mapped experts. Where a task has fewer, the router fills what is left.
      free: slots in training that the router fills; default k - forced. 0: routing is static while training.
      inference: "free", the paper's; or "forced": a task that is known takes its slots as in training, an unknown one
        is routed freely.
    """

    def __init__(
        self,
        d: int,
        num_experts: int,
        *,
        k: int = 2,
        weights: str = "chosen",
        jitter: float = 0.0,
        experts: TaskMap = None,
        forced: int = 1,
        free: int | None = None,
        inference: str = "free",
        rngs: Rngs,
    ):
        super().__init__(d, num_experts, k=k, weights=weights, jitter=jitter, rngs=rngs)
        self.experts = task_table(experts, num_experts)
        self.forced, self.free, self.inference = forced, k - forced if free is None else free, inference
        if forced < 1 or self.free < 0 or forced + self.free > num_experts:
            raise ValueError(
                f"forced={forced}, free={self.free}: at least one slot must be forced, none below 0, "
                f"and together no more than num_experts={num_experts} (free is k - forced by default)"
            )
        if inference not in ("free", "forced"):
            raise ValueError(f"unknown inference {inference!r}; known: free, forced")

    def mapped(self, info: TokenInfo) -> Array:
        """mapped_BxLxE: the experts of each position's task; none of one that is unknown."""
        return jnp.asarray(_mask(self.experts, self.num_experts))[info.task_BxL] & info.valid_BxL[..., None]

    def select(self, logits_BxLxE: Array, info: TokenInfo, key: Array | None) -> Array:
        if key is None and self.inference == "free":
            return super().select(logits_BxLxE, info, key)
        mapped = self.mapped(info)
        best_BxLxM = top_k(jnp.where(mapped, logits_BxLxE, -jnp.inf), self.forced)
        forced = mapped & jax.nn.one_hot(best_BxLxM, self.num_experts, dtype=bool).any(2)
        slots = self.k if key is None else self.forced + self.free
        return top_k(jnp.where(forced, jnp.inf, logits_BxLxE), slots)

    def __call__(self, x_BxLxD: Array, info: TokenInfo, key: Array | None = None) -> RoutingDecision:
        return dataclasses.replace(super().__call__(x_BxLxD, info, key), target_BxLxE=self.mapped(info))


def some_unknown(info: TokenInfo, rate: float, key: Array | None) -> TokenInfo:
    """While training the task of some rows is hidden, so that a gate that sees tasks works without one too."""
    if key is None or not rate:
        return info
    hidden_Bx1 = jax.random.bernoulli(key, rate, (info.task_BxL.shape[0], 1))
    return dataclasses.replace(info, task_BxL=jnp.where(hidden_Bx1, 0, info.task_BxL))


class TaskBiased(Router):
    """The gate sees position and task: logits = x W + b_task, which is a linear gate on [x; e_task] (after Gupta et al.
    2022, whose exact gate is not known to us). An unknown task has no bias.

    Args:
      unknown_rate: share of training rows whose task is hidden.
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
        key, hide = (None, None) if key is None else jax.random.split(key)
        return super().__call__(x_BxLxD, some_unknown(info, self.unknown_rate, hide), key)


class TaskLevel(Router):
    """The gate sees the task alone (Kudugunta et al. 2021): which experts a task has is learnt, and the same for all of
    its positions. There is no jitter, which would part them.

    Args:
      unknown_rate: share of training rows whose task is hidden: they teach what an unknown task has (ours; the paper's
        is always known).
    """

    def __init__(
        self, d: int, num_experts: int, *, k: int = 2, weights: str = "chosen", unknown_rate: float = 0.1, rngs: Rngs
    ):
        super().__init__(MAX_TASKS, num_experts, k=k, weights=weights, rngs=rngs)  # a gate on the task, one-hot
        self.unknown_rate = unknown_rate

    def logits(self, x_BxLxD: Array, info: TokenInfo) -> Array:
        return super().logits(jax.nn.one_hot(info.task_BxL, MAX_TASKS), info)

    def __call__(self, x_BxLxD: Array, info: TokenInfo, key: Array | None = None) -> RoutingDecision:
        return super().__call__(x_BxLxD, some_unknown(info, self.unknown_rate, key), key)


class ByTask(Module):
    """Static: every position of a task goes to the task's expert, with weight 1; with several to all of them, with
    equal weights. Nothing is learnt. A router without parameters is also how a task adapter is chosen.

    Args:
      experts: task id -> expert or experts; default (id - 1) mod E.
      others: where the unknown task goes, and tasks of no expert: "first", to expert 0, as a feed-forward layer must;
        or "none", where the layer adds nothing, as an adapter should: then tasks that the map does not name have none.
    """

    def __init__(
        self,
        d: int,
        num_experts: int,
        *,
        experts: TaskMap = None,
        others: str = "first",
        rngs: Rngs | None = None,
    ):
        if others not in ("first", "none"):
            raise ValueError(f"unknown others {others!r}; known: first, none")
        fill = others == "first" or not isinstance(experts, Mapping)
        self.experts, self.others = task_table(experts, num_experts, fill), others
        self.num_experts, self.k = num_experts, max(1, *map(len, self.experts))

    def after_step(self, stats: RouterStats) -> ByTask:
        return self

    def __call__(self, x_BxLxD: Array, info: TokenInfo, key: Array | None = None) -> RoutingDecision:
        nobody = (self.num_experts,) * self.k
        other = (0,) if self.others == "first" else ()
        table_TxK = jnp.asarray([((experts or other) + nobody)[: self.k] for experts in self.experts], jnp.int32)
        return fixed(table_TxK[info.task_BxL], info, self.num_experts)


class Subset(Router):
    """Each task has a part of the experts, and the gate chooses among them alone, in training and after: hard parts, of
    which a task's own can be loaded by themselves. An unknown task, or one of no experts, chooses among all.

    Args:
      experts: task id -> its experts.

    Raises ValueError for an expert out of range, and for a task of fewer experts than k.
    """

    def __init__(
        self,
        d: int,
        num_experts: int,
        *,
        k: int = 2,
        weights: str = "chosen",
        jitter: float = 0.0,
        experts: TaskMap = None,
        rngs: Rngs,
    ):
        super().__init__(d, num_experts, k=k, weights=weights, jitter=jitter, rngs=rngs)
        self.experts = task_table(experts, num_experts, fill=False)
        if few := [task for task, found in enumerate(self.experts) if 0 < len(found) < k]:
            raise ValueError(f"task {few[0]} has experts {self.experts[few[0]]}, and k={k} are to be chosen")

    def logits(self, x_BxLxD: Array, info: TokenInfo) -> Array:
        table_TxE = _mask(self.experts, self.num_experts)
        table_TxE |= ~table_TxE.any(1, keepdims=True)
        return jnp.where(jnp.asarray(table_TxE)[info.task_BxL], super().logits(x_BxLxD, info), FAR)


class Grouped(Module):
    """A router that sees groups of tasks in place of tasks: target languages, say, in place of directions.

    Args:
      router: the configured router.
      groups: task id -> group, from 1; tasks that it does not name are unknown (0).
    """

    def __init__(
        self,
        d: int,
        num_experts: int,
        *,
        router: Callable[..., Any] = TaskLevel,
        groups: Mapping[int, int] | Sequence[Sequence[int]] = (),
        rngs: Rngs,
    ):
        # As pairs: JSON has no objects with numbers as names.
        self.groups = tuple(sorted(groups.items() if isinstance(groups, Mapping) else map(tuple, groups)))
        for task, group in self.groups:
            if not (1 <= task < MAX_TASKS and 1 <= group < MAX_TASKS):
                raise ValueError(f"groups of tasks: {task} -> {group}, both must be in 1..{MAX_TASKS - 1}")
        self.router = router(d, num_experts, rngs=rngs)

    causal = property(lambda self: self.router.causal)
    num_experts = property(lambda self: self.router.num_experts)
    k = property(lambda self: self.router.k)

    def after_step(self, stats: RouterStats) -> Grouped:
        self.router = self.router.after_step(stats)
        return self

    def __call__(self, x_BxLxD: Array, info: TokenInfo, key: Array | None = None) -> RoutingDecision:
        table_T = np.zeros(MAX_TASKS, np.int32)
        for task, group in self.groups:
            table_T[task] = group
        return self.router(x_BxLxD, dataclasses.replace(info, task_BxL=jnp.asarray(table_T)[info.task_BxL]), key)
