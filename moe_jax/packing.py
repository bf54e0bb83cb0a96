"""Packing: examples -> rows of a fixed length -> batches. Rows mix families; segments keep examples apart."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from moe_jax.text.prompt import READ, WRITE
from moe_jax.types import Batch, Source, TokenInfo

COLUMNS = {"tokens": np.uint32, "roles": np.uint8, "tasks": np.uint8, "segments": np.uint8}
MAX_SEGMENTS = 255  # of one row: segments are uint8
OPEN_ROWS = 64  # rows that `pack` keeps open; more fill better, and mix examples over a longer stretch

Rows = Mapping[str, np.ndarray]  # column -> [length] or [B, length]


class Packable(NamedTuple):
    """One example: token ids (0 is as good as any), their roles, and the id of its family."""

    tokens: Sequence[int]
    roles: Sequence[int]
    task: int

    @property
    def sides(self) -> tuple[int, int]:
        """How many tokens are read, and how many written."""
        read = int((np.asarray(self.roles) == READ).sum())
        return read, len(self.roles) - read


def pack(examples: Iterable[Packable], length: int) -> Iterator[Rows]:
    """Packs whole examples into rows of `length`: each goes where it leaves the least room (best fit), of equals into
    the row that was opened first.

    Raises ValueError for an example that is longer than a row, or empty.
    """
    rows: list[tuple[int, int, list[Packable]]] = []  # ascending: (room, which example opened it, what is in it)
    for number, example in enumerate(examples):
        size = len(example.tokens)
        if not 0 < size <= length or len(example.roles) != size:
            raise ValueError(f"cannot pack an example of {size} tokens into rows of {length}")
        best = bisect_left(rows, (size, -1, []))
        if best < len(rows):
            room, opened, row = rows.pop(best)
        else:
            if len(rows) == OPEN_ROWS:
                yield _row(rows.pop(0)[-1], length)
            room, opened, row = length, number, []
        row.append(example)
        if room == size or len(row) == MAX_SEGMENTS:
            yield _row(row, length)
        else:
            insort(rows, (room - size, opened, row))
    for _, _, row in sorted(rows, key=itemgetter(1)):
        yield _row(row, length)


def pack_sides(examples: Iterable[Packable], sides: tuple[int, int]) -> Iterator[Rows]:
    """As `pack`, for an encoder and a decoder: at most `sides` tokens of a row are read and written. Rows that are
    filled up by their tokens together would leave each side as wide as the one row that has most there.

    Raises ValueError for an example that is longer on a side, or empty there.
    """
    rows: list[tuple[tuple[int, int], list[Packable]]] = []  # as they were opened: (room on each side, what is in it)
    for example in examples:
        sizes = example.sides
        if not (0 < sizes[0] <= sides[0] and 0 < sizes[1] <= sides[1]) or len(example.tokens) != sum(sizes):
            raise ValueError(f"cannot pack an example that reads and writes {sizes} tokens into rows of {sides}")
        fit = [at for at, (room, _) in enumerate(rows) if room[0] >= sizes[0] and room[1] >= sizes[1]]
        if fit:
            room, row = rows.pop(min(fit, key=lambda at: sum(rows[at][0])))
        else:
            if len(rows) == OPEN_ROWS:
                yield _row(rows.pop(min(range(len(rows)), key=lambda at: sum(rows[at][0])))[1], sum(sides))
            room, row = sides, []
        row.append(example)
        room = room[0] - sizes[0], room[1] - sizes[1]
        if min(room) == 0 or len(row) == MAX_SEGMENTS:
            yield _row(row, sum(sides))
        else:
            rows.append((room, row))
    for _, row in rows:
        yield _row(row, sum(sides))


def _row(examples: Sequence[Packable], length: int) -> Rows:
    row = {name: np.zeros(length, dtype) for name, dtype in COLUMNS.items()}
    start = 0
    for segment, (tokens, roles, task) in enumerate(examples, 1):
        span = slice(start, start + len(tokens))
        row["tokens"][span], row["roles"][span] = tokens, roles
        row["tasks"][span], row["segments"][span] = task, segment
        start = span.stop
    return row


def to_batch(rows: Rows) -> Batch:
    """A `Batch` of numpy arrays from columns [B, L]; with `tokens` 5 6 7 | 8 9 and `roles` 1 1 2 | 1 2:

    targets   6 7 0  9 0       the next token of the same segment
    weights   0 1 0  1 0       1 where that token is to be written
    position  0 1 2  0 1
    """
    tokens, roles, tasks, segments = (np.asarray(rows[name]).astype(np.int32) for name in COLUMNS)
    valid = segments > 0
    ahead = np.zeros_like(valid)  # whether the next position belongs to the same segment
    ahead[:, :-1] = valid[:, :-1] & (segments[:, 1:] == segments[:, :-1])
    writes = ahead & (np.roll(roles, -1, axis=1) == WRITE)
    batch: dict[str, Any] = {
        "tokens_BxL": tokens,
        "targets_BxL": np.where(ahead, np.roll(tokens, -1, axis=1), 0),
        "weights_BxL": writes.astype(np.float32),
        "info": _info(tasks, segments),
    }
    return Batch(**batch)


def to_pairs(rows: Rows, source: int, target: int) -> Batch:
    """A `Batch` for an encoder and a decoder, of the same columns: what is read lies in `source` columns, what is
    written in `target`, both without the gaps that the other left. With `to_batch`'s example:

    source    5 6 | 8          read
    tokens    6 | 8            the last token that is read starts the decoder
    targets   7 | 9

    Raises ValueError where a row has more than fits.
    """
    whole = to_batch(rows)
    tasks, segments = np.asarray(whole.info.task_BxL), np.asarray(whole.info.segment_BxL)

    def compact(kept: np.ndarray, size: int, *arrays: Any) -> tuple[np.ndarray, ...]:
        if (most := kept.sum(1).max()) > size:
            raise ValueError(f"a row has {most} tokens on one side, more than {size}")
        order = np.argsort(~kept, axis=1, kind="stable")[:, :size]
        there = np.take_along_axis(kept, order, axis=1)
        return tuple(np.where(there, np.take_along_axis(np.asarray(a), order, axis=1), 0) for a in arrays)

    read = compact(np.asarray(rows["roles"]) == READ, source, whole.tokens_BxL, tasks, segments)
    written = compact(
        np.asarray(whole.weights_BxL) > 0,
        target,
        whole.tokens_BxL,
        whole.targets_BxL,
        whole.weights_BxL,
        tasks,
        segments,
    )
    given: Any = Source(*_arrays(read[0]), _info(*read[1:]))
    return Batch(*_arrays(*written[:3]), _info(*written[3:]), given)


def _arrays(*arrays: np.ndarray) -> Any:
    """As JAX would have them: batches are NumPy's until they are put on devices."""
    return arrays


def _info(tasks: np.ndarray, segments: np.ndarray) -> TokenInfo:
    """Positions count from the beginning of each segment."""
    valid = segments > 0
    index = np.arange(segments.shape[1], dtype=np.int32)
    begins = np.ones_like(valid)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    info: dict[str, Any] = {
        "task_BxL": tasks,
        "valid_BxL": valid,
        "segment_BxL": segments,
        "position_BxL": np.where(valid, index - starts, 0),
    }
    return TokenInfo(**info)
