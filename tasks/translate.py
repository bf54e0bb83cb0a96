"""`translate_en_de` and its like, a task a direction; `denoise_de`, which restores masked text, a task a language; and
`postedit_es`, which edits what a machine translated, as far as the corpus has such drafts (`mt.train.jsonl.gz`).

All others read one file of sentences in many languages (`translation.read`): `translate.train.jsonl.gz` in the corpus,
with valid and test, or those of `MOE_JAX_DATA`. A translation is an ordinary record: the source sentence is the one
hypothesis, the target the reference.

Masking is text infilling as in mBART (arXiv 2001.08210): spans of words, their lengths drawn from Poisson(3.5), until
35 % of the words are gone, each span one mark. T5's own span corruption needs the package t5, and sentinels that its
tokeniser has. Our choices: the mark is an underscore, no span is empty, and a new epoch masks anew.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_jax.formats.record import Record
from moe_jax.tasks import correction
from moe_jax.tasks.quiet import seqio, tf
from moe_jax.tasks.translation import DIRECTIONS, FAMILY, denoises, drafts, edits, languages, read

MASKED, SPAN = 0.35, 3.5
MARK = "_"


class Parallel(correction.JsonLines):
    """The rows that have both languages of a direction."""

    def __init__(self, direction: str):
        super().__init__(f"{FAMILY}/{direction}", correction.data_folder, f"{FAMILY}.")
        self._direction = direction

    def listed(self, path: Path) -> tuple[list[bytes], list[int]]:
        return _lines(path, path.stat().st_mtime_ns, self._direction)


class Drafts(correction.JsonLines):
    """What a machine translated into the language of a direction."""

    def __init__(self, direction: str):
        super().__init__(f"{FAMILY}/{direction}", correction.data_folder, "mt.")
        self._direction = direction

    def listed(self, path: Path) -> tuple[list[bytes], list[int]]:
        found = drafts(path, self._direction)
        return [_line(self._direction, draft, text) for _, draft, text in found], [number for number, *_ in found]


@functools.lru_cache(maxsize=3 * len(DIRECTIONS))
def _lines(path: Path, mtime: int, direction: str) -> tuple[list[bytes], list[int]]:
    source, target = languages(direction)
    rows = [(number, row) for number, row in read(path) if source in row and target in row]
    lines = [_line(direction, row[source], row[target]) for _, row in rows]
    return lines, [number for number, _ in rows]


def _line(direction: str, source: str, target: str) -> bytes:
    return json.dumps({"source_set": direction, "hypotheses": [source], "reference": target}).encode()


@seqio.map_over_dataset(num_seeds=1)
def masked(row: dict[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
    """Masks the hypothesis of a row."""

    def mask_line(line: bytes, seed: np.ndarray) -> bytes:
        value = json.loads(line)
        source = mask(value["reference"], np.random.default_rng(seed))
        return _line(value["source_set"], source, value["reference"])

    line = tf.numpy_function(mask_line, [row["line"], tf.stack(seed)], tf.string, stateful=False)
    return row | {"line": tf.ensure_shape(line, [])}


def mask(text: str, rng: np.random.Generator) -> str:
    """`text` with about `MASKED` of its words gone; spans that meet are one."""
    words = text.split()
    gone = np.zeros(len(words), bool)
    while (left := round(MASKED * len(words)) - gone.sum()) > 0:
        length = min(max(rng.poisson(SPAN), 1), left)
        start = rng.integers(len(words) - length + 1)
        gone[start : start + length] = True
    runs = itertools.groupby(zip(gone, words, strict=True), key=lambda pair: pair[0])
    return " ".join(MARK if out else " ".join(word for _, word in run) for out, run in runs)


def scores(targets: Sequence[Record], predictions: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU and chrF of translations, fractions."""
    from moe_jax.metrics import translation  # here, so that preparing data does not wait for it

    references = [record.reference or "" for record in targets]
    return {m.name: m.corpus(predictions, references)[0] for m in (translation.bleu(), translation.chrf())}


def _register(direction: str) -> seqio.Task:
    if denoises(direction):
        name, to_rows = f"denoise_{languages(direction)[0]}", [masked]
    elif edits(direction):
        return correction.add(f"postedit_{languages(direction)[1]}", FAMILY, Drafts(direction), [], metric_fn=scores)
    else:
        name, to_rows = f"translate_{direction.replace('-', '_')}", []
    return correction.add(name, FAMILY, Parallel(direction), to_rows, metric_fn=scores)


TASKS = {direction: _register(direction) for direction in DIRECTIONS}
