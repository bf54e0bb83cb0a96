"""The job that makes a prepared folder, unless it is there already: only then is TensorFlow imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_jax.data import Prepared
from moe_jax.text.tokeniser import Tokeniser


def prepare(
    folder: str,
    *,
    mixture: str,
    tokeniser: str,
    split: str = "train",
    length: int = 256,
    seed: int = 0,
    examples: int | None = None,
    passes: int | None = None,
    layout: str = "aligned",
    max_hypotheses: int = 5,
    max_sources: int = 0,
) -> None:
    """Draws from a seqio mixture into `folder` (`seqio_data.prepare`); what is there already must be what was asked
    for.

    Raises ValueError where `folder` holds something else.
    """
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
    }
    if Path(folder).exists():
        there = Prepared.open(folder).meta
        for key, value in wanted.items():
            if there.get(key) != value:
                raise ValueError(
                    f"{folder} was prepared with {key}={there.get(key)!r}, not {value!r}: "
                    "remove it, or choose another folder"
                )
        return
    from moe_jax import seqio_data

    about: dict[str, Any] = {k: v for k, v in wanted.items() if k not in ("mixture", "tokeniser", "drawn")}
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    seqio_data.prepare(mixture, tokeniser, folder, examples=examples, passes=passes, **about)
