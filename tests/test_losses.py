"""Losses by hand, the statistics they are made of, and that each auxiliary loss reaches every gate."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_moe import GATED, ROUTERS, configured

from moe_jax import losses, tree
from moe_jax.moe.dispatch import gathered
from moe_jax.moe.layer import router_stats
from moe_jax.moe.routers import MAX_TASKS
from moe_jax.types import RouterStats, RoutingDecision, TokenInfo

KEY = jax.random.key(5)
ranks_must_match = pytest.mark.usefixtures("ranks_must_match")


def make_stats(**known) -> RouterStats:
    zeros: dict[str, Any] = {"load_E": np.zeros(2), "prob_E": np.zeros(2), "task_load_TxE": np.zeros((MAX_TASKS, 2))}
    zeros |= dict.fromkeys(("z", "entropy", "dropped", "count", "target_nll"), 0.0)
    zeros |= dict.fromkeys(("target_T", "found_T"), np.zeros(MAX_TASKS))
    return RouterStats(**{name: jnp.asarray(x, jnp.float32) for name, x in (zeros | known).items()})


# Four positions: three went to expert 0, one to expert 1; their probabilities sum to 2.4 and 1.6.
SKEWED = make_stats(
    load_E=[3, 1],
    prob_E=[2.4, 1.6],
    z=8.0,
    count=4.0,
    task_load_TxE=np.array([[0, 0], [2, 0], [1, 1]] + [[0, 0]] * (MAX_TASKS - 3)),
)
BALANCED = make_stats(load_E=[2, 2], prob_E=[2.0, 2.0], z=4.0, count=4.0)


# --- by hand ------------------------------------------------------------------------------------------------


@ranks_must_match
def test_xent():
    logits = jnp.log(jnp.array([[[1.0, 3.0], [2.0, 2.0]]]))
    # 3 / (1 + 3) and 2 / (2 + 2)
    np.testing.assert_allclose(losses.xent(logits, jnp.array([[1, 0]])), -np.log([[0.75, 0.5]]), rtol=1e-6)
    assert losses.xent(logits.astype(jnp.bfloat16), jnp.array([[1, 0]])).dtype == jnp.float32
    huge = losses.xent(jnp.array([[[1e4, 0.0]]]), jnp.array([[1]]))
    np.testing.assert_allclose(huge, [[1e4]])


@ranks_must_match
def test_load_balance():
    # shares 3/4 1/4, mean probabilities 0.6 0.4: 2 * (0.75 * 0.6 + 0.25 * 0.4) = 2 * 0.55
    np.testing.assert_allclose(losses.load_balance(SKEWED), 1.1, rtol=1e-6)
    np.testing.assert_allclose(losses.load_balance(BALANCED), 1, rtol=1e-6)
    both = jax.tree.map(lambda *layers: jnp.stack(layers), SKEWED, BALANCED)
    np.testing.assert_allclose(losses.load_balance(both), 1.05, rtol=1e-6)


@ranks_must_match
def test_router_z():
    both = jax.tree.map(lambda *layers: jnp.stack(layers), SKEWED, BALANCED)
    np.testing.assert_allclose(losses.router_z(both), (8 / 4 + 4 / 4) / 2)


@ranks_must_match
def test_task_balance():
    # task 1 all on expert 0: 2 * 1.0 * 0.6; task 2 half and half: 2 * (0.5 * 0.6 + 0.5 * 0.4); no others: the mean
    np.testing.assert_allclose(losses.task_balance(SKEWED), (1.2 + 1.0) / 2, rtol=1e-6)


@ranks_must_match
def test_a_small_task_weighs_as_much_as_a_large_one():
    load = np.zeros((MAX_TASKS, 2))
    load[1], load[2] = (1000, 0), (0, 1)
    alike = np.minimum(load, 1)
    stats = dataclasses.replace(SKEWED, task_load_TxE=jnp.asarray(load))
    assert losses.task_balance(stats) == losses.task_balance(
        dataclasses.replace(stats, task_load_TxE=jnp.asarray(alike))
    )


@ranks_must_match
def test_task_map():
    # two positions of the first layer have a mapped expert, one of the second: (6 / 2 + 1 / 1) / 2
    asked = lambda n: np.eye(1, MAX_TASKS, 3)[0] * n  # noqa: E731
    layers = make_stats(target_nll=6.0, target_T=asked(2)), make_stats(target_nll=1.0, target_T=asked(1))
    np.testing.assert_allclose(losses.task_map(jax.tree.map(lambda *x: jnp.stack(x), *layers)), 2)
    assert float(losses.task_map(SKEWED)) == 0  # a router without a map


@ranks_must_match
def test_nothing_valid_costs_nothing():
    assert all(float(loss(make_stats())) == 0 for loss in losses.AUXILIARY.values())


@ranks_must_match
def test_auxiliary_is_the_weighted_sum():
    total, values = losses.auxiliary(SKEWED, {"load_balance": 0.5, "router_z": 0.1})
    np.testing.assert_allclose(total, 0.5 * 1.1 + 0.1 * 2, rtol=1e-6)
    assert set(values) == set(losses.AUXILIARY)
    assert float(losses.auxiliary(SKEWED, {})[0]) == 0
    assert losses.auxiliary(None, {"router_z": 1.0}) == (0.0, {})


@ranks_must_match
@pytest.mark.parametrize("stats", [None, SKEWED])
def test_an_unknown_auxiliary_loss_is_refused(stats):
    with pytest.raises(ValueError, match=r"unknown auxiliary loss \['balance'\]; known: load_balance, router_z"):
        losses.auxiliary(stats, {"balance": 0.1})


# --- statistics ---------------------------------------------------------------------------------------------


def random_decision(seed: int):
    """(decision, info) of 2 x 6 positions, 3 experts, 2 choices; a third is padding that holds other numbers."""
    rng = np.random.default_rng(seed)
    valid = rng.random((2, 6)) < 0.7
    expert = np.argsort(rng.random((2, 6, 3)), -1)[..., :2]
    decision = RoutingDecision(
        jnp.asarray(np.where(valid[..., None], expert, 3)),
        jnp.asarray(np.where(valid[..., None], 0.5, 0), jnp.float32),
        jnp.asarray(rng.normal(size=(2, 6, 3)), jnp.float32),
        jnp.asarray(valid[..., None] & (rng.random((2, 6, 3)) < 0.4)),
    )
    task = jnp.asarray(np.where(valid, rng.integers(1, 4, (2, 6)), 0))
    return decision, TokenInfo(task, jnp.asarray(valid), jnp.ones((2, 6), int), jnp.zeros((2, 6), int))


stats_of = jax.jit(lambda decision, info: router_stats(decision, info, jnp.ones(()), 3))


@ranks_must_match
def test_statistics_equal_a_loop():
    decision, info = jax.device_get(random_decision(0))
    load, prob, by_task, z, entropy, nll = np.zeros(3), np.zeros(3), np.zeros((MAX_TASKS, 3)), 0.0, 0.0, 0.0
    asked, found = np.zeros((2, MAX_TASKS))
    for b, l in np.argwhere(info.valid_BxL):
        p = np.exp(decision.logits_BxLxE[b, l]) / np.exp(decision.logits_BxLxE[b, l]).sum()
        prob += p
        entropy -= (p * np.log(p)).sum()
        z += np.log(np.exp(decision.logits_BxLxE[b, l]).sum()) ** 2
        if (target := decision.target_BxLxE[b, l]).any():
            nll -= np.log(p[target].sum())
            asked[info.task_BxL[b, l]] += 1
            found[info.task_BxL[b, l]] += target[decision.expert_BxLxK[b, l]].any()
        for e in decision.expert_BxLxK[b, l]:
            load[e] += 1
            by_task[info.task_BxL[b, l], e] += 1
    numbers: tuple[Any, ...] = (load, prob, z, entropy, 1.0, by_task, info.valid_BxL.sum(), nll, asked, found)
    assert 0 < found.sum() < asked.sum() < info.valid_BxL.sum()
    expected = RouterStats(*numbers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stats_of(decision, info), expected)


@ranks_must_match
def test_statistics_add_up_over_batches():
    parts = [random_decision(0), random_decision(1)]
    apart = jax.tree.map(jnp.add, *(stats_of(*part) for part in parts))
    together = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    stats = dataclasses.replace(stats_of(*together), dropped=jnp.array(2.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), apart, stats)


# --- through the whole model --------------------------------------------------------------------------------


def router_configured(name: str):
    return configured(ROUTERS[name], k=2, jitter=0.1, unknown_rate=0.2)


def only_auxiliary(batch):
    """No token is to be written: of the loss the auxiliary terms are left."""
    return dataclasses.replace(batch, weights_BxL=jnp.zeros_like(batch.weights_BxL))


@pytest.mark.parametrize("router", [name for name in GATED if ROUTERS[name].causal])
def test_each_auxiliary_loss_reaches_the_gate_of_every_layer(router):
    weights = {"load_balance": 0.5, "router_z": 0.25, "task_balance": 2.0, "task_map": 1.5}
    assert set(weights) == set(losses.AUXILIARY)
    model = tiny.model(tiny.moe(router_configured(router), gathered), auxiliary=weights)
    batch = only_auxiliary(tiny.batch())

    def values(params):
        loss, metrics = tree.unflatten(model, params).loss(batch, KEY)
        return jnp.stack([loss, *(metrics[name] for name in weights)])

    back = jax.jit(lambda params, one: jax.vjp(values, params)[1](one)[0])
    total, *each = (back(tree.flatten(model), one) for one in jnp.eye(1 + len(weights)))
    gate = "blocks/ffn/router/gate"
    for name, grads in zip(weights, each, strict=True):
        reaches = name != "task_map" or router == "TaskMapped"  # no other router has a map
        assert ((np.abs(grads[gate]).max((1, 2)) > 1e-6) == reaches).all(), name
    expected = sum(w * grads[gate] for w, grads in zip(weights.values(), each, strict=True))
    np.testing.assert_allclose(total[gate], expected, rtol=1e-3, atol=1e-6)
    if "blocks/ffn/router/bias" in total:
        assert not total["blocks/ffn/router/bias"].any()


def test_without_weight_there_is_no_auxiliary_gradient():
    model = tiny.model(tiny.moe(to=gathered), auxiliary=dict.fromkeys(losses.AUXILIARY, 0.0))
    batch = only_auxiliary(tiny.batch())
    loss = lambda params: tree.unflatten(model, params).loss(batch, KEY)[0]  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss))(tree.flatten(model))
    assert float(value) == 0 and not any(g.any() for g in grads.values())


def test_evaluation_has_no_auxiliary_terms_but_reports_them():
    model = tiny.model(tiny.moe(), auxiliary={"load_balance": 1.0})
    loss, metrics = jax.jit(lambda batch: model.loss(batch))(tiny.batch())
    np.testing.assert_allclose(loss, metrics["nll_T"].sum() / metrics["weight_T"].sum(), rtol=1e-6)
    assert float(metrics["load_balance"]) > 0.5


def padded(batch, rows: int, places: int):
    """With rows and places of padding, in which lie tokens and targets that mean nothing."""
    pad = lambda x: np.pad(x, ((0, rows), (0, places)))  # noqa: E731
    batch = jax.tree.map(pad, batch)
    garbage = np.random.default_rng(0).integers(0, tiny.VOCAB, batch.tokens_BxL.shape)
    valid = batch.info.valid_BxL
    return dataclasses.replace(
        batch,
        tokens_BxL=np.where(valid, batch.tokens_BxL, garbage),
        targets_BxL=np.where(batch.weights_BxL > 0, batch.targets_BxL, garbage),
    )


def test_padding_changes_no_loss():
    model = tiny.model(tiny.moe(), auxiliary=dict.fromkeys(losses.AUXILIARY, 0.1))
    run = jax.jit(lambda batch: (model.loss(batch), model.loss(batch, KEY)))
    plain, more = run(tiny.batch()), run(padded(tiny.batch(), rows=2, places=3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, more)


def test_routing_is_free_at_evaluation_and_forced_in_training():
    """In the whole model: while training a task's load lies on its mapped expert, then where the gate says."""
    router = partial(ROUTERS["TaskMapped"], k=1)
    model = tiny.model(tiny.moe(router))
    run = jax.jit(lambda batch, key: model.loss(batch, key)[1]["stats"].task_load_TxE.sum(0))
    batch = tiny.batch()
    trained = np.asarray(run(batch, KEY))
    for task in range(1, 5):
        assert trained[task].argmax() == task - 1 and (trained[task] > 0).sum() == 1
    without = dataclasses.replace(
        batch, info=dataclasses.replace(batch.info, task_BxL=jnp.zeros_like(batch.info.task_BxL))
    )
    free = np.asarray(run(batch, None))
    assert ((free > 0).sum(1) > 1).any()
    np.testing.assert_array_equal(free.sum(0), np.asarray(run(without, None)).sum(0))  # the task plays no part


def test_by_task_has_nothing_to_balance():
    model = tiny.model(tiny.moe(ROUTERS["ByTask"]))
    assert not [path for path in tree.flatten(model) if "router" in path]
