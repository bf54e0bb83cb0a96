"""Routers: what all of them promise, and what each decides."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from contract import (
    Case,
    D,
    make_info,
    verify_causal,
    verify_chunks,
    verify_contract,
    verify_padding,
    verify_segments,
    verify_sharded,
    verify_training,
)
from test_moe import GATED, KEY, ROUTERS, E, configured, decide, layer_case, weights

from moe_jax import describe
from moe_jax.layers.param import Rngs
from moe_jax.moe import routers, task_routers
from moe_jax.tasks import families
from moe_jax.types import RouterStats

BLIND = {"ByTask", "TaskLevel", "Hash", "Grouped"}  # they do not look at x
CAUSAL = {name for name, cls in ROUTERS.items() if getattr(cls, "causal", True)}
SEVERAL = {1: (0, 1), 2: (1, 2, 3), 3: 3, 4: ()}


def chosen_logits(logits_BxLxE, expert_BxLxK) -> np.ndarray:
    return np.take_along_axis(np.asarray(logits_BxLxE), np.minimum(np.asarray(expert_BxLxK), E - 1), -1)


def softmax(logits) -> np.ndarray:
    return np.asarray(jax.nn.softmax(logits, axis=-1))


def router_case(router: str) -> Case:
    """The router alone: its output is whom it weighs how much."""
    make = configured(ROUTERS[router], d=D, num_experts=E, k=2, jitter=0.3, unknown_rate=0.4)
    return Case(make, lambda layer, x, info, state, key: (weights(layer(x, info, key)), None))


def hidden(info):
    """With tasks that nobody says."""
    return dataclasses.replace(info, task_BxL=jnp.zeros_like(info.task_BxL))


# --- all of them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTERS)
def test_router_contract(router):
    case, meshes = router_case(router), ({"data": 2, "expert": 4},)
    if router in CAUSAL - BLIND:
        verify_contract(case, meshes=meshes)
        verify_training(case)
        return
    verify_padding(case)
    verify_padding(case, KEY)
    verify_segments(case)
    if router in GATED:
        verify_sharded(case, meshes=meshes)
    if router in CAUSAL:
        verify_chunks(case)
    else:
        with pytest.raises(AssertionError, match="before position"):
            verify_causal(case)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_decisions_are_well_formed(router, training):
    valid, d = np.asarray(make_info().valid_BxL), decide(router, training)
    real = d.expert_BxLxK < E
    assert not real[~valid].any() and not d.weight_BxLxK[~valid].any() and not d.logits_BxLxE[~valid].any()
    assert (d.expert_BxLxK >= 0).all() and (d.expert_BxLxK <= E).all()
    assert np.asarray(jax.nn.one_hot(d.expert_BxLxK, E)).sum(2).max() == 1  # no expert twice
    np.testing.assert_array_equal(d.weight_BxLxK > 0, real)
    assert d.weight_BxLxK.dtype == d.logits_BxLxE.dtype == np.float32 and d.expert_BxLxK.dtype == np.int32
    if router != "ExpertChoice":
        assert real[valid].all()
    if router not in ("ExpertChoice", "Switch"):
        np.testing.assert_allclose(d.weight_BxLxK[valid].sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("router", sorted(set(ROUTERS) - CAUSAL))
def test_a_causal_model_refuses_a_router_that_sees_its_future(router):
    with pytest.raises(ValueError, match=f"{router} looks at the whole row.*use it in an encoder"):
        tiny.model(tiny.moe(ROUTERS[router]))


@pytest.mark.parametrize("router", GATED)
def test_gates_stay_float32_in_bfloat16_models(router):
    case = layer_case(router)
    d = jax.eval_shape(case.layer.router, case.x.astype(jnp.bfloat16), case.info)
    assert d.logits_BxLxE.dtype == d.weight_BxLxK.dtype == jnp.float32
    y, _ = jax.eval_shape(
        jax.tree.map(lambda a: a.astype(jnp.bfloat16), case.layer), case.x.astype(jnp.bfloat16), case.info
    )
    assert y.dtype == jnp.bfloat16


def test_noise_is_for_training_alone_and_comes_from_the_key():
    case = layer_case("Router")
    router = jax.jit(case.layer.router)
    clean = decide("Router", training=False).logits_BxLxE
    valid = np.asarray(case.info.valid_BxL)
    np.testing.assert_allclose(clean[valid], case.x[valid] @ case.layer.router.gate[...], atol=1e-5)
    noisy = np.concatenate(
        [router(case.x, case.info, jax.random.key(i)).logits_BxLxE[valid] - clean[valid] for i in range(20)]
    )
    np.testing.assert_allclose(noisy.std(), 0.3, rtol=0.1)
    np.testing.assert_allclose(noisy.mean(), 0, atol=0.02)


def test_the_weight_of_switch_is_the_whole_softmax():
    d, valid = decide("Switch", training=False), np.asarray(make_info().valid_BxL)
    prob = np.exp(d.logits_BxLxE) / np.exp(d.logits_BxLxE).sum(-1, keepdims=True)
    np.testing.assert_array_equal(d.expert_BxLxK[valid][:, 0], prob[valid].argmax(-1))
    np.testing.assert_allclose(d.weight_BxLxK[valid][:, 0], prob[valid].max(-1), rtol=1e-5)


@pytest.mark.parametrize("weights", routers.WEIGHTS)
@pytest.mark.parametrize("router", ["Router", "TaskMapped"])
def test_the_weights_of_the_chosen(router, weights):
    d, valid = decide(router, training=True, jitter=0.0, weights=weights), np.asarray(make_info().valid_BxL)
    full = np.take_along_axis(softmax(d.logits_BxLxE)[valid], d.expert_BxLxK[valid], -1)
    expected = {"chosen": full / full.sum(-1, keepdims=True), "full": full, "equal": np.full_like(full, 0.5)}
    np.testing.assert_allclose(d.weight_BxLxK[valid], expected[weights], rtol=1e-5)


@pytest.mark.parametrize(
    ("router", "weights", "learns"),
    [("Switch", "", True), ("Router", "full", True), ("Router", "chosen", False), ("Router", "equal", False)],
)
def test_the_gate_of_top_1_has_a_gradient_with_probabilities_only(router, weights, learns):
    """Softmax over one chosen logit is the constant 1; the probability of the full softmax is not."""
    case = layer_case(router, k=1, jitter=0.0, weights=weights)
    _, grads = case.run(case.x, case.info, KEY)
    assert (np.abs(grads["router/gate"]).max() > 1e-4) == learns


# --- by the task --------------------------------------------------------------------------------------------


def test_task_mapped_forces_while_training_and_is_free_at_inference():
    info = jax.device_get(make_info())
    task, valid = info.task_BxL, info.valid_BxL
    trained, free = (
        decide("TaskMapped", training=True, jitter=0.0),
        decide("TaskMapped", training=False, jitter=0.0),
    )
    np.testing.assert_array_equal(trained.expert_BxLxK[valid][:, 0], (task[valid] - 1) % E)
    np.testing.assert_array_equal(free.expert_BxLxK[valid], np.argsort(-free.logits_BxLxE[valid], -1)[:, :2])
    np.testing.assert_array_equal(free.logits_BxLxE, trained.logits_BxLxE)  # the logits are not what is forced
    mapped = (task[valid] - 1) % E
    best_other = [
        next(e for e in np.argsort(-row) if e != m) for row, m in zip(free.logits_BxLxE[valid], mapped, strict=True)
    ]
    np.testing.assert_array_equal(trained.expert_BxLxK[valid][:, 1], best_other)
    chosen = chosen_logits(free.logits_BxLxE, trained.expert_BxLxK)[valid]
    expected = np.exp(chosen) / np.exp(chosen).sum(-1, keepdims=True)
    np.testing.assert_allclose(trained.weight_BxLxK[valid], expected, rtol=1e-5)


@pytest.mark.parametrize(("forced", "free"), [(1, 1), (2, 1), (1, 0), (2, 0), (1, 2), (2, None)])
def test_of_several_mapped_experts_the_best_take_the_forced_slots(forced, free):
    info = jax.device_get(make_info())
    experts = tuple(SEVERAL.get(task, 0) for task in range(5))
    d = decide("TaskMapped", True, jitter=0.0, experts=experts, forced=forced, free=free)
    slots = forced + free if free is not None else 2
    assert d.expert_BxLxK.shape[-1] == slots
    for at in np.argwhere(info.valid_BxL):
        b, l = at
        order = np.argsort(-d.logits_BxLxE[b, l]).tolist()
        mapped = SEVERAL[int(info.task_BxL[b, l])]
        mapped = mapped if isinstance(mapped, tuple) else (mapped,)
        first = [e for e in order if e in mapped][:forced]
        expected = (first + [e for e in order if e not in first])[:slots]
        assert set(d.expert_BxLxK[b, l].tolist()) == set(expected)
        np.testing.assert_array_equal(d.target_BxLxE[b, l], np.isin(np.arange(E), mapped))


def test_task_mapped_says_what_the_map_asks_for_whoever_routes():
    info = jax.device_get(make_info())
    mapped = (np.arange(E) == (info.task_BxL[..., None] - 1) % E) & info.valid_BxL[..., None]
    for training in (False, True):
        np.testing.assert_array_equal(decide("TaskMapped", training, jitter=0.0).target_BxLxE, mapped)


@pytest.mark.parametrize("inference", ["free", "forced"])
def test_task_mapped_routes_an_unknown_task_freely(inference):
    case = layer_case("TaskMapped", jitter=0.0, inference=inference)
    router, free = jax.jit(case.layer.router), decide("TaskMapped", training=False, jitter=0.0)
    for key in (None, KEY):
        d = router(case.x, hidden(case.info), key)
        np.testing.assert_array_equal(d.expert_BxLxK, free.expert_BxLxK)
        assert not d.target_BxLxE.any()


def test_a_task_that_the_user_says_may_have_its_expert_at_inference():
    said = decide("TaskMapped", training=False, jitter=0.0, inference="forced")
    trained = decide("TaskMapped", training=True, jitter=0.0)
    jax.tree.map(np.testing.assert_array_equal, said, trained)


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"forced": 0}, "forced=0, free=2: at least one slot must be forced"),
        ({"forced": 3}, "forced=3, free=-1: .* none below 0"),
        ({"forced": 2, "free": 3}, "no more than num_experts=4"),
        ({"inference": "known"}, "unknown inference 'known'; known: free, forced"),
        ({"weights": "softmax"}, "unknown weights 'softmax'; known: chosen, full, equal"),
    ],
)
def test_wrong_arguments_of_task_mapped_are_one_line(hyper, message):
    with pytest.raises(ValueError, match=message):
        task_routers.TaskMapped(D, E, **hyper, rngs=Rngs(params=0))


@pytest.mark.parametrize("router", ["TaskMapped", "ByTask"])
def test_a_task_map_says_which_expert(router):
    cls = ROUTERS[router]
    info = make_info()
    d = cls(D, E, experts={1: 3, 2: 3}, rngs=Rngs(params=0))(jnp.zeros((*info.task_BxL.shape, D)), info, KEY)
    for task, expert in ((1, 3), (2, 3), (3, 2), (4, 3)):  # 3 and 4 by default: (3 - 1) mod 4, (4 - 1) mod 4
        assert (d.expert_BxLxK[info.task_BxL == task][:, 0] == expert).all()


@pytest.mark.parametrize("router", ["TaskMapped", "ByTask"])
def test_a_checkpoint_describes_the_map(router):
    made = ROUTERS[router](D, E, experts=SEVERAL, rngs=Rngs(params=0))
    again = describe.configured(json.loads(json.dumps(describe.describe(made))))(D, E, rngs=Rngs(params=0))
    assert again.experts == made.experts and again.experts[:6] == ((), (0, 1), (1, 2, 3), (3,), (), (0,))
    older = ROUTERS[router](D, E, experts=(0, 3, 2), rngs=Rngs(params=0))  # one expert a task, fewer ids
    assert older.experts[1:5] == ((3,), (2,), (2,), (3,))


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({0: 1}, "task id 0 is outside 1..63"),
        ({64: 1}, "task id 64 is outside 1..63"),
        ({2: 4}, "task 2 -> expert 4, but there are experts 0..3"),
        ({2: (1, 5)}, "task 2 -> expert 5, but there are experts 0..3"),
        ((0, 0, -1), "task 2 -> expert -1, but there are experts 0..3"),
        ({2: True}, "task 2 -> expert True, but there are experts 0..3"),
        ({2: "1"}, "task 2 -> expert '1', but there are experts 0..3"),
        ({2.5: 1}, "task id 2.5 is outside 1..63"),
    ],
)
def test_a_wrong_task_map_is_refused(experts, message):
    with pytest.raises(ValueError, match=message):
        task_routers.task_table(experts, E)


def test_by_task_sends_a_position_to_all_experts_of_its_task():
    info = jax.device_get(make_info())
    by_task = task_routers.ByTask(D, E, experts=SEVERAL)
    d = by_task(jnp.zeros((*info.task_BxL.shape, D)), info)
    expected = np.array([[0] * E, [1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1], [1, 0, 0, 0]])  # of none: expert 0
    share = expected / np.maximum(expected.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(weights(d), share[info.task_BxL], rtol=1e-6)


def test_by_task_sends_every_position_to_its_expert_with_weight_1():
    info = jax.device_get(make_info())
    d = decide("ByTask", training=False)
    np.testing.assert_array_equal(d.expert_BxLxK[info.valid_BxL][:, 0], (info.task_BxL[info.valid_BxL] - 1) % E)
    np.testing.assert_array_equal(d.weight_BxLxK[info.valid_BxL], 1)


def test_task_biased_adds_a_bias_of_the_task_and_hides_some_tasks_while_training():
    case = layer_case("TaskBiased", jitter=0.0)
    router, info = case.layer.router, jax.device_get(case.info)
    plain = case.x @ router.gate[...]
    bias = np.asarray(router.task[...])[info.task_BxL]
    np.testing.assert_allclose(
        decide("TaskBiased", training=False, jitter=0.0).logits_BxLxE[info.valid_BxL],
        (plain + bias)[info.valid_BxL],
        atol=1e-5,
    )
    call, hidden = jax.jit(router), 0
    rows = info.valid_BxL.any(1)
    for i in range(40):
        logits = np.asarray(call(case.x, case.info, jax.random.key(i)).logits_BxLxE)
        with_task, without = (
            np.abs(logits - np.where(info.valid_BxL[..., None], z, 0)).max((1, 2)) for z in (plain + bias, plain)
        )
        assert ((with_task < 1e-4) | (without < 1e-4)).all()  # a row is hidden whole, or not at all
        hidden += (without[rows] < 1e-4).sum() / rows.sum() / 40
    np.testing.assert_allclose(hidden, 0.4, atol=0.1)


def test_task_level_learns_a_row_a_task_and_one_of_the_unknown():
    case = layer_case("TaskLevel")
    router, info = case.layer.router, jax.device_get(case.info)
    gate = np.asarray(router.gate[...])
    logits = decide("TaskLevel", training=False).logits_BxLxE
    np.testing.assert_allclose(logits[info.valid_BxL], gate[info.task_BxL[info.valid_BxL]], atol=1e-6)
    trained = decide("TaskLevel", training=True).logits_BxLxE
    known, unknown = (
        (np.abs(trained - np.where(info.valid_BxL[..., None], z, 0)).max((1, 2)) < 1e-6)[info.valid_BxL.any(1)]
        for z in (gate[info.task_BxL], gate[0])
    )
    assert (known ^ unknown).all() and known.any() and unknown.any()


# --- names instead of numbers -------------------------------------------------------------------------------


def test_families_and_task_tables_agree():
    assert families.MAX_FAMILIES == routers.MAX_TASKS
    assert len(set(families.FAMILIES.values())) == len(families.FAMILIES)
    assert set(families.FAMILIES.values()) <= set(range(1, 16))  # ids from 16 are data sets


def test_a_map_by_names():
    assert families.task_map({"asr": 0, "ocr": [1, 2], 17: 3}, num_experts=4) == {1: (0,), 2: (1, 2), 17: (3,)}
    assert families.task_map(None, num_experts=4) == {}
    by_set = families.task_map({"asr/own": 3, "ocr": 1}, num_experts=4, ids={"asr/own": 16})
    assert by_set == {16: (3,), 2: (1,)}


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"asrr": 0}, "unknown task family 'asrr'; known: asr, ocr, mt, gec"),
        ({"asr": 4}, "'asr' -> expert 4, but there are experts 0..3"),
        ({"asr": [0, "1"]}, "'asr' -> expert '1', but there are experts 0..3"),
        ({64: 0}, "task id 64 is outside 1..63"),
        ("asr", "'asr' maps no tasks to experts"),
    ],
)
def test_a_wrong_map_by_names_is_one_line(experts, message):
    with pytest.raises(ValueError, match=message):
        families.task_map(experts, num_experts=4)


def test_a_random_map_comes_from_its_seed():
    maps = [families.random_map(seed, num_experts=4) for seed in range(20)]
    assert maps[0] == families.random_map(0, num_experts=4) and len({tuple(m.values()) for m in maps}) == 20
    assert {e for m in maps for e in m.values()} == {0, 1, 2, 3} and all(set(m) == set(families.FAMILIES) for m in maps)


# --- without the task ---------------------------------------------------------------------------------------


def test_sentence_level_sends_a_segment_one_way():
    case = layer_case("SentenceLevel")
    info, d = jax.device_get(case.info), decide("SentenceLevel", training=True)
    for b in range(len(case.x)):
        for segment in set(info.segment_BxL[b]) - {0}:
            at = info.segment_BxL[b] == segment
            logits = (case.x[b, at] @ np.asarray(case.layer.router.gate[...])).mean(0)
            np.testing.assert_allclose(d.logits_BxLxE[b, at], np.broadcast_to(logits, (at.sum(), E)), atol=1e-5)
            assert (d.expert_BxLxK[b, at] == np.argsort(-logits)[:2]).all()


@pytest.mark.parametrize("capacity", [0.5, 2.0, 4.0])
def test_expert_choice_equals_a_loop(capacity):
    info, d = jax.device_get(make_info()), decide("ExpertChoice", False, capacity=capacity)
    prob = softmax(d.logits_BxLxE)
    expected = np.zeros_like(prob)
    for b, row in enumerate(info.segment_BxL):
        for segment in set(row) - {0}:
            (places,) = np.where(row == segment)
            for e in range(E):
                best = places[np.argsort(-prob[b, places, e])][: int(np.ceil(capacity * len(places) / E))]
                expected[b, best, e] = prob[b, best, e]
    np.testing.assert_allclose(weights(d), expected, rtol=1e-6)


@pytest.mark.parametrize("capacity", [0.0, 4.5])
def test_the_capacity_of_expert_choice_is_a_number_of_experts(capacity):
    with pytest.raises(ValueError, match="must be above 0 and at most num_experts=4"):
        routers.ExpertChoice(D, E, capacity=capacity, rngs=Rngs(params=0))


def test_a_hash_of_ids_is_balanced_and_looks_at_nothing_else():
    ids = jnp.arange(1000)[None]
    info = make_info()
    info = type(info)(ids * 0, ids >= 0, ids * 0 + 1, ids, ids)
    expert = lambda x, **hyper: np.asarray(routers.Hash(D, E, **hyper)(x, info).expert_BxLxK[0])  # noqa: E731
    one = expert(jnp.zeros((1, 1000, D)))
    np.testing.assert_array_equal(one, expert(jnp.ones((1, 1000, D))))
    assert (np.bincount(one[:, 0]) == 250).all() and (np.bincount(one[:100, 0]) == 25).all()
    assert one[:8, 0].tolist() == [
        0,
        2,
        1,
        3,
        1,
        0,
        2,
        3,
    ]  # a checkpoint depends on it
    assert 0.6 < (one != expert(jnp.zeros((1, 1000, D)), seed=1)).mean() < 0.9
    two = expert(jnp.zeros((1, 1000, D)), k=2)
    np.testing.assert_array_equal(two[:, :1], one)
    assert (np.bincount(two[:, 1]) == 250).all() and (two[:, 0] != two[:, 1]).all()


def test_a_model_of_tokens_routes_by_their_hash():
    batch = tiny.batch()
    _, metrics = jax.jit(tiny.model(tiny.moe(routers.Hash)).loss)(batch)
    table = routers.hash_table(tiny.E, 0).ravel()
    load = np.bincount(table[np.asarray(batch.tokens_BxL)[np.asarray(batch.info.valid_BxL)]], minlength=tiny.E)
    np.testing.assert_array_equal(metrics["stats"].load_E, [load] * 2)


def test_without_ids_there_is_no_hash():
    info = dataclasses.replace(make_info(), token_BxL=None)
    with pytest.raises(ValueError, match="Hash routes by token id"):
        routers.Hash(D, E)(jnp.zeros((*info.task_BxL.shape, D)), info)


def test_bias_balancing_moves_towards_balance_and_never_enters_the_weight():
    """One expert that everyone wants loses its advantage step by step; gradients never touch the bias."""
    case = layer_case("BiasBalanced", jitter=0.0, k=1)
    layer = case.make(router=partial(routers.BiasBalanced, k=1, rate=0.05), rngs=Rngs(params=0))
    layer.router.gate[...] = 0.3 * layer.router.gate[...]
    x = np.abs(case.x)  # positive inputs and a gate that favours expert 2: alone it would take everything
    layer.router.gate[...] = layer.router.gate[...].at[:, 2].add(0.02)
    call = jax.jit(lambda layer: layer(x, case.info, KEY)[1])
    stats = call(layer)
    shares = []
    for _ in range(30):
        before = np.asarray(layer.router.bias[...])
        layer.router = layer.router.after_step(stats)
        load = np.asarray(stats.load_E)
        moved = np.asarray(layer.router.bias[...]) - before
        np.testing.assert_allclose(moved, 0.05 * np.sign(load.mean() - load), atol=1e-6)
        stats = call(layer)
        shares.append(float(stats.load_E.max() / stats.load_E.sum()))
    assert shares[0] > 0.9 and np.mean(shares[-5:]) < 0.65, shares
    _, grads = layer_case("BiasBalanced").run(case.x, case.info, KEY)
    assert not grads["router/bias"].any() and grads["router/gate"].any()
    d = decide("BiasBalanced", training=False, jitter=0.0)
    chosen = chosen_logits(d.logits_BxLxE, d.expert_BxLxK)
    np.testing.assert_allclose(
        d.weight_BxLxK[..., 0],
        np.where(d.weight_BxLxK[..., 0] > 0, 1 / (1 + np.exp(chosen[..., 1] - chosen[..., 0])), 0),
        rtol=1e-4,
    )


@pytest.mark.parametrize("router", ROUTERS)
def test_after_step_works_on_stacked_layers(router):
    one = layer_case(router).layer.router
    load = jnp.array([[3.0, 0, 1, 4], [2.0, 2, 2, 2]])
    zero = jnp.zeros(())
    stats = [RouterStats(x, x, zero, zero, zero, jnp.zeros((1, E)), zero) for x in load]
    stacked = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    expected = stacked([one.after_step(s) for s in stats])
    jax.tree.map(np.testing.assert_array_equal, stacked([one, one]).after_step(stacked(stats)), expected)


@pytest.mark.parametrize("k", [0, 5])
def test_k_is_between_1_and_the_number_of_experts(k):
    with pytest.raises(ValueError, match=f"k={k} must be between 1 and num_experts=4"):
        routers.Router(D, E, k=k, rngs=Rngs(params=0))
