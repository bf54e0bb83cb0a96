"""A trained Conformer at work: whole recordings in two passes, or audio as it comes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moe_jax import checkpoint, describe, programs, tree, xla
from moe_jax import decode as searching
from moe_jax.layers import stack, subsample
from moe_jax.layers.relative import Chunks
from moe_jax.models.conformer import EOS
from moe_jax.speech import decode, features
from moe_jax.speech.decode import BestPath, Hypothesis, PrefixBeam
from moe_jax.text.tokeniser import Tokeniser
from moe_jax.types import Array

FRAME = subsample.RATE * features.SHIFT  # seconds from one of the model's frames to the next
WAYS = ("greedy", "ctc", "attention", "rescored")
CHUNK = 16  # frames of 40 ms that a stream reads at once, unless it is told
SHORTEST = 64  # frames of features: lengths that the encoder's programs are made for grow from here, by a quarter


@dataclasses.dataclass(frozen=True)
class Text:
    """One reading.

    Attributes:
      times: seconds at which each of its tokens is likeliest, from the beginning of the recording.
    """

    text: str
    score: float
    times: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Update:
    """What a stream says after a piece of audio.

    Attributes:
      texts: the n-best since the last final; of a final, after rescoring.
      final: the speaker paused, or went on for too long, or the audio ended: what comes later is a new text.
      end: seconds of audio that were heard.
      took: seconds of computing since the update before.
      start, until: seconds of audio between which `texts` are said.
    """

    texts: list[Text]
    final: bool
    end: float
    took: float
    start: float = 0.0
    until: float = 0.0


@dataclasses.dataclass(frozen=True)
class Recogniser:
    """Args:
    model, tokeniser: of a checkpoint (`load`).
    way: how whole recordings are read: "greedy", the tokens of CTC's likeliest path; "ctc", its prefix beam search;
      "attention", beam search with the decoder from left to right alone; "rescored", CTC's n-best scored again by both
      decoders (U2++). Streams are rescored at the end of each text, or by "greedy" and "ctc" are not.
    beam: prefixes that are kept, and the most texts that come out.
    ctc_weight, reverse_weight: of rescoring (default: WeNet's for AISHELL, 0.3 and 0.5, but for the latter 0 where the
      model's own is 0, whose decoder from right to left never learnt).
    chunk: frames of 40 ms that are read at once: of a stream, and of whole recordings if it is not None.
    left: chunks before it that they see; all since the last final, if negative.
    pause, longest: a stream's text ends after so many seconds without a token behind one, or after so many in all.
    """

    model: Any
    tokeniser: Tokeniser
    way: str = "rescored"
    beam: int = 10
    ctc_weight: float = 0.3
    reverse_weight: float | None = None
    chunk: int | None = None
    left: int = -1
    pause: float = 1.0
    longest: float = 20.0

    def __post_init__(self):
        if self.way not in WAYS:
            raise ValueError(f"unknown way to decode {self.way!r}; known: {', '.join(WAYS)}")
        if not (0 <= self.ctc_weight < math.inf and 0 <= (self.reverse_weight or 0) <= 1):
            ctc, reverse = f"ctc_weight {self.ctc_weight}", f"reverse_weight {self.reverse_weight}"
            raise ValueError(f"{ctc} must be 0 or more, and {reverse} from 0 to 1")

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Recogniser:
        """From a run folder (its `model.safetensors`) or such a file.

        Raises CheckpointError, in one line, for a checkpoint that is missing, torn or no Conformer.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "model.safetensors"
        if not path.exists():
            raise checkpoint.CheckpointError(f"{path}: no such file; train a model there first")
        params, meta = checkpoint.read_safetensors(path)
        try:
            if meta["model"]["class"] != "Conformer":
                raise ValueError(f"it is a {meta['model']['class']}, not a Conformer")
            tokeniser, empty = Tokeniser.of_meta(meta), describe.abstract(meta["model"])
            shapes = {name: leaf.shape for name, leaf in tree.flatten(empty).items()}
            if {name: x.shape for name, x in params.items()} != shapes:
                raise ValueError("its arrays are not those that it describes")
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise checkpoint.CheckpointError(f"{path}: cannot recognise speech with it ({error})") from error
        return cls(tree.unflatten(empty, params), tokeniser, **options)

    @property
    def rate(self) -> int:
        """Of the audio, in samples a second."""
        return int(dict(self.model.frontend)["rate"])

    @property
    def mels(self) -> int:
        return int(dict(self.model.frontend)["mels"])

    # --- whole recordings -------------------------------------------------------------------------------------------

    def __call__(self, samples_S: np.ndarray) -> list[Text]:
        """The n-best of a recording, the best first; [] where it is too short for a frame."""
        x_LxD, logp_LxV = self.heard(samples_S)
        return self.read(x_LxD, logp_LxV)

    def read(self, x_LxD: np.ndarray, logp_LxV: np.ndarray) -> list[Text]:
        """The n-best of what was `heard`."""
        if not len(logp_LxV):
            return []
        if self.way == "attention":
            return self._texts(self._attended(x_LxD))
        search = self.search()
        search.advance(logp_LxV)
        return self._texts(self._second(search.nbest(), x_LxD))

    def search(self) -> BestPath | PrefixBeam:
        """A first pass."""
        return BestPath() if self.way == "greedy" else PrefixBeam(self.beam)

    def _second(self, hypotheses: list[Hypothesis], x_LxD: np.ndarray) -> list[Hypothesis]:
        """The second pass, where there is one."""
        return self.rescored(hypotheses, x_LxD) if self.way == "rescored" else hypotheses

    def _attended(self, x_LxD: np.ndarray) -> list[Hypothesis]:
        """At most a token a frame; no times."""
        x, seen = self._memory(x_LxD)
        read = _program(_begin)(self.model.left, x, seen)
        most = min(len(x_LxD) + 1, searching.ROOMS[-1])
        (found,) = searching.nbest(self.model.left, read, beams=self.beam, max_new=most, alpha=0.0)
        there = [d for d in found if d.total > -math.inf]
        ended = [d for d in there if d.ended] or there  # what was cut is no text, nor is its score that of one
        return [Hypothesis(tuple(t for t in d.tokens if t > EOS), d.total, ()) for d in ended]

    def heard(self, samples_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(what the encoder made of it [L, D], log probabilities of CTC [L, V])."""
        frames_TxC = features.fbank(samples_S, self.rate, self.mels)
        x_TxC = _padded(frames_TxC, _bucket(len(frames_TxC)))
        chunks = None if self.chunk is None else Chunks(self.chunk, self.left)
        x, logp = _program(_whole)(self.model, x_TxC[None], np.arange(len(x_TxC))[None] < len(frames_TxC), chunks)
        L = subsample.length(len(frames_TxC))
        return np.asarray(x)[0, :L], np.asarray(logp)[0, :L]  # NumPy cuts: JAX would compile each length

    def frames(self, samples: int) -> int:
        """How many frames the encoder makes of so many samples."""
        return subsample.length(features.num_frames(samples, self.rate))

    def rescored(self, hypotheses: Sequence[Hypothesis], x_LxD: np.ndarray) -> list[Hypothesis]:
        """By both decoders, all hypotheses at once."""
        longest = max(len(h.tokens) for h in hypotheses)
        tokens = np.zeros((self.beam, _bucket(longest, 8, 2)), np.int32)
        for row, h in zip(tokens, hypotheses, strict=False):
            row[: len(h.tokens)] = h.tokens
        left, right = _program(_score)(self.model, tokens, *self._memory(x_LxD))
        number = len(hypotheses)
        reverse = self.reverse_weight
        if reverse is None:
            reverse = 0.5 if self.model.reverse_weight else 0.0
        weights = dict(ctc_weight=self.ctc_weight, reverse_weight=reverse)
        return decode.rescored(hypotheses, left[:number].tolist(), right[:number].tolist(), **weights)

    def _memory(self, x_LxD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(x_1xSxD, which of S are there): of a length that programs are made for. There are few of these, as each pair
        with a length of texts has a program."""
        size = _bucket(len(x_LxD), SHORTEST // subsample.RATE, 2)
        return _padded(x_LxD, size)[None], np.arange(size)[None] < len(x_LxD)

    def _texts(self, hypotheses: Iterable[Hypothesis], start: float = 0.0) -> list[Text]:
        """Each text once, with its best score: pieces may spell one in several ways, and spaces that part no words make
        no other text."""
        found: dict[str, Text] = {}
        for h in hypotheses:
            kept = _parting(h.tokens, _spaces(self.tokeniser))
            text = " ".join(self.tokeniser.decode([h.tokens[i] for i in kept]).split())
            times = tuple(start + h.frames[i] * FRAME for i in kept) if h.frames else ()
            found.setdefault(text, Text(text, h.score, times))
        return list(found.values())

    # --- streams ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def laid_out(self) -> Any:
        """The model as streams read it: on a CPU each weight as an array of its own, of which a chunk makes no copy."""
        return programs.laid_out(self.model)

    def compile(self) -> None:
        """Makes all programs that a stream needs, so that no speaker waits for one. The second pass has one for each
        length of what was heard with each length of a text, which is no longer."""
        list(self.stream([np.zeros(self.rate, np.float32)]))
        if self.way != "rescored":
            return
        most = _Segment(self, self.chunk or CHUNK, 0.0).most
        heard = _sizes(most, SHORTEST // subsample.RATE)
        sizes = [(frames, tokens) for frames in heard for tokens in _sizes(min(frames, most), 8)]
        for frames, tokens in tqdm(sizes, "compiling", disable=None, leave=False):
            x_LxD = np.zeros((frames, self.model.d), self.model.subsample.o.dtype)
            self.rescored([Hypothesis((EOS + 1,) * tokens, 0.0, ())], x_LxD)

    def stream(self, pcm: Iterable[np.ndarray]) -> Iterator[Update]:
        """What is known after each portion of audio (samples [S] at `rate`, of any size), however long it goes on: the
        memory that it takes does not grow."""
        chunk = self.chunk or CHUNK
        step, window = subsample.RATE * chunk, subsample.RATE * (chunk - 1) + subsample.WINDOW
        shift = features.sizes(self.rate)[1]
        samples, frames = np.zeros(0, np.float32), np.zeros((0, self.mels), np.float32)
        heard, segment = 0, _Segment(self, chunk, 0.0)
        for block in itertools.chain(pcm, [None]):
            began = time.perf_counter()
            if block is not None:
                heard += len(block)
                samples = np.concatenate([samples, block])
                new = features.fbank(samples, self.rate, self.mels)
                samples, frames = samples[len(new) * shift :], np.concatenate([frames, new])
            while len(frames) >= (window if block is not None else subsample.WINDOW):
                segment.read(frames[:window], window)
                frames = frames[step:]
                if segment.over:
                    found, times = segment.final(), (segment.start, segment.end)
                    yield Update(found, True, heard / self.rate, time.perf_counter() - began, *times)
                    began = time.perf_counter()
                    segment = _Segment(self, chunk, segment.end)
            if block is None:
                found, times = segment.final(), (segment.start, heard / self.rate)
            else:
                found, times = segment.texts(), (segment.start, segment.end)
            yield Update(found, block is None, heard / self.rate, time.perf_counter() - began, *times)


class _Segment:
    """What is said until a pause: the encoder's caches and outputs, and the search over them."""

    def __init__(self, by: Recogniser, chunk: int, start: float):
        self.by, self.start = by, start
        self.most = max(1, round(by.longest / FRAME / chunk)) * chunk
        held = self.most if by.left < 0 else by.left * chunk
        state, self.chunks = by.model.state(1, held), Chunks(chunk, by.left)
        self.state = state if by.laid_out is by.model else stack.split(state, by.model.layers)
        self.search, self.outputs, self.silent = by.search(), [], 0

    def read(self, frames_TxC: np.ndarray, window: int) -> None:
        valid = np.arange(window)[None] < len(frames_TxC)
        x, logp, self.state = _program(_chunk)(
            self.by.laid_out, _padded(frames_TxC, window)[None], valid, self.state, self.chunks
        )
        L = subsample.length(len(frames_TxC))
        logp_LxV = np.asarray(logp)[0, :L]  # NumPy cuts: JAX would compile each length
        self.outputs.append(np.asarray(x)[0, :L])
        self.search.advance(logp_LxV)
        for token in logp_LxV.argmax(1):
            self.silent = self.silent + 1 if token == decode.BLANK else 0

    @property
    def length(self) -> int:
        return sum(map(len, self.outputs))

    @property
    def end(self) -> float:
        return self.start + self.length * FRAME

    @property
    def over(self) -> bool:
        spoken = bool(self.search.nbest(1)[0].tokens)
        return self.length >= self.most or (spoken and self.silent * FRAME >= self.by.pause)

    def texts(self) -> list[Text]:
        return self.by._texts(self.search.nbest(), self.start)

    def final(self) -> list[Text]:
        if not self.outputs:
            return []
        found = self.by._second(self.search.nbest(), np.concatenate(self.outputs))
        return self.by._texts(found, self.start)


def _parting(tokens: Sequence[int], spaces: Collection[int]) -> list[int]:
    """Which of them are left without spaces at either end, or after another."""
    spelt = [i for i, token in enumerate(tokens) if token not in spaces]
    inside = range(spelt[0], spelt[-1] + 1) if spelt else ()
    return [i for i in inside if tokens[i] not in spaces or tokens[i - 1] not in spaces]


@functools.lru_cache(maxsize=4)
def _spaces(tokeniser: Tokeniser) -> frozenset[int]:
    """Tokens that spell nothing else."""
    return frozenset(token for token in range(tokeniser.vocab_size) if tokeniser.decode([token]).isspace())


@functools.cache
def _program(function: Any) -> Any:
    return jax.jit(function, compiler_options=xla.options())


def _whole(model: Any, x_BxTxC: Array, valid_BxT: Array, chunks: Chunks | None) -> tuple[Array, Array]:
    x, _, _, _ = programs.in_place(model).encode(x_BxTxC, valid_BxT, chunks=chunks)
    return x, jax.nn.log_softmax(model.ctc_logits(x))


def _chunk(model: Any, x_BxTxC: Array, valid_BxT: Array, state: Any, chunks: Chunks) -> tuple[Array, Array, Any]:
    x, _, state, _ = model.encode(x_BxTxC, valid_BxT, state, chunks=chunks)
    return x, jax.nn.log_softmax(model.ctc_logits(x)), state


def _begin(decoder: Any, x_1xSxD: Array, seen_1xS: Array) -> searching.Prefill:
    x, state = decoder.read(x_1xSxD, seen_1xS)
    logp = jax.nn.log_softmax(decoder.logits(x).astype(jnp.float32))
    return searching.Prefill(state, logp, jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32))


def _score(model: Any, tokens_KxU: Array, x_1xLxD: Array, seen_1xL: Array) -> tuple[Array, Array]:
    memory, seen = (jnp.broadcast_to(a, (len(tokens_KxU), *a.shape[1:])) for a in (x_1xLxD, seen_1xL))
    return programs.in_place(model).score(tokens_KxU, memory, seen)


def _bucket(length: int, shortest: int = SHORTEST, factor: float = 1.25) -> int:
    size = shortest
    while size < length:
        size = math.ceil(size * factor)
    return size


def _sizes(longest: int, shortest: int) -> list[int]:
    """What `_bucket` gives by twos, up to `longest`."""
    return list(dict.fromkeys(_bucket(length, shortest, 2) for length in range(longest + 1)))


def _padded(x_LxD: np.ndarray, length: int) -> np.ndarray:
    return np.pad(x_LxD, ((0, length - len(x_LxD)), (0, 0)))
