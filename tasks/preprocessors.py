"""From a line of JSON to `tokens`, `roles` and `tasks`: int32, equally long, without zeros.

Zero-free because seqio's packer strips zeros; per token because it refuses features that pass through.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moe_jax.tasks.quiet import tf
from moe_jax.text.prompt import READ, Example
from moe_jax.text.tokeniser import EOS

UNFIT = Example([EOS], [READ])  # stands for an example that is too long, so that it is counted, not lost

Encode = Callable[[dict[str, Any], int], Example | None]  # (row, max_length)


def parse_row(line: str | bytes, where: str) -> dict[str, Any]:
    """The object on a line: `hypotheses` (best first), `reference`, and what else it holds.

    Raises ValueError, in one line that begins with `where`, if it is not such an object.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: not JSON in UTF-8") from None
    if not isinstance(row, dict):
        raise ValueError(f'{where}: not a JSON object such as {{"hypotheses": [...], "reference": "..."}}')
    hypotheses = row.get("hypotheses")
    if not isinstance(hypotheses, list) or not hypotheses or not all(isinstance(h, str) for h in hypotheses):
        raise ValueError(f'{where}: "hypotheses" is not a list of one or more strings')
    if not isinstance(row.get("reference"), str):
        raise ValueError(f'{where}: "reference" is not a string')
    sources = row.setdefault("sources", {})
    if not isinstance(sources, dict) or not all(isinstance(text, str) for text in sources.values()):
        raise ValueError(f'{where}: "sources" is not an object of language: text')
    return row


def encode_rows(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int] | None,
    *,
    get_encode: Callable[[], Encode],
    task_id: int,
) -> tf.data.Dataset:
    """Adds the features of the model to {"line", "where"}; an example that does not fit becomes `UNFIT`.

    `sequence_length["tokens"]` bounds prompt and reference together; None is no bound. `get_encode` is asked
    once, now, so that a dataset keeps the tokeniser that it was built with.
    """
    max_length = sequence_length["tokens"] if sequence_length else 1 << 30
    encode = get_encode()

    def to_arrays(line: bytes, where: bytes) -> np.ndarray:
        row = parse_row(line, where.decode())
        try:
            example = encode(row, max_length) or UNFIT
        except ValueError as error:
            raise ValueError(f"{where.decode()}: {error}") from None
        return np.stack([example.tokens, example.roles, np.full(len(example.tokens), task_id)]).astype(
            np.int32
        )

    def features(row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        # Declared stateless: TensorFlow cannot save the state of an iterator over stateful functions.
        arrays = tf.numpy_function(to_arrays, [row["line"], row["where"]], tf.int32, stateful=False)
        columns = tf.unstack(tf.ensure_shape(arrays, [3, None]))
        return row | dict(zip(("tokens", "roles", "tasks"), columns, strict=True))

    return dataset.map(features)  # in parallel it would only wait for Python's lock
