"""Decoding: read the prompts once, then search (one compiled loop; greedy is one beam) and score texts after them.

Prompts are padded on the left, so that every row writes into the same cache slot; positions and masks know the
difference. Shapes come from short lists of buckets: a new length costs no new compilation beyond those. A prompt that
was read may be searched and scored after any number of times, so its state is copied, not donated, to the search.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import tree, xla
from moe_jax.layers import stack
from moe_jax.moe.dispatch import WRITTEN_OUT
from moe_jax.types import Array, TokenInfo, value

PAD, EOS = 0, 1
BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
ROOMS = (48, 96, 144, 192, 288, 384, 576, 768)  # a step reads all of its room, and each costs a program
SLOTS = (64, 128, 256, 512, 1024)  # of the caches: one program of search serves the prompts of several buckets


@value
class Prefill:
    """Prompts that the model has read.

    Attributes:
      state: its state after them, with `SLOTS` that they fill in part.
      logp_BxV: log-probabilities, float32, of what comes next.
      length_B: tokens in each prompt.
      task_B: family of each; 0 is unknown.
    """

    state: Any
    logp_BxV: Array
    length_B: Array
    task_B: Array


@dataclasses.dataclass(frozen=True)
class Decoded:
    """One written text: its tokens (end-of-text included if reached) and the log-probability of each, in nats."""

    tokens: list[int]
    logprobs: list[float]

    @property
    def total(self) -> float:
        return float(sum(self.logprobs))

    @property
    def ended(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] == EOS


def bucket(size: int, buckets: Sequence[int] = BUCKETS) -> int:
    """The smallest bucket that holds `size`. Raises ValueError beyond the last."""
    for b in buckets:
        if size <= b:
            return b
    raise ValueError(f"{size} tokens are more than the longest bucket ({buckets[-1]})")


def length_penalty(length: Any, alpha: float) -> Any:
    """((5 + length) / 6) ** alpha (Wu et al. 2016); 0 switches it off."""
    return ((5.0 + length) / 6.0) ** alpha


def left_padded(prompts: Sequence[Sequence[int]], tasks: Sequence[int], length: int) -> tuple[np.ndarray, TokenInfo]:
    """tokens_BxL and their TokenInfo, padding on the left."""
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    start = length - np.array([len(p) for p in prompts])[:, None]
    position = np.arange(length)[None] - start
    valid = position >= 0
    task = np.where(valid, np.asarray(tasks, np.int32)[:, None], 0)
    parts = (task, valid, valid.astype(np.int32), np.maximum(position, 0).astype(np.int32))
    return tokens, TokenInfo(*(jnp.asarray(p) for p in parts))


def prefill(model: Any, prompts: Sequence[Sequence[int]], tasks: Sequence[int] | None = None) -> Prefill:
    """Reads the prompts. `tasks`: family ids where they are known; 0, the default, is unknown."""
    tokens, info = left_padded(prompts, tasks or [0] * len(prompts), bucket(max(map(len, prompts))))
    return _prefill()(_structure(model), tree.flatten(model), tokens, info)


def search(
    model: Any,
    read: Prefill,
    *,
    beams: int = 1,
    max_new: Sequence[int] | int,
    alpha: float = 0.6,
) -> list[Decoded]:
    """The best continuation of each prompt by beam search; `beams=1` is greedy.

    Args:
      max_new: tokens to write at most, of each prompt or of all.
      alpha: length penalty.
    """
    limits = np.broadcast_to(np.asarray(max_new, np.int32), read.length_B.shape)
    room = bucket(int(limits.max()), ROOMS)
    out = _search()(_structure(model), tree.flatten(model), read, limits, beams=beams, room=room, alpha=alpha)
    written, logprobs, lengths = (np.asarray(a) for a in out)
    return [Decoded(w[:n].tolist(), p[:n].tolist()) for w, p, n in zip(written, logprobs, lengths, strict=True)]


class _structure:
    """A model's structure without its arrays: hashable, so that compiled programs are found again."""

    def __init__(self, model: Any):
        self.treedef = jax.tree.structure(model)
        self.model = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model)
        self.key = str(self.treedef)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _structure) and self.key == other.key

    def filled(self, params: dict[str, Array]) -> Any:
        return tree.unflatten(self.model, params)


def _compiled(**options: Any) -> Callable[[Callable], Callable[[], Any]]:
    """A program of (structure, ...), made when it is first asked for: importing this file must not start a backend."""

    def program(function: Callable) -> Callable[[], Any]:
        return functools.cache(lambda: jax.jit(function, static_argnums=0, compiler_options=xla.options(), **options))

    return program


@_compiled()
def _prefill(structure: _structure, params: dict[str, Array], tokens_BxP: Array, info: TokenInfo) -> Prefill:
    model = structure.filled(params)
    B, P = tokens_BxP.shape
    x, state, _ = model(tokens_BxP, info, model.state(B, bucket(P, SLOTS)))
    logp = jax.nn.log_softmax(model.logits(x[:, -1]).astype(jnp.float32))
    return Prefill(state, logp, info.valid_BxL.sum(1), info.task_BxL[:, -1])


@_compiled(static_argnames=("beams", "room", "alpha"))
def _search(
    structure: _structure,
    params: dict[str, Array],
    read: Prefill,
    limit_B: Array,
    *,
    beams: int,
    room: int,
    alpha: float,
):
    """Returns (written_BxM, logprobs_BxM, lengths_B) of the best beam."""
    model = jax.lax.optimization_barrier(_apart(structure.filled(params)))  # or XLA slices in every step
    B, K, M, V = len(limit_B), beams, room, model.vocab
    # Rows of beams lie beside each other: [B * K]. Only the first beam of a row is alive at the start.
    state = tuple(one.shared(K, M) for one in stack.split(read.state, model.layers))
    first_BxKxV = jnp.repeat(read.logp_BxV[:, None], K, axis=1)
    alive = jnp.where(jnp.arange(K) == 0, 0.0, -jnp.inf)
    task_R = jnp.repeat(read.task_B, K)

    def choose(logp_BxKxV, total_BxK, done_BxK, count_BxK):
        """The K best of all continuations. A finished beam goes on with PAD at no cost; a full one must end."""
        only = jnp.full((V,), -jnp.inf)
        logp = jnp.where(done_BxK[..., None], only.at[PAD].set(0.0), logp_BxKxV.at[..., PAD].set(-jnp.inf))
        full = (count_BxK + 1 >= limit_B[:, None])[..., None] & ~done_BxK[..., None]
        logp = jnp.where(full & (jnp.arange(V) != EOS), -jnp.inf, logp)
        total = total_BxK[..., None] + logp
        after = (count_BxK + ~done_BxK).astype(jnp.float32)
        _, flat = jax.lax.top_k((total / length_penalty(after, alpha)[..., None]).reshape(B, K * V), K)
        parent, token = flat // V, flat % V
        pick = lambda a: jnp.take_along_axis(a, parent, axis=1)  # noqa: E731
        gain = jnp.take_along_axis(logp.reshape(B, K * V), flat, axis=1)
        return parent, token, gain, pick(total_BxK) + gain, pick(done_BxK)

    def body(carry):
        t, state, logp, total, done, count, written, gains = carry
        parent, token, gain, total, done = choose(logp, total, done, count)
        reorder = lambda a: jnp.take_along_axis(a, parent[..., None], axis=1)  # noqa: E731
        written = reorder(written).at[:, :, t].set(token)
        gains = reorder(gains).at[:, :, t].set(jnp.where(done, 0.0, gain))
        count = jnp.take_along_axis(count, parent, axis=1) + ~done
        done = done | (token == EOS)
        if K > 1:
            state = tuple(one.descended(parent) for one in state)
        live = ~done.reshape(-1, 1)
        place = (read.length_B[:, None] + t + jnp.zeros((B, K), jnp.int32)).reshape(-1, 1)
        step = TokenInfo(jnp.where(live, task_R[:, None], 0), live, live.astype(jnp.int32), place)
        x, state, _ = model(jnp.where(live, token.reshape(-1, 1), PAD), step, state)
        logp = jax.nn.log_softmax(model.logits(x[:, -1]).astype(jnp.float32)).reshape(B, K, V)
        return t + 1, state, logp, total, done, count, written, gains

    start = (
        jnp.zeros((), jnp.int32),
        state,
        first_BxKxV,
        jnp.broadcast_to(alive, (B, K)),
        jnp.zeros((B, K), bool),
        jnp.zeros((B, K), jnp.int32),
        jnp.zeros((B, K, M), jnp.int32),
        jnp.zeros((B, K, M)),
    )
    end = jax.lax.while_loop(lambda c: (c[0] < M) & ~c[4].all(), body, start)
    _, _, _, total, _, count, written, gains = end
    best = jnp.argmax(total / length_penalty(count.astype(jnp.float32), alpha), axis=1)[:, None]
    take = lambda a: jnp.take_along_axis(a, best.reshape(B, 1, *(1,) * (a.ndim - 2)), axis=1)[:, 0]  # noqa: E731
    return take(written), take(gains), take(count)


def score(model: Any, read: Prefill, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> list[Decoded]:
    """The log-probability of each given text (token ids, end-of-text included) after the prompt `rows` names."""
    tokens = np.zeros((len(texts), bucket(max(map(len, texts)), ROOMS)), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    lengths = np.array([len(t) for t in texts])
    logprobs = np.asarray(_score()(_structure(model), tree.flatten(model), read, np.asarray(rows), tokens, lengths))
    return [Decoded(list(t), p[: len(t)].tolist()) for t, p in zip(texts, logprobs, strict=True)]


@_compiled()
def _score(
    structure: _structure, params: dict[str, Array], read: Prefill, row_R: Array, tokens_RxM: Array, length_R: Array
) -> Array:
    """logprob_RxM of each token given its prompt and those before it."""
    model = structure.filled(params)
    M = tokens_RxM.shape[1]
    valid = jnp.arange(M) < length_R[:, None]
    task = jnp.where(valid, read.task_B[row_R][:, None], 0)
    info = TokenInfo(task, valid, valid.astype(jnp.int32), read.length_B[row_R][:, None] + jnp.arange(M))
    x, _, _ = model(tokens_RxM, info, _rows(read.state, row_R).grown(M))
    after = jax.nn.log_softmax(model.logits(x[:, :-1]).astype(jnp.float32))
    logp = jnp.concatenate([read.logp_BxV[row_R][:, None], after], axis=1)
    return jnp.take_along_axis(logp, tokens_RxM[..., None], axis=-1)[..., 0]


def _apart(model: Any) -> Any:
    """`model` with the matrices of each layer and each expert as arrays of their own, on CPU. (Elsewhere a slice is no
    copy, and these would be.)"""
    if jax.default_backend() != "cpu":
        return model

    def parts(x: Array, words: Sequence[str | None]) -> Any:
        stacked = x.ndim > len(words) or (words[:1] == ("expert",) and len(x) <= WRITTEN_OUT)
        return stack.Apart(tuple(parts(part, words[-part.ndim :]) for part in x)) if stacked else x

    words = tree.axes(model)
    return tree.unflatten(model, {name: parts(x, words[name]) for name, x in tree.flatten(model).items()})


def _rows(state: Any, row_R: Array) -> Any:
    """The state of some rows, stacked over layers; leaves without rows count slots."""
    return jax.tree.map(lambda s: s if s.ndim < 2 else jnp.take(s, row_R, axis=1), state)
