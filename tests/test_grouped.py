"""Experts on sorted rows: a loop over rows, however the rows fall to the experts; gradients too."""

import inspect
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import tree
from moe_jax.describe import KNOWN
from moe_jax.layers import stack
from moe_jax.layers.param import Rngs
from moe_jax.moe import grouped, megablox
from moe_jax.moe.experts import Gated
from moe_jax.moe.grouped import block_rows

pytestmark = pytest.mark.usefixtures("ranks_must_match")

D, HIDDEN, E = 3, 5, 4

# rows in all, rows of each expert; what is left is padding behind them
SKEWS = {
    "even": (16, (4, 4, 4, 4)),
    "one expert takes all": (16, (0, 16, 0, 0)),
    "the first takes all": (16, (16, 0, 0, 0)),
    "the last takes all": (16, (0, 0, 0, 16)),
    "many take nothing": (16, (0, 5, 0, 3)),
    "one row": (16, (0, 0, 1, 0)),
    "one row of one": (1, (0, 0, 1, 0)),
    "padding everywhere": (16, (0, 0, 0, 0)),
    "no multiples of a block": (37, (9, 1, 17, 8)),
    "a block and one more": (19, (8, 9, 1, 1)),
    "no rows at all": (0, (0, 0, 0, 0)),
}

PRODUCTS = {
    name: f
    for name, f in vars(grouped).items()
    if inspect.isfunction(f) and list(inspect.signature(f).parameters)[:2] == ["size_E", "rows"]
}

EXPERTS = Gated(D, E, hidden=HIDDEN, rngs=Rngs(params=0))


def operands(rows: int):
    """x and dy."""
    return np.random.default_rng(rows).normal(size=(2, rows, D)).astype(np.float32)


def by_rows(x, sizes):
    """Each row through its expert; zeros where a row has none."""
    weights = tree.flatten(EXPERTS)
    y = np.zeros_like(x)
    for r, e in enumerate(np.repeat(np.arange(E), sizes)):
        gate, up, down = (np.asarray(weights[name][e], np.float64) for name in ("gate", "up", "down"))
        y[r] = (x[r] @ gate / (1 + np.exp(-x[r] @ gate)) * (x[r] @ up)) @ down
    return y


def dense(experts, x, sizes):
    """The same as a formula that autodiff can take: every expert on every row, by one-hot."""
    expert = jnp.repeat(jnp.arange(E + 1), jnp.append(sizes, len(x) - sizes.sum()), total_repeat_length=len(x))
    return grouped.apply(experts, x, lambda rows, w: jnp.einsum("ri,eio,re->ro", rows, w, jax.nn.one_hot(expert, E)))


def sorted_rows(experts, x, sizes, product):
    """With garbage in the spare rows."""
    way = product(sizes, len(x))
    rows = jnp.concatenate([x, jnp.full((way.spare, D), jnp.nan, x.dtype)])
    return way.apply(experts, rows)[: len(x)]


@partial(jax.jit, static_argnames="product")
def run(x, dy, sizes, product):
    """y, its gradients by weights and rows, and y of a call without a gradient; rows of nobody are not looked at."""
    y, back = jax.vjp(lambda experts, x: sorted_rows(experts, x, sizes, product), EXPERTS, x)
    of_somebody = lambda rows: jnp.where((jnp.arange(len(x)) < sizes.sum())[:, None], rows, 0)  # noqa: E731
    dw, dx = back(dy)
    return of_somebody(y), dw, of_somebody(dx), of_somebody(sorted_rows(EXPERTS, x, sizes, product))


@jax.jit
def expected(x, dy, sizes):
    y, back = jax.vjp(lambda experts, x: dense(experts, x, sizes), EXPERTS, x)
    return y, *back(dy), y


def close(a, b, atol=1e-5):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_every_way_equals_the_loop_and_its_gradients_the_dense_formula(skew, product):
    rows, sizes = SKEWS[skew]
    x, dy = operands(rows)
    found = run(x, dy, jnp.array(sizes), product)
    close(found[0], by_rows(x, sizes))
    close(found, expected(x, dy, jnp.array(sizes)))


@pytest.mark.parametrize("skew", ["one expert takes all", "many take nothing", "no multiples of a block"])
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_experts_that_are_apart(skew, product):
    """As decoding has them: an array an expert."""
    rows, sizes = SKEWS[skew]
    x, _ = operands(rows)
    apart = jax.tree.map(lambda w: stack.Apart(tuple(w)), EXPERTS)
    y = jax.jit(partial(sorted_rows, product=product))(apart, x, jnp.array(sizes))
    close(y[: sum(sizes)], by_rows(x, sizes)[: sum(sizes)])


@pytest.mark.parametrize("cores", [1, 2])
def test_matrices_whose_rows_lie_pages_apart(cores, monkeypatch):
    """They are widened, where a bias or another type of number is not, and nothing else changes; within a walk on one
    core alone."""
    monkeypatch.setattr(grouped, "PAGE", HIDDEN)
    monkeypatch.setattr(grouped.sharding, "cores", lambda: cores)
    assert isinstance(grouped._wide(EXPERTS, 0).up[...], grouped.Wide) == (cores == 1)
    w = EXPERTS.up[0]
    assert isinstance(grouped.widened(w), grouped.Wide)
    close(grouped.times(np.ones((2, D), np.float32), grouped.widened(w)), np.ones((2, D)) @ w)
    assert not any(isinstance(grouped.widened(x), grouped.Wide) for x in (w[:1], w.astype(jnp.bfloat16), w[:, 1:]))
    rows, sizes = SKEWS["no multiples of a block"]
    x, dy = operands(rows)
    close(
        jax.jit(partial(run.__wrapped__, product=grouped.walk))(x, dy, jnp.array(sizes)),
        expected(x, dy, jnp.array(sizes)),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 16), min_size=E, max_size=E).filter(lambda sizes: sum(sizes) <= 37))
def test_any_skew(sizes):
    x, dy = operands(37)
    close(run(x, dy, jnp.array(sizes), grouped.walk), expected(x, dy, jnp.array(sizes)))


@pytest.mark.parametrize("skew", ["many take nothing", "padding everywhere"])
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_nan_behind_the_last_row_goes_nowhere(skew, product):
    rows, sizes = SKEWS[skew]
    x, dy = operands(rows)
    clean = run(x, dy, jnp.array(sizes), product)
    x[sum(sizes) :] = dy[sum(sizes) :] = np.nan
    dirty = run(x, dy, jnp.array(sizes), product)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_can_name_every_way():
    assert set(PRODUCTS.values()) <= set(KNOWN.values())


def test_each_backend_has_its_way(monkeypatch):
    assert grouped.best() is grouped.walk
    for kind, way in (
        (("tpu", "TPU v5"), grouped.megablox),
        (("tpu", "TPU v6 lite"), grouped.mixed),
        (("gpu", "NVIDIA H100"), grouped.tokamax),
    ):
        monkeypatch.setattr(grouped.sharding, "kind", lambda kind=kind: kind)
        assert grouped.best() is way
    monkeypatch.setattr(grouped.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match=r"pip install 'moe_jax\[gpu\]'"):
        assert grouped.best() is grouped.ragged_dot


@pytest.mark.parametrize("sizes", [(100, 28, 0, 200), (0, 129, 127, 1), (384, 0, 0, 0)])
def test_tpu_kernels_over_more_than_one_tile_of_rows(sizes):
    x, dy = operands(384)
    for way in (grouped.megablox, grouped.mixed):
        close(run(x, dy, jnp.array(sizes), way), expected(x, dy, jnp.array(sizes)), 1e-4)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("experts, inputs, outputs", [(8, 4096, 14336), (8, 14336, 4096), (64, 2048, 1024), (4, 3, 5)])
def test_tiles_fit_a_tpu(experts, inputs, outputs, weights):
    rows, *columns = megablox.tiling(16384, inputs, outputs, experts, 2, weights=weights)
    assert 16384 % rows == 0
    assert all(
        c == size or (c % 128 == 0 and c < size + 128) for c, size in zip(columns, (inputs, outputs), strict=True)
    )
    i, o = columns
    blocks = 2 * 2 * (rows * i + i * o + rows * o) + 4 * (i if weights else rows) * o
    assert blocks <= 16 << 20


def test_tiles_of_rows_grow_with_the_load_and_divide_it():
    """Few rows of each expert take small tiles, many take larger ones, of what divides all rows."""
    rows = [megablox.tiling(r, 4096, 4096, 8, 2)[0] for r in (1024, 16384, 1 << 20, (1 << 20) + 256, (1 << 20) + 128)]
    assert rows == [128, 256, 512, 256, 128]


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_bfloat16_stays(product):
    x, dy, experts = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (*operands(16), EXPERTS))
    y, back = jax.vjp(lambda e, x: sorted_rows(e, x, jnp.array((4, 4, 4, 4)), product), experts, x)
    assert {leaf.dtype for leaf in jax.tree.leaves((y, back(dy)))} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("rows", [0, 1, 8, 37, 48, 1024, 4096, 1 << 20])
@pytest.mark.parametrize("experts", [1, 4, 64])
def test_blocks_waste_little_of_a_balanced_load(rows, experts):
    blocks = block_rows(rows, experts)
    assert blocks[0] <= max(8, rows / experts / 5)
    assert all(b == 2 * a for a, b in itertools.pairwise(blocks)) and blocks[0] >= 8 and blocks[-1] <= 512
    assert blocks[-1] <= max(8, 1.4 * rows / experts) and blocks[-1] <= rows + blocks[0]
    computed = -(-(rows // experts) // blocks[0]) * blocks[0]
    assert computed <= 1.25 * rows / experts + 8
