"""How fast a Conformer hears: its real-time factor with dense layers and with mixtures, of random weights.

    python -m benchmarks.rtf --only d                 # the small shapes
    python -m benchmarks.rtf --json rtf.json          # and one of the paper's size: 10 GB of weights

Rivals: "moe" has 8 experts of the dense layer's units, of which a frame takes 2 (as the paper's: twice the active
feed-forward work, so that 4.7 times the parameters and equal work are to be had of top 1 alone) or 1; "dense x2" has
twice the units, as much active work as top 2; "wide" is dense with as many parameters as the mixtures. All take turns
in one process. "stream" is the encoder on one chunk of 16 frames (640 ms, as WeNet's scores have it) at batch 1, which
looks back on 4 others (its weights laid out as `Recogniser` has them for streams), "stream of 1 s" on one of 25 frames,
the longest that training in chunks draws; "batch" on 8 recordings of 10 s at once; "final" is the second pass, both
decoders on 10 texts of 40 tokens of one recording of 10 s; "two passes" is the sum of these two. Time is
seconds of computing a second of audio, features and search not counted; M are millions of parameters of all of a model
and of its rival. Target: a mixture at most 1.15 times as slow as the dense model of as much active work. Of a stream,
GB is the weights that the chunk reads, without those of experts that no frame of it chose, and "reading" the time that
this alone takes (at the rate of a product of one row), in the same unit.

"padding" shows what it changes that padded frames are not routed (WeNet routes them): 8 recordings of 1 to 10 s, all as
long as the longest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import interleaved, main, program, row
from moe_jax import programs, tree
from moe_jax.layers import stack, subsample
from moe_jax.layers.ffn import PlainFfn
from moe_jax.layers.param import Rngs
from moe_jax.layers.relative import Chunks
from moe_jax.models.conformer import Conformer
from moe_jax.moe.experts import Plain
from moe_jax.moe.layer import MoeFfn
from moe_jax.moe.routers import TopK
from moe_jax.speech.recognise import FRAME
from moe_jax.types import TokenInfo

EXPERTS, LEFT = 8, 4
CHUNKS = {"stream": 16, "stream of 1 s": 25}  # frames
ROWS, SECONDS, TEXTS, TOKENS = 8, 10.0, 10, 40
RIVALS = (
    ("moe top 2", "dense x2", 1.15),
    ("moe top 1", "dense", 1.15),
    ("moe top 2", "dense", None),
    ("wide", "dense", None),
)
FRONTEND = {"rate": 16_000, "mels": 80, "mean": [0.0] * 80, "scale": [1.0] * 80}
# (width, blocks, units, vocabulary): a small one, WeNet's for AISHELL (models/conformer.gin), and one of as many
# parameters as the paper's, whose own shape is not known.
SHAPES = {"d96": (96, 4, 384, 64), "d256": (256, 12, 2048, 4233), "225M": (512, 26, 2048, 12_000)}


def shape(d: int, layers: int, vocab: int) -> Callable[..., Any]:
    return partial(Conformer, d=d, layers=layers, heads=d // 64 or 1, vocab=vocab, frontend=FRONTEND)


def models(d: int, layers: int, hidden: int, vocab: int) -> dict[str, Conformer]:
    def moe(k: int) -> Callable:
        return partial(MoeFfn, num_experts=EXPERTS, hidden=hidden, router=partial(TopK, k=k), experts=Plain)

    ffns = {"moe top 2": moe(2)}
    units_of = (("dense", hidden), ("dense x2", 2 * hidden), ("wide", EXPERTS * hidden))
    ffns |= {name: partial(PlainFfn, hidden=units) for name, units in units_of}
    make = shape(d, layers, vocab)
    made = {name: jax.jit(lambda ffn=ffn: make(ffn=ffn, rngs=Rngs(params=0)))() for name, ffn in ffns.items()}
    top_1 = jax.eval_shape(lambda: make(ffn=moe(1), rngs=Rngs(params=0)))
    return made | {"moe top 1": tree.unflatten(top_1, tree.flatten(made["moe top 2"]))}  # the same arrays


def stream(model: Conformer, x: jax.Array, valid: jax.Array, state: Any, chunk: int) -> Any:
    y, _, state, stats = model.encode(x, valid, state, chunks=Chunks(chunk, LEFT))
    return jax.nn.log_softmax(model.ctc_logits(y)), state, stats and stats.load_E


def whole(model: Conformer, x: jax.Array, valid: jax.Array) -> jax.Array:
    y, _, _, _ = programs.in_place(model).encode(x, valid)
    return jax.nn.log_softmax(model.ctc_logits(y))


def score(model: Conformer, *args: jax.Array) -> tuple[jax.Array, jax.Array]:
    return programs.in_place(model).score(*args)


def heard(d: int, layers: int, hidden: int, vocab: int) -> Iterator[dict[str, Any]]:
    made = models(d, layers, hidden, vocab)
    sizes = {name: tree.count(tree.flatten(m)) / 1e6 for name, m in made.items()}
    hearing = {name: weights(m) for name, m in made.items()}
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(3, vocab, (TEXTS, TOKENS)), jnp.int32)
    memory = jnp.asarray(rng.normal(size=(TEXTS, subsample.length(round(SECONDS * 100)), d)), jnp.float32)

    def features(*shape: int) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(rng.normal(size=(*shape, 80)), jnp.float32), jnp.ones(shape, bool)

    def chunk_of(chunk: int) -> Callable[[Conformer], tuple[Any, ...]]:
        window = features(1, subsample.RATE * (chunk - 1) + subsample.WINDOW)
        return lambda m: (*window, stack.split(m.state(1, chunk * LEFT), layers))

    recordings = features(ROWS, round(SECONDS * 100))
    cases: dict[str, tuple[Callable, Callable, float]] = {
        "batch": (whole, lambda m: recordings, ROWS * SECONDS),
        "final": (score, lambda m: (tokens, memory, jnp.ones(memory.shape[:2], bool)), SECONDS),
    }
    cases |= {n: (partial(stream, chunk=chunk), chunk_of(chunk), chunk * FRAME) for n, chunk in CHUNKS.items()}
    ready: dict[str, Any] = {}
    passes: dict[str, dict[str, float]] = {}
    for name, (function, of, seconds) in cases.items():
        ready.clear()  # of the case before, which hold its models
        if name == "stream":  # what follows are streams too
            made = laid_out(made)
        ready |= {n: program(function, m, *of(m)) for n, m in made.items()}
        times = interleaved({n: p.run for n, p in ready.items()}, seconds=10, rounds=3)  # some take a minute
        reads: dict[str, dict[str, float]] = {}
        if name in CHUNKS:
            read = {n: read_of(*hearing[n], ready[n].run()[2]) for n in ready}
            rate = reading()
            reads = {"GB": {n: x / 1e9 for n, x in read.items()}}
            reads["reading"] = {n: x / rate / seconds for n, x in read.items()}
        passes[name] = {n: times[n] / seconds for n in times}
        yield from compared(name, passes[name], {"M": sizes, **reads})
        if name == "final":
            both = {n: passes["batch"][n] + passes["final"][n] for n in times}
            yield from compared("two passes", both, {"M": sizes})


def compared(name: str, times: dict[str, float], about: dict[str, dict[str, float]]) -> Iterator[dict[str, Any]]:
    """`about`: a column's name to each model's value, of which a row has that of its model and that of the rival."""
    for ours, rival, target in RIVALS:
        columns: dict[str, float] = {}
        for what, of in about.items():
            columns |= {what: of[ours], f"{what} rival": of[rival]}
        more = "" if target or ours == "wide" else ", twice the work"
        yield row(f"{name} {ours}{more}", times[ours], times[rival], target, unit="RTF", against=rival, **columns)


def weights(model: Conformer) -> tuple[int, int]:
    """Bytes that a stream reads of each chunk, whatever it is, and of all experts."""
    of = {n: x.nbytes for n, x in tree.flatten(model).items() if not n.startswith(("left/", "right/"))}
    experts = sum(size for n, size in of.items() if "/experts/" in n)
    return sum(of.values()) - experts, experts


def read_of(always: int, experts: int, load_E: jax.Array | None) -> float:
    """Bytes that a chunk reads whose frames went to experts like this."""
    return always + (0.0 if load_E is None else experts * float((load_E > 0).mean()))


def reading() -> float:
    """Bytes of weights a second that go through a product of one row, which has nothing else to do."""
    w = jnp.ones((2**16, 2**12))
    one = program(jnp.matmul, jnp.ones((1, len(w))), w)
    return w.nbytes / interleaved({"read": one.run}, seconds=1)["read"]


def laid_out(made: dict[str, Conformer]) -> dict[str, Conformer]:
    """As a stream's weights lie. One after another, as there is no room for all of them twice; `made` is emptied."""
    like = jax.tree.structure(jax.eval_shape(programs.apart, made.pop("moe top 1")))
    out = {name: programs.laid_out(made.pop(name)) for name in [*made]}
    return out | {"moe top 1": jax.tree.unflatten(like, jax.tree.leaves(out["moe top 2"]))}


class RoutesPadding(MoeFfn):
    """As if every frame were one."""

    def __call__(self, x_BxLxD: jax.Array, info: TokenInfo, key: jax.Array | None = None) -> Any:
        return super().__call__(x_BxLxD, dataclasses.replace(info, valid_BxL=jnp.ones_like(info.valid_BxL)), key)


def padded(d: int, layers: int, hidden: int, vocab: int) -> Iterator[dict[str, Any]]:
    """With and without; what is said of real frames is the same, as no expert is ever full."""
    frames_B = np.linspace(1, SECONDS, ROWS) * 100
    valid = jnp.arange(round(SECONDS * 100)) < jnp.asarray(frames_B)[:, None]
    x = jax.random.normal(jax.random.key(0), (*valid.shape, 80))
    make = shape(d, layers, vocab)
    ffn = dict(num_experts=EXPERTS, hidden=hidden, router=partial(TopK, k=2), experts=Plain)
    kinds = {"not routed": MoeFfn, "routed": RoutesPadding}
    made = {n: make(ffn=partial(kind, **ffn), rngs=Rngs(params=0)) for n, kind in kinds.items()}
    ready = {n: program(whole, m, x, valid) for n, m in made.items()}
    times = interleaved({n: p.run for n, p in ready.items()})
    said = [np.asarray(p.run())[subsampled(valid)] for p in ready.values()]
    loads = [np.asarray(m.encode(x, valid)[3].load_E.sum(0)) for m in made.values()]
    more = {"unit": "RTF", "padded": float(1 - valid.mean()), "difference": float(np.abs(said[0] - said[1]).max())}
    more |= {f"busiest, {n}": float(load.max() / load.mean()) for n, load in zip(made, loads, strict=True)}
    ours, rival = (times[n] / float(frames_B.sum() / 100) for n in made)
    yield row("not routed / routed", ours, rival, None, **more)


def subsampled(valid_BxT: jax.Array) -> np.ndarray:
    """Which of the model's frames are real."""
    lengths_B = np.array([subsample.length(int(n)) for n in valid_BxT.sum(1)])
    return np.arange(subsample.length(valid_BxT.shape[1])) < lengths_B[:, None]


CASES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {name: partial(heard, *of) for name, of in SHAPES.items()}
CASES["padding"] = partial(padded, *SHAPES["d256"])

if __name__ == "__main__":
    main(str(__doc__), CASES)
