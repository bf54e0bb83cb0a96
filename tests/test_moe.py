"""The mixture of experts: every router with every dispatch. (What routers decide: test_routers.py.)

Both are found by introspection, so that a new one is tested from its first day.
"""

import inspect
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
    verify_contract,
    verify_sharded,
    verify_training,
)

from moe_jax import describe, programs, tree
from moe_jax.layers import stack
from moe_jax.layers.ffn import DenseFfn
from moe_jax.layers.param import Module, Rngs
from moe_jax.moe import dispatch, grouped, routers, task_routers
from moe_jax.moe.layer import MoeFfn
from moe_jax.types import RoutingDecision

E, HIDDEN = 4, 8
KEY = jax.random.key(3)

ROUTERS = {
    name: cls
    for module in (routers, task_routers)
    for name, cls in vars(module).items()
    if inspect.isclass(cls) and issubclass(cls, Module) and cls.__module__ == module.__name__ and name == cls.__name__
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
    hyper = {"k": 2, "jitter": 0.3, "unknown_rate": 0.4, "capacity": 3.0, "factor": 0.5} | hyper
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


def experts_of(layer) -> list:
    return [[np.asarray(w[e]) for w in (layer.experts.gate, layer.experts.up, layer.experts.down)] for e in range(E)]


def test_what_there_is():
    assert {"Router", "Switch", "BiasBalanced", "SentenceLevel", "ExpertChoice", "Hash"} <= set(ROUTERS)
    assert {"TaskMapped", "TaskBiased", "TaskLevel", "ByTask"} <= set(ROUTERS)
    assert {"ragged", "exchanged", "slots", "gathered", "side_by_side", "dropless"} <= set(DISPATCHES)
    assert (set(ROUTERS) | set(DISPATCHES)) <= set(describe.KNOWN), "a checkpoint could not describe it"


# --- the layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTERS)
def test_every_dispatch_of_every_router_equals_the_oracle(router):
    case = layer_case(router)
    d = decide(router, training=True)
    half = {"factor": 0.5}

    def choose(b, l):
        real = d.expert_BxLxK[b, l] < E
        return d.expert_BxLxK[b, l][real], d.weight_BxLxK[b, l][real]

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
    """What it costs: all-to-alls there and back; no device ever holds all rows, nor their logits."""
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
    assert "all-gather" not in text


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
    monkeypatch.setattr(dispatch.sharding, "kind", lambda: (backend, backend))
    few = dispatch.FEW if backend == "cpu" else dispatch.GATHER_ROWS // 2
    for positions in (few, few + 1):
        experts = jnp.zeros((1, positions, 2), int)
        dispatch.dropless(RoutingDecision(experts, jnp.zeros(experts.shape), jnp.zeros((1, positions, E))), E)
    assert seen == ["side_by_side" if backend == "cpu" else "gathered", "exchanged"]


@partial(jax.jit, static_argnums=(0, 1))
def _with_gradients(way, apart, decision, experts, x, dy):
    def y(experts, x):
        if apart:
            experts = jax.tree.map(lambda w: stack.Apart(tuple(w)), experts)
        return way(decision, E).apply(experts, x)

    y, back = jax.vjp(y, experts, x)
    return y, back(dy)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("positions", [1, 2, 12, 16, 17, 40])
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

    given = decision, layer.experts, x, dy
    expected = _with_gradients(dispatch.ragged, False, *given)
    close(expected, _with_gradients(dispatch.side_by_side, apart, *given), "side by side")
    assert not np.isnan(np.concatenate([np.ravel(a) for a in jax.tree.leaves(expected)])).any()


@pytest.mark.parametrize("positions", [1, 12, 40])
def test_experts_as_a_stream_has_them_are_sorted_experts(positions, monkeypatch):
    """Apart and widened, each on so many rows as it has."""
    monkeypatch.setattr("moe_jax.moe.grouped.PAGE", 1)
    layer = layer_case("Router").layer
    rng = np.random.default_rng(positions)
    x = jnp.asarray(rng.normal(size=(1, positions, D)), jnp.float32)
    expert = np.stack([rng.permutation(E)[:2] for _ in range(positions)])[None]
    decision = RoutingDecision(jnp.asarray(expert), jnp.ones(expert.shape), jnp.zeros((1, positions, E)))
    apart = programs.apart(layer).experts
    assert any(
        isinstance(w, grouped.Wide) for w in jax.tree.leaves(apart, is_leaf=lambda w: isinstance(w, grouped.Wide))
    )
    for way in (dispatch.side_by_side, dispatch.ragged):
        run = jax.jit(lambda experts, x, way=way: way(decision, E).apply(experts, x))
        close(dispatch.ragged(decision, E).apply(layer.experts, x), run(apart, x), "apart")


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
