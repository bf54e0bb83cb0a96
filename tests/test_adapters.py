"""Adapters: the base at step 0, a textbook's gradients, and nothing that stands still moves by a bit."""

from functools import partial

import child
import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from moe_jax import adapters, checkpoint, main, optim, sharding, train, tree
from moe_jax.adapters import Adapters
from moe_jax.checkpoint import CheckpointError
from moe_jax.moe import routers

BOTH = Adapters(targets=("/attention/[qkvo]$", "/experts/"), full=("/router/", "norm"), rank=3, alpha=6.0)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    return tiny.model(tiny.moe(routers.BiasBalanced))


def split(model, how=BOTH):
    return how.split(tree.flatten(model), tree.axes(model), KEY)


def with_b(moving):
    """B that is not zero, as after some steps."""
    return {p: jnp.sin(jnp.arange(x.size)).reshape(x.shape) if p.endswith(adapters.B) else x for p, x in moving.items()}


# --- the reparametrisation ------------------------------------------------------------------------------------


def test_step_0_is_the_base_to_the_bit(model):
    base, merged = tree.flatten(model), BOTH.merge(*split(model))
    assert merged.keys() == base.keys()
    jax.tree.map(np.testing.assert_array_equal, merged, base)


def test_everything_trains_unless_something_is_said(model):
    moving, frozen = split(model, adapters.EVERYTHING)
    assert not frozen and moving.keys() == tree.flatten(model).keys()
    assert adapters.EVERYTHING.merge(moving, frozen) == moving  # the very arrays
    assert moving.keys() - adapters.trained(moving).keys() == {"blocks/ffn/router/bias"}


@pytest.mark.parametrize("stack", [(), (2,), (2, 4)], ids=str)
def test_gradients_are_those_of_a_textbook_lora_layer(stack):
    """y = x W + (alpha / rank) (x A) B, for every matrix of a stack."""
    how = Adapters(targets=("w",), rank=3, alpha=6.0)
    x, w = (jax.random.normal(k, (*stack, 5, n)) for k, n in zip(jax.random.split(KEY), (5, 7), strict=True))
    moving, frozen = how.split({"w": w}, {"w": ("embed", "mlp")}, KEY)
    moving = with_b(moving)

    def merged(moving):
        return jnp.sin(x @ how.merge(moving, frozen)["w"]).sum()

    def textbook(moving):
        return jnp.sin(x @ w + 6.0 / 3 * ((x @ moving["w/lora_a"]) @ moving["w/lora_b"])).sum()

    got, expected = jax.value_and_grad(merged)(moving), jax.value_and_grad(textbook)(moving)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, expected)
    assert all(jnp.abs(g).max() > 0.1 for g in got[1].values())


def test_every_expert_of_every_layer_has_factors_of_its_own(model):
    moving, frozen = split(model)
    a, b = (moving["blocks/ffn/experts/up" + end] for end in (adapters.A, adapters.B))
    assert a.shape == (2, tiny.E, tiny.D, 3) and b.shape == (2, tiny.E, 3, 8)
    assert len(np.unique(a)) == a.size
    np.testing.assert_allclose(a.std(), tiny.D**-0.5, rtol=0.2)
    one = moving | {"blocks/ffn/experts/up" + adapters.B: b.at[1, 2].set(1.0)}
    moved = BOTH.merge(one, frozen)["blocks/ffn/experts/up"] != frozen["blocks/ffn/experts/up"]
    assert moved[1, 2].all() and moved.sum() == moved[1, 2].size


def test_frozen_leaves_in_bfloat16_are_rounded_but_routers_are_not(model):
    base = tree.flatten(model)
    half = Adapters(full=("norm",), frozen_dtype="bfloat16")
    moving, frozen = split(model, half)
    merged = half.merge(moving, frozen)
    still = {"blocks/ffn/router/gate", "blocks/ffn/router/bias"}  # of a layer of which nothing trains
    assert {p for p, x in frozen.items() if x.dtype == jnp.float32} == still
    for path, x in base.items():
        rounded = path in frozen and "router" not in path
        np.testing.assert_array_equal(merged[path], x.astype(jnp.bfloat16 if rounded else x.dtype))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"targets": ("/atention/q$",)}, r"no path .* matches '/atention/q\$'; near are .*blocks/attention/q"),
        ({"full": ("/experts/", "/scael$")}, r"no path of this model matches '/scael\$'; near are .*scale"),
        ({"targets": ("norm",)}, "scale is no matrix, it cannot have factors"),
        ({"targets": ("(q",)}, r"'\(q' is no regular expression"),
        ({"targets": "/attention/q$"}, "give lists of patterns"),
        ({"targets": ()}, "nothing would train"),
        ({"rank": 0}, "rank=0 must be 1 or more"),
        ({"frozen_dtype": "int8"}, "frozen_dtype='int8' float32 or bfloat16"),
    ],
)
def test_what_cannot_be_meant_is_one_line(model, how, message):
    with pytest.raises(ValueError, match=message) as error:
        split(model, Adapters(**how))
    assert "\n" not in str(error.value)


def test_what_trains_is_said(model):
    said = adapters.summary(*split(model, Adapters(full=("/router/",), rank=2)))
    assert said.startswith("9 leaves train, 0.00 M of 0.01 M parameters (") and "norm" not in said
    assert said.endswith("blocks/attention/v (factors), blocks/ffn/router/gate")


# --- steps ------------------------------------------------------------------------------------------------------


def stepped(mesh, micro=1):
    """(state before, moving after, metrics) of one step."""
    network = train.build(child.configured(routers.BiasBalanced, auxiliary={}), vocab=tiny.VOCAB, seed=0)
    transform = optim.adamw(lambda step: 0.01)
    with sharding.use(mesh):
        state = train.start(network, transform, mesh, BOTH)
        state.params = jax.tree.map(lambda x, y: jax.device_put(y, x.sharding), state.params, with_b(state.params))
        before = jax.device_get(state.params)
        kinds = {"seed": 0, "dtype": "float32", "max_targets": 12}
        step = train.make_step(network, transform, micro=micro, adapters=BOTH, **kinds)
        batch = sharding.put_batch(tiny.batch(), mesh)
        params, _, metrics = step(state.params, state.opt, np.int32(0), batch, state.frozen)
    return tree.flatten(network), before, state, jax.device_get(params), jax.device_get(metrics)


@pytest.fixture(scope="module")
def single():
    return stepped(child.one_device())


def test_a_step_moves_what_trains_and_nothing_else(single):
    base, before, state, after, metrics = single
    assert after.keys() == before.keys() and not after.keys() & state.frozen.keys()
    for path in after:
        assert (after[path] != before[path]).any(), path
    load = metrics["stats"].load_E
    np.testing.assert_allclose(after["blocks/ffn/router/bias"], 1e-3 * np.sign(load.mean(-1, keepdims=True) - load))
    for path, x in state.frozen.items():
        np.testing.assert_array_equal(x, base[path])


def test_the_optimiser_knows_only_what_trains(single):
    _, before, state, *_ = single
    sizes = {x.shape for x in jax.tree.leaves(state.opt)} - {()}
    assert sizes == {x.shape for x in adapters.trained(before).values()}


def test_slices_of_a_batch_add_up(single):
    whole = single[3]
    sliced = stepped(child.one_device(), micro=2)[3]
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), sliced, whole)


def test_factors_lie_as_their_leaves_and_a_step_on_a_mesh_is_that_of_one_device(single):
    _, _, state, after, metrics = stepped(sharding.make_mesh(data=2, expert=2, model=2))
    lies = {path: x.sharding.spec for path, x in (state.frozen | state.params).items()}
    up = "blocks/ffn/experts/up"
    assert lies[up] == P(None, "expert", None, "model")
    assert lies[up + adapters.A] == P(None, "expert", None, None)
    assert lies[up + adapters.B] == P(None, "expert", None, "model")
    assert lies["blocks/attention/o" + adapters.A] == P(None, "model", None)
    np.testing.assert_allclose(metrics["loss"], single[4]["loss"], rtol=1e-5)
    close = [np.isclose(after[p], x, atol=1e-4).mean() for p, x in single[3].items()]
    assert min(close) > 0.99, close


# --- files --------------------------------------------------------------------------------------------------------


def shipped(tmp_path, model, how=BOTH):
    """(base file, adapters file, what they are together)."""
    moving, frozen = split(model, how)
    moving = with_b(moving)
    checkpoint.write_safetensors(tmp_path / "base.safetensors", tree.flatten(model), {})
    about = {"adapters": {"targets": how.targets, "full": how.full, "rank": how.rank, "alpha": how.alpha}}
    about |= {"base": adapters.fingerprint({p: tree.flatten(model)[p] for p in frozen}), "families": {"asr": 1}}
    checkpoint.write_safetensors(tmp_path / "adapters.safetensors", moving, about)
    return tmp_path / "base.safetensors", tmp_path / "adapters.safetensors", how.merge(moving, frozen)


def test_factors_merge_into_their_base_and_into_no_other(tmp_path, model):
    base, factors, expected = shipped(tmp_path, model)
    table, meta = adapters.merged(factors, base)
    jax.tree.map(np.testing.assert_array_equal, table, expected)
    assert meta == {"families": {"asr": 1}}
    checkpoint.write_safetensors(base, {p: x + 1e-6 for p, x in tree.flatten(model).items()}, {})
    with pytest.raises(CheckpointError, match="is not the base of") as error:
        adapters.merged(factors, base)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params, meta: (params, {}), "holds no adapters"),
        (lambda params, meta: (params, meta | {"adapters": {"ranks": 3}}), "holds no adapters"),
        (lambda params, meta: (params, meta | {"adapters": {"rank": "3", "alpha": []}}), "holds no adapters"),
        (lambda params, meta: ({p: x for p, x in params.items() if "lora_b" not in p}, meta), "do not fit the base"),
        (lambda params, meta: ({p: x[..., :2] for p, x in params.items()}, meta), "do not fit the base"),
    ],
)
def test_a_file_of_factors_that_is_wrong_is_one_line(tmp_path, model, change, message):
    base, factors, _ = shipped(tmp_path, model)
    checkpoint.write_safetensors(factors, *change(*checkpoint.read_safetensors(factors)))
    with pytest.raises(CheckpointError, match=message) as error:
        adapters.merged(factors, base)
    assert "\n" not in str(error.value)


def test_the_gin_file_makes_adapters_of_a_run():
    flags = ["RANK=4", 'TARGETS=["/experts/"]', 'FULL=["/router/"]']
    main.load(["runs/quickstart.gin", "adapters/lora.gin"], flags)
    how = gin.get_configurable(Adapters)()
    assert (how.rank, how.targets, how.full, how.frozen_dtype) == (4, ["/experts/"], ["/router/"], "float32")
