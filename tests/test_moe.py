"""The mixture of experts: every router with every dispatch.

Both are found by introspection, so that a new one is tested from its first day.
"""

import inspect
import re
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from contract import (
    Case,
    D,
    close,
    make_info,
    verify_chunks,
    verify_contract,
    verify_sharded,
    verify_training,
)

from moe_jax import describe, tree
from moe_jax.layers import stack
from moe_jax.layers.ffn import DenseFfn
from moe_jax.layers.param import Module, Rngs
from moe_jax.moe import dispatch, routers
from moe_jax.moe.layer import MoeFfn
from moe_jax.types import RouterStats, RoutingDecision

E, HIDDEN = 4, 8
KEY = jax.random.key(3)

ROUTERS = {
    name: cls
    for name, cls in vars(routers).items()
    if inspect.isclass(cls) and issubclass(cls, Module) and cls.__module__ == routers.__name__ and name == cls.__name__
}
DISPATCHES = {
    name: f
    for name, f in vars(dispatch).items()
    if inspect.isfunction(f) and list(inspect.signature(f).parameters)[:2] == ["decision", "num_experts"]
}
CHOSEN = [name for name in DISPATCHES if name != "dropless"]  # that one is one of the others, by size
GATED = [name for name, cls in ROUTERS.items() if issubclass(cls, routers.Router)]


def configured(thing, **hyper):
    """With those of the arguments that it has (a class's own signature says nothing)."""
    names = inspect.signature(thing.__init__ if inspect.isclass(thing) else thing).parameters
    return partial(thing, **{k: v for k, v in hyper.items() if k in names})


@cache
def layer_case(router: str, to: str = "dropless", **hyper) -> Case:
    """Noise while training, and too few slots, where they can be had."""
    hyper = {"k": 2, "jitter": 0.3, "unknown_rate": 0.4, "factor": 0.5} | hyper
    make = partial(
        MoeFfn,
        D,
        num_experts=E,
        hidden=HIDDEN,
        router=configured(ROUTERS[router], **hyper),
        dispatch=configured(DISPATCHES[to], **hyper),
    )
    return Case(make, lambda layer, x, info, state, key: (layer(x, info, key)[0], None))


@cache
def decide(router: str, training: bool, **hyper) -> RoutingDecision:
    case = layer_case(router, **hyper)
    return jax.device_get(jax.jit(case.layer.router)(case.x, case.info, KEY if training else None))


def weights(d: RoutingDecision) -> jax.Array:
    """weight_BxLxE: 0 for those not chosen."""
    return (jax.nn.one_hot(d.expert_BxLxK, E) * d.weight_BxLxK[..., None]).sum(2)


def chosen_logits(logits_BxLxE, expert_BxLxK) -> np.ndarray:
    return np.take_along_axis(np.asarray(logits_BxLxE), np.minimum(np.asarray(expert_BxLxK), E - 1), -1)


def router_case(router: str) -> Case:
    """The router alone: its output is whom it weighs how much."""
    make = configured(ROUTERS[router], d=D, num_experts=E, k=2, jitter=0.3, unknown_rate=0.4)
    return Case(make, lambda layer, x, info, state, key: (weights(layer(x, info, key)), None))


def experts_of(layer) -> list:
    return [[np.asarray(w[e]) for w in (layer.experts.gate, layer.experts.up, layer.experts.down)] for e in range(E)]


def test_what_there_is():
    assert {"Router", "Switch", "TaskMapped", "TaskBiased", "ByTask", "BiasBalanced"} <= set(ROUTERS)
    assert {"ragged", "exchanged", "slots", "gathered", "side_by_side", "dropless"} <= set(DISPATCHES)
    assert (set(ROUTERS) | set(DISPATCHES)) <= set(describe.KNOWN), "a checkpoint could not describe it"


# --- the layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTERS)
def test_every_dispatch_of_every_router_equals_the_oracle(router):
    case = layer_case(router)
    d = decide(router, training=True)
    choose = lambda b, l: (d.expert_BxLxK[b, l], d.weight_BxLxK[b, l])  # noqa: E731
    half = {"factor": 0.5}

    @jax.jit
    def everyway(layer, x, info):
        decision = layer.router(x, info, KEY)
        ways = {name: configured(DISPATCHES[name], **half)(decision, E) for name in CHOSEN}
        return {name: (to.apply(layer.experts, x), to.dropped) for name, to in ways.items()}

    for name, (y, dropped) in everyway(case.layer, case.x, case.info).items():
        limited = "factor" in inspect.signature(DISPATCHES[name]).parameters
        capacity = np.ceil(0.5 * case.x.shape[1] * d.expert_BxLxK.shape[-1] / E) if limited else None
        expected, lost = oracle.moe(case.x, case.info.valid_BxL, choose, experts_of(case.layer), capacity)
        close(expected, np.where(case.valid, y, 0), name)
        assert float(dropped) == lost and (lost > 0) == limited, name


def test_contract():
    verify_contract(layer_case("Router"), meshes=())


@pytest.mark.parametrize("to", CHOSEN)
def test_training_contract(to):
    verify_training(layer_case("Router", to))


@pytest.mark.parametrize("to", CHOSEN)
def test_dispatches_sharded(to):
    meshes = ({"data": 2, "expert": 4}, {"data": 4, "expert": 2})
    verify_sharded(layer_case("Router", to), KEY, meshes if to == "slots" else meshes[:1])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_k_equals_the_textbook(k):
    case = layer_case("Router", k=k)
    y, _ = jax.jit(case.layer)(case.x, case.info)
    gate = np.asarray(case.layer.router.gate[...])
    choose = lambda b, l: oracle.top_k(case.x[b, l], gate, k)  # noqa: E731
    close(
        oracle.moe(case.x, case.info.valid_BxL, choose, experts_of(case.layer))[0],
        np.where(case.valid, y, 0),
        "the textbook",
    )


@pytest.mark.parametrize("gated", [False, True])
def test_a_shared_expert_adds_what_it_makes_of_every_position(gated):
    case = layer_case("Router")
    shared = partial(DenseFfn, hidden=HIDDEN)
    layer = MoeFfn(D, num_experts=E, hidden=HIDDEN, shared=shared, gated_shared=gated, rngs=Rngs(params=1))
    layer.router, layer.experts = case.layer.router, case.layer.experts
    weight = jax.nn.sigmoid(case.x @ layer.shared_gate[...]) if gated else 1
    expected = case.layer(case.x, case.info)[0] + weight * layer.shared(case.x, case.info)[0]
    close(np.where(case.valid, expected, 0), np.where(case.valid, layer(case.x, case.info)[0], 0), "shared")


def test_gradients_equal_those_of_computing_every_expert():
    """The formula without any dispatch: each expert on each position, by autodiff."""

    def everyone(layer, x, info, state, key):
        x = jnp.where(info.valid_BxL[..., None], x, 0)
        ffn = lambda gate, up, down: (jax.nn.silu(x @ gate) * (x @ up)) @ down  # noqa: E731
        out_ExBxLxD = jax.vmap(ffn)(layer.experts.gate[...], layer.experts.up[...], layer.experts.down[...])
        return jnp.einsum("ble,ebld->bld", weights(layer.router(x, info, key)), out_ExBxLxD), None

    case = layer_case("Router")
    expected = Case(case.make, everyone).run(case.x, case.info, KEY)
    roomy = layer_case("Router", "slots", factor=float(E))
    for to, case in (
        ("ragged", layer_case("Router", "ragged")),
        ("gathered", layer_case("Router", "gathered")),
        ("roomy", roomy),
    ):
        close(expected, case.run(case.x, case.info, KEY), to)


def test_slots_over_the_expert_axis_exchange_rows_and_gather_nothing_of_them():
    """What it costs: all-to-alls there and back; no device ever holds all rows. (XLA does not partition `top_k`, so
    the logits, E numbers a position, are gathered.)"""
    from moe_jax import sharding

    case = layer_case("Router", "slots")
    mesh = sharding.make_mesh(data=2, expert=4)
    params = tree.flatten(case.layer)
    layout = sharding.shardings(tree.axes(case.layer), params, mesh)
    params = {path: jax.device_put(x, layout[path]) for path, x in params.items()}
    with sharding.use(mesh):
        x, info = sharding.put_batch((case.x, case.info), mesh)
        call = jax.jit(lambda params, x, info: case.call(tree.unflatten(case.layer, params), x, info, None, KEY)[0])
        text = call.lower(params, x, info).compile().as_text() or ""
    assert text.count(" all-to-all(") == 2
    assert re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text) == [f"8,12,{E}"]


def test_evaluation_drops_nothing_whatever_the_dispatch():
    case, tight = layer_case("Router"), layer_case("Router", "slots", factor=0.1)
    y, stats = jax.jit(tight.layer)(case.x, case.info)
    close(case.run(case.x, case.info)[0], np.where(case.valid, y, 0), "tight slots")
    assert float(stats.dropped) == 0


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_few_positions_are_computed_otherwise_than_many(backend, monkeypatch):
    seen = []
    for name in ("gathered", "side_by_side", "exchanged"):
        monkeypatch.setattr(dispatch, name, lambda decision, e, name=name, **_: seen.append(name))
    monkeypatch.setattr(dispatch.jax, "default_backend", lambda: backend)
    few = dispatch.FEW if backend == "cpu" else dispatch.GATHER_ROWS // 2
    for positions in (few, few + 1):
        experts = jnp.zeros((1, positions, 2), int)
        dispatch.dropless(RoutingDecision(experts, jnp.zeros(experts.shape), jnp.zeros((1, positions, E))), E)
    assert seen == ["side_by_side" if backend == "cpu" else "gathered", "exchanged"]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("positions", [1, 2, 16, 17, 40])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_experts_side_by_side_are_sorted_experts(positions, share, apart):
    """In one turn or in several; `share` of all positions want one expert, and the last position is padding."""
    rng, layer = np.random.default_rng(positions), layer_case("Router").layer
    expert = np.stack([rng.permutation(E)[:2] for _ in range(positions)])[None]
    expert[0, : round(share * positions)] = (2, 1)
    weight = rng.uniform(0.1, 1, expert.shape).astype(np.float32)
    x, dy = rng.normal(size=(2, 1, positions, D)).astype(np.float32)
    expert[0, -1], weight[0, -1], x[0, -1] = E, 0, np.nan
    decision = RoutingDecision(jnp.asarray(expert), jnp.asarray(weight), jnp.zeros((1, positions, E)))

    @partial(jax.jit, static_argnums=(0, 1))
    def run(way, apart, experts, x):
        def y(experts, x):
            if apart:
                experts = jax.tree.map(lambda w: stack.Apart(tuple(w)), experts)
            return way(decision, E).apply(experts, x)

        y, back = jax.vjp(y, experts, x)
        return y, back(jnp.asarray(dy))

    expected = run(dispatch.ragged, False, layer.experts, x)
    close(expected, run(dispatch.side_by_side, apart, layer.experts, x), "side by side")
    assert not np.isnan(np.concatenate([np.ravel(a) for a in jax.tree.leaves(expected)])).any()


def test_the_capacity_of_a_slot_table():
    # L = 3, K = 1, E = 2, factor 1: ceil(1 * 3 * 1 / 2) = 2 slots an expert; all three want expert 1.
    decision = RoutingDecision(jnp.ones((1, 3, 1), int), jnp.ones((1, 3, 1)), jnp.zeros((1, 3, 2)))
    to = dispatch.slots(decision, 2, factor=1.0)
    seen = []
    same = SimpleNamespace(first=lambda rows, matmul: seen.append(rows) or (rows,), second=lambda kept, matmul: kept[0])
    y = to.apply(same, jnp.arange(1.0, 4).reshape(1, 3, 1))
    np.testing.assert_array_equal(seen[0][0, :, :, 0], [[0, 0], [1, 2]])
    np.testing.assert_array_equal(y[0, :, 0], [1, 2, 0])
    assert float(to.dropped) == 1


# --- routers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTERS)
def test_router_contract(router):
    case = router_case(router)
    if router == "ByTask":  # it looks at the task alone, and learns nothing
        verify_chunks(case)
    else:
        verify_contract(case, meshes=({"data": 2, "expert": 4},))
        verify_training(case)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_decisions_are_well_formed(router, training):
    valid, d = np.asarray(make_info().valid_BxL), decide(router, training)
    k = d.expert_BxLxK.shape[-1]
    assert (d.expert_BxLxK[~valid] == E).all() and not d.weight_BxLxK[~valid].any() and not d.logits_BxLxE[~valid].any()
    assert all(
        len(set(chosen)) == k and 0 <= min(chosen) <= max(chosen) < E for chosen in d.expert_BxLxK[valid].tolist()
    )
    assert (d.weight_BxLxK[valid] > 0).all()
    assert d.weight_BxLxK.dtype == d.logits_BxLxE.dtype == np.float32 and d.expert_BxLxK.dtype == np.int32
    if ROUTERS[router] is not routers.Switch:
        np.testing.assert_allclose(d.weight_BxLxK[valid].sum(-1), 1, rtol=1e-5)


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


@pytest.mark.parametrize("router", ["Switch", "Router"])
def test_the_gate_of_top_1_has_a_gradient_with_switch_weights_only(router):
    """Softmax over one chosen logit is the constant 1; the probability of the full softmax is not."""
    case = layer_case(router, k=1, jitter=0.0)
    _, grads = case.run(case.x, case.info, KEY)
    assert (np.abs(grads["router/gate"]).max() > 1e-4) == (router == "Switch")


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


def test_task_mapped_says_what_the_map_asks_for_in_training_only():
    info = jax.device_get(make_info())
    target = decide("TaskMapped", training=True, jitter=0.0).target_BxL
    np.testing.assert_array_equal(target, np.where(info.valid_BxL, (info.task_BxL - 1) % E, -1))
    assert decide("TaskMapped", training=False, jitter=0.0).target_BxL is None


def test_task_mapped_routes_an_unknown_task_freely():
    case = layer_case("TaskMapped", jitter=0.0)
    unknown = jax.tree.map(lambda a: a, case.info)
    unknown = type(unknown)(
        jnp.zeros_like(unknown.task_BxL), unknown.valid_BxL, unknown.segment_BxL, unknown.position_BxL
    )
    trained = jax.jit(case.layer.router)(case.x, unknown, KEY)
    free = decide("TaskMapped", training=False, jitter=0.0)
    np.testing.assert_array_equal(trained.expert_BxLxK, free.expert_BxLxK)
    assert (np.asarray(trained.target_BxL) == -1).all()


@pytest.mark.parametrize("router", ["TaskMapped", "ByTask"])
def test_a_task_map_says_which_expert(router):
    cls = ROUTERS[router]
    info = make_info()
    d = cls(D, E, experts={1: 3, 2: 3}, rngs=Rngs(params=0))(jnp.zeros((*info.task_BxL.shape, D)), info, KEY)
    for task, expert in ((1, 3), (2, 3), (3, 2), (4, 3)):  # 3 and 4 by default: (3 - 1) mod 4, (4 - 1) mod 4
        assert (d.expert_BxLxK[info.task_BxL == task][:, 0] == expert).all()


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({0: 1}, "task id 0 is outside 1..15"),
        ({16: 1}, "task id 16 is outside 1..15"),
        ({2: 4}, "task 2 -> expert 4, but there are experts 0..3"),
        ((0, 0, -1), "task 2 -> expert -1, but there are experts 0..3"),
    ],
)
def test_a_wrong_task_map_is_refused(experts, message):
    with pytest.raises(ValueError, match=message):
        routers.task_table(experts, E)


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
