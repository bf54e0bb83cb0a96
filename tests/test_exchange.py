"""Dropless over devices: whatever the routing and the mesh, it is what one device computes."""

from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from contract import B, D, L, close, verify_sharded
from test_moe import KEY, ROUTERS, decide, layer_case

from benchmarks.exchange import collectives
from moe_jax import sharding, tree
from moe_jax.layers.param import Rngs
from moe_jax.moe import dispatch, grouped
from moe_jax.moe.experts import Gated
from moe_jax.types import RoutingDecision

E, K, HIDDEN = 8, 2, 4
MESHES = {
    "2x4": {"data": 2, "expert": 4},
    "4x2": {"data": 4, "expert": 2},
    "8x1": {"data": 8},
    "1x8": {"expert": 8},
    "2x2x2": {"data": 2, "expert": 2, "model": 2},
}
EXPERTS = Gated(D, E, hidden=HIDDEN, rngs=Rngs(params=0))


def skew(name: str) -> np.ndarray:
    """expert_BxLxK."""
    rng = np.random.default_rng(0)
    expert = rng.permuted(np.tile(np.arange(E), (B, L, 1)), axis=-1)[..., :K]
    if name == "one expert takes all":
        expert[..., 0], expert[..., 1] = 5, E
    elif name == "many take nothing":
        expert = np.where(expert % 2, 6, 1)
    elif name == "one token":
        expert[:], expert[3, 7] = E, (2, 7)
    elif name == "padding everywhere":
        expert[:] = E
    elif name == "only one device has rows":
        expert[np.arange(B) != 6] = E
    elif name == "one row of the batch is skewed":
        expert[2] = (0, 1)
    return expert.astype(np.int32)


SKEWS = ("even", "one expert takes all", "many take nothing", "one token", "padding everywhere")
SKEWS += ("only one device has rows", "one row of the batch is skewed")


def decision(case: str) -> RoutingDecision:
    """Of a skew, or of a router of `test_moe` with its experts for the first of ours."""
    if case in ROUTERS:
        d = decide(case, training=True)
        pad = ((0, 0), (0, 0), (0, K - d.expert_BxLxK.shape[-1]))  # one choice: and nobody
        nobody = d.logits_BxLxE.shape[-1]
        expert = np.pad(np.where(d.expert_BxLxK == nobody, E, d.expert_BxLxK), pad, constant_values=E)
        return RoutingDecision(expert, np.pad(d.weight_BxLxK, pad), np.zeros((B, L, E), np.float32))
    expert = skew(case)
    weight = np.where(expert < E, np.random.default_rng(1).uniform(0.1, 1, expert.shape), 0).astype(np.float32)
    return RoutingDecision(expert, weight, np.zeros((B, L, E), np.float32))


def inputs(case: str):
    """Positions of nobody hold NaN."""
    d = decision(case)
    x = np.random.default_rng(2).normal(size=(B, L, D)).astype(np.float32)
    return d, np.where((d.expert_BxLxK < E).any(-1, keepdims=True), x, np.nan)


@cache
def compiled(to, mesh: str | None = None, rows: int = B, length: int = L, dtype=jnp.float32):
    """(decision, x) -> (y, gradients of the experts, the weights and x), compiled for a mesh, and its placing."""

    def run(table, weight, x, d):
        d = RoutingDecision(d.expert_BxLxK, weight, d.logits_BxLxE)
        y = to(d, E).apply(tree.unflatten(EXPERTS, table), x)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape)).astype(y.dtype)).sum(), y

    devices = mesh and sharding.make_mesh(**MESHES[mesh])
    table = {path: w.astype(dtype) for path, w in tree.flatten(EXPERTS).items()}
    expert = np.zeros((rows, length, K), np.int32)
    d = RoutingDecision(expert, expert.astype(np.float32), np.zeros((rows, length, E), np.float32))
    batch = (d, np.zeros((rows, length, D), dtype))
    place = lambda batch: sharding.put_batch(batch, devices) if devices and rows % 8 == 0 else batch  # noqa: E731
    if devices:
        layout = sharding.shardings(tree.axes(EXPERTS), table, devices)
        table = {path: jax.device_put(w, layout[path]) for path, w in table.items()}
    with sharding.use(devices):
        grad = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)
        d, x = place(batch)
        program = jax.jit(grad).lower(table, d.weight_BxLxK, x, d).compile()

    def call(d, x):
        d, x = place((d, x))
        (_, y), grads = program(table, d.weight_BxLxK, x, d)
        return jax.device_get((y, grads))

    return program, call


HERE = partial(dispatch.ragged, product=grouped.ragged_dot)  # it compiles faster
THERE = partial(dispatch.exchanged, product=grouped.ragged_dot)
SPARING = partial(THERE, share=0.3)  # in several turns even when balanced


@pytest.mark.parametrize(
    ("to", "mesh"), [*((THERE, mesh) for mesh in MESHES), (SPARING, "2x4")], ids=[*MESHES, "in several turns"]
)
def test_it_equals_one_device_for_every_skew_and_every_router(to, mesh):
    (_, here), (_, there) = compiled(HERE), compiled(to, mesh)
    for case in (*SKEWS, *(r for r in ROUTERS if r != "ExpertChoice")):  # which has another number of choices
        d, x = inputs(case)
        found = there(d, x)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)), (case, "NaN of nobody got through")
        close(here(d, x), found, f"{case} on {mesh}")


def forward(d, x):
    """Without a gradient, on 2x4."""
    mesh = sharding.make_mesh(**MESHES["2x4"])
    with sharding.use(mesh):
        return np.asarray(_forward(*sharding.put_batch((d, x), mesh)))


_forward = jax.jit(lambda d, x: THERE(d, E).apply(EXPERTS, x))


@pytest.mark.parametrize("case", SKEWS)
def test_it_equals_the_oracle(case):
    d, x = inputs(case)
    experts = [[np.asarray(w[e]) for w in (EXPERTS.gate, EXPERTS.up, EXPERTS.down)] for e in range(E)]

    def choose(b, l):
        real = d.expert_BxLxK[b, l] < E
        return d.expert_BxLxK[b, l][real], d.weight_BxLxK[b, l][real]

    expected, _ = oracle.moe(np.nan_to_num(x), np.ones((B, L), bool), choose, experts)
    close(expected, forward(d, x), case)


@pytest.mark.parametrize("mesh", MESHES)
def test_rows_go_by_all_to_all_and_no_device_gets_all_of_them(mesh):
    """There and back, forward and backward, and how many. A turn more: there and back, and both again backward, where
    what the turn did not save is computed anew. The gradients of weights are summed over `data`."""
    found = Counter((kind, again) for kind, again, _ in collectives(compiled(THERE, mesh)[0].as_text()))
    assert found.pop(("all-reduce", False)) > 0
    exchanges = {("all-to-all", False): 4 + 1, ("all-to-all", True): 2 + 4} if "expert" in MESHES[mesh] else {}
    if "model" not in MESHES[mesh]:
        assert found == exchanges
    else:  # the products of parts of an expert's hidden units are summed, in whatever turn
        assert {kind: n for kind, n in found.items() if kind[0] != "all-reduce"} == exchanges


def by_the_first(size_E, rows):
    """Every row by the first expert's matrix: the memory of a product, and a quick compilation."""
    matmul = lambda x, w: x @ w[0]  # noqa: E731
    return grouped.Grouped(0, lambda experts, x: grouped.apply(experts, x, matmul))


def test_memory_is_a_share_of_the_rows_and_not_the_worst_case():
    to = partial(dispatch.exchanged, product=by_the_first)

    def temporary(to, mesh, rows=B):
        return compiled(to, mesh, rows, length=512)[0].memory_analysis().temp_size_in_bytes

    one = temporary(to, None, 1)  # a device's own rows: an eighth
    assert temporary(to, "8x1") < 1.1 * one
    assert temporary(to, "2x4") < 2 * one < temporary(partial(to, share=4.0), "2x4")


def test_a_batch_that_does_not_divide_and_experts_that_do_not_are_computed_all_the_same():
    d, x = jax.tree.map(lambda a: a[:3], inputs("even"))
    close(compiled(HERE, None, 3)[1](d, x), compiled(THERE, "2x4", 3)[1](d, x), "3 rows on 8 devices")
    four = layer_case("Router", "exchanged", product=grouped.ragged_dot)
    verify_sharded(four, KEY, ({"expert": 8},))


def test_bfloat16_stays():
    d, x = inputs("even")
    y, (experts, _, dx) = compiled(THERE, "4x2", B, L, jnp.bfloat16)[1](d, x.astype(jnp.bfloat16))
    assert {a.dtype for a in (y, dx, *experts.values())} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(y.astype(np.float32), compiled(HERE)[1](d, x)[0], rtol=0.02, atol=0.02)
