"""Task families: the small integers that routers see.

Append only. 0 is padding (seqio's packer strips zeros, so a family is never 0), and `MAX_FAMILIES` fixes the
shapes of every task table, so that a checkpoint still loads after a family has been added. Families keep 1 to 15; ids
from 16 are free for a run's own data sets.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

MAX_FAMILIES = 64

FAMILIES = {
    "asr": 1,  # post-ASR from an n-best list
    "ocr": 2,  # post-OCR from one or more readings
    "mt": 3,  # post-MT from one or more translations
    "gec": 4,  # grammar and spelling
    "denoise": 5,  # synthetic noise on clean text, for base models
    "tn": 6,  # text normalisation: written to spoken form
    "itn": 7,  # inverse text normalisation: spoken to written form
    "st": 8,  # post speech translation from one or more translations
    "translate": 9,  # a sentence into another language; each direction is a task (tasks/translation.py)
}


def family_id(name: str, ids: Mapping[str, int] | None = None) -> int:
    """The id of a family, or of what a run names besides by `ids`. Raises ValueError with the known names."""
    known = FAMILIES | dict(ids or {})
    if name not in known:
        raise ValueError(f"unknown task family {name!r}; known: {', '.join(known)} (add it to tasks/families.py)")
    return known[name]


def task_map(
    experts: Mapping[str | int, int | Sequence[int]] | None = None,
    *,
    num_experts: int,
    ids: Mapping[str, int] | None = None,
) -> dict[int, tuple[int, ...]]:
    """What task routers take for names: {"asr": 0, "ocr": [1, 2]} -> {1: (0,), 2: (1, 2)}.

    Args:
      experts: family, name in `ids`, or id -> expert or experts; None leaves all to the router's default.
      ids: task ids as `prepare.prepare` has them, of single data sets too: {"asr/austen-whisper": 16}.

    Raises ValueError for an unknown family, an id or an expert out of range, or no mapping at all.
    """
    if not isinstance(experts, Mapping | None):
        raise ValueError(f'task map: {experts!r} maps no tasks to experts; write {{"asr": 0, "ocr": [1, 2]}}')
    found = {}
    for task, given in (experts or {}).items():
        number = family_id(task, ids) if isinstance(task, str) else task
        if type(number) is not int or not 1 <= number < MAX_FAMILIES:
            raise ValueError(f"task map: task id {task} is outside 1..{MAX_FAMILIES - 1}")
        several: list[Any] = [*given] if isinstance(given, list | tuple) else [given]
        for expert in several:
            if type(expert) is not int or expert not in range(num_experts):
                raise ValueError(f"task map: {task!r} -> expert {expert!r}, but there are experts 0..{num_experts - 1}")
        found[number] = tuple(several)
    return found


def random_map(seed: int = 0, *, num_experts: int) -> dict[str, int]:
    """Each family's expert drawn at random, alone: several may share one, and some experts may have none."""
    draw = random.Random(seed).random  # the same in every version of Python
    return {name: int(draw() * num_experts) for name in FAMILIES}
