"""Self-attention with rotary positions, whose cache is an input and an output, and attention to what was read.

A call with `state=None` sees the whole sequence. A call with a `KvCache` sees what went before and adds itself:
chunked and whole agree for every chunking. Positions of two segments never attend to each other; padding (segment 0)
attends to nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.param import Module, Rngs, fan_in, linear, param
from moe_jax.sharding import constrain
from moe_jax.types import Array, TokenInfo, value

NEG = -1e30


@value
class KvCache:
    """Fixed-size cache; slots below `index` are filled. Heads come before slots: what a head reads lies together, and
    its matrix product needs no transposed copy of the cache.

    Attributes: key_BxNxSxH, value_BxNxSxH, segment_BxS (0 = empty or padding), index (scalar, next slot), seen_BxKxS
    (of beams: what each sees, whatever its slot).
    """

    key_BxNxSxH: Array
    value_BxNxSxH: Array
    segment_BxS: Array
    index: Array
    seen_BxKxS: Array | None = None

    def grown(self, slots: int) -> KvCache:
        """With so many more empty slots (also of caches stacked over layers)."""

        def pad(x: Array, axis: int) -> Array:
            return jnp.pad(x, [(0, slots if i == x.ndim + axis else 0) for i in range(x.ndim)])

        return KvCache(pad(self.key_BxNxSxH, -2), pad(self.value_BxNxSxH, -2), pad(self.segment_BxS, -1), self.index)

    def shared(self, beams: int, steps: int) -> KvCache:
        """With room for so many steps of so many beams of each row. In a step each writes into a slot of its own, and a
        beam that goes on from another sees what that one wrote: no key or value is moved or held twice."""
        cache = self.grown(beams * steps)
        seen = jnp.repeat(cache.segment_BxS[..., None, :] > 0, beams, axis=-2)
        return dataclasses.replace(cache, seen_BxKxS=seen)

    def descended(self, parent_BxK: Array) -> KvCache:
        """Each beam goes on from its parent."""
        assert self.seen_BxKxS is not None
        return dataclasses.replace(self, seen_BxKxS=jnp.take_along_axis(self.seen_BxKxS, parent_BxK[..., None], axis=1))


Scaling = Mapping[str, float | str] | Sequence[tuple[str, float | str]]


def frequencies(half: int, base: float, scaling: Scaling = ()) -> Array:
    """Rotary angle a position, [half]; `scaling` has the keys of Hugging Face's `rope_scaling`.

    Types: linear (all by `factor`), llama3 (slow ones by `factor`, fast ones not, between them a ramp). Raises
    ValueError for another.
    """
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if not scaling:
        return frequency
    args = dict(scaling)
    kind, factor = args["rope_type"], float(args["factor"])
    if kind == "linear":
        return frequency / factor
    if kind != "llama3":
        raise ValueError(f"rope_scaling: unknown type {kind!r}; known: linear, llama3")
    slow, fast = float(args["low_freq_factor"]), float(args["high_freq_factor"])
    turns = float(args["original_max_position_embeddings"]) * frequency / (2 * jnp.pi)
    keep = jnp.clip((turns - slow) / (fast - slow), 0, 1)
    return frequency * (keep + (1 - keep) / factor)


def rotary(position_BxL: Array, frequency: Array) -> Array:
    """Sines and cosines of the rotary angles (Su et al. 2021): [2, B, 1, L, half], float32.

    Of many positions in a loop over the two, or XLA:CPU computes them again for every head wherever they are used: a
    quarter of the layer's time.
    """
    angle = position_BxL[:, None, :, None].astype(jnp.float32) * frequency
    if position_BxL.shape[1] < len(frequency):
        return jnp.stack([jnp.sin(angle), jnp.cos(angle)])
    return jax.lax.map(lambda cosine: jnp.where(cosine, jnp.cos(angle), jnp.sin(angle)), jnp.array([False, True]))


def rotate(x_BxNxLxH: Array, rotary: Array) -> Array:
    """Rotary embedding, halves convention (as Llama)."""
    sin, cos = rotary.astype(x_BxNxLxH.dtype)
    a, b = jnp.split(x_BxNxLxH, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Attention(Module):
    """Args:
    d: model width.
    heads, kv_heads: query heads, and key-value heads that they share (default: as many).
    head: H, the width of a head (default: d / heads).
    bias: on queries, keys and values (as Qwen2).
    rope_base, rope_scaling: of the rotary frequencies (`frequencies`).
    window: the model was made to look back no further (as Mistral). Longer rows are refused; who decodes keeps to it.
    block: without a cache, queries go in blocks of so many positions, each against the keys up to its end: most of
      the scores above the diagonal are never computed. 0: one block.
    causal: nothing sees what comes later. False: for encoders, which have no cache.
    """

    def __init__(
        self,
        d: int,
        *,
        heads: int = 4,
        kv_heads: int | None = None,
        head: int | None = None,
        bias: bool = False,
        rope_base: float = 10_000.0,
        rope_scaling: Scaling = (),
        window: int | None = None,
        block: int = 0,
        causal: bool = True,
        rngs: Rngs,
    ):
        kv_heads = kv_heads or heads
        if (head is None and d % heads) or (head or d // heads) % 2 or heads % kv_heads:
            raise ValueError(f"d={d} must be a multiple of 2 x heads={heads}, and heads of kv_heads={kv_heads}")
        self.heads, self.kv_heads, self.head, self.bias = heads, kv_heads, head or d // heads, bias
        self.rope_base, self.rope_scaling = rope_base, tuple(sorted(dict(rope_scaling).items()))
        self.window, self.block, self.causal = window, block, causal
        self.q = param(rngs, (d, heads * self.head), ("embed", "heads"), fan_in())
        self.k = param(rngs, (d, kv_heads * self.head), ("embed", "heads"), fan_in())
        self.v = param(rngs, (d, kv_heads * self.head), ("embed", "heads"), fan_in())
        self.o = param(rngs, (heads * self.head, d), ("heads", "embed"), fan_in())

        def zeros(heads: int) -> nnx.Param | None:
            return param(rngs, (heads * self.head,), ("heads",), jax.nn.initializers.zeros) if bias else None

        self.q_bias, self.k_bias, self.v_bias = zeros(heads), zeros(kv_heads), zeros(kv_heads)

    def cache(self, batch: int, slots: int, dtype=jnp.float32) -> KvCache:
        shape = (batch, self.kv_heads, slots, self.head)
        return KvCache(
            jnp.zeros(shape, dtype),
            jnp.zeros(shape, dtype),
            jnp.zeros((batch, slots), jnp.int32),
            jnp.zeros((), jnp.int32),
        )

    def __call__(self, x_BxLxD: Array, info: TokenInfo, state: KvCache | None = None) -> tuple[Array, KvCache | None]:
        if state is None or state.seen_BxKxS is None:
            return self._attended(x_BxLxD, info, state)
        B = len(state.segment_BxS)  # rows are beams; here they are positions of the row that they share
        x_BxKxD, info = jax.tree.map(lambda a: a.reshape(B, -1, *a.shape[2:]), (x_BxLxD, info))
        y, state = self._attended(x_BxKxD, info, state)
        return y.reshape(x_BxLxD.shape), state

    def _attended(self, x_BxLxD: Array, info: TokenInfo, state: KvCache | None) -> tuple[Array, KvCache | None]:
        B, L, _ = x_BxLxD.shape
        # Garbage in padding must not reach a valid position: a weight of 0 does not stop NaN, forward or backward.
        x_BxLxD = jnp.where(info.valid_BxL[..., None], x_BxLxD, 0)
        q, k, v = (
            constrain(linear(x_BxLxD, w[...], None if b is None else b[...]), "batch", None, "heads")
            .reshape(B, L, -1, self.head)
            .swapaxes(1, 2)
            for w, b in ((self.q, self.q_bias), (self.k, self.k_bias), (self.v, self.v_bias))
        )
        angles = rotary(info.position_BxL, frequencies(self.head // 2, self.rope_base, self.rope_scaling))
        q, k = rotate(q, angles), rotate(k, angles)
        segment = jnp.where(info.valid_BxL, info.segment_BxL, 0)
        start: Array | int = 0
        beams = None if state is None else state.seen_BxKxS
        if state is not None:
            start = state.index
            k = jax.lax.dynamic_update_slice(state.key_BxNxSxH, k.astype(state.key_BxNxSxH.dtype), (0, 0, start, 0))
            v = jax.lax.dynamic_update_slice(state.value_BxNxSxH, v.astype(state.value_BxNxSxH.dtype), (0, 0, start, 0))
            keys = jax.lax.dynamic_update_slice(state.segment_BxS, segment, (0, start))
            if beams is not None:  # each sees its own slot
                own_BxKxK = jnp.broadcast_to(jnp.eye(L, dtype=bool), (B, L, L))
                beams = jax.lax.dynamic_update_slice(beams, own_BxKxK, (0, 0, start))
            state = KvCache(k, v, keys, start + L, beams)
        else:
            keys = segment
        if state is None and self.window is not None and self.window < L:
            raise ValueError(f"{L} positions, but this model looks back {self.window}: take shorter rows")
        slot_L, slot_S = start + jnp.arange(L), jnp.arange(k.shape[2])
        same = (segment[:, :, None] == keys[:, None, :]) & (keys[:, None, :] > 0)
        if not self.causal:
            seen = same
        else:
            seen = (slot_L[:, None] >= slot_S) & same if beams is None else beams
        # Everything sees itself, padding too (its value is 0): then no row of the softmax is empty.
        bias = jnp.where(seen | (slot_L[:, None] == slot_S), 0.0, NEG)
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        size = self.block if state is None and self.block else L
        if beams is not None:  # XLA:CPU multiplies with one vector, and again, faster than with a few together
            size = 1
        y = []
        for i in range(0, L, size):
            j = min(i + size, L)
            S = j if state is None and self.causal else k.shape[2]  # without a cache nobody sees beyond itself
            y.append(attend(q[:, :, i:j], k[:, :, :S], v[:, :, :S], bias[:, i:j, :S]))
        y = jnp.concatenate(y, axis=2).swapaxes(1, 2).reshape(B, L, -1)
        return constrain(linear(y, self.o[...]), "batch", None, None), state


@value
class Memory:
    """What a layer's `CrossAttention` keeps of what was read.

    Attributes: key_BxNxSxH, value_BxNxSxH, segment_BxS (0 = padding).
    """

    key_BxNxSxH: Array
    value_BxNxSxH: Array
    segment_BxS: Array


class CrossAttention(Module):
    """Attention of a decoder to what an encoder made of its segment, without positions (Vaswani et al. 2017).

    Args: d, the model's width; heads; head, H (default: d / heads).
    """

    def __init__(self, d: int, *, heads: int = 4, head: int | None = None, rngs: Rngs):
        if head is None and d % heads:
            raise ValueError(f"d={d} must be a multiple of heads={heads}")
        self.heads, self.head = heads, head or d // heads
        self.q, self.k, self.v = (param(rngs, (d, heads * self.head), ("embed", "heads"), fan_in()) for _ in range(3))
        self.o = param(rngs, (heads * self.head, d), ("heads", "embed"), fan_in())

    def memory(self, x_BxSxD: Array, info: TokenInfo) -> Memory:
        x_BxSxD = jnp.where(info.valid_BxL[..., None], x_BxSxD, 0)
        key, val = (self._by_head(linear(x_BxSxD, w[...])) for w in (self.k, self.v))
        return Memory(key, val, jnp.where(info.valid_BxL, info.segment_BxL, 0))

    def __call__(self, x_BxLxD: Array, info: TokenInfo, memory: Memory) -> Array:
        """Of R rows that share the memory of B, R / B lie beside each other (beams)."""
        rows = x_BxLxD.shape
        B = len(memory.segment_BxS)
        if rows[0] != B:
            x_BxLxD, info = jax.tree.map(lambda a: a.reshape(B, -1, *a.shape[2:]), (x_BxLxD, info))
        x_BxLxD = jnp.where(info.valid_BxL[..., None], x_BxLxD, 0)
        segment = jnp.where(info.valid_BxL, info.segment_BxL, 0)
        # Padding sees padding, whose value is 0, and where there is none everything: no row of the softmax is empty.
        same = segment[:, :, None] == memory.segment_BxS[:, None, :]
        bias = jnp.where(same | ~same.any(-1, keepdims=True), 0.0, NEG)
        q = self._by_head(linear(x_BxLxD, self.q[...]))
        y = attend(q, memory.key_BxNxSxH.astype(q.dtype), memory.value_BxNxSxH.astype(q.dtype), bias)
        y = y.swapaxes(1, 2).reshape(*x_BxLxD.shape[:2], -1)
        return constrain(linear(y, self.o[...]), "batch", None, None).reshape(rows)

    def _by_head(self, x: Array) -> Array:
        return constrain(x, "batch", None, "heads").reshape(*x.shape[:2], -1, self.head).swapaxes(1, 2)


@value
class DecoderState:
    """Of one decoder layer, or stacked over them: what was written, and what was read."""

    attention: KvCache
    memory: Memory

    def grown(self, slots: int) -> DecoderState:
        return dataclasses.replace(self, attention=self.attention.grown(slots))

    def shared(self, beams: int, steps: int) -> DecoderState:
        return dataclasses.replace(self, attention=self.attention.shared(beams, steps))

    def descended(self, parent_BxK: Array) -> DecoderState:
        return dataclasses.replace(self, attention=self.attention.descended(parent_BxK))


@jax.custom_vjp
def attend(q_BxNxLxH: Array, k_BxKxSxH: Array, v_BxKxSxH: Array, bias_BxLxS: Array) -> Array:
    """y_BxNxLxH: grouped-query attention; the softmax is float32. No row may be without a key.

    Its own way back goes twice over the scores, where autodiff's goes five times (the sum over keys of weight times
    gradient is that of output times gradient, which is smaller; Dao et al. 2022, section 3).
    """
    return _attend_fwd(q_BxNxLxH, k_BxKxSxH, v_BxKxSxH, bias_BxLxS)[0]


def _attend_fwd(q_BxNxLxH: Array, k: Array, v: Array, bias_BxLxS: Array):
    B, N, L, H = q_BxNxLxH.shape
    q = q_BxNxLxH.reshape(B, k.shape[1], -1, L, H)
    score = jnp.einsum("bkglh,bksh->bkgls", q, k, preferred_element_type=jnp.float32) * H**-0.5
    score += bias_BxLxS[:, None, None]
    weight = jnp.exp(score - score.max(-1, keepdims=True))
    total = weight.sum(-1, keepdims=True).astype(q.dtype)
    weight = weight.astype(q.dtype)
    y = jnp.einsum("bkgls,bksh->bkglh", weight, v) / total
    return y.reshape(B, N, L, H), (q, k, v, weight, total, y)


def _attend_bwd(saved, dy_BxNxLxH: Array):
    q, k, v, weight, total, y = saved
    B, K, G, L, H = q.shape
    dy = dy_BxNxLxH.reshape(q.shape) / total
    inner = (dy * y).sum(-1, keepdims=True, dtype=jnp.float32)
    dscore = jnp.einsum("bkglh,bksh->bkgls", dy, v, preferred_element_type=jnp.float32) - inner
    dscore = (weight * dscore * H**-0.5).astype(q.dtype)
    dq = jnp.einsum("bkgls,bksh->bkglh", dscore, k).reshape(B, K * G, L, H)
    # Products with the smaller matrix transposed, which XLA:CPU copies to do it.
    dk, dv = (jnp.einsum("bkglh,bkgls->bkhs", a, b).swapaxes(2, 3) for a, b in ((q, dscore), (dy, weight)))
    return dq, dk, dv, None


attend.defvjp(_attend_fwd, _attend_bwd)
