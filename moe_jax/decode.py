"""Decoding: read the prompts once, then search or sample after them (one compiled loop; greedy is one beam), and score
given texts.

Prompts are padded on the right, so that they may follow a prefix that was read once for all; every row then writes into
the same cache slot, and positions and masks know of the holes. Shapes come from short lists of buckets: a new length
costs no new compilation beyond those. A prompt that was read may be searched and scored after any number of times, so
its state is copied, not donated, to the search.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding, tree
from moe_jax.layers import stack
from moe_jax.programs import Structure, apart, compiled, of_rows
from moe_jax.sampling import Sampling, draw, keys
from moe_jax.types import Array, TokenInfo, value

EOS = 1  # of the library's own tokenisers
BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
ROOMS = (48, 96, 144, 192, 288, 384, 576, 768)  # a step reads all of its room, and each costs a program
SLOTS = (64, 128, 256, 512, 1024, 2048)  # of the caches: one program of search serves the prompts of several buckets


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

    @property
    def slots(self) -> int:
        return self.state.attention.segment_BxS.shape[-1]


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What every prompt of a job begins with, read once: its tokens, their family and the state after them."""

    tokens: tuple[int, ...]
    task: int
    state: Any


@dataclasses.dataclass(frozen=True)
class Decoded:
    """One written text: its tokens (end-of-text included if reached) and the log-probability of each, in nats.

    Attributes:
      ended: whether the last token is an end of text.
    """

    tokens: list[int]
    logprobs: list[float]
    ended: bool

    @property
    def total(self) -> float:
        return float(sum(self.logprobs))


def bucket(size: int, buckets: Sequence[int] = BUCKETS) -> int:
    """The smallest bucket that holds `size`. Raises ValueError beyond the last."""
    for b in buckets:
        if size <= b:
            return b
    raise ValueError(f"{size} tokens are more than the longest bucket ({buckets[-1]})")


def length_penalty(length: Any, alpha: float) -> Any:
    """((5 + length) / 6) ** alpha (Wu et al. 2016); 0 switches it off."""
    return ((5.0 + length) / 6.0) ** alpha


def padded(
    prompts: Sequence[Sequence[int]], tasks: Sequence[int], length: int, start: int = 0
) -> tuple[np.ndarray, TokenInfo]:
    """tokens_BxL, padding on the right, and their TokenInfo; the first is at position `start`."""
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    valid = np.arange(length) < np.array([len(p) for p in prompts])[:, None]
    task = np.where(valid, np.asarray(tasks, np.int32)[:, None], np.int32(0))
    position = np.where(valid, start + np.arange(length, dtype=np.int32), np.int32(0))
    info: tuple[Any, ...] = task, valid, valid.astype(np.int32), position
    return tokens, TokenInfo(*info)


def read_prefix(model: Any, tokens: Sequence[int], task: int = 0) -> Prefix:
    """Reads what prompts share. Each length is a program of its own: round it."""
    batch = padded([tokens], [task], len(tokens))
    slots = bucket(len(tokens), SLOTS)
    read = _prefill()(Structure(model), tree.flatten(model), *batch, None, grown=slots)
    return Prefix(tuple(tokens), task, read.state)


def prefill(
    model: Any, prompts: Sequence[Sequence[int]], tasks: Sequence[int] | None = None, prefix: Prefix | None = None
) -> Prefill:
    """Reads the prompts.

    Args:
      tasks: family ids where they are known; 0, the default, is unknown.
      prefix: what all of them begin with and go on after; of the same family. Their state is the same as without it.

    Raises ValueError for a prompt that does not.
    """
    tasks = tasks or [0] * len(prompts)
    if prefix is None:
        tokens, info = padded(prompts, tasks, length := bucket(max(map(len, prompts))))
        return _prefill()(Structure(model), tree.flatten(model), tokens, info, None, grown=bucket(length, SLOTS))
    start = len(prefix.tokens)
    for prompt, task in zip(prompts, tasks, strict=True):
        if len(prompt) <= start or tuple(prompt[:start]) != prefix.tokens or task != prefix.task:
            raise ValueError(f"a prompt of {len(prompt)} tokens and task {task} does not go on after the prefix")
    tokens, info = padded([p[start:] for p in prompts], tasks, length := bucket(max(map(len, prompts)) - start), start)
    grown = bucket(start + length, SLOTS) - bucket(start, SLOTS)
    return _prefill()(Structure(model), tree.flatten(model), tokens, info, prefix.state, grown=grown)


def search(
    model: Any,
    read: Prefill,
    *,
    beams: int = 1,
    max_new: Sequence[int] | int,
    alpha: float = 0.6,
    eos: Sequence[int] = (EOS,),
) -> list[Decoded]:
    """The best continuation of each prompt by beam search; `beams=1` is greedy.

    Args:
      max_new: tokens to write at most, of each prompt or of all; the last of them can only be an end.
      alpha: length penalty.
      eos: the tokens that end a text, any of them.
    """
    return [best for best, *_ in nbest(model, read, beams=beams, max_new=max_new, alpha=alpha, eos=eos)]


def nbest(
    model: Any,
    read: Prefill,
    *,
    beams: int,
    max_new: Sequence[int] | int,
    alpha: float = 0.6,
    eos: Sequence[int] = (EOS,),
) -> list[list[Decoded]]:
    """All that `search` ends with: `beams` continuations of each prompt, the best first. Where there are fewer texts
    than beams, the last have a log-probability of minus infinity."""
    alive = np.full(beams, -np.inf, np.float32)
    alive[0] = 0.0  # all beams begin alike: only one is alive at the start
    return _texts(model, read, alive, None, None, max_new, alpha=alpha, eos=eos)


def sample(
    model: Any,
    read: Prefill,
    sampling: Sampling,
    *,
    samples: int = 1,
    seed: int = 0,
    record: Sequence[int],
    max_new: Sequence[int] | int,
    eos: Sequence[int] = (EOS,),
) -> list[list[Decoded]]:
    """So many random continuations of each prompt, the likeliest first.

    Args:
      seed, record: of the random numbers: what is drawn for a record does not depend on what shares its batch.
      max_new, eos: as of `search`.
    """
    key_R = keys(seed, jnp.asarray(record, jnp.uint32), samples)
    bits_R = np.asarray(jax.random.key_data(key_R))  # of this host: a program on several takes NumPy's arrays or theirs
    return _texts(model, read, np.zeros(samples, np.float32), bits_R, sampling, max_new, alpha=0.0, eos=eos)


def _texts(model, read, alive_K, bits_R, sampling, max_new, *, alpha, eos) -> list[list[Decoded]]:
    """The texts of all beams or samples of each prompt, best first."""
    limits = np.broadcast_to(np.asarray(max_new, np.int32), read.length_B.shape)
    room = bucket(int(limits.max()), ROOMS)
    arrays = Structure(model), tree.flatten(model), read, limits, alive_K, bits_R
    out = _search()(*arrays, sampling=sampling, room=room, alpha=alpha, eos=tuple(eos))
    return [
        [Decoded(w[:n].tolist(), p[:n].tolist(), w[n - 1] in eos) for w, p, n in zip(*of_row, strict=True)]
        for of_row in zip(*map(np.asarray, out), strict=True)
    ]


@compiled(static_argnames="grown")
def _prefill(
    structure: Structure, params: dict[str, Array], tokens_BxP: Array, info: TokenInfo, before: Any, *, grown: int
) -> Prefill:
    """`before`: the state of the one row that all go on after; `grown`: its additional slots."""
    model = structure.filled(params)
    B = len(tokens_BxP)
    if hasattr(model, "read"):  # an encoder reads them; what is written counts from 0
        x_BxD, state = model.read(tokens_BxP, info)
        logp = jax.nn.log_softmax(model.logits(x_BxD).astype(jnp.float32))
        return Prefill(state, logp, jnp.ones(B, jnp.int32), info.task_BxL[:, 0])
    state = model.state(B, grown) if before is None else of_rows(before, jnp.zeros(B, jnp.int32)).grown(grown)
    x, state, _ = model(tokens_BxP, info, state)
    last = info.valid_BxL.sum(1) - 1
    x_BxD = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    logp = jax.nn.log_softmax(model.logits(x_BxD).astype(jnp.float32))
    length_B = jnp.take_along_axis(info.position_BxL, last[:, None], axis=1)[:, 0] + 1
    return Prefill(state, logp, length_B, info.task_BxL[:, 0])


@compiled(static_argnames=("sampling", "room", "alpha", "eos"))
def _search(
    structure: Structure,
    params: dict[str, Array],
    read: Prefill,
    limit_B: Array,
    alive_K: Array,
    bits_R: Array | None,
    *,
    sampling: Sampling | None,
    room: int,
    alpha: float,
    eos: tuple[int, ...],
):
    """Returns (written_BxKxM, logprobs_BxKxM, lengths_BxK) of all beams or samples, best first. `bits_R`: of samples'
    random keys."""
    model = apart(structure.filled(params))
    B, K, M, V = len(limit_B), len(alive_K), room, model.vocab
    # Rows of beams lie beside each other: [B * K].
    state = tuple(one.shared(K, M) for one in stack.split(read.state, model.layers))
    task_R = jnp.repeat(read.task_B, K)
    key_R = None if bits_R is None else jax.random.wrap_key_data(bits_R)

    def choose(logp_BxKxV, total_BxK, done_BxK, count_BxK):
        """The K best of all continuations, or one drawn for each sample."""
        logp = allowed(logp_BxKxV, done_BxK, count_BxK + 1 >= limit_B[:, None], eos)
        if sampling is not None and key_R is not None:
            token = draw(logp.reshape(B * K, V), key_R, count_BxK.reshape(-1), sampling).reshape(B, K)
            parent = jnp.broadcast_to(jnp.arange(K), (B, K))
            gain = jnp.take_along_axis(logp, token[..., None], axis=-1)[..., 0]
            return parent, token, gain, total_BxK + gain, done_BxK
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
        if sampling is None:
            reorder = lambda a: jnp.take_along_axis(a, parent[..., None], axis=1)  # noqa: E731
            written, gains = reorder(written), reorder(gains)
            count = jnp.take_along_axis(count, parent, axis=1)
            if K > 1:
                state = tuple(one.descended(parent) for one in state)
        written = written.at[:, :, t].set(token)
        gains = gains.at[:, :, t].set(jnp.where(done, 0.0, gain))
        count += ~done
        done |= is_end(token, eos)
        place = (read.length_B[:, None] + t + jnp.zeros((B, K), jnp.int32)).reshape(-1)
        logp, state = step(model, state, token.reshape(-1), ~done.reshape(-1), place, task_R)
        return t + 1, state, logp.reshape(B, K, V), total, done, count, written, gains

    start = (
        jnp.zeros((), jnp.int32),
        state,
        jnp.repeat(read.logp_BxV[:, None], K, axis=1),
        jnp.broadcast_to(alive_K, (B, K)),
        jnp.zeros((B, K), bool),
        jnp.zeros((B, K), jnp.int32),
        jnp.zeros((B, K, M), jnp.int32),
        jnp.zeros((B, K, M)),
    )
    end = jax.lax.while_loop(lambda c: (c[0] < M) & ~c[4].all(), body, start)
    _, _, _, total, _, count, written, gains = end
    order_BxK = jnp.argsort(-total / length_penalty(count.astype(jnp.float32), alpha), axis=1)
    take = lambda a: jnp.take_along_axis(a, order_BxK.reshape(B, K, *(1,) * (a.ndim - 2)), axis=1)  # noqa: E731
    return tuple(sharding.whole(take(x)) for x in (written, gains, count))


def is_end(token: Array, eos: Sequence[int]) -> Array:
    return (token[..., None] == jnp.asarray(eos)).any(-1)


def allowed(logp_xV: Array, done: Array, last: Array, eos: Sequence[int]) -> Array:
    """`logp_xV` of texts that are not `done`; what is the `last` token of one can only end it. A text that is done goes
    on as itself: by one end more, which is not counted, at no cost."""
    end_V = is_end(jnp.arange(logp_xV.shape[-1]), eos)
    again_V = jnp.where(jnp.arange(logp_xV.shape[-1]) == eos[0], 0.0, -jnp.inf)
    return jnp.where(done[..., None], again_V, jnp.where(last[..., None] & ~end_V, -jnp.inf, logp_xV))


def step(model: Any, state: Any, token_R: Array, live_R: Array, place_R: Array, task_R: Array) -> tuple[Array, Any]:
    """(logp_RxV, state) after one more token of each row that is live."""
    live = live_R[:, None]
    info = TokenInfo(jnp.where(live, task_R[:, None], 0), live, live.astype(jnp.int32), place_R[:, None])
    x, state, _ = model(jnp.where(live, token_R[:, None], 0), info, state)
    return jax.nn.log_softmax(model.logits(x[:, -1]).astype(jnp.float32)), state


def score(
    model: Any, read: Prefill, rows: Sequence[int], texts: Sequence[Sequence[int]], eos: Sequence[int] = (EOS,)
) -> list[Decoded]:
    """The log-probability of each given text (token ids, end-of-text included) after the prompt `rows` names."""
    tokens = np.zeros((len(texts), bucket(max(map(len, texts)), ROOMS)), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    lengths = np.array([len(t) for t in texts])
    logprobs = np.asarray(_score()(Structure(model), tree.flatten(model), read, np.asarray(rows), tokens, lengths))
    return [Decoded(list(t), p[: len(t)].tolist(), t[-1] in eos) for t, p in zip(texts, logprobs, strict=True)]


@compiled()
def _score(
    structure: Structure, params: dict[str, Array], read: Prefill, row_R: Array, tokens_RxM: Array, length_R: Array
) -> Array:
    """logprob_RxM of each token given its prompt and those before it."""
    model = structure.filled(params)
    M = tokens_RxM.shape[1]
    valid = jnp.arange(M) < length_R[:, None]
    task = jnp.where(valid, read.task_B[row_R][:, None], 0)
    info = TokenInfo(task, valid, valid.astype(jnp.int32), read.length_B[row_R][:, None] + jnp.arange(M))
    x, _, _ = model(tokens_RxM, info, of_rows(read.state, row_R).grown(M))
    after = jax.nn.log_softmax(model.logits(x[:, :-1]).astype(jnp.float32))
    logp = jnp.concatenate([read.logp_BxV[row_R][:, None], after], axis=1)
    return sharding.whole(jnp.take_along_axis(logp, tokens_RxM[..., None], axis=-1)[..., 0])
