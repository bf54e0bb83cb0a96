"""From hypotheses to corrected text: a checkpoint with its tokeniser, its prompt layout and its guard."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from moe_jax import checkpoint, decode, describe, lanes, quantise, sharding, tree
from moe_jax.correct import Correction
from moe_jax.data import sha256
from moe_jax.formats import Record
from moe_jax.sampling import Sampling
from moe_jax.text.prompt import Example, check_layout, encode_example, room_to_write
from moe_jax.text.tokeniser import Tokeniser

Batch = tuple[list[Record], list[list[int]]]  # records and their prompts
Read = tuple[decode.Prefill, list[decode.Decoded]]  # what was read of a batch, and what was written after it
# A prefix is read once in multiples of SHARED tokens from LEAST_SHARED on. Measured on the shipped base: reading 32
# prompts of 40 tokens after 16, 32, 64 and 128 shared ones takes 1.45, 0.84, 0.63 and 0.59 of the time without.
SHARED, LEAST_SHARED = 16, 32


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What the model would write for one record, before the guard.

    Attributes:
      first: the first hypothesis.
      text: the best text; equal to `first` where `note` says why there was none.
      margin: log p(text) - log p(first), in nats: how much more the model believes its own text.
      score: log p(text).
      several: whether the hypotheses differed.
    """

    first: str
    text: str
    margin: float
    score: float
    note: str | None = None
    several: bool = False

    def guarded(self, threshold: float) -> Correction:
        """The correction, or the first pass where the margin is below `threshold`."""
        if self.text == self.first or self.note:
            return Correction(self.first, kept=bool(self.note), note=self.note, score=self.score)
        if self.margin < threshold:
            return Correction(self.first, kept=True, note="not confident", score=self.score - self.margin)
        return Correction(self.text, kept=False, score=self.score)


@dataclasses.dataclass(frozen=True)
class Guard:
    """Thresholds on `Proposal.margin`, in nats, tuned on validation data; -inf switches one off.

    Hypotheses that differ have a threshold of their own: in what a recogniser hesitated about, several texts are
    likely, and a small margin says less than it does where one word is no word.
    """

    single: float
    several: float

    @classmethod
    def of(cls, thresholds: Any) -> Guard:
        """From one number for both, or from the JSON of one. Raises TypeError or ValueError."""
        if isinstance(thresholds, Mapping):
            return cls(float(thresholds["single"]), float(thresholds["several"]))
        return cls(float(thresholds), float(thresholds))

    def __call__(self, proposal: Proposal) -> Correction:
        return proposal.guarded(self.several if proposal.several else self.single)

    def __str__(self) -> str:
        return f"{self.several:g} nats for lists, {self.single:g} for single hypotheses"


@dataclasses.dataclass
class Pipeline:
    """A model ready to correct.

    Attributes:
      guard: when to keep the first pass.
      beams: width of the beam search (1 is greedy); with `sampling`, how many samples, of which the likeliest is taken.
      sampling, seed: how to draw; what is drawn for a record depends on the seed and its number alone. None: search.
      continuous: lanes that are done take the next prompt (`lanes`; one beam or sample); else batches end together.
      task: the family of everything that is corrected; None, the default, is unknown: routing is free anyway. (A
        layout that says the task, "+task", then says what a record gives as its own; without either its prompts are
        none that it was trained on.)
      rescore: let the given hypotheses compete with what the search found, by the model's own score.
      mesh: that the model is divided over, and batches with it; of several hosts all must correct the same records.
    """

    model: Any
    tokeniser: Tokeniser
    families: dict[str, int]
    layout: str
    guard: Guard
    fingerprint: str
    beams: int = 1
    rescore: bool = True
    alpha: float = 0.6
    max_length: int = 256
    max_hypotheses: int = 5
    max_sources: int = 0
    batch_size: int = 32
    task: str | None = None
    sampling: Sampling | None = None
    seed: int = 0
    continuous: bool = False
    mesh: sharding.Mesh | None = None
    _prefix: decode.Prefix | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.continuous and self.beams > 1:
            raise ValueError(f"continuous batching has one beam or sample, not {self.beams}; take one")
        if self.continuous and self.mesh:
            raise ValueError("continuous batching is of one device: take batches, or no mesh")
        self.batch_size = sharding.full(self.batch_size, self.mesh)

    @classmethod
    def load(
        cls, path: str | Path, *, weights: str = "float32", mesh: sharding.Mesh | None = None, **options: Any
    ) -> Pipeline:
        """From a run folder (its `model.safetensors`) or such a file; its matrices held as `weights` (`quantise`). On a
        mesh no device, and no host, need have room for the whole.

        Raises CheckpointError, in one line, for a checkpoint that is missing, torn or of another shape.
        """
        path = Path(path)
        if path.is_dir():
            if not (path / "model.safetensors").exists():
                raise checkpoint.CheckpointError(
                    f"{path}: holds no model.safetensors; train there first, or name the file"
                )
            path = path / "model.safetensors"
        source = checkpoint.Source(path)
        meta = source.meta
        try:
            tokeniser = Tokeniser.of_meta(meta)
            empty = describe.abstract(meta["model"])
            families, layout, length = dict(meta["families"]), meta["layout"], int(meta["length"])
            guard = Guard.of(meta.get("guard", 0.0))
            counts: dict[str, Any] = {k: int(meta[k]) for k in ("max_hypotheses", "max_sources") if k in meta}
            check_layout(tokeniser, layout)
            if meta["model"]["class"] != "Corrector":
                raise ValueError(f"it is a {meta['model']['class']}")
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise checkpoint.CheckpointError(
                f"{path}: its description is incomplete or wrong ({error}); export it again"
            ) from error
        for name, leaf in tree.flatten(empty).items():
            if source.shapes.get(name) != leaf.shape:
                was = source.shapes.get(name, "nothing")
                raise checkpoint.CheckpointError(
                    f"{path}: {name} is {was}, its description needs {tuple(leaf.shape)}; export it again"
                )
        fingerprint = sha256(path)[:16]
        if empty.vocab != tokeniser.vocab_size:
            raise checkpoint.CheckpointError(
                f"{path}: the tokeniser has {tokeniser.vocab_size} pieces, the embedding {empty.vocab}; export it again"
            )
        model = quantise.hold(describe.filled(empty, source, mesh), weights)
        made = cls(model, tokeniser, families, layout, guard, fingerprint, max_length=length, mesh=mesh, **counts)
        if (task := options.get("task")) and task not in families:
            known = ", ".join(families) or "none: it has not been trained on any here"
            raise ValueError(f"unknown task {task!r}; {path} knows {known}")
        options = {k: Guard.of(v) if k == "guard" else v for k, v in options.items() if v is not None}
        return dataclasses.replace(made, **options)

    def __call__(self, records: Sequence[Record]) -> list[Correction]:
        return [self.guard(p) for p in self.propose(records)]

    @sharding.within
    def propose(self, records: Sequence[Record]) -> list[Proposal]:
        """Search, let the n-best compete, and weigh the result against the first pass; order is kept."""
        examples = [self.encode(r) for r in records]
        # Rows of like length share a batch: padding is wasted work.
        fitting = {i: e for i, e in enumerate(examples) if e is not None}
        order = sorted(fitting, key=lambda i: len(fitting[i].tokens))
        out: list[Proposal | None] = [None] * len(records)
        prefix = self._shared([e.tokens for e in fitting.values()])
        numbers = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        decoded = self._in_lanes if self.continuous else self._in_turn
        batches = [([records[i] for i in chosen], [fitting[i].tokens for i in chosen]) for chosen in numbers]
        for chosen, (given, _), (read, found) in zip(numbers, batches, decoded(batches, prefix), strict=True):
            for i, proposal in zip(chosen, self._proposals(given, read, found), strict=True):
                out[i] = proposal
        return [
            p
            or Proposal(
                r.hypotheses[0], r.hypotheses[0], 0.0, 0.0, "empty" if not r.hypotheses[0].strip() else "too long"
            )
            for p, r in zip(out, records, strict=True)
        ]

    @sharding.within
    def score(self, records: Sequence[Record], texts: Sequence[str]) -> list[decode.Decoded | None]:
        """How likely each text is as the correction of its record, token by token (end-of-text is one); None for a
        record that would not be corrected (`encode`), or a text that is too long."""
        examples = [self.encode(r) for r in records]
        ids = [self._ids(t) for t in texts]
        fitting = {i: e.tokens for i, e in enumerate(examples) if e is not None and len(ids[i]) <= self._longest}
        order = sorted(fitting, key=lambda i: len(fitting[i]))
        out: list[decode.Decoded | None] = [None] * len(records)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            read = self._read([fitting[i] for i in chosen], None)
            scored = self._after(read, range(len(chosen)), [ids[i] for i in chosen])
            for i, text in zip(chosen, scored, strict=True):
                out[i] = text
        return out

    def encode(self, record: Record) -> Example | None:
        """The prompt, or None for a first hypothesis that is blank or too long for the model."""
        if not record.hypotheses[0].strip():
            return None
        return encode_example(
            self.tokeniser,
            record.hypotheses,
            record.sources,
            max_length=self.max_length,
            layout=self.layout,
            max_hypotheses=self.max_hypotheses,
            max_sources=self.max_sources,
            family=self.task or record.task,
        )

    def _shared(self, prompts: Sequence[list[int]]) -> decode.Prefix | None:
        """What these prompts begin with, read once; that of an earlier call where it fits, as its programs are there.
        Few prompts have much in common by chance, and are not worth a program."""
        held = self._prefix
        if held and all(len(p) > len(held.tokens) and tuple(p[: len(held.tokens)]) == held.tokens for p in prompts):
            return held
        if len(prompts) < self.batch_size or self.mesh:  # one row does not divide over a mesh
            return None
        first, last = min(prompts), max(prompts)  # all others lie between them
        common = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], zip(first[:-1], last, strict=False)))
        size = common // SHARED * SHARED
        if size < LEAST_SHARED:
            return None
        self._prefix = decode.read_prefix(self.model, first[:size], self._task_id())
        return self._prefix

    def _task_id(self) -> int:
        return self.families[self.task] if self.task else 0

    def _read(self, prompts: Sequence[list[int]], prefix: decode.Prefix | None) -> decode.Prefill:
        """A full batch always: one compiled program a bucket."""
        full = [*prompts, *[prompts[-1]] * (self.batch_size - len(prompts))]
        return decode.prefill(self.model, full, [self._task_id()] * len(full), prefix)

    def _limits(self, records: Sequence[Record]) -> list[int]:
        return [room_to_write(self.tokeniser, r.hypotheses[0]) for r in records]

    def _in_turn(self, batches: Sequence[Batch], prefix: decode.Prefix | None) -> Iterator[Read]:
        """Each batch to its end."""
        eos = self.tokeniser.eos
        for records, prompts in batches:
            read, pad = self._read(prompts, prefix), self.batch_size - len(records)
            room = [*self._limits(records), *[1] * pad]
            if self.sampling is None:
                found = decode.search(self.model, read, beams=self.beams, max_new=room, alpha=self.alpha, eos=eos)
            else:
                numbers = [*(r.number for r in records), *[0] * pad]
                how: dict[str, Any] = dict(samples=self.beams, seed=self.seed, record=numbers, max_new=room, eos=eos)
                drawn = decode.sample(self.model, read, self.sampling, **how)
                found = [max(texts, key=lambda d: self._penalised(d)[1]) for texts in drawn]
            yield read, found[: len(records)]

    def _in_lanes(self, batches: Sequence[Batch], prefix: decode.Prefix | None) -> Iterator[Read]:
        """Lanes of one program take the prompts whose caches are of one size."""
        limits = [self._limits(records) for records, _ in batches]
        how: dict[str, Any] = dict(lanes=self.batch_size, seed=self.seed, eos=self.tokeniser.eos)
        how |= dict(room=decode.bucket(max(itertools.chain(*limits), default=1), decode.ROOMS))
        waiting = (
            lanes.Waiting(self._read(prompts, prefix), limit, [r.number for r in records])
            for (records, prompts), limit in zip(batches, limits, strict=True)
        )
        for _, group in itertools.groupby(waiting, lambda batch: batch.read.slots):
            for batch, texts in lanes.run(self.model, group, sampling=self.sampling or lanes.GREEDY, **how):
                yield batch.read, texts

    def _proposals(
        self, records: Sequence[Record], read: decode.Prefill, found: Sequence[decode.Decoded]
    ) -> list[Proposal]:
        firsts = [r.hypotheses[0] for r in records]
        written = [self.tokeniser.decode(d.tokens) if d.ended else None for d in found]
        texts = [t and local_edits(t, r.hypotheses) for t, r in zip(written, records, strict=True)]
        candidates = [self._candidates(r, t) for r, t in zip(records, texts, strict=True)]
        scores = self._scores(read, candidates, found)
        several = [len(set(r.hypotheses)) > 1 for r in records]
        return [self._best(*given) for given in zip(firsts, texts, scores, several, strict=True)]

    def _candidates(self, record: Record, text: str | None) -> dict[str, list[int]]:
        """The texts that compete, with their tokens; of the given ones those that are not too long."""
        given = record.hypotheses[: self.max_hypotheses] if self.rescore else record.hypotheses[:1]
        usable = text is not None and text.strip() and not repeats(text, record.hypotheses)
        own = [text] if usable else []
        texts = dict.fromkeys([*own, *(h for h in given if h.strip())])
        tokens = {t: self._ids(t) for t in texts}
        return {t: ids for t, ids in tokens.items() if t in own or len(ids) <= self._longest}

    def _ids(self, text: str) -> list[int]:
        """A text as it would be written."""
        return [*self.tokeniser.encode(text), self.tokeniser.eos[0]]

    @property
    def _longest(self) -> int:
        return min(self.max_length, decode.ROOMS[-1])

    def _scores(
        self, read: decode.Prefill, candidates: Sequence[Mapping[str, list[int]]], found: Sequence[decode.Decoded]
    ) -> list[dict[str, tuple[float, float]]]:
        """For each record: candidate -> (log p, log p under the length penalty). What was `found` has its score."""
        out: list[dict[str, tuple[float, float]]] = [{} for _ in candidates]
        jobs = []
        for i, (text, ids) in ((i, c) for i, cs in enumerate(candidates) for c in cs.items()):
            if ids == found[i].tokens:
                out[i][text] = self._penalised(found[i])
            else:
                jobs.append((i, text, ids))
        jobs.sort(key=lambda job: len(job[2]))
        for start in range(0, len(jobs), self.batch_size):
            batch = jobs[start : start + self.batch_size]
            results = self._after(read, [i for i, *_ in batch], [ids for *_, ids in batch])
            for (i, text, _), result in zip(batch, results, strict=True):
                out[i][text] = self._penalised(result)
        return out

    def _after(self, read: decode.Prefill, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> list[decode.Decoded]:
        """`decode.score` of at most a batch, always of a full one: one compiled program a bucket."""
        pad = self.batch_size - len(rows)
        found = decode.score(
            self.model, read, [*rows, *[rows[-1]] * pad], [*texts, *[texts[-1]] * pad], self.tokeniser.eos
        )
        return found[: len(rows)]

    def _penalised(self, text: decode.Decoded) -> tuple[float, float]:
        return text.total, text.total / float(decode.length_penalty(len(text.tokens), self.alpha))

    def _best(self, first: str, own: str | None, scored: dict[str, tuple[float, float]], several: bool) -> Proposal:
        """The candidate of the highest penalised score; of the given ones where the search went astray."""
        searched = own is not None and own in scored
        text = own if searched and not self.rescore else max(scored, key=lambda c: scored[c][1])
        note = None if searched or text != first else "no usable text was found"
        return Proposal(first, text, scored[text][0] - scored[first][0], scored[text][0], note, several)


MOST_GROWTH, LEAST_SLACK = 0.3, 3  # chosen on validation text


def local_edits(text: str, hypotheses: Sequence[str]) -> str:
    """`text` with those edits of the first hypothesis undone that lose or add much text: a span of words may change by
    `MOST_GROWTH` of its characters (or `LEAST_SLACK` characters), or become what another hypothesis says. Small models
    skip or make up a clause now and then; the edits beside it are still good."""
    first, new = hypotheses[0].split(" "), text.split(" ")
    others = [f" {h} " for h in hypotheses[1:]]
    out: list[str] = []
    for same, pairs in itertools.groupby(Levenshtein.opcodes(first, new), key=lambda op: op.tag == "equal"):
        ops = list(pairs)
        old_words = first[ops[0].src_start : ops[-1].src_end]
        new_words = new[ops[0].dest_start : ops[-1].dest_end]
        before, after = " ".join(old_words), " ".join(new_words)
        close = abs(len(after) - len(before)) <= max(LEAST_SLACK, MOST_GROWTH * len(before))
        heard = bool(after) and any(f" {after} " in other for other in others)
        out += new_words if same or close or heard else old_words
    return " ".join(out)


def repeats(text: str, hypotheses: Sequence[str], n: int = 3) -> bool:
    """Whether `text` says some `n` words again more often than any hypothesis does: a small model's search can go in
    circles, and what goes in circles looks probable to it."""

    def again(t: str) -> int:
        words = t.split()
        grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        return sum(c - 1 for c in grams.values())

    return again(text) > max(map(again, hypotheses))


def export(path: Path | str, params: dict[str, Any], meta: dict[str, Any], **more: Any) -> None:
    """One safetensors file that `Pipeline.load` and `init_from` read. `meta` is that of a run's checkpoint."""
    needed = ("model", "families", "layout", "length", "tokeniser", "tokeniser_model")
    known = ("step", "seed", "max_hypotheses", "max_sources", "positions", "trained", "longest_read")
    about = {k: meta[k] for k in needed} | {k: meta[k] for k in known if k in meta} | more
    checkpoint.write_safetensors(path, params, json.loads(json.dumps(about)))
