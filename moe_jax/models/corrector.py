"""The decoder-only corrector: reads a prompt of hypotheses, writes the corrected text (NeKo's shape, arXiv 2411.05945).

Pre-norm blocks: a short causal convolution, rotary attention, a gated feed-forward layer (dense or MoE).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import losses
from moe_jax.layers import stack, vocab
from moe_jax.layers.attention import Attention, KvCache
from moe_jax.layers.conv import CausalConv, ConvState
from moe_jax.layers.ffn import DenseFfn
from moe_jax.layers.param import Module, RMSNorm, Rngs, normal, param
from moe_jax.moe.routers import MAX_TASKS
from moe_jax.sharding import top_k
from moe_jax.types import Array, Batch, Metrics, RouterStats, TokenInfo, value


@value
class BlockState:
    attention: KvCache
    conv: ConvState | None

    def grown(self, slots: int) -> BlockState:
        """With room for so many more positions."""
        return BlockState(self.attention.grown(slots), self.conv)

    def shared(self, beams: int, steps: int) -> BlockState:
        """For so many beams of each row, which lie beside each other [B * K], and so many steps; of one layer."""
        conv = jax.tree.map(lambda c: jnp.repeat(c, beams, axis=0), self.conv)
        return BlockState(self.attention.shared(beams, steps), conv)

    def descended(self, parent_BxK: Array) -> BlockState:
        """Each beam goes on from its parent; of one layer."""
        B, K = parent_BxK.shape
        row_R = (jnp.arange(B)[:, None] * K + parent_BxK).reshape(-1)
        return BlockState(self.attention.descended(parent_BxK), jax.tree.map(lambda c: c[row_R], self.conv))


State = BlockState | tuple[BlockState, ...]


class Block(Module):
    def __init__(self, d: int, *, attention: Callable, ffn: Callable, conv_width: int, norm_eps: float, rngs: Rngs):
        self.norm_attention, self.norm_ffn = (RMSNorm(d, eps=norm_eps, rngs=rngs) for _ in range(2))
        self.conv = CausalConv(d, width=conv_width, rngs=rngs) if conv_width else None
        self.attention = attention(d, rngs=rngs)
        self.ffn = ffn(d, rngs=rngs)

    def state(self, batch: int, slots: int, d: int, dtype) -> BlockState:
        conv = None if self.conv is None else self.conv.state(batch, d, dtype)
        return BlockState(self.attention.cache(batch, slots, dtype), conv)

    def __call__(
        self, x: Array, info: TokenInfo, state: BlockState | None, key: Array | None
    ) -> tuple[Array, tuple[BlockState | None, RouterStats | None]]:
        h, conv = self.norm_attention(x), None
        if self.conv is not None:
            h, conv = self.conv(h, info, None if state is None else state.conv)
        h, cache = self.attention(h, info, None if state is None else state.attention)
        x = x + h
        h, stats = self.ffn(self.norm_ffn(x), info, key)
        return x + h, (None if state is None else BlockState(cache, conv), stats)


class Corrector(Module):
    """Args:
    d: model width.
    layers: number of blocks.
    vocab: size of the vocabulary (the tokeniser's).
    attention, ffn: configured classes, called with (d, rngs=...). `ffn` is the seam for MoE.
    dense, dense_layers: the feed-forward layer, dense, of the layers with these numbers; `ffn` is that of the others.
    conv_width: taps of the convolution (1: a scale only; 0: none).
    embedding_scale: what embeddings are multiplied with (default: the square root of d).
    norm_eps: of the norms.
    tied: the output matrix is the embedding.
    auxiliary: weights of the auxiliary losses by name (`losses.AUXILIARY`).
    remat: gradient checkpointing policy of the stack (`layers.stack.REMAT`).
    unroll: layers written out in each turn of the loop over layers, without a state; 1 compiles fastest.

    Raises ValueError for a router that is not causal.
    """

    def __init__(
        self,
        *,
        d: int = 192,
        layers: int = 4,
        vocab: int,
        attention: Callable = Attention,
        ffn: Callable = DenseFfn,
        dense: Callable | None = None,
        dense_layers: Sequence[int] = (),
        conv_width: int = 4,
        embedding_scale: float | None = None,
        norm_eps: float = 1e-6,
        tied: bool = True,
        auxiliary: Mapping[str, float] | Sequence[tuple[str, float]] = (),
        remat: str = "none",
        unroll: int = 1,
        rngs: Rngs,
    ):
        self.d, self.layers, self.vocab, self.conv_width, self.tied = d, layers, vocab, conv_width, tied
        self.embedding_scale, self.norm_eps = d**0.5 if embedding_scale is None else embedding_scale, norm_eps
        self.dense_layers = tuple(sorted(dense_layers))
        if not set(self.dense_layers) < set(range(layers)) or bool(self.dense_layers) != (dense is not None):
            raise ValueError(
                f"dense_layers={self.dense_layers} of {layers} layers: name some of 0..{layers - 1}, not all, "
                "and give `dense` with them"
            )
        self.embedding = param(rngs, (vocab, d), ("vocab", "embed"), normal(d**-0.5))

        def blocks(ffn: Callable, number: int) -> Any:
            shared: dict[str, Any] = dict(attention=attention, conv_width=conv_width, norm_eps=norm_eps)
            return stack.build(lambda rngs: Block(d, ffn=ffn, **shared, rngs=rngs), number, rngs)

        self.blocks: Any = blocks(ffn, layers - len(self.dense_layers))
        self.dense_blocks: Any = None if dense is None else blocks(dense, len(self.dense_layers))
        if (router := getattr(self.ffn, "router", None)) and not getattr(router, "causal", True):
            raise ValueError(
                f"{type(router).__name__} looks at the whole row: a causal model would see its future; "
                "use it in an encoder"
            )
        self.norm = RMSNorm(d, eps=norm_eps, rngs=rngs)
        self.output = None if tied else param(rngs, (d, vocab), ("embed", "vocab"), normal(d**-0.5))
        self.auxiliary = tuple(sorted(dict(auxiliary).items()))
        self.remat, self.unroll = remat, unroll

    @property
    def attention(self) -> Any:
        return self.blocks.attention

    @property
    def ffn(self) -> Any:
        return self.blocks.ffn

    @property
    def dense(self) -> Any:
        return None if self.dense_blocks is None else self.dense_blocks.ffn

    def state(self, batch: int, slots: int, dtype=jnp.float32) -> BlockState:
        """Empty decoding state for `slots` positions, stacked over layers."""
        one = self.blocks.state(batch, slots, self.d, dtype)
        return stack.repeated(one, self.layers)

    def __call__(
        self, tokens_BxL: Array, info: TokenInfo, state: State | None = None, key: Array | None = None
    ) -> tuple[Array, State | None, RouterStats | None]:
        """Returns (x_BxLxD before the output matrix, state, router statistics stacked over layers).

        The state comes back as it is given: stacked over layers, or `stack.split`, which is faster token by token.
        """
        x = vocab.embed(self.embedding[...], tokens_BxL) * self.embedding_scale
        info = dataclasses.replace(info, token_BxL=tokens_BxL)
        keys = None if key is None else jax.random.split(key, self.layers)
        states, stats = [], []
        for blocks, start, end in stack.in_turn(self.blocks, self.dense_blocks, self.dense_layers, self.layers):
            own_state, own_keys = (None if a is None else stack.section(a, start, end) for a in (state, keys))
            x, outs = stack.run(
                blocks,
                x,
                lambda block, x, state, key: block(x, info, state, key),
                own_state,
                own_keys,
                remat=self.remat,
                unroll=self.unroll if state is None else 1,
            )
            own_states, own_stats = stack.paired(outs)
            states.append(own_states)
            stats += [own_stats] if own_stats is not None else []
        return self.norm(x), stack.joined(states), stack.joined(stats)

    def after_step(self, stats: RouterStats) -> Corrector:
        """The model for the next step: routers that balance without a loss move by this step's load."""
        self.ffn.router = self.ffn.router.after_step(stats)
        return self

    def active(self, path: str) -> float:
        """The share of a leaf that a token is multiplied with."""
        if path == "embedding":
            return float(self.tied)
        return self.ffn.router.k / self.ffn.num_experts if "/experts/" in path else 1.0

    def logits(self, x_BxLxD: Array) -> Array:
        return vocab.logits(x_BxLxD, self._matrix())

    def _matrix(self) -> Array:
        return self.embedding[...].T if self.output is None else self.output[...]

    def loss(
        self,
        batch: Batch,
        key: Array | None = None,
        *,
        normaliser: Array | float | None = None,
        max_targets: int | None = None,
    ) -> tuple[Array, Metrics]:
        """Mean nll of the written tokens plus the weighted auxiliary losses.

        Args:
          key: training; None is evaluation (free routing, no noise, no auxiliary losses).
          normaliser: what the sum of nll is divided by (default: this batch's weights); for gradient accumulation.
          max_targets: no row writes more tokens than this: only so many positions get logits.
        """
        x, _, stats = self(batch.tokens_BxL, batch.info, key=key)
        targets, weights, task = batch.targets_BxL, batch.weights_BxL, batch.info.task_BxL
        if max_targets is not None and max_targets < targets.shape[1]:
            where = top_k(weights, max_targets)
            x = jnp.take_along_axis(x, where[..., None], axis=1)
            targets, weights, task = (jnp.take_along_axis(a, where, axis=1) for a in (targets, weights, task))
        nll = losses.xent(vocab.spared(x, self._matrix()), targets) * weights
        loss = nll.sum() / (jnp.maximum(weights.sum(), 1) if normaliser is None else normaliser)
        metrics: Metrics = {
            "nll_T": jnp.zeros(MAX_TASKS).at[task].add(nll),
            "weight_T": jnp.zeros(MAX_TASKS).at[task].add(weights),
            "tokens": batch.info.valid_BxL.sum(),
        }
        if stats is not None:
            extra, values = losses.auxiliary(stats, dict(self.auxiliary))
            loss = loss + (extra if key is not None else 0.0)
            metrics |= values | {"stats": stats}
        return loss, metrics
