"""An encoder-decoder whose feed-forward layers may be mixtures of experts that know the task, with task adapters: an
interpretation of Task-Based MoE (arXiv 2308.15772), of which only the abstract is known to us.

Pre-norm blocks with rotary positions. The encoder reads the source, both ways; the decoder writes the target. Task ids
ride in `TokenInfo` on both sides: which part of a task a router sees is the router's affair (`task_routers.Grouped`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import losses
from moe_jax.layers import stack
from moe_jax.layers import vocab as vocabulary
from moe_jax.layers.attention import Attention, CrossAttention, DecoderState
from moe_jax.layers.ffn import DenseFfn
from moe_jax.layers.param import Module, RMSNorm, Rngs, normal, param
from moe_jax.moe.routers import MAX_TASKS, BiasBalanced
from moe_jax.types import Array, Batch, Metrics, RouterStats, Source, TokenInfo


class Feed(Module):
    """The feed-forward layer of a block, then its adapter: each in a residual, after a norm."""

    def __init__(self, d: int, *, ffn: Callable, adapter: Callable | None, rngs: Rngs):
        self.norm, self.ffn = RMSNorm(d, rngs=rngs), ffn(d, rngs=rngs)
        self.norm_adapter = None if adapter is None else RMSNorm(d, rngs=rngs)
        self.adapter = None if adapter is None else adapter(d, rngs=rngs)

    def __call__(self, x: Array, info: TokenInfo, key: Array | None) -> tuple[Array, tuple[Any, Any]]:
        """(x, statistics of the layer and of its adapter)."""
        keys = (None, None) if key is None else jax.random.split(key)
        h, stats = self.ffn(self.norm(x), info, keys[0])
        x, adapted = x + h, None
        if self.adapter is not None and self.norm_adapter is not None:
            h, adapted = self.adapter(self.norm_adapter(x), info, keys[1])
            x = x + h
        return x, (stats, adapted)


class EncoderBlock(Module):
    def __init__(self, d: int, *, attention: Callable, cross: Callable, rngs: Rngs, **feed: Any):
        self.norm_attention = RMSNorm(d, rngs=rngs)
        self.attention = attention(d, causal=False, rngs=rngs)
        self.feed = Feed(d, **feed, rngs=rngs)

    def __call__(self, x: Array, info: TokenInfo, key: Array | None) -> tuple[Array, tuple[None, Any]]:
        h, _ = self.attention(self.norm_attention(x), info)
        x, stats = self.feed(x + h, info, key)
        return x, (None, stats)


class DecoderBlock(Module):
    def __init__(self, d: int, *, attention: Callable, cross: Callable, rngs: Rngs, **feed: Any):
        self.norm_attention, self.norm_cross = (RMSNorm(d, rngs=rngs) for _ in range(2))
        self.attention, self.cross = attention(d, rngs=rngs), cross(d, rngs=rngs)
        self.feed = Feed(d, **feed, rngs=rngs)

    def __call__(
        self,
        x: Array,
        info: TokenInfo,
        read: tuple[Array, TokenInfo] | None,
        state: DecoderState | None,
        key: Array | None,
    ) -> tuple[Array, tuple[DecoderState | None, Any]]:
        """`read`: what the encoder made of the source; where there is a state, it is in its memory."""
        h, cache = self.attention(self.norm_attention(x), info, None if state is None else state.attention)
        x = x + h
        memory = self.cross.memory(*read) if state is None and read is not None else state.memory  # ty: ignore
        x = x + self.cross(self.norm_cross(x), info, memory)
        x, stats = self.feed(x, info, key)
        return x, (None if state is None else DecoderState(cache, memory), stats)


class Side(Module):
    """The layers of the encoder or of the decoder, of two kinds: with `ffn`, and dense.

    Attributes: blocks, dense_blocks: stacked over layers (`stack.in_turn`).
    """

    def __init__(
        self,
        block: Callable,
        d: int,
        *,
        layers: int,
        ffn: Callable,
        dense: Callable | None,
        dense_layers: Sequence[int],
        adapter: Callable | None,
        adapt_dense: bool,
        rngs: Rngs,
        **parts: Callable,
    ):
        self.layers, self.dense_layers = layers, tuple(dense_layers)

        def blocks(ffn: Callable, number: int, adapter: Callable | None) -> Any:
            make = partial(block, d, ffn=ffn, adapter=adapter, **parts)
            return stack.build(lambda rngs: make(rngs=rngs), number, rngs)

        between = adapter if adapt_dense else None
        self.blocks: Any = blocks(ffn, layers - len(self.dense_layers), adapter)
        self.dense_blocks: Any = None if dense is None else blocks(dense, len(self.dense_layers), between)
        self.norm = RMSNorm(d, rngs=rngs)

    @property
    def ffn(self) -> Any:
        return self.blocks.feed.ffn

    def __call__(
        self, x: Array, call: Callable, state: Any, key: Array | None, *, remat: str, unroll: int
    ) -> tuple[Array, Any, Any, Any]:
        """(x after the last norm, states, statistics of layers that have some, those of adapters)."""
        keys = None if key is None else jax.random.split(key, self.layers)
        states, stats, adapted = [], [], []
        for blocks, start, end in stack.in_turn(self.blocks, self.dense_blocks, self.dense_layers, self.layers):
            own_state, own_keys = (None if a is None else stack.section(a, start, end) for a in (state, keys))
            x, outs = stack.run(
                blocks, x, call, own_state, own_keys, remat=remat, unroll=unroll if state is None else 1
            )
            own_states, own_stats = stack.paired(outs)
            states.append(own_states)
            for found, into in zip(own_stats, (stats, adapted), strict=True):
                into += [found] if found is not None else []
        return self.norm(x), stack.joined(states), stack.joined(stats), stack.joined(adapted)


class Translator(Module):
    """Args:
    d: model width.
    vocab: size of the vocabulary that both languages share; the embedding is tied to the output.
    encoder_layers, decoder_layers: numbers of blocks.
    attention, cross, ffn: configured classes, called with (d, rngs=...).
    encoder_ffn: the encoder's, where it is another than the decoder's `ffn`; to train, of as many experts.
    every: `ffn` is in every such layer, from the last backwards; the others have `dense`.
    dense: the feed-forward layer of the others.
    adapter: a layer besides in every block (task adapters: `MoeFfn` of `experts.Bottleneck` behind a task router).
    adapt_dense: whether the layers between have it too, or those of `ffn` alone.
    label_smoothing: in training (`losses.smoothed`).
    auxiliary, remat, unroll: as of `Corrector`.
    """

    sides = 2  # that tokens are on: no token is multiplied with both

    def __init__(
        self,
        *,
        d: int = 192,
        vocab: int,
        encoder_layers: int = 4,
        decoder_layers: int = 4,
        attention: Callable = Attention,
        cross: Callable = CrossAttention,
        ffn: Callable = DenseFfn,
        encoder_ffn: Callable | None = None,
        every: int = 1,
        dense: Callable | None = None,
        adapter: Callable | None = None,
        adapt_dense: bool = True,
        label_smoothing: float = 0.1,
        auxiliary: Mapping[str, float] | Sequence[tuple[str, float]] = (),
        remat: str = "none",
        unroll: int = 1,
        rngs: Rngs,
    ):
        if every < 1 or (every > 1) != (dense is not None):
            raise ValueError(
                f"every={every}: of 2 or more the layers between are `dense`, of 1 there are none; give both"
            )
        self.d, self.vocab, self.every, self.label_smoothing = d, vocab, every, label_smoothing
        self.encoder_layers, self.decoder_layers, self.adapt_dense = encoder_layers, decoder_layers, adapt_dense
        self.embedding = param(rngs, (vocab, d), ("vocab", "embed"), normal(d**-0.5))
        parts: dict[str, Any] = dict(attention=attention, cross=cross, dense=dense, adapter=adapter, rngs=rngs)
        parts["adapt_dense"] = adapt_dense

        def side(block: Callable, layers: int, ffn: Callable) -> Side:
            between = [n for n in range(layers) if (layers - 1 - n) % every]
            own: dict[str, Any] = parts if between else parts | {"dense": None}
            return Side(block, d, layers=layers, ffn=ffn, dense_layers=between, **own)

        self.encoder = side(EncoderBlock, encoder_layers, encoder_ffn or ffn)
        self.decoder = side(DecoderBlock, decoder_layers, ffn)
        there = [blocks.feed for blocks in (self.decoder.blocks, self.decoder.dense_blocks) if blocks is not None]
        for router in [getattr(part, "router", None) for feed in there for part in (feed.ffn, feed.adapter)]:
            if not getattr(router, "causal", True):
                raise ValueError(f"{type(router).__name__} looks at the whole row: a decoder would see its future")
        if isinstance(getattr(self.adapter, "router", None), BiasBalanced):
            raise ValueError("BiasBalanced moves with the load of feed-forward layers: give adapters another router")
        self.auxiliary = tuple(sorted(dict(auxiliary).items()))
        self.remat, self.unroll = remat, unroll

    # What a checkpoint's description asks for (`describe`): configured classes as what they made.
    layers = property(lambda self: self.decoder_layers)  # those with a state
    attention = property(lambda self: self.decoder.blocks.attention)
    cross = property(lambda self: self.decoder.blocks.cross)
    ffn = property(lambda self: self.decoder.ffn)
    encoder_ffn = property(lambda self: self.encoder.ffn)
    adapter = property(lambda self: self.decoder.blocks.feed.adapter)

    @property
    def dense(self) -> Any:
        sides = (self.decoder.dense_blocks, self.encoder.dense_blocks)
        return next((blocks.feed.ffn for blocks in sides if blocks is not None), None)

    def encode(self, source: Source, key: Array | None = None) -> tuple[Array, Any, Any]:
        """(x_BxSxD, statistics of the encoder's layers, of its adapters)."""
        info = dataclasses.replace(source.info, token_BxL=source.tokens_BxS)
        x = self._embedded(source.tokens_BxS)
        x, _, stats, adapted = self.encoder(
            x, lambda block, x, _, key: block(x, info, key), None, key, remat=self.remat, unroll=self.unroll
        )
        return x, stats, adapted

    def decode(
        self,
        tokens_BxL: Array,
        info: TokenInfo,
        read: tuple[Array, TokenInfo] | None,
        state: Any = None,
        key: Array | None = None,
    ) -> tuple[Array, Any, Any, Any]:
        """(x_BxLxD before the output, state, statistics of the decoder's layers, of its adapters).

        Args:
          read: what `encode` made of the source, and its info; or `state`, whose memory has it.
        """
        info = dataclasses.replace(info, token_BxL=tokens_BxL)
        call = lambda block, x, state, key: block(x, info, read, state, key)  # noqa: E731
        return self.decoder(self._embedded(tokens_BxL), call, state, key, remat=self.remat, unroll=self.unroll)

    def read(self, tokens_BxS: Array, info: TokenInfo) -> tuple[Array, DecoderState]:
        """Reads prompts, of which the last token starts the decoder: (x_BxD after it, state stacked over layers)."""
        encoded, _, _ = self.encode(Source(tokens_BxS, info))
        remember = jax.vmap(lambda cross: cross.memory(encoded, info))
        sides = (self.decoder.blocks, self.decoder.dense_blocks, self.decoder.dense_layers, self.decoder_layers)
        memory = stack.joined([remember(blocks.cross) for blocks, _, _ in stack.in_turn(*sides)])
        cache = stack.repeated(self.attention.cache(len(tokens_BxS), 1, encoded.dtype), self.decoder_layers)
        last = info.valid_BxL.sum(1, keepdims=True) - 1
        first = TokenInfo(
            *(jnp.take_along_axis(a, last, axis=1) for a in (info.task_BxL, info.valid_BxL, info.segment_BxL)),
            jnp.zeros_like(last),
        )
        x, state, _ = self(jnp.take_along_axis(tokens_BxS, last, axis=1), first, DecoderState(cache, memory))
        return x[:, 0], state

    def __call__(self, tokens_BxL: Array, info: TokenInfo, state: Any) -> tuple[Array, Any, Any]:
        """A step of the decoder: (x_BxLxD before the output, state, statistics)."""
        return self.decode(tokens_BxL, info, None, state)[:3]

    def logits(self, x: Array) -> Array:
        return vocabulary.logits(x, self.embedding[...].T)

    def loss(
        self,
        batch: Batch,
        key: Array | None = None,
        *,
        normaliser: Array | float | None = None,
        max_targets: int | None = None,
    ) -> tuple[Array, Metrics]:
        """As `Corrector.loss`; in training with label smoothing. Every target has logits, whatever `max_targets`."""
        if batch.source is None:
            raise ValueError("an encoder-decoder reads pairs: open the data with data.Pairs.open")
        keys = (None, None) if key is None else jax.random.split(key)
        encoded, *read_stats = self.encode(batch.source, keys[0])
        x, _, *stats = self.decode(batch.tokens_BxL, batch.info, (encoded, batch.source.info), key=keys[1])
        logits = vocabulary.spared(x, self.embedding[...].T)
        nll = losses.xent(logits, batch.targets_BxL)
        objective = nll
        if key is not None and self.label_smoothing:
            objective = losses.smoothed(nll, logits, batch.targets_BxL, self.vocab, self.label_smoothing)
        weights, task = batch.weights_BxL, batch.info.task_BxL
        loss = (objective * weights).sum() / (jnp.maximum(weights.sum(), 1) if normaliser is None else normaliser)
        metrics: Metrics = {
            "nll_T": jnp.zeros(MAX_TASKS).at[task].add(nll * weights),
            "weight_T": jnp.zeros(MAX_TASKS).at[task].add(weights),
            "tokens": batch.info.valid_BxL.sum() + batch.source.info.valid_BxL.sum(),
        }
        if _experts(self.encoder.ffn) != _experts(self.decoder.ffn):
            raise ValueError("to train, encoder_ffn and ffn must both be dense, or have as many experts")
        if stats[0] is not None:
            both = stack.joined([read_stats[0], stats[0]])
            extra, values = losses.auxiliary(both, dict(self.auxiliary))
            loss = loss + (extra if key is not None else 0.0)
            metrics |= values | {"stats": both}
        return loss, metrics

    def after_step(self, stats: RouterStats) -> Translator:
        """The model for the next step (`Corrector.after_step`)."""
        mine = len(self.encoder.blocks.norm_attention.scale)
        for side, own in ((self.encoder, slice(0, mine)), (self.decoder, slice(mine, None))):
            side.ffn.router = side.ffn.router.after_step(jax.tree.map(lambda a, own=own: a[own], stats))
        return self

    def active(self, path: str) -> float:
        """The share of a leaf that a token of its side is multiplied with."""
        if "/experts/" not in path:
            return 1.0
        side = self.encoder if path.startswith("encoder/") else self.decoder
        layer = self.adapter if "/adapter/" in path else side.ffn
        return layer.router.k / layer.num_experts

    def _embedded(self, tokens: Array) -> Array:
        return vocabulary.embed(self.embedding[...], tokens) * self.d**0.5


def _experts(ffn: Any) -> int:
    return getattr(ffn, "num_experts", 0)
