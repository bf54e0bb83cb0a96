"""Correction tasks over TensorFlow Datasets.

    from moe_jax.tasks import tfds
    tfds.register_tfds_task("my_captions", "ocr", "captions:1.0.0", hypotheses="readings", reference="text")

in a module of your own, which imports the dataset's builder if it is yours; a gin file that says `import that_module`
may then name the task in a mixture.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable

import numpy as np

from moe_jax.tasks import correction
from moe_jax.tasks.quiet import seqio, tf

SHUFFLED = 20_000  # examples at a time; files are shuffled, too


def register_tfds_task(
    name: str,
    family: str,
    dataset: str,
    *,
    hypotheses: str = "hypotheses",
    reference: str = "reference",
    sources: str | None = None,
    data_dir: str | os.PathLike | None = None,
    splits: Iterable[str] | dict[str, str] | None = None,
) -> seqio.Task:
    """A task over a dataset that TFDS knows, with its version: "captions:1.0.0".

    Args:
      hypotheses, reference, sources: names of its features: texts, best first (or one text); a text; texts or None.
      data_dir: where TFDS keeps it, if not where it keeps all.
      splits: those to use (all by default), or ours -> its own: {"train": "train[:95%]", "valid": "train[95%:]"}.

    Raises ValueError, in one line, if the name or the family cannot be used.
    """
    source = seqio.TfdsDataSource(dataset, str(data_dir) if data_dir else None, splits)
    features = {"hypotheses": hypotheses, "reference": reference} | ({"sources": sources} if sources else {})
    to_rows = functools.partial(rows, name=dataset, features=features)
    return correction.add(name, family, source, [to_rows], SHUFFLED)


def rows(dataset: tf.data.Dataset, *, name: str, features: dict[str, str]) -> tf.data.Dataset:
    """Examples as the rows of `correction.JsonLines`: {"line", "path", "number"}.

    Raises ValueError, in one line, for a feature that there is not.
    """
    for feature in features.values():
        if feature not in dataset.element_spec:
            raise ValueError(f"{name}: no feature {feature!r}; it has {', '.join(dataset.element_spec)}")

    def to_line(*values: np.ndarray | bytes) -> bytes:
        row: dict[str, object] = {"source_set": name}
        for key, value in zip(features, values, strict=True):
            texts = [text.decode("utf-8", "surrogateescape") for text in np.atleast_1d(np.asarray(value, object))]
            row[key] = "".join(texts) if key == "reference" else texts
        return json.dumps(row).encode()

    def to_row(number: tf.Tensor, example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        values = [example[feature] for feature in features.values()]
        line = tf.ensure_shape(tf.numpy_function(to_line, values, tf.string, stateful=False), [])
        return {"line": line, "path": tf.constant(name), "number": number}

    return dataset.enumerate(1).map(to_row)
