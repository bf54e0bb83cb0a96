"""The job that makes a prepared folder, unless it is there already: only then is TensorFlow imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax import formats, hosts
from moe_jax.data import Prepared, summary
from moe_jax.speech.data import write
from moe_jax.text.tokeniser import Tokeniser


@hosts.in_turn
def prepare(
    folder: str,
    *,
    mixture: str | Mapping[str, float],
    tokeniser: str,
    split: str = "train",
    length: int = 256,
    seed: int = 0,
    examples: int | None = None,
    passes: int | None = None,
    layout: str = "aligned",
    max_hypotheses: int = 5,
    max_sources: int = 0,
    sides: Sequence[int] | None = None,
    ids: Mapping[str, int] | None = None,
    own: Mapping[str, tuple[str, str]] | None = None,
) -> None:
    """Draws from a seqio mixture into `folder` (`seqio_data.prepare`); what is there already must be what was asked
    for.

    Args:
      mixture: a registered task or mixture, or rates of such: {"own": 1.0, "correct_all": 0.5}.
      tokeniser: the path of one, or of a Hugging Face model's folder.
      layout: "aligned", "list", both also with "+task"; of translation "tagged", "tagged+source", "untagged"
        (`text/prompt.py`); or a template (`text/templates.py`).
      sides: how many of the `length` tokens of a row are for reading and for writing, where an encoder and a decoder
        read it (`packing.pack_sides`).
      ids: task ids that differ from those of `tasks/families.py`, also of single data sets: {"asr/austen-whisper": 16}.
      own: tasks of the user's own that the mixture may name: name -> (family, folder of train.jsonl, valid.jsonl).

    Raises ValueError where `folder` holds something else, and for sides that are not `length` together.
    """
    if sides and (len(sides) != 2 or sum(sides) != length):
        raise ValueError(f"sides {list(sides)} must be two, that together have the length, {length}")
    mixture = mixture if isinstance(mixture, str) else dict(mixture)
    wanted = {
        "mixture": mixture,
        "split": split,
        "length": length,
        "seed": seed,
        "drawn": {"examples": examples, "passes": passes},
        "layout": layout,
        "max_hypotheses": max_hypotheses,
        "max_sources": max_sources,
        "tokeniser": Tokeniser.load(tokeniser).sha256,
        "ids": dict(ids) if ids else None,
        "corpus": _corpus(split),
        "sides": list(sides) if sides else None,
    }
    if own:
        wanted["own"] = {name: [family, *_state(Path(home), split)] for name, (family, home) in own.items()}
    if Path(folder).exists():
        there = Prepared.open(folder).meta
        for key, value in wanted.items():
            if there.get(key) != value:
                raise ValueError(
                    f"{folder} was prepared with {key}={there.get(key)!r}, not {value!r}: "
                    "remove it, or choose another folder"
                )
        if split == "train":  # what is learnt from, at the start of every run
            print(summary(there), file=sys.stderr)
        return
    from moe_jax import seqio_data

    for name, (family, home) in (own or {}).items():
        seqio_data.own(name, family, home)
    about: dict[str, Any] = {k: v for k, v in wanted.items() if k not in ("mixture", "tokeniser", "drawn")}
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    seqio_data.prepare(mixture, tokeniser, folder, examples=examples, passes=passes, **about)


@hosts.in_turn
def speech(folder: str, *, task: str, split: str = "train", **options: Any) -> None:
    """Makes a folder of prepared speech of a seqio task or mixture of speech (`tasks.speech`), unless it is there.

    Args:
      task: registered, such as "speech_prompts". Of a mixture every utterance of each task comes once.
      options: of `speech.data.write`: tokeniser, units, rate, mels, speeds, lengths, batch, longest.

    Raises ValueError where `folder` holds something else, or no utterance is left.
    """

    def utterances() -> Iterable[Any]:
        from moe_jax import seqio_data

        return seqio_data.utterances(task, split)

    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    write(folder, utterances, f"{task}, split {split!r}", ["seqio", task, split], **options)


def _corpus(split: str) -> dict[str, int] | None:
    """The files of a split in the folder that MOE_JAX_DATA names, and their sizes: what was drawn from them is not used
    again for another corpus. None of the embedded one."""
    if not (folder := os.environ.get("MOE_JAX_DATA")):
        return None
    return {path.name: path.stat().st_size for path in sorted(Path(folder).glob(f"*.{split}.json*"))}


def _state(home: Path, split: str) -> list[Any]:
    """Which file of a user's it was: a prepared folder is not used again for another, or for one that has grown."""
    path = formats.split_file(home, split)
    return [str(path.absolute()), path.stat().st_size]
