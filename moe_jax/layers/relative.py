"""Self-attention with relative positions as WeNet has it, under a mask of chunks; the cache is an input and an output.

Transformer-XL's content and position biases u and v, but without its shift (WeNet left it out on purpose), so that the
score of a query with key j is

    (q + u) . k_j + (q + v) . p_j  =  q . (k_j + p_j)  +  (u . k_j + v . p_j)

with p_j a product of the sinusoids of position j itself: one product with k_j + p_j, and one number a key and head.
Biases of q, k and v would change nothing that u, v and the output's bias do not: they are left out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.layers.attention import NEG
from moe_jax.layers.param import Module, Rngs, fan_in, linear, param
from moe_jax.sharding import constrain
from moe_jax.types import Array, TokenInfo, value


@value
class Chunks:
    """What a frame sees: its own chunk of `size` frames, to its end, and `left` chunks before it (all, if negative).
    Chunks are counted from the beginning of the row. Both may be traced: one program for all sizes."""

    size: Array | int
    left: Array | int = -1


@value
class RelativeCache:
    """The last S positions, shifted as new ones come; segment 0 is empty or padding.

    Attributes: key_BxNxSxH (k + p), value_BxNxSxH, bias_BxNxS (u . k + v . p), segment_BxS, index (of the next
    position, from the beginning of the row).
    """

    key_BxNxSxH: Array
    value_BxNxSxH: Array
    bias_BxNxS: Array
    segment_BxS: Array
    index: Array


def sinusoids(position: Array, d: int) -> Array:
    """[..., d] float32 of positions [...]: sine and cosine by turns (Vaswani et al. 2017)."""
    frequency = 10_000.0 ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d)
    angle = position[..., None].astype(jnp.float32) * frequency
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*position.shape, d)


class RelativeAttention(Module):
    """Args:
    d: model width, a multiple of twice the heads.
    heads: N.
    """

    def __init__(self, d: int, *, heads: int = 4, rngs: Rngs):
        if d % (2 * heads):
            raise ValueError(f"d={d} must be a multiple of 2 x heads={heads}")
        self.d, self.heads = d, heads
        self.q, self.k, self.v, self.p = (param(rngs, (d, d), ("embed", "heads"), fan_in()) for _ in range(4))
        self.o = param(rngs, (d, d), ("heads", "embed"), fan_in())
        self.o_bias = param(rngs, (d,), (None,), jax.nn.initializers.zeros)
        own = jax.nn.initializers.glorot_uniform()
        self.u_bias, self.v_bias = (param(rngs, (heads, d // heads), ("heads", None), own) for _ in range(2))

    def cache(self, batch: int, slots: int, dtype=jnp.float32) -> RelativeCache:
        """Empty, for `slots` positions: as many as the chunks to the left have."""
        N, H = self.heads, self.d // self.heads
        key, value = (jnp.zeros((batch, N, slots, H), dtype) for _ in range(2))
        bias, segment = jnp.zeros((batch, N, slots)), jnp.zeros((batch, slots), jnp.int32)
        return RelativeCache(key, value, bias, segment, jnp.zeros((), jnp.int32))

    def __call__(
        self,
        x_BxLxD: Array,
        info: TokenInfo,
        state: RelativeCache | None = None,
        *,
        chunks: Chunks | None = None,
        place: Array | None = None,
    ) -> tuple[Array, RelativeCache | None]:
        """Chunk after chunk with a state (whole chunks, each call's last may be short) gives what the whole row gives.

        Args:
          chunks: None: the whole row (with a state: all that the cache holds).
          place: `sinusoids` of the positions, [1 or B, L, D], where many layers share them.
        """
        B, L, D = x_BxLxD.shape
        if place is None:
            place = sinusoids(info.position_BxL, D)
        x_BxLxD = jnp.where(info.valid_BxL[..., None], x_BxLxD, 0)

        def apart(x: Array, w_DxD: Array) -> Array:
            y = constrain(linear(x, w_DxD), "batch", None, "heads")
            return y.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)

        q, k, v = (apart(x_BxLxD, w[...]) for w in (self.q, self.k, self.v))
        p = apart(place.astype(x_BxLxD.dtype), self.p[...])
        bias = jnp.einsum("bnlh,nh->bnl", k, self.u_bias[...]) + jnp.einsum("bnlh,nh->bnl", p, self.v_bias[...])
        k, keys, start, held = k + p, jnp.where(info.valid_BxL, info.segment_BxL, 0), 0, 0
        segment = keys
        if state is not None:
            start, held = state.index, state.segment_BxS.shape[1]
            after = lambda old, new, axis: jnp.concatenate([old, new.astype(old.dtype)], axis)  # noqa: E731
            k, v = after(state.key_BxNxSxH, k, 2), after(state.value_BxNxSxH, v, 2)
            bias, keys = after(state.bias_BxNxS, bias, 2), after(state.segment_BxS, keys, 1)
            state = RelativeCache(k[:, :, L:], v[:, :, L:], bias[:, :, L:], keys[:, L:], start + L)
            k, v = k.astype(q.dtype), v.astype(q.dtype)
        slot_L, slot_S = start + jnp.arange(L), start - held + jnp.arange(held + L)
        seen_BxLxS = (segment[:, :, None] == keys[:, None, :]) & (keys[:, None, :] > 0)
        if chunks is not None:
            ahead_LxS = slot_S // chunks.size - (slot_L // chunks.size)[:, None]
            seen_BxLxS &= (ahead_LxS <= 0) & ((chunks.left < 0) | (ahead_LxS >= -chunks.left))
        # Everything sees itself, padding too (its value is 0): then no row of the softmax is empty.
        seen_BxLxS |= slot_L[:, None] == slot_S
        score = jnp.einsum("bnlh,bnsh->bnls", q, k, preferred_element_type=jnp.float32) + bias[:, :, None]
        score = jnp.where(seen_BxLxS[:, None], score * q.shape[-1] ** -0.5, NEG)
        weight = jax.nn.softmax(score, axis=-1).astype(q.dtype)
        y = jnp.einsum("bnls,bnsh->bnlh", weight, v).swapaxes(1, 2).reshape(B, L, D)
        return constrain(linear(y, self.o[...], self.o_bias[...]), "batch", None, None), state
