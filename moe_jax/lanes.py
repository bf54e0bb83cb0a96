"""Continuous batching: a fixed number of lanes writes texts, and a lane whose text has ended takes the next prompt.

Lanes go on together for `BLOCK` steps in one compiled loop; between blocks those that are done are filled with prompts
that were read before, batch by batch. All lanes write into the same slot of their caches, which goes round in a ring
behind the prompts' slots: a text is never longer than the ring, so what it overwrites is of nobody. Texts and their
values are those of `decode.search` with one beam, or of `decode.sample`. (Beams keep to batches: those of a prompt
share its cache, and a lane has one of its own.)

It pays where prompts do not foretell how long texts are: texts of exponential lengths took 0.62 of the time of batches
of 32 (two CPU cores, `benchmarks.decode --only ragged`). Sorted corrections end nearly together: of the shipped base
384 test lines went at 32 to 34 sentences/s in lanes and at 32 to 36 in batches, so batches are the default.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import tree
from moe_jax.decode import EOS, Decoded, Prefill, allowed, is_end, step
from moe_jax.layers import stack
from moe_jax.programs import Structure, compiled, laid_out, of_rows
from moe_jax.sampling import Sampling, draw, keys
from moe_jax.types import Array, value

BLOCK = 16
GREEDY = Sampling(temperature=0.0)


@value
class Lanes:
    """Attributes:
    state: of each layer, of all lanes, with room for a text of M tokens each.
    logp_BxV: of each lane's next token.
    place_B, task_B, limit_B, key_B: position of the next token; family; tokens to write at most; of random numbers.
    done_B, count_B, written_BxM, gains_BxM: the text so far.
    turn: steps since the beginning.
    """

    state: tuple[Any, ...]
    logp_BxV: Array
    place_B: Array
    task_B: Array
    limit_B: Array
    key_B: Array
    done_B: Array
    count_B: Array
    written_BxM: Array
    gains_BxM: Array
    turn: Array


@dataclasses.dataclass
class Waiting:
    """A batch of prompts that were read.

    Attributes:
      limits: tokens that each may write at most; rows of `read` beyond them are padding.
      records: their numbers, for random numbers of their own (`decode.sample`).
    """

    read: Prefill
    limits: Sequence[int]
    records: Sequence[int]

    def __post_init__(self) -> None:
        self.begun = 0
        self.texts: list[Decoded | None] = [None] * len(self.limits)


def run(
    model: Any,
    batches: Iterable[Waiting],
    *,
    lanes: int,
    room: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    eos: Sequence[int] = (EOS,),
) -> Iterator[tuple[Waiting, list[Decoded]]]:
    """Each batch with its texts, in turn. The next one is taken when a lane would be empty without it.

    Args:
      batches: whose caches all have equally many slots.
      room: no text is longer.
    """
    model = laid_out(model)  # once for all blocks
    structure, params = Structure(model), tree.flatten(model)
    queue, begun, now = iter(batches), deque[Waiting](), None
    holder: list[tuple[Waiting, int] | None] = [None] * lanes
    while True:
        free = [lane for lane, held in enumerate(holder) if held is None]
        while free:
            if not begun or begun[-1].begun == len(begun[-1].limits):
                if (batch := next(queue, None)) is None:
                    break
                begun.append(batch)
            batch = begun[-1]
            rows = range(batch.begun, min(batch.begun + len(free), len(batch.limits)))
            taken, free = free[: len(rows)], free[len(rows) :]
            for lane, row in zip(taken, rows, strict=True):
                holder[lane] = batch, row
            if now is None:
                now = _empty()(structure, batch.read, lanes=lanes, room=room)
            limit_N, record_N, lane_N = np.zeros((3, lanes), np.int32)
            limit_N[: len(rows)] = batch.limits[rows.start : rows.stop]
            record_N[: len(rows)] = batch.records[rows.start : rows.stop]
            lane_N[: len(rows)] = taken
            key_N = keys(seed, jnp.asarray(record_N), 1)
            now = _fill()(structure, now, batch.read, limit_N, key_N, lane_N, batch.begun, len(rows))
            batch.begun = rows.stop
        if now is None or not any(holder):
            return
        now = _advance()(structure, params, now, sampling=sampling, eos=tuple(eos))
        done, count, written, gains = jax.device_get((now.done_B, now.count_B, now.written_BxM, now.gains_BxM))
        for lane, held in enumerate(holder):
            if held and done[lane]:
                (batch, row), n = held, count[lane]
                batch.texts[row] = Decoded(written[lane, :n].tolist(), gains[lane, :n].tolist(), True)
                holder[lane] = None
        while begun and all(begun[0].texts):
            batch = begun.popleft()
            yield batch, [text for text in batch.texts if text]


@compiled(static_argnames=("lanes", "room"))
def _empty(structure: Structure, read: Prefill, *, lanes: int, room: int) -> Lanes:
    """Lanes that are done."""
    first = jnp.zeros(lanes, jnp.int32)
    return Lanes(
        state=_state(structure, read, first, room),
        logp_BxV=read.logp_BxV[first],
        place_B=first,
        task_B=first,
        limit_B=first,
        key_B=keys(0, first, 1),
        done_B=first == 0,
        count_B=first,
        written_BxM=jnp.zeros((lanes, room), jnp.int32),
        gains_BxM=jnp.zeros((lanes, room)),
        turn=jnp.zeros((), jnp.int32),
    )


def _state(structure: Structure, read: Prefill, row_R: Array, room: int) -> tuple[Any, ...]:
    return tuple(one.shared(1, room) for one in stack.split(of_rows(read.state, row_R), structure.model.layers))


@compiled(donate_argnums=1)
def _fill(
    structure: Structure,
    lanes: Lanes,
    read: Prefill,
    limit_N: Array,
    key_N: Array,
    lane_N: Array,
    first: Array,
    many: Array,
) -> Lanes:
    """So `many` of the lanes named take rows of what was read, from the `first`; only these lanes are written."""

    def fill(i: Array, lanes: Lanes) -> Lanes:
        row, lane = first + i, lane_N[i]
        put = lambda a, b: a if a.ndim == 0 else jax.lax.dynamic_update_slice_in_dim(a, b, lane, 0)  # noqa: E731
        of_row = _state(structure, read, row[None], lanes.written_BxM.shape[1])
        return dataclasses.replace(
            lanes,
            state=jax.tree.map(put, lanes.state, of_row),
            logp_BxV=lanes.logp_BxV.at[lane].set(read.logp_BxV[row]),
            place_B=lanes.place_B.at[lane].set(read.length_B[row]),
            task_B=lanes.task_B.at[lane].set(read.task_B[row]),
            limit_B=lanes.limit_B.at[lane].set(limit_N[i]),
            key_B=lanes.key_B.at[lane].set(key_N[i]),
            done_B=lanes.done_B.at[lane].set(False),
            count_B=lanes.count_B.at[lane].set(0),
        )

    return jax.lax.fori_loop(0, many, fill, lanes)


@compiled(static_argnames=("sampling", "eos"), donate_argnums=2)
def _advance(
    structure: Structure, params: dict[str, Array], lanes: Lanes, *, sampling: Sampling, eos: tuple[int, ...]
) -> Lanes:
    """A block of steps."""
    model = structure.filled(params)
    B, M = lanes.written_BxM.shape
    ring = lanes.state[0].attention.segment_BxS.shape[1] - M

    def body(now: Lanes) -> Lanes:
        logp = allowed(now.logp_BxV, now.done_B, now.count_B + 1 >= now.limit_B, eos)
        token = draw(logp, now.key_B, now.count_B, sampling)
        gain = jnp.take_along_axis(logp, token[:, None], axis=1)[:, 0]
        here = jnp.arange(B), jnp.where(now.done_B, M, now.count_B)  # M: nowhere
        done = now.done_B | is_end(token, eos)
        slot = ring + now.turn % M
        state = jax.tree.map(lambda s: s if s.ndim else slot, now.state)
        logp, state = step(model, state, token, ~done, now.place_B, now.task_B)
        return dataclasses.replace(
            now,
            state=state,
            logp_BxV=logp,
            place_B=now.place_B + 1,
            done_B=done,
            count_B=now.count_B + ~now.done_B,
            written_BxM=now.written_BxM.at[here].set(token, mode="drop"),
            gains_BxM=now.gains_BxM.at[here].set(gain, mode="drop"),
            turn=now.turn + 1,
        )

    end = lanes.turn + BLOCK
    return jax.lax.while_loop(lambda now: (now.turn < end) & ~now.done_B.all(), body, lanes)
