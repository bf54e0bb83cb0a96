"""From a line of JSON to `tokens`, `roles` and `tasks`: int32, equally long, the last two without zeros.

Zero-free because seqio's packer strips zeros (`CorrectionConverter` keeps it from token 0, which pretrained
vocabularies have); per token because it refuses features that pass through.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import numpy as np

from moe_jax.formats import objects
from moe_jax.formats.record import Bad, Place, Record
from moe_jax.tasks.quiet import tf
from moe_jax.text.prompt import READ, Example

UNFIT = Example([1], [READ])  # stands for an example that is too long, so that it is counted, not lost

Encode = Callable[[Record, int], tuple[Example | None, int]]  # (record, max_length) -> an example, the id of its task


def parse_row(line: bytes, path: bytes, number: int) -> Record:
    """The record on a line; its keys are those of `moe_jax.formats`, and it must have a reference.

    Raises FormatError (a ValueError): `path:number: what; how to mend it`.
    """
    place = Place(path.decode(), int(number))
    raw = line.decode("utf-8", "surrogateescape").strip(objects.SPACE).removeprefix("\ufeff")
    try:
        value = objects.DECODER.decode(raw)
    except (json.JSONDecodeError, RecursionError):
        raise place.error("not JSON", "write one JSON object a line") from None
    record = objects.parse(value, raw, place, None)
    if isinstance(record, Bad):
        raise record.error
    if record.reference is None:
        raise place.error("no reference to learn from", 'give the right text under "reference"')
    return record


def encode_rows(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int] | None,
    *,
    get_encode: Callable[[], Encode],
) -> tf.data.Dataset:
    """Adds the model's features to {"line", "path", "number"}; an example that does not fit becomes `UNFIT`.

    `sequence_length["tokens"]` bounds prompt and reference together; None is no bound. `get_encode` is asked
    once, now, so that a dataset keeps the tokeniser that it was built with.
    """
    max_length = sequence_length["tokens"] if sequence_length else 1 << 30
    encode = get_encode()

    def to_arrays(line: bytes, path: bytes, number: int) -> np.ndarray:
        record = parse_row(line, path, number)
        try:
            example, task = encode(record, max_length)
        except ValueError as error:
            raise ValueError(f"{path.decode()}:{number}: {error}") from None
        tokens, roles = example or UNFIT
        return np.stack([tokens, roles, np.full(len(tokens), task)]).astype(np.int32)

    def features(row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        # Declared stateless: TensorFlow cannot save the state of an iterator over stateful functions.
        inputs = [row["line"], row["path"], row["number"]]
        arrays = tf.ensure_shape(tf.numpy_function(to_arrays, inputs, tf.int32, stateful=False), [3, None])
        return row | dict(zip(("tokens", "roles", "tasks"), tf.unstack(arrays), strict=True))

    return dataset.map(features)  # in parallel it would only wait for Python's lock
