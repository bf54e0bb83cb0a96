"""From seqio mixtures to prepared folders and batches: alone in `moe_jax` to import seqio and TensorFlow.

Training reads prepared folders (`data.py`) and never comes here.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from moe_jax.data import summary, write_prepared
from moe_jax.formats.manifest import Recorded, Skipped
from moe_jax.packing import COLUMNS, Packable, pack, to_batch
from moe_jax.tasks import correction, mixtures, speech  # noqa: F401  (registers the tasks)
from moe_jax.tasks.preprocessors import UNFIT
from moe_jax.tasks.quiet import seqio, tf
from moe_jax.text.tokeniser import Tokeniser
from moe_jax.types import Batch

FEATURES = ("tokens", "roles", "tasks")
GIVE_UP = 10_000  # examples that do not fit, before the first that does
BATCHED = 256  # examples that come over from TensorFlow at a time
_INT32 = seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)


def own(name: str, family: str, folder: str) -> None:
    """Registers a user's folder of JSON lines as a task (`tasks.correction.register_jsonl_task`), once."""
    if name not in seqio.TaskRegistry.names():
        correction.register_jsonl_task(name, family, folder)


def find(name: str | Mapping[str, float]) -> seqio.Task | seqio.Mixture:
    """A registered task or mixture, or a mixture of such by rates, made here.

    Raises ValueError with the nearest and all known names.
    """
    if not isinstance(name, str):
        parts = [(find(part), float(rate)) for part, rate in name.items()]
        if not parts or min(rate for _, rate in parts) <= 0:
            raise ValueError(f"mixture {dict(name)}: give each task or mixture in it a rate above 0")
        return seqio.Mixture("_".join(part.name for part, _ in parts), parts)
    known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown task or mixture {name!r}; {hint}known: {', '.join(known)}")
    return seqio.get_mixture_or_task(name)


def utterances(task: str, split: str) -> Iterator[Recorded | Skipped]:
    """Every utterance of a task or mixture of speech (`tasks.speech`), once."""
    with _quiet():
        yield from speech.utterances(task, split)


class CorrectionConverter(seqio.FeatureConverter):
    """Task features -> the columns of a row, for seqio's own `get_dataset` and `Evaluator`.

    Token 0 is a token as any other. seqio's packer strips zeros, so ids are one higher while it packs.

    With pack=True and length 8, two examples of families 1 and 3:

        tokens    [3 20 8 20 1] [3 30 8]      ->  [3 20 8 20 1 3 30 8]
        roles     [1  1 1  2 2] [1  1 1]      ->  [1  1 1  2 2 1  1 1]
        tasks     [1  1 1  1 1] [3  3 3]      ->  [1  1 1  1 1 3  3 3]
                                     segments     [1  1 1  1 1 2  2 2]
    """

    TASK_FEATURES = dict.fromkeys(FEATURES, _INT32)
    MODEL_FEATURES = dict.fromkeys(COLUMNS, _INT32)
    PACKING_FEATURE_DTYPES = dict.fromkeys(COLUMNS, tf.int32)

    def _convert_features(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
        def columns(row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            there = tf.cast(row["tokens"] > 0, tf.int32)
            segments = row["tokens_segment_ids"] if self.pack else there
            return {**{name: row[name] for name in FEATURES}, "tokens": row["tokens"] - there, "segments": segments}

        raised = ds.map(lambda row: {**row, "tokens": row["tokens"] + 1})
        return self._pack_or_pad(raised, task_feature_lengths).map(columns, num_parallel_calls=tf.data.AUTOTUNE)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        return {**task_feature_lengths, "segments": task_feature_lengths["tokens"]}


def draw(
    name: str | Mapping[str, float],
    *,
    length: int,
    seed: int,
    split: str = "train",
    examples: int | None = None,
    passes: int | None = None,
    **settings: Any,
) -> Iterator[Packable]:
    """Examples of a task or mixture, shuffled; the same for the same arguments and files.

    Args:
      name: registered with seqio, or rates of such names.
      length: the most tokens of an example; one that does not fit comes as `UNFIT`.
      examples: draw so many, by the rates of the mixture; or
      passes: draw every example of every task so many times, whatever the rates; or neither: without end.
      settings: of `tasks.correction.Settings`, such as tokeniser and layout.

    Raises ValueError, in one line, for an unknown name, a missing split or file, or a bad line of a file.
    """
    provider = find(name)
    if examples is not None and passes is not None:
        raise ValueError("give examples or passes, not both")
    sources = _tasks_with(provider, split)
    lengths = dict.fromkeys(FEATURES, length)
    common: dict[str, Any] = {"shuffle": True, "seed": seed, "try_in_mem_cache": False}
    with _quiet(), correction.using(**settings):
        if passes is None:
            ds = provider.get_dataset(lengths, split, num_epochs=None, **common)
            ds = ds if examples is None else ds.take(examples)
        else:
            parts = [task.get_dataset(lengths, split, num_epochs=passes, **common) for task in sources]
            sizes = [float(task.num_input_examples(split)) for task in sources]
            ds = tf.data.Dataset.sample_from_datasets(parts, sizes, seed, stop_on_empty_dataset=False)
    # Many at a time: for each, this thread and TensorFlow's hand Python's lock to each other.
    ds = ds.map(lambda row: {name: row[name] for name in FEATURES}).ragged_batch(BATCHED)
    with _one_line_errors():
        for batch in ds:
            tokens, roles, tasks = (batch[name].values.numpy() for name in FEATURES)
            for start, end in itertools.pairwise(batch["tokens"].row_splits.numpy()):
                yield Packable(tokens[start:end], roles[start:end], int(tasks[start]))


def seqio_batches(
    name: str, *, length: int, batch_size: int, seed: int, split: str = "train", **settings: Any
) -> Iterator[Batch]:
    """Batches without end, straight from seqio: for trials; it takes the CPU that a prepared folder saves."""
    skipped: Counter[str] = Counter()
    ids = settings.get("ids", correction.task_ids())
    stream = pack(_fitting(draw(name, length=length, seed=seed, split=split, **settings), ids, skipped), length)
    while True:
        rows = [next(stream) for _ in range(batch_size)]
        yield to_batch({column: np.stack([row[column] for row in rows]) for column in COLUMNS})


def prepare(
    name: str | Mapping[str, float],
    tokeniser: Tokeniser | str | os.PathLike,
    folder: str | os.PathLike,
    *,
    length: int,
    seed: int,
    examples: int | None = None,
    passes: int | None = None,
    layout: str = "aligned",
    max_hypotheses: int = 5,
    max_sources: int = 0,
    sides: Sequence[int] | None = None,
    split: str = "train",
    ids: Mapping[str, int] | None = None,
    own: Mapping[str, Any] | None = None,
    corpus: Mapping[str, int] | None = None,
) -> Mapping[str, Any]:
    """Draws from a task or mixture into a prepared folder (see `data.py`), says what came, returns the meta.

    `examples` or `passes` as in `draw`: one of them. `sides` as of `prepare.prepare`, `ids` as in
    `tasks.correction.task_ids`; the whole table is the meta's "families". `ids`, `own` and `corpus` are kept in the
    meta. Raises ValueError in one line.
    """
    families = correction.task_ids(ids)
    own_sides = (sides[0], sides[1]) if sides else None
    if examples is None and passes is None:
        raise ValueError("say how much to draw: give examples or passes")
    settings = {"layout": layout, "max_hypotheses": max_hypotheses, "max_sources": max_sources}
    loaded = tokeniser if isinstance(tokeniser, Tokeniser) else Tokeniser.load(tokeniser)
    provider = find(name)
    tasks = _tasks_with(provider, split)
    total = examples or (passes or 0) * sum(task.num_input_examples(split) for task in tasks)
    drawn = draw(
        name,
        length=length,
        seed=seed,
        split=split,
        examples=examples,
        passes=passes,
        tokeniser=loaded,
        ids=families,
        **settings,
    )
    skipped: Counter[str] = Counter()
    available: Counter[str] = Counter()
    for task in tasks:
        family = getattr(task.source, "family", "")
        if not any(name.startswith(f"{family}/") for name in families):  # of these, parts are counted
            available[family] += task.num_input_examples(split)
    progress = tqdm(drawn, total=total, desc=f"{provider.name} {split}", unit=" examples", mininterval=1, disable=None)
    meta = write_prepared(
        folder,
        _fitting(progress, families, skipped, own_sides),
        length=length,
        tokeniser=loaded,
        families=families,
        skipped=skipped,
        sides=own_sides,
        mixture=name if isinstance(name, str) else dict(name),
        split=split,
        seed=seed,
        drawn={"examples": examples, "passes": passes},
        available=dict(available),
        **settings,
        **({"ids": dict(ids)} if ids else {}),
        **({"own": dict(own)} if own else {}),
        **({"corpus": dict(corpus)} if corpus is not None else {}),
    )
    print(summary(meta), file=sys.stderr)
    return meta


def _tasks_with(provider: seqio.Task | seqio.Mixture, split: str) -> Sequence[seqio.Task]:
    """The tasks of a mixture that have the split; their files are looked for now."""
    tasks = seqio.get_subtasks(provider)
    found = [task for task in tasks if split in task.splits]
    if not found:
        splits = sorted({split for task in tasks for split in task.splits})
        there = ", ".join(splits) or "none here: MOE_JAX_DATA names a folder with its files"
        raise ValueError(f"{provider.name} has no split {split!r}; it has {there}")
    for task in found:
        if not task.num_input_examples(split):
            raise ValueError(f"{task.name}: its split {split!r} has no examples")
    return found


def _fitting(
    examples: Iterable[Packable],
    families: Mapping[str, int],
    skipped: Counter[str],
    sides: tuple[int, int] | None = None,
) -> Iterator[Packable]:
    """Leaves out, and counts by family, what does not fit, also on a side. Raises ValueError if nothing does."""
    names = {number: name for name, number in families.items()}
    fits = False
    for example in examples:
        if len(example.tokens) > len(UNFIT.tokens) and (sides is None or _fits(example, sides)):
            fits = True
            yield example
        else:
            skipped[names[example.task]] += 1
            if not fits and skipped.total() >= GIVE_UP:
                raise ValueError(f"none of the first {GIVE_UP:,} examples fits the length; take a larger one")


def _fits(example: Packable, sides: tuple[int, int]) -> bool:
    return all(size <= side for size, side in zip(example.sides, sides, strict=True))


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """seqio warns for each task that it counts source lines, as it should."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def _one_line_errors() -> Generator[None]:
    """TensorFlow wraps a Python error in its own, with both tracebacks in the message."""
    try:
        yield
    except tf.errors.OpError as error:
        ours = re.search(r"(?:Value|Format)Error: (.+)", error.message)
        raise ValueError(ours[1] if ours else error.message.splitlines()[0]) from None
