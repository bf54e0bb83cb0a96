"""The grouped product: a loop over rows, however the rows fall to the experts; gradients too."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.layers.param import Module
from moe_jax.moe import grouped
from moe_jax.moe.grouped import block_rows

pytestmark = pytest.mark.usefixtures("ranks_must_match")

I, O, E = 3, 5, 4

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


def operands(rows: int):
    rng = np.random.default_rng(rows)
    return (rng.normal(size=shape).astype(np.float32) for shape in ((rows, I), (E, I, O), (rows, O)))


def by_rows(x, w, sizes):
    """y[r] = x[r] @ w[its expert]; zeros where a row has none."""
    expert = np.repeat(np.arange(E), sizes)
    y = np.zeros((len(x), O), np.float32)
    for r, e in enumerate(expert):
        y[r] = x[r] @ w[e]
    return y


def one_hot(x, w, sizes):
    """The same as a dense formula that autodiff can take."""
    expert = jnp.repeat(jnp.arange(E + 1), jnp.append(sizes, len(x) - sizes.sum()), total_repeat_length=len(x))
    return jnp.einsum("ri,eio,re->ro", x, w, jax.nn.one_hot(expert, E))


PRODUCTS = {
    name: f
    for name, f in vars(grouped).items()
    if inspect.isfunction(f) and list(inspect.signature(f).parameters)[:2] == ["size_E", "rows"]
}


def multiply(x, w, sizes, product=grouped.walk):
    """The product alone, with garbage in the spare rows."""
    way = product(sizes, len(x))
    rows = jnp.concatenate([x, jnp.full((way.spare, x.shape[1]), jnp.nan, x.dtype)])
    return way.matmul(rows, w)[: len(x)]


@partial(jax.jit, static_argnames="product")
def both(x, w, dy, sizes, product=grouped.walk):
    y, back = jax.vjp(lambda x, w: multiply(x, w, sizes, product), x, w)
    y_dense, back_dense = jax.vjp(lambda x, w: one_hot(x, w, sizes), x, w)
    return (y, *back(dy)), (y_dense, *back_dense(dy))


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products_equal_the_loop_and_their_gradients_the_dense_formula(skew, product):
    rows, sizes = SKEWS[skew]
    x, w, dy = operands(rows)
    fast, dense = both(x, w, dy, jnp.array(sizes), product)
    np.testing.assert_allclose(fast[0], by_rows(x, w, sizes), atol=1e-5)
    for a, b in zip(fast, dense, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 16), min_size=E, max_size=E).filter(lambda sizes: sum(sizes) <= 37))
def test_any_skew(sizes):
    x, w, dy = operands(37)
    fast, dense = both(x, w, dy, jnp.array(sizes))
    np.testing.assert_allclose(fast[0], by_rows(x, w, sizes), atol=1e-5)
    for a, b in zip(fast, dense, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("skew", ["many take nothing", "padding everywhere"])
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_nan_behind_the_last_row_goes_nowhere(skew, product):
    rows, sizes = SKEWS[skew]
    x, w, dy = operands(rows)
    clean, _ = both(x, w, dy, jnp.array(sizes), product)
    x[sum(sizes) :] = dy[sum(sizes) :] = np.nan
    dirty, _ = both(x, w, dy, jnp.array(sizes), product)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.any(dirty[1][sum(sizes) :])  # no gradient there either


def test_each_backend_has_its_way(monkeypatch):
    assert grouped.best() is grouped.walk
    monkeypatch.setattr(grouped.jax, "default_backend", lambda: "gpu")
    assert grouped.best() is grouped.ragged_dot


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_bfloat16_stays(product):
    x, w, _ = operands(16)
    y = multiply(jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16), jnp.array((4, 4, 4, 4)), product)
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize("rows", [0, 1, 8, 37, 1024, 4096, 1 << 20])
@pytest.mark.parametrize("experts", [1, 4, 64])
def test_blocks_waste_little_of_a_balanced_load(rows, experts):
    blocks = block_rows(rows, experts)
    assert list(blocks) == sorted(set(blocks)) and blocks[0] >= 8 and blocks[-1] <= 512
    whole, rest = divmod(rows // experts, blocks[-1])
    computed = whole * blocks[-1] + min((b for b in blocks if b >= rest), default=0) * (rest > 0)
    assert computed <= 1.25 * rows / experts + 8


class Square(Module):
    """Experts that are no plain product: (rows @ w)^2."""

    def __init__(self, w):
        self.w = nnx.Param(w)

    def __call__(self, rows, matmul):
        return matmul(rows, self.w[...]) ** 2


@pytest.mark.parametrize("skew", SKEWS)
def test_whole_experts_walk_as_their_products_do(skew):
    """Without a gradient block by block, with one product by product: the same values, and those of the formula."""
    rows, sizes = SKEWS[skew]
    x, w, _ = operands(rows)
    w, dy, sizes = w[..., :I], x + 1, jnp.array(sizes)
    way = grouped.walk(sizes, rows)
    padded = np.pad(x, ((0, way.spare), (0, 0)), constant_values=np.nan)

    def fast(w, x):
        return way.each(Square(w), x)[:rows]

    y, back = jax.vjp(fast, w, padded)
    want, back_want = jax.vjp(lambda w, x: one_hot(x, w, sizes) ** 2, w, x)
    dw, dx = back(dy)
    np.testing.assert_allclose(jax.jit(fast)(w, padded), want, atol=1e-4)
    for a, b in zip((y, dw, dx[:rows]), (want, *back_want(dy)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    assert not np.asarray(dx[rows:]).any()
