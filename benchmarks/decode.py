"""Decoding with a cache against `transformers.generate`: the same weights, prompts and number of new tokens.

    python -m benchmarks.decode --json decode.json          # about 5 minutes on two cores; needs '.[bench]'

Neither stops early. Greedy texts must be the same token by token. The ragged case is lanes that take the next prompt
against batches that end together (`--only ragged`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks import peer
from benchmarks.measure import apart, interleaved, main, row
from moe_jax import decode, lanes, tree
from moe_jax.models.corrector import Corrector

PROMPT, NEW, TARGET = 60, 128, 1 / 3


def network(shape: peer.Shape) -> Corrector:
    """Neither the pad nor the end-of-text token is ever the best."""
    model = peer.ours(shape)
    table = tree.flatten(model)
    return tree.unflatten(model, table | {"output": table["output"].at[:, : decode.EOS + 1].set(0.0)})


Writes = Callable[[], list[list[int]]]
"""A call reads the prompts and writes after each."""


def ours(model: Any, prompts: np.ndarray, beams: int, new: int, eos: Sequence[int]) -> Writes:
    def call() -> list[list[int]]:
        read = decode.prefill(model, prompts.tolist())
        found = decode.search(model, read, beams=beams, max_new=new + 1, alpha=0.0, eos=eos)
        return [d.tokens[:new] for d in found]

    return call


def theirs(model: Any, prompts: np.ndarray, beams: int, new: int) -> Writes:
    import torch

    ids = torch.from_numpy(prompts)

    def call() -> list[list[int]]:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=beams,
                max_new_tokens=new,
                min_new_tokens=new,
                length_penalty=0.0,
            )
        return out[:, prompts.shape[1] :].tolist()

    return call


def _ours(shape: peer.Shape, prompts: np.ndarray, beams: int) -> Writes:
    return ours(network(shape), prompts, beams, NEW, (decode.EOS,))


def _theirs(shape: peer.Shape, prompts: np.ndarray, beams: int) -> Writes:
    return theirs(peer.theirs(shape, network(shape)), prompts, beams, NEW)


def generate(shape: peer.Shape, batch: int, beams: int) -> Iterator[dict[str, Any]]:
    prompts = np.random.default_rng(0).integers(3, shape.vocab, (batch, PROMPT))
    model = network(shape)
    peer.agree(shape, model, peer.theirs(shape, model))
    with apart(_ours, shape, prompts, beams) as mine, apart(_theirs, shape, prompts, beams) as other:
        first, second = mine(), other()
        if beams == 1 and first != second:
            raise ValueError("the two wrote different texts")
        times = interleaved({"ours": mine, "theirs": other}, rounds=5)
    more = {"unit": "ms", "tokens/s": batch * NEW / times["ours"], "theirs tokens/s": batch * NEW / times["theirs"]}
    yield row("generate", 1e3 * times["ours"], 1e3 * times["theirs"], TARGET, **more)


def ragged(shape: peer.Shape) -> Iterator[dict[str, Any]]:
    """Texts of exponentially distributed lengths, which their prompts do not foretell."""
    rng, rows = np.random.default_rng(0), 32
    prompts = rng.integers(3, shape.vocab, (4 * rows, PROMPT)).reshape(4, rows, PROMPT).tolist()
    limits = np.clip(rng.exponential(NEW / 4, (4, rows)).astype(int), 2, NEW).tolist()
    model = network(shape)

    def in_turn() -> list[list[int]]:
        reads = (decode.prefill(model, batch) for batch in prompts)
        found = (decode.search(model, read, max_new=limit) for read, limit in zip(reads, limits, strict=True))
        return [d.tokens for batch in found for d in batch]

    def in_lanes() -> list[list[int]]:
        reads = (decode.prefill(model, batch) for batch in prompts)
        waiting = (lanes.Waiting(read, limit, [0] * rows) for read, limit in zip(reads, limits, strict=True))
        room = decode.bucket(NEW, decode.ROOMS)
        return [d.tokens for _, texts in lanes.run(model, waiting, lanes=rows, room=room) for d in texts]

    if in_turn() != in_lanes():
        raise ValueError("lanes and batches wrote different texts")
    times = interleaved({"lanes": in_lanes, "batches": in_turn}, rounds=3)
    yield row("generate", 1e3 * times["lanes"], 1e3 * times["batches"], 1.0, unit="ms", tokens=sum(map(sum, limits)))


CASES = {
    f"{name} {'greedy' if beams == 1 else f'beam {beams}'} batch {batch}": partial(generate, shape, batch, beams)
    for name, shape in (("moe", peer.MOE), ("dense", peer.DENSE))
    for beams in (1, 4)
    for batch in (1, 8, 32)
} | {"moe ragged": partial(ragged, peer.MOE)}

if __name__ == "__main__":
    main(str(__doc__), CASES)
