"""What every layer promises, in one place.

A `Case` says how to call a layer; each `verify_*` states one promise about it, on packed rows with padding at
the end, at the start, and everywhere. `verify_contract` is all that hold for evaluation, `verify_training` those
that must hold with a key too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding, tree
from moe_jax.layers.param import Rngs
from moe_jax.types import TokenInfo

B, L, D, VOCAB = 8, 12, 16, 40
MESHES = ({"slices": 2, "fsdp": 2, "expert": 2}, {"data": 4, "model": 2})
CHUNKS = ((1,) * 12, (4, 4, 4), (1, 4, 1, 1, 4, 1))
TOLERANCE = 2e-5


def make_info() -> TokenInfo:
    """Rows of segments 5 + 4 long and 3 of padding; of padding, then one segment; and a row of nothing."""
    segment = np.tile(np.repeat([1, 2, 0], [5, 4, 3]), (B, 1)).astype(np.int32)
    position = np.tile(np.r_[0:5, 0:4, [0] * 3], (B, 1)).astype(np.int32)
    segment[1], position[1] = np.repeat([0, 1], [3, 9]), np.r_[[0] * 3, 0:9]
    segment[2] = position[2] = 0
    task = np.where(segment > 0, 1 + (segment + np.arange(B)[:, None]) % 4, 0).astype(np.int32)
    token = np.random.default_rng(0).integers(1, VOCAB, (B, L)).astype(np.int32)
    return TokenInfo(*map(jnp.asarray, (task, segment > 0, segment, position, token)))


def part(info: TokenInfo, rows: slice, places: slice) -> TokenInfo:
    return jax.tree.map(lambda a: a[rows, places], info)


@dataclasses.dataclass
class Case:
    """A layer and how it is used.

    Attributes:
      make: (rngs) -> layer.
      call: (layer, x, info, state, key) -> (y, state).
      empty: (layer, slots) -> the state before the first position.
      tokens: the input is token ids instead of vectors.
    """

    make: Callable[..., Any]
    call: Callable[..., tuple[Any, Any]]
    empty: Callable[..., Any] = lambda layer, slots: None
    tokens: bool = False

    @cached_property
    def layer(self) -> Any:
        """With every parameter moved at random: initial zeros and ones would hide mistakes."""
        layer = self.make(rngs=Rngs(params=0))
        rng = np.random.default_rng(1)
        table = {p: x + 0.2 * rng.normal(size=x.shape).astype(x.dtype) for p, x in tree.flatten(layer).items()}
        return tree.unflatten(layer, table)

    @cached_property
    def info(self) -> TokenInfo:
        return make_info()

    @cached_property
    def x(self) -> Any:
        rng = np.random.default_rng(2)
        x = rng.integers(1, VOCAB, (B, L)) if self.tokens else rng.normal(size=(B, L, D)).astype(np.float32)
        return np.where(self.valid, x, 0)

    @cached_property
    def valid(self) -> np.ndarray:
        """[B, L], or [B, L, 1] to go with vectors."""
        valid = np.asarray(self.info.valid_BxL)
        return valid if self.tokens else valid[..., None]

    def loss(self, params: dict, x: Any, info: TokenInfo, key: Any) -> tuple[Any, Any]:
        y, _ = self.call(tree.unflatten(self.layer, params), x, info, None, key)
        y = jnp.where(info.valid_BxL[..., None], y, 0)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    @cached_property
    def run(self) -> Callable:
        """(x, info, key) -> (valid y, gradients by path)."""
        grad = jax.jit(jax.value_and_grad(self.loss, has_aux=True))

        def run(x, info, key=None):
            (_, y), grads = grad(tree.flatten(self.layer), x, info, key)
            return np.asarray(y), jax.device_get(grads)

        return run

    def garbage(self, where: np.ndarray) -> Any:
        """x with NaN (other tokens) in the places of `where`."""
        return np.where(where, VOCAB - 1 - self.x if self.tokens else np.nan, self.x).astype(self.x.dtype)

    def other(self, where: np.ndarray) -> Any:
        """x with other values in the places of `where`."""
        return np.where(where, VOCAB - 1 - self.x if self.tokens else 3 - 2 * self.x, self.x).astype(self.x.dtype)


def close(a: Any, b: Any, what: str) -> None:
    for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = max(1.0, float(np.abs(left).max()))
        np.testing.assert_allclose(right, left, rtol=0, atol=TOLERANCE * scale, err_msg=f"{what} {path}")


def verify_padding(case: Case, key=None) -> None:
    """Whatever lies in padding, NaN too, reaches no valid output and no gradient."""
    y, grads = case.run(case.x, case.info, key)
    again, grads_again = case.run(case.garbage(~case.valid), case.info, key)
    np.testing.assert_array_equal(y, again)
    assert all(np.isfinite(g).all() for g in grads_again.values()), [
        p for p, g in grads_again.items() if np.isnan(g).any()
    ]
    close(grads, grads_again, "gradients with garbage in padding")


def verify_causal(case: Case, key=None) -> None:
    """What comes later moves nothing before it, in training too; and it does move what is there."""
    y, _ = case.run(case.x, case.info, key)
    for cut in (1, 4, 7, 10):
        later = np.arange(L).reshape((1, L, 1)[: case.valid.ndim]) >= cut
        moved, _ = case.run(case.other(later & case.valid), case.info, key)
        close(y[:, :cut], moved[:, :cut], f"before position {cut}")
        assert cut > 1 or np.abs(moved[:, cut:] - y[:, cut:]).max() > 0.01


def verify_segments(case: Case, key=None) -> None:
    """Two segments of a row do not see each other: packed they are what they are alone."""
    y, _ = case.run(case.x, case.info, key)
    for segment in (1, 2):
        own = np.asarray(case.info.segment_BxL) == segment
        alone, _ = case.run(case.x, jax.tree.map(lambda a, own=own: jnp.where(own, a, 0), case.info), key)
        close(y[own], alone[own], f"segment {segment} alone")


def verify_chunks(case: Case) -> None:
    """Chunk after chunk, the state handed on, gives the whole."""
    y, _ = case.run(case.x, case.info)
    call = jax.jit(case.call)
    for sizes in CHUNKS:
        state, pieces = case.empty(case.layer, L), []
        for size, start in zip(sizes, np.cumsum((0, *sizes)), strict=False):
            places = slice(start, start + size)
            piece, state = call(case.layer, case.x[:, places], part(case.info, slice(None), places), state, None)
            pieces.append(piece)
        together = np.where(np.asarray(case.info.valid_BxL)[..., None], np.concatenate(pieces, 1), 0)
        close(y, together, f"chunks of {sizes}")


def verify_sharded(case: Case, key=None, meshes=MESHES) -> None:
    """Spread over a mesh, values and gradients are those of one device."""
    y, grads = case.run(case.x, case.info, key)
    for sizes in meshes:
        mesh = sharding.make_mesh(**sizes)
        params = tree.flatten(case.layer)
        layout = sharding.shardings(tree.axes(case.layer), params, mesh)
        params = {path: jax.device_put(x, layout[path]) for path, x in params.items()}
        with sharding.use(mesh):
            x, info = sharding.put_batch((case.x, case.info), mesh)
            grad = jax.jit(jax.value_and_grad(lambda *args: case.loss(*args), has_aux=True))
            (_, y_mesh), grads_mesh = grad(params, x, info, key)
        close((y, grads), (np.asarray(y_mesh), jax.device_get(grads_mesh)), f"on {sizes}")


def verify_contract(case: Case, meshes=MESHES) -> None:
    verify_padding(case)
    verify_causal(case)
    verify_segments(case)
    verify_chunks(case)
    verify_sharded(case, meshes=meshes)


def verify_training(case: Case) -> None:
    key = jax.random.key(3)
    verify_padding(case, key)
    verify_causal(case, key)
