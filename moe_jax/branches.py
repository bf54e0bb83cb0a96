"""One dense model a family, each trained on what the joint mixture has of that family: by themselves, or to be averaged
or mixed.

They lie in folders of the run's, RUN_DIR/asr and so on; Branch-Train-Merge (Li et al. 2022) and Branch-Train-MiX
(Sukhbaatar et al. 2024) go on from there by `checkpoint.average` and `checkpoint.branch_train_mix`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optax

from moe_jax.data import Prepared
from moe_jax.metrics import scoring
from moe_jax.partfile import write_text

FAMILIES = ("asr", "ocr", "mt", "gec")


def folders(run_dir: str, families: Sequence[str] = FAMILIES) -> list[str]:
    """Their run folders, in the order of the families: the experts that a mixture makes of them."""
    return [str(Path(run_dir) / family) for family in families]


def shares(steps: int, tokens: Mapping[str, int]) -> dict[str, int]:
    """`steps` divided as the tokens are, to whole steps of at least one each; their sum is `steps`.

    Raises ValueError, in one line, for fewer steps than families.
    """
    if steps < len(tokens):
        raise ValueError(f"{steps} steps for {len(tokens)} families ({', '.join(tokens)}); give each at least one")
    whole = sum(tokens.values())
    out = dict.fromkeys(tokens, 1)
    for _ in range(steps - len(tokens)):  # to whom the most is due (Jefferson)
        out[max(tokens, key=lambda family: (tokens[family] / whole) / (out[family] + 1))] += 1
    return out


def train(
    run_dir: str,
    *,
    families: Sequence[str] = FAMILIES,
    joint: str,
    data: str = "prepared",
    prepare: Callable[..., Any],
    examples: int,
    train: Callable[..., Any],
    steps: int,
    optimizer: Callable[..., optax.GradientTransformation],
    schedule: Callable[..., optax.Schedule],
) -> None:
    """Trains each on the seqio mixture `correct_all_<family>`.

    Args:
      joint: the prepared data of all families together: a family has its share of their tokens in steps, so that all
        branches together read what one joint model reads in as many steps.
      data: where the branches' prepared data lie, `correct_all_<family>` and `correct_all_<family>.valid`.
      prepare, train: configured jobs, called with what differs between families, by name: what gin has bound gives way.
      examples: drawn of each family.
      steps: of all branches together.
      optimizer: configured, called with the schedule.
      schedule: configured, called with a branch's steps.

    Raises ValueError for fewer steps than families.
    """
    counted = Prepared.open(joint).meta["tasks"]
    of = shares(steps, {family: counted[family]["tokens"] for family in families})
    print(f"steps by family: {', '.join(f'{family} {n}' for family, n in of.items())}")
    for family, folder in zip(families, folders(run_dir, families), strict=True):
        task, n = f"correct_all_{family}", of[family]
        own, held_out = f"{data}/{task}", f"{data}/{task}.valid"
        prepare(folder=own, mixture=task, examples=examples)
        prepare(folder=held_out, mixture=task, split="valid", passes=1)
        train(
            run_dir=folder,
            data=own,
            valid_data=held_out,
            steps=n,
            eval_every=n,
            save_every=n,
            optimizer=lambda n=n: optimizer(schedule(steps=n)),
        )


def evaluate(
    run_dir: str,
    *,
    families: Sequence[str] = FAMILIES,
    data: str = "prepared",
    evaluate: Callable[..., Any],
    corpus: Callable[..., list[str]],
) -> None:
    """Scores each on its own family, and puts the scores and examples together in `run_dir`, as of one system that is
    told the task."""
    rows: list[Any] = []
    meta: dict[str, Any] = {}
    examples = ""
    for family, folder in zip(families, folders(run_dir, families), strict=True):
        valid, test = (corpus(split, [family]) for split in ("valid", "test"))
        evaluate(run_dir=folder, valid=valid, test=test, valid_data=f"{data}/correct_all_{family}.valid")
        scores = json.loads((Path(folder) / "scores.json").read_text("utf-8"))
        rows += scores["rows"]
        for name in ("split", "guard"):  # which differ
            scores["meta"][name] = ", ".join(filter(None, (meta.get(name), f"{family}: {scores['meta'][name]}")))
        meta = scores["meta"]
        examples += (Path(folder) / "examples.jsonl").read_text("utf-8")
    write_text(Path(run_dir) / "examples.jsonl", examples)
    write_text(Path(run_dir) / "scores.md", scoring.to_markdown(rows))
    write_text(Path(run_dir) / "scores.json", json.dumps({"rows": rows, "meta": meta}, indent=1))
