"""A Conformer that recognises speech whole and as it is spoken: U2++ (arXiv 2106.05642) as WeNet trains it, every
feed-forward layer dense or a mixture of experts (U2++ MoE, arXiv 2404.16407).

Features are subsampled by four, then go through blocks of half a feed-forward layer, attention under a mask of chunks,
a causal convolution and the other half. On top of them are a CTC head, and two attention decoders, from left to right
and from right to left. One model serves both ways because the size of chunks is drawn anew in each step.

Where WeNet and this differ: decoders have rotary positions instead of sinusoids added to embeddings; dropout acts on
what a layer adds to the residual, not inside of it; padding never routes. The paper has no balance loss; statistics of
the routers are there to be looked at, and `auxiliary` adds losses on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import losses
from moe_jax.layers import stack
from moe_jax.layers import vocab as vocabulary
from moe_jax.layers.attention import Attention, CrossAttention, DecoderState
from moe_jax.layers.conv import ConformerConv, ConvState
from moe_jax.layers.ffn import PlainFfn
from moe_jax.layers.param import LayerNorm, Module, Rngs, fan_in, linear, normal, param
from moe_jax.layers.relative import Chunks, RelativeAttention, RelativeCache, sinusoids
from moe_jax.layers.subsample import Subsample, length
from moe_jax.moe.routers import MAX_TASKS
from moe_jax.sharding import constrain
from moe_jax.types import Array, Metrics, RouterStats, TokenInfo, Utterances, value

EOS = 1  # begins and ends what a decoder reads and writes; 0 is the blank


@value
class BlockState:
    attention: RelativeCache
    conv: ConvState


class Block(Module):
    """A block of the encoder: its router statistics, if any, are those of its two halves, [2, ...]."""

    def __init__(self, d: int, *, heads: int, width: int, ffn: Callable, dropout: float, rngs: Rngs):
        self.dropout = dropout
        self.norm_first, self.norm_attention, self.norm_conv, self.norm_second, self.norm = (
            LayerNorm(d, rngs=rngs) for _ in range(5)
        )
        self.ffn_first, self.ffn_second = (ffn(d, rngs=rngs) for _ in range(2))
        self.attention = RelativeAttention(d, heads=heads, rngs=rngs)
        self.conv = ConformerConv(d, width=width, rngs=rngs)

    def state(self, batch: int, slots: int, d: int, dtype) -> BlockState:
        return BlockState(self.attention.cache(batch, slots, dtype), self.conv.state(batch, d, dtype))

    def __call__(
        self, x: Array, info: TokenInfo, state: BlockState | None, key: Array | None, **seen: Any
    ) -> tuple[Array, tuple[BlockState | None, RouterStats | None]]:
        keys = [None] * 6 if key is None else jax.random.split(key, 6)
        own_attention, own_conv = (None, None) if state is None else (state.attention, state.conv)
        h, stats_first = self.ffn_first(self.norm_first(x), info, keys[0])
        x = x + 0.5 * drop(h, keys[1], self.dropout)
        h, own_attention = self.attention(self.norm_attention(x), info, own_attention, **seen)
        x = x + drop(h, keys[2], self.dropout)
        h, own_conv = self.conv(self.norm_conv(x), info, own_conv)
        x = x + drop(h, keys[3], self.dropout)
        h, stats_second = self.ffn_second(self.norm_second(x), info, keys[4])
        x = x + 0.5 * drop(h, keys[5], self.dropout)
        stats = None
        if stats_first is not None:
            stats = jax.tree.map(lambda *a: jnp.stack(a), stats_first, stats_second)
        new = None if own_attention is None or own_conv is None else BlockState(own_attention, own_conv)
        return self.norm(x), (new, stats)


class DecoderBlock(Module):
    def __init__(self, d: int, *, heads: int, ffn: Callable, dropout: float, rngs: Rngs):
        self.dropout = dropout
        self.norm_attention, self.norm_cross, self.norm_ffn = (LayerNorm(d, rngs=rngs) for _ in range(3))
        self.attention = Attention(d, heads=heads, rngs=rngs)
        self.cross = CrossAttention(d, heads=heads, rngs=rngs)
        self.ffn = ffn(d, rngs=rngs)

    def __call__(
        self,
        x: Array,
        info: TokenInfo,
        heard: tuple[Array, TokenInfo] | None,
        state: DecoderState | None,
        key: Array | None,
    ) -> tuple[Array, tuple[DecoderState | None, RouterStats | None]]:
        """`heard`: what the encoder made of the audio; where there is a state, it is in its memory."""
        keys = [None] * 4 if key is None else jax.random.split(key, 4)
        h, cache = self.attention(self.norm_attention(x), info, None if state is None else state.attention)
        x = x + drop(h, keys[0], self.dropout)
        memory = self.cross.memory(*heard) if state is None and heard is not None else state.memory  # ty: ignore
        x = x + drop(self.cross(self.norm_cross(x), info, memory), keys[1], self.dropout)
        h, stats = self.ffn(self.norm_ffn(x), info, keys[2])
        return x + drop(h, keys[3], self.dropout), (None if cache is None else DecoderState(cache, memory), stats)


class Decoder(Module):
    """Reads what was written so far and what was heard, says what comes next: one direction. With a state it is what
    `decode.search` asks for."""

    def __init__(
        self, d: int, *, layers: int, heads: int, vocab: int, ffn: Callable, dropout: float, remat: str, rngs: Rngs
    ):
        self.d, self.layers, self.vocab, self.dropout, self.remat = d, layers, vocab, dropout, remat
        self.embedding = param(rngs, (vocab, d), ("vocab", "embed"), normal(d**-0.5))
        args: dict[str, Any] = dict(heads=heads, ffn=ffn, dropout=dropout)
        self.blocks: Any = stack.build(lambda rngs: DecoderBlock(d, **args, rngs=rngs), layers, rngs)
        self.norm = LayerNorm(d, rngs=rngs)
        self.output = param(rngs, (d, vocab), ("embed", "vocab"), fan_in())
        self.output_bias = param(rngs, (vocab,), ("vocab",), jax.nn.initializers.zeros)

    def decode(
        self,
        tokens_BxU: Array,
        info: TokenInfo,
        heard: tuple[Array, TokenInfo] | None,
        state: Any = None,
        key: Array | None = None,
    ) -> tuple[Array, Any, RouterStats | None]:
        """(x_BxUxD before the output, state, router statistics stacked over layers).

        Args:
          heard: what the encoder made of the audio, and its info; or `state`, whose memory has it.
        """
        x = vocabulary.embed(self.embedding[...], tokens_BxU) * self.d**0.5
        keys = None if key is None else jax.random.split(key, self.layers + 1)
        x = drop(x, None if keys is None else keys[-1], self.dropout)
        call = lambda block, x, state, key: block(x, info, heard, state, key)  # noqa: E731
        x, outs = stack.run(self.blocks, x, call, state, None if keys is None else keys[:-1], remat=self.remat)
        return self.norm(x), *stack.paired(outs)

    def __call__(self, tokens_BxU: Array, info: TokenInfo, state: Any) -> tuple[Array, Any, Any]:
        """A step: (x_BxUxD before the output, state, statistics)."""
        return self.decode(tokens_BxU, info, None, state)

    def logits(self, x: Array) -> Array:
        y = linear(x, self.output[...], self.output_bias[...])
        return constrain(y, "batch", *(None,) * (y.ndim - 2), "vocab")

    def read(self, memory_BxSxD: Array, seen_BxS: Array) -> tuple[Array, DecoderState]:
        """Hears, and reads the beginning of a text: (x_BxD after it, state stacked over layers)."""
        B, S = seen_BxS.shape
        info = _info(seen_BxS, None, jnp.arange(S))
        memory = jax.vmap(lambda cross: cross.memory(memory_BxSxD, info))(self.blocks.cross)
        cache = stack.repeated(self.blocks.attention.cache(B, 1, memory_BxSxD.dtype), self.layers)
        first = _info(jnp.ones((B, 1), bool), None, jnp.zeros((B, 1), jnp.int32))
        x, state, _ = self(jnp.full((B, 1), EOS), first, DecoderState(cache, memory))
        return x[:, 0], state


class Conformer(Module):
    """Args:
    d: model width.
    layers, decoder_layers: blocks of the encoder, and of each of the two decoders.
    heads: of all attention.
    width: taps of the convolution.
    channels: of the convolutions that subsample (default: d).
    vocab: size of the vocabulary; 0 is the blank, 1 (`EOS`) ends a text.
    ffn: configured class of the feed-forward layers, called with (d, rngs=...): the seam for MoE.
    decoder_ffn: that of the decoders (default: `ffn`).
    frontend: what its features are: "rate" of the audio, "mels", and their global "mean" and "scale" (prepared data
      know: `speech.data.frontend`).
    max_chunk: frames (after subsampling) of the largest chunk drawn while training; None: a model for whole utterances.
    dynamic_left: draw, too, how many chunks before it are seen (else all): for streams that look back less.
    augment: configured function (features, frames, key) -> features, while training.
    ctc_weight, reverse_weight, smoothing: of the losses (WeNet's defaults).
    dropout: of what each layer adds.
    auxiliary: weights of the auxiliary losses by name (`losses.AUXILIARY`).
    remat, unroll: of the encoder's stack (`layers.stack`).

    Raises ValueError for routers that cannot serve a stream or a decoder, and for layers of unlike experts.
    """

    def __init__(
        self,
        *,
        d: int = 256,
        layers: int = 12,
        decoder_layers: int = 3,
        heads: int = 4,
        width: int = 15,
        channels: int | None = None,
        vocab: int,
        ffn: Callable = PlainFfn,
        decoder_ffn: Callable | None = None,
        frontend: Mapping[str, Any] | Sequence[tuple[str, Any]],
        max_chunk: int | None = 25,
        dynamic_left: bool = False,
        augment: Callable | None = None,
        ctc_weight: float = 0.3,
        reverse_weight: float = 0.3,
        smoothing: float = 0.1,
        dropout: float = 0.1,
        auxiliary: Mapping[str, float] | Sequence[tuple[str, float]] = (),
        remat: str = "none",
        unroll: int = 1,
        rngs: Rngs,
    ):
        self.d, self.layers, self.decoder_layers, self.heads, self.width = d, layers, decoder_layers, heads, width
        self.channels, self.vocab, self.max_chunk, self.augment = channels, vocab, max_chunk, augment
        self.ctc_weight, self.reverse_weight, self.smoothing = ctc_weight, reverse_weight, smoothing
        self.dropout, self.remat, self.unroll, self.dynamic_left = dropout, remat, unroll, dynamic_left
        self.auxiliary = tuple(sorted(dict(auxiliary).items()))
        self.frontend = tuple(
            sorted((k, tuple(map(float, v)) if isinstance(v, Sequence) else v) for k, v in dict(frontend).items())
        )
        self.subsample = Subsample(d, mels=int(dict(frontend)["mels"]), channels=channels, rngs=rngs)
        of_block: dict[str, Any] = dict(heads=heads, width=width, ffn=ffn, dropout=dropout)
        self.blocks: Any = stack.build(lambda rngs: Block(d, **of_block, rngs=rngs), layers, rngs)
        self.norm = LayerNorm(d, rngs=rngs)
        self.ctc = param(rngs, (d, vocab), ("embed", "vocab"), fan_in())
        self.ctc_bias = param(rngs, (vocab,), ("vocab",), jax.nn.initializers.zeros)
        of_decoder: dict[str, Any] = dict(layers=decoder_layers, heads=heads, vocab=vocab, dropout=dropout, remat=remat)
        self.left, self.right = (Decoder(d, **of_decoder, ffn=decoder_ffn or ffn, rngs=rngs) for _ in range(2))
        routers = [getattr(f, "router", None) for f in (self.ffn, self.decoder_ffn)]
        if any(r and not r.causal and (max_chunk or r is routers[1]) for r in routers):
            raise ValueError("a router that looks at the whole row serves neither a stream nor a decoder")
        if len({r.num_experts for r in routers if r}) > 1:
            raise ValueError("encoder and decoders must have as many experts, or none")

    @property
    def ffn(self) -> Any:
        return self.blocks.ffn_first

    @property
    def decoder_ffn(self) -> Any:
        return self.left.blocks.ffn

    def state(self, batch: int, slots: int, dtype=jnp.float32) -> BlockState:
        """Empty streaming state that looks back `slots` frames, stacked over layers."""
        one = self.blocks.state(batch, slots, self.d, dtype)
        return stack.repeated(one, self.layers)

    def encode(
        self,
        features_BxTxC: Array,
        valid_BxT: Array,
        state: BlockState | tuple[BlockState, ...] | None = None,
        *,
        chunks: Chunks | None = None,
        task_B: Array | None = None,
        key: Array | None = None,
    ) -> tuple[Array, TokenInfo, Any, RouterStats | None]:
        """(x_BxLxD, their info, state, router statistics [2 x layers, ...]).

        With a state these are the windows of whole chunks that follow those of the last call, frames overlapping by
        `subsample.WINDOW - subsample.RATE`; what comes out is what the whole gives under `chunks`. The state comes back
        as it is given: stacked over layers, or `stack.split`, as it must be where layers lie apart (`programs.apart`).
        """
        of, valid_BxT = dict(self.frontend), jnp.asarray(valid_BxT)
        x = (features_BxTxC - jnp.asarray(of["mean"])) * jnp.asarray(of["scale"])
        keys = None if key is None else jax.random.split(key, self.layers + 2)
        if keys is not None and self.augment is not None:
            x = self.augment(x, valid_BxT.sum(1), keys[-1])
        x, valid = self.subsample(x.astype(self.subsample.o.dtype), valid_BxT)
        x = drop(constrain(x * self.d**0.5, "batch", None, None), None if keys is None else keys[-2], self.dropout)
        start = 0
        if state is not None:
            start = state[0].attention.index if isinstance(state, tuple) else state.attention.index[0]
        position = start + jnp.arange(x.shape[1])
        info = _info(valid, task_B, jnp.broadcast_to(position, valid.shape))
        place = sinusoids(position[None], self.d)
        x, outs = stack.run(
            self.blocks,
            x,
            lambda block, x, state, key: block(x, info, state, key, chunks=chunks, place=place),
            state,
            None if keys is None else keys[:-2],
            remat=self.remat,
            unroll=self.unroll if state is None else 1,
        )
        states, stats = stack.paired(outs)
        return self.norm(x), info, states, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stats)

    def ctc_logits(self, x_BxLxD: Array) -> Array:
        return constrain(linear(x_BxLxD, self.ctc[...], self.ctc_bias[...]), "batch", None, "vocab")

    def directions(
        self, tokens_BxU: Array, memory_BxSxD: Array, seen_BxS: Array, task_B: Array | None = None, key=None
    ) -> tuple[tuple[tuple[Array, Array], tuple[Array, Array]], Array, RouterStats | None]:
        """What each decoder says of texts.

        Returns ((logits, targets) from left to right, the same from right to left), [B, U + 1, V] and [B, U + 1], the
        valid positions of both, which end with the end of text, and the decoders' router statistics.
        """
        size_B = (tokens_BxU > 0).sum(1)
        place = jnp.arange(tokens_BxU.shape[1] + 1)
        valid = place <= size_B[:, None]
        info = _info(valid, task_B, jnp.broadcast_to(place, valid.shape))
        heard = memory_BxSxD, _info(seen_BxS, None, jnp.arange(seen_BxS.shape[1]))
        keys = (None, None) if key is None else jax.random.split(key)
        backwards = jnp.take_along_axis(tokens_BxU, jnp.maximum(size_B[:, None] - 1 - place[:-1], 0), axis=1)
        said, stats = [], []
        for decoder, tokens, own_key in zip((self.left, self.right), (tokens_BxU, backwards), keys, strict=True):
            read = jnp.where(valid, jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=EOS), 0)
            targets = jnp.where(place < size_B[:, None], jnp.pad(tokens, ((0, 0), (0, 1))), EOS)
            x, _, own_stats = decoder.decode(read, info, heard, key=own_key)
            said.append((decoder.logits(x), targets))
            stats += [] if own_stats is None else [own_stats]
        return (said[0], said[1]), valid, stack.joined(stats)

    def score(self, tokens_BxU: Array, memory_BxSxD: Array, seen_BxS: Array) -> tuple[Array, Array]:
        """(logp_B of texts from left to right, from right to left), their ends included."""
        said, valid, _ = self.directions(tokens_BxU, memory_BxSxD, seen_BxS)
        left, right = (-jnp.where(valid, losses.xent(*pair), 0).sum(1) for pair in said)
        return left, right

    def loss(
        self,
        batch: Utterances,
        key: Array | None = None,
        *,
        normaliser: Array | float | None = None,
        max_targets: int | None = None,
    ) -> tuple[Array, Metrics]:
        """The weighted sum of the CTC loss and of both decoders', summed over tokens, the mean over utterances as in
        WeNet; plus the weighted auxiliary losses.

        Args:
          key: training, in which chunks are drawn; None is evaluation of whole utterances.
          normaliser: what the sum is divided by (default: the utterances of this batch that count).
          max_targets: not needed here.
        """
        keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
        tokens, task_B = batch.tokens_BxU, batch.task_B
        chunks = None
        if keys[0] is not None and self.max_chunk is not None:
            frames = length(batch.features_BxTxC.shape[1])
            chunks = drawn_chunks(keys[0], frames, self.max_chunk, self.dynamic_left)
        x, info, _, stats = self.encode(
            batch.features_BxTxC, batch.valid_BxT, chunks=chunks, task_B=task_B, key=keys[1]
        )
        ctc_B = losses.ctc(self.ctc_logits(x), info.valid_BxL, tokens, tokens > 0)
        said, valid, own_stats = self.directions(tokens, x, info.valid_BxL, task_B, keys[2])
        left_B, right_B = (jnp.where(valid, losses.smoothed_xent(*pair, self.smoothing), 0).sum(1) for pair in said)
        attention_B = (1 - self.reverse_weight) * left_B + self.reverse_weight * right_B
        weight_B = jnp.ones(tokens.shape[0]) if key is not None or batch.weight_B is None else batch.weight_B
        ctc_B, attention_B = ctc_B * weight_B, attention_B * weight_B
        nll_B = self.ctc_weight * ctc_B + (1 - self.ctc_weight) * attention_B
        loss = nll_B.sum() / (jnp.maximum(weight_B.sum(), 1) if normaliser is None else normaliser)
        metrics: Metrics = {
            "nll_T": jnp.zeros(MAX_TASKS).at[task_B].add(nll_B),
            "weight_T": jnp.zeros(MAX_TASKS).at[task_B].add(weight_B),
            "tokens": info.valid_BxL.sum(),
            "nll_ctc": ctc_B.sum(),
            "nll_attention": attention_B.sum(),
        }
        stats = stack.joined([s for s in (stats, own_stats) if s is not None])
        if stats is not None:
            extra, values = losses.auxiliary(stats, dict(self.auxiliary))
            loss = loss + (extra if key is not None else 0.0)
            metrics |= values | {"stats": stats}
        return loss, metrics

    def after_step(self, stats: RouterStats) -> Conformer:
        """The model for the next step: routers that balance without a loss move by this step's load."""
        kinds = [
            (self.blocks, ("ffn_first", "ffn_second"), self.layers),
            (self.left.blocks, ("ffn",), self.decoder_layers),
            (self.right.blocks, ("ffn",), self.decoder_layers),
        ]
        done = 0
        for blocks, names, layers in kinds:
            if getattr(getattr(blocks, names[0]), "router", None) is None:
                continue
            for i, name in enumerate(names):
                ffn, mine = getattr(blocks, name), slice(done + i, done + layers * len(names), len(names))
                ffn.router = ffn.router.after_step(jax.tree.map(lambda a, mine=mine: a[mine], stats))
            done += layers * len(names)
        return self

    def active(self, path: str) -> float:
        """The share of a leaf that a frame (a token, of the decoders) is multiplied with."""
        if path.endswith("/embedding"):
            return 0.0
        if "/experts/" not in path:
            return 1.0
        ffn = self.ffn if path.startswith("blocks/") else self.decoder_ffn
        return ffn.router.k / ffn.num_experts


def drawn_chunks(key: Array, frames: int, largest: int, dynamic_left: bool = False) -> Chunks:
    """WeNet's rule (`add_optional_chunk_mask`): a size from 1 to frames - 1; of more than half of them the whole, else
    that modulo `largest`, plus 1. So about half of the batches see everything.

    Args:
      dynamic_left: of the others, from none to but two of all chunks before are seen (`use_dynamic_left_chunk`).
    """
    drawn = jax.random.randint(key, (), 1, max(frames, 2))
    whole = drawn > frames // 2
    size = jnp.where(whole, frames, drawn % largest + 1)
    if not dynamic_left:
        return Chunks(size)
    left = jax.random.randint(jax.random.fold_in(key, 1), (), 0, jnp.maximum((frames - 1) // size, 1))
    return Chunks(size, jnp.where(whole, -1, left))


def drop(x: Array, key: Array | None, rate: float) -> Array:
    """Dropout; none without a key."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def _info(valid_BxL: Array, task_B: Array | None, position_BxL: Array) -> TokenInfo:
    """Rows of one utterance each."""
    one = valid_BxL.astype(jnp.int32)
    task = one * 0 if task_B is None else one * task_B[:, None]
    return TokenInfo(task, valid_BxL, one, jnp.where(valid_BxL, position_BxL, 0))
