"""Decoding: one compiled loop of beam search with caches (greedy is one beam), and scoring of given texts.

Prompts are padded on the left, so that every row writes into the same cache slot; positions and masks know the
difference. Shapes come from short lists of buckets: a new length costs no new compilation beyond those.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import tree
from moe_jax.types import Array, TokenInfo

PAD, EOS = 0, 1
BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
ROOMS = (
    48,
    96,
    192,
    384,
    768,
)  # the loop ends with its last row, so a wide room costs little; each costs a compilation


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


def search(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    tasks: Sequence[int] | None = None,
    beams: int = 1,
    max_new: Sequence[int] | int,
    alpha: float = 0.6,
) -> list[Decoded]:
    """The best continuation of each prompt by beam search; `beams=1` is greedy.

    Args:
      tasks: family ids where they are known; 0, the default, is unknown.
      max_new: tokens to write at most, of each prompt or of all.
      alpha: length penalty.
    """
    limits = np.broadcast_to(np.asarray(max_new, np.int32), (len(prompts),))
    tokens, info = left_padded(prompts, tasks or [0] * len(prompts), bucket(max(map(len, prompts))))
    room = bucket(int(limits.max()), ROOMS)
    params, structure = tree.flatten(model), _structure(model)
    out = _search(structure, params, tokens, info, limits, beams=beams, room=room, alpha=alpha)
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


@functools.partial(jax.jit, static_argnums=0, static_argnames=("beams", "room", "alpha"))
def _search(
    structure: _structure,
    params: dict[str, Array],
    tokens_BxP: Array,
    info: TokenInfo,
    limit_B: Array,
    *,
    beams: int,
    room: int,
    alpha: float,
):
    """Returns (written_BxM, logprobs_BxM, lengths_B) of the best beam."""
    model = structure.filled(params)
    B, P = tokens_BxP.shape
    K, M, V = beams, room, model.vocab
    x, state, _ = model(tokens_BxP, info, model.state(B, P + M))
    # Rows of beams lie beside each other: [B * K]. Only the first beam of a row is alive at the start.
    state = jax.tree.map(lambda s: s if s.ndim < 2 else jnp.repeat(s, K, axis=1), state)
    first_BxKxV = jnp.repeat(jax.nn.log_softmax(model.logits(x[:, -1]).astype(jnp.float32))[:, None], K, axis=1)
    alive = jnp.where(jnp.arange(K) == 0, 0.0, -jnp.inf)
    length_B = info.valid_BxL.sum(1)
    task_R = jnp.repeat(info.task_BxL[:, -1], K)

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
            rows = (jnp.arange(B)[:, None] * K + parent).reshape(-1)
            state = jax.tree.map(lambda s: s if s.ndim < 2 else s[:, rows], state)
        live = ~done.reshape(-1, 1)
        place = (length_B[:, None] + t + jnp.zeros((B, K), jnp.int32)).reshape(-1, 1)
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


def score(
    model: Any, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], *, tasks: Sequence[int] | None = None
) -> list[Decoded]:
    """The log-probability of each given text (token ids, end-of-text included) after its prompt."""
    rows = [[*p, *t] for p, t in zip(prompts, texts, strict=True)]
    tokens, info = left_padded(rows, tasks or [0] * len(rows), bucket(max(map(len, rows))))
    logprobs = np.asarray(_score(_structure(model), tree.flatten(model), tokens, info))
    return [Decoded(list(t), logprobs[i, -len(t) :].tolist()) for i, t in enumerate(texts)]


@functools.partial(jax.jit, static_argnums=0)
def _score(structure: _structure, params: dict[str, Array], tokens_BxL: Array, info: TokenInfo) -> Array:
    """logprob_BxL of each token given those before it (the first is 0)."""
    model = structure.filled(params)
    x, _, _ = model(tokens_BxL, info)
    logp = jax.nn.log_softmax(model.logits(x[:, :-1]).astype(jnp.float32))
    out = jnp.take_along_axis(logp, tokens_BxL[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(out, ((0, 0), (1, 0)))
