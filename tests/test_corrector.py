"""The corrector: the contract through all its layers, its loss, and that its description rebuilds it."""

import dataclasses
import inspect
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from contract import B, Case, verify_chunks, verify_contract, verify_training
from test_moe import CHOSEN, DISPATCHES, ROUTERS, configured

from moe_jax import describe, losses, tree
from moe_jax.layers import stack, vocab
from moe_jax.layers.attention import Attention
from moe_jax.layers.param import Rngs
from moe_jax.moe import dispatch
from moe_jax.packing import Packable, pack, to_batch

KEY = jax.random.key(7)
TIGHT = partial(dispatch.slots, factor=0.5)

CAUSAL = [name for name, cls in ROUTERS.items() if getattr(cls, "causal", True)]
FFNS = {"dense": tiny.dense, "moe": tiny.moe(configured(ROUTERS["TaskMapped"], jitter=0.3), TIGHT)}


def call(model, tokens, info, state, key):
    x, state, _ = model(tokens, info, state, key)
    return model.logits(x), state


# Layers of two kinds, an expert for all beside those that are routed to, no convolution.
SHARED = partial(FFNS["moe"], shared=tiny.dense, gated_shared=True)
MIXED = tiny.configured(SHARED, layers=5, dense=tiny.dense, dense_layers=(0, 1, 3), conv_width=0, embedding_scale=1.0)
MODELS = {"moe": tiny.configured(FFNS["moe"]), "mixed": MIXED}


def case(model: str) -> Case:
    make = partial(MODELS[model], vocab=tiny.VOCAB)
    return Case(make, call, lambda model, slots: model.state(B, slots), tokens=True)


@pytest.mark.parametrize("model", MODELS)
def test_contract(model):
    verify_contract(case(model), meshes=({"data": 2, "expert": 2, "model": 2},))


@pytest.mark.parametrize("model", MODELS)
def test_chunks_with_a_state_split_over_layers(model):
    split = lambda model, slots: stack.split(model.state(B, slots), model.layers)  # noqa: E731
    verify_chunks(dataclasses.replace(case(model), empty=split))


def test_training_contract():
    verify_training(case("moe"))


def test_layers_of_two_kinds_come_in_their_order():
    model = case("mixed").layer
    tokens, info = tiny.batch().tokens_BxL, tiny.batch().info
    x, _, stats = jax.jit(model)(tokens, info)
    assert stats.load_E.shape == (2, tiny.E)  # of the two that route
    h = model.embedding[...][tokens]
    for blocks, number in (
        (model.dense_blocks, 0),
        (model.dense_blocks, 1),
        (model.blocks, 0),
        (model.dense_blocks, 2),
        (model.blocks, 1),
    ):
        h, _ = stack.part(blocks, number)(h, info, None, None)
    valid = np.asarray(info.valid_BxL)
    np.testing.assert_allclose(np.asarray(x)[valid], np.asarray(model.norm(h))[valid], atol=1e-4)


@pytest.mark.parametrize("layers", [(0, 1), (2,), ()])
def test_layers_that_are_dense_must_be_some_of_them(layers):
    with pytest.raises(ValueError, match=r"dense_layers=.* of 2 layers: name some of 0\.\.1, not all"):
        tiny.model(FFNS["moe"], dense=tiny.dense, dense_layers=layers)


# --- the loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_spare_columns_of_the_output_change_no_loss_and_no_gradient(tied, monkeypatch):
    model, batch = tiny.model(FFNS["dense"], tied=tied), tiny.batch()
    run = lambda: jax.value_and_grad(lambda t: tree.unflatten(model, t).loss(batch)[0])(tree.flatten(model))  # noqa: E731
    plain = run()
    monkeypatch.setattr(vocab, "spare_columns", lambda columns: 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run(), plain)
    monkeypatch.undo()
    assert vocab.spare_columns(4096) == 64 and not vocab.spare_columns(4000)


def test_the_loss_at_a_position_has_no_gradient_to_later_tokens():
    """Also in training with too few slots: no later token may move what an earlier one is sent to."""
    model = tiny.model(FFNS["moe"], tied=False)
    length, position = 12, 6
    (row,) = pack([Packable(range(1, length + 1), [1] + [2] * (length - 1), 2)], length)  # every token occurs once
    batch = jax.tree.map(jnp.asarray, to_batch({name: column[None] for name, column in row.items()}))
    here = jnp.zeros((1, length)).at[0, position].set(1)
    loss = lambda params: tree.unflatten(model, params).loss(dataclasses.replace(batch, weights_BxL=here), KEY)[0]  # noqa: E731
    moved = np.abs(jax.jit(jax.grad(loss))(tree.flatten(model))["embedding"]).max(1)
    assert not moved[position + 2 :].any() and not moved[0]  # tokens 1 .. position + 1 stand up to the position
    assert moved[position + 1] > 0 and np.count_nonzero(moved) > position / 2


def test_only_so_many_targets_give_the_same_loss_and_gradients():
    model, batch = tiny.model(FFNS["moe"]), tiny.batch()
    most = int(batch.weights_BxL.sum(1).max())
    assert 0 < most < batch.tokens_BxL.shape[1]

    def run(max_targets):
        loss = lambda params: tree.unflatten(model, params).loss(batch, KEY, max_targets=max_targets)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(tree.flatten(model))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), run(None), run(most))


def test_task_metrics_are_the_loss_of_each_task_and_sum_to_the_total():
    model, batch = tiny.model(), tiny.batch()
    loss, metrics = jax.jit(model.loss)(batch)
    x, _, _ = model(batch.tokens_BxL, batch.info)
    nll = np.asarray(losses.xent(model.logits(x), batch.targets_BxL))
    task, written = np.asarray(batch.info.task_BxL), np.asarray(batch.weights_BxL) > 0
    for t in range(1, 5):
        np.testing.assert_allclose(metrics["nll_T"][t], nll[written & (task == t)].sum(), rtol=1e-4)
        assert float(metrics["weight_T"][t]) == (written & (task == t)).sum() > 0
    np.testing.assert_allclose(loss, nll[written].mean(), rtol=1e-4)
    np.testing.assert_allclose(loss, metrics["nll_T"].sum() / metrics["weight_T"].sum(), rtol=1e-4)
    assert int(metrics["tokens"]) == batch.info.valid_BxL.sum()


def test_the_normaliser_replaces_the_number_of_targets():
    model, batch = tiny.model(), tiny.batch()
    loss, _ = jax.jit(model.loss)(batch)
    halved, _ = jax.jit(partial(model.loss, normaliser=2 * batch.weights_BxL.sum()))(batch)
    np.testing.assert_allclose(halved, loss / 2, rtol=1e-6)


def test_an_untrained_model_knows_nothing():
    loss, _ = jax.jit(tiny.model().loss)(tiny.batch())
    np.testing.assert_allclose(loss, np.log(tiny.VOCAB), rtol=0.25)


def test_nothing_to_write_costs_nothing():
    batch = tiny.batch()
    loss, _ = jax.jit(tiny.model().loss)(dataclasses.replace(batch, weights_BxL=jnp.zeros_like(batch.weights_BxL)))
    assert float(loss) == 0


# --- the parameters -----------------------------------------------------------------------------------------


def test_the_table_of_parameters():
    shapes = {path: x.shape for path, x in tree.flatten(tiny.model(FFNS["moe"], tied=False)).items()}
    assert shapes == {
        "blocks/attention/k": (2, 16, 8),  # two layers; two key heads of four
        "blocks/attention/o": (2, 16, 16),
        "blocks/attention/q": (2, 16, 16),
        "blocks/attention/v": (2, 16, 8),
        "blocks/conv/taps": (2, 4, 16),
        "blocks/ffn/experts/down": (2, 4, 8, 16),
        "blocks/ffn/experts/gate": (2, 4, 16, 8),
        "blocks/ffn/experts/up": (2, 4, 16, 8),
        "blocks/ffn/router/gate": (2, 16, 4),
        "blocks/norm_attention/scale": (2, 16),
        "blocks/norm_ffn/scale": (2, 16),
        "embedding": (40, 16),
        "norm/scale": (16,),
        "output": (16, 40),
    }


@pytest.mark.parametrize("ffn", FFNS)
def test_every_dim_that_a_mesh_can_divide_has_a_name(ffn):
    model = tiny.model(FFNS[ffn], tied=False)
    axes, table = tree.axes(model), tree.flatten(model)
    assert set(axes) == set(table)
    for path, x in table.items():
        stacked = path.startswith("blocks/")
        assert len(axes[path]) == x.ndim - stacked, path
    assert ("expert" in axes.get("blocks/ffn/experts/up", ())) == (ffn == "moe")


def test_a_tied_output_is_the_embedding():
    tied, free = tiny.model(tied=True), tiny.model(tied=False)
    assert set(tree.flatten(free)) - set(tree.flatten(tied)) == {"output"}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, tiny.D)), jnp.float32)
    np.testing.assert_allclose(tied.logits(x), x @ tied.embedding[...].T, rtol=1e-5)
    np.testing.assert_allclose(free.logits(x), x @ tree.flatten(free)["output"], rtol=1e-5)


def test_a_table_that_is_not_the_model_is_refused():
    model = tiny.model()
    table = tree.flatten(model)
    jax.tree.map(np.testing.assert_array_equal, tree.flatten(tree.unflatten(model, table)), table)
    table["embeding"] = table.pop("embedding")
    with pytest.raises(ValueError, match=r"missing \['embedding'\], left over \['embeding'\]"):
        tree.unflatten(model, table)


# --- the description ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("router", "to"), [("Router", "dropless"), *((r, "slots") for r in CAUSAL), *(("Router", to) for to in CHOSEN)]
)
def test_a_description_rebuilds_the_model(router, to):
    odd = {"k": 1, "jitter": 0.25, "experts": {1: 3}, "unknown_rate": 0.5, "rate": 0.125, "factor": 0.75}
    ffn = tiny.moe(configured(ROUTERS[router], **odd), configured(DISPATCHES[to], **odd))
    verify_description(tiny.configured(ffn, auxiliary={"router_z": 0.5}, tied=False, conv_width=2, remat="full"))


def test_a_description_rebuilds_a_dense_model():
    verify_description(tiny.configured())


def test_a_description_rebuilds_what_pretrained_models_need():
    attention = partial(Attention, heads=2, head=4, bias=True, rope_scaling={"rope_type": "linear", "factor": 2.0})
    verify_description(partial(MIXED, attention=attention, norm_eps=1e-5))


def verify_description(make):
    model = jax.eval_shape(lambda: make(vocab=tiny.VOCAB, rngs=Rngs(params=0)))
    text = json.dumps(describe.describe(model))
    rebuilt = jax.eval_shape(lambda: describe.configured(json.loads(text))(rngs=Rngs(params=0)))
    assert json.dumps(describe.describe(rebuilt)) == text
    shapes = lambda m: {path: (x.shape, x.dtype) for path, x in tree.flatten(m).items()}  # noqa: E731
    assert shapes(model) == shapes(rebuilt) and tree.axes(model) == tree.axes(rebuilt)
    for a, b in ((model, rebuilt), (model.blocks.ffn, rebuilt.blocks.ffn), (model.attention, rebuilt.attention)):
        for name in inspect.signature(type(a).__init__).parameters:  # every argument came back
            if isinstance(getattr(a, name, None), (int, float, str, tuple)):
                assert getattr(a, name) == getattr(b, name), name
    if hasattr(model.ffn, "router"):
        for name in ("k", "jitter", "experts", "unknown_rate", "rate"):
            assert getattr(model.ffn.router, name, None) == getattr(rebuilt.ffn.router, name, None)
        assert describe.describe(model.ffn.dispatch) == describe.describe(rebuilt.ffn.dispatch)


def test_a_rebuilt_model_computes_the_same():
    model = tiny.model(FFNS["moe"], auxiliary={"router_z": 0.5})
    again = describe.configured(json.loads(json.dumps(describe.describe(model))))(rngs=Rngs(params=0))
    run = lambda model: jax.jit(model.loss)(tiny.batch(), KEY)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, run(model), run(again))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"class": "os.system", "args": {}}, "names 'os.system'; known: Corrector, "),
        ({"class": "Corrector", "args": {"ffn": {"class": "eval"}}}, "names 'eval'; known"),
        (
            {"class": "Attention", "args": {"width": 3}},
            "description of Attention: got an unexpected keyword argument 'width'",
        ),
        (
            {"class": "slots", "args": {"capacity": 3}},
            "description of slots: got an unexpected keyword argument 'capacity'",
        ),
        ({"class": ["Corrector"], "args": {}}, r"names \['Corrector'\]; known"),
        ({"class": "Corrector", "args": [1]}, "description of Corrector: args are not an object"),
    ],
)
def test_a_description_builds_nothing_but_what_is_known(data, message):
    with pytest.raises(ValueError, match=message):
        describe.configured(data)
