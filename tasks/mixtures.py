"""Mixtures of the correction tasks, and of directions of translation.

correct_all   the four families, each by the square root of its size (temperature 2), so that small ones count
correct_five  the same with text normalisation and its inverse, where the corpus has them
correct_all_asr, ...  what correct_all has of one family, for a model of that family alone
correct_base  generated noise (two thirds) and the families, to pretrain a base model
translate_all          the directions that are trained on (`translation.TRAINED`), at temperature 2 too
translate_from_en      of these the ones from English
translate_and_denoise  the same with masked text in each of their languages
translate_denoise_edit  and what a machine translated, to be edited

In these every third example of speech, print and writers comes with a first pass that is right: recognisers
are better on other text than on that from which a model learns, and what is right is to be left alone.
"""

import functools
from collections.abc import Sequence

from moe_jax.tasks import asr, correction, denoise, gec, itn, mt, ocr, tn, translate, translation
from moe_jax.tasks.quiet import seqio

by_size = functools.partial(seqio.mixing_rate_num_examples, temperature=2.0)


def half(task: seqio.Task) -> float:
    return by_size(task) / 2 if task.source.has("train") else 0.0


RIGHT = [(module.RIGHT.name, half) for module in (asr, ocr, gec)]


class Present(seqio.Mixture):
    """Goes without the tasks that have no file in the corpus."""

    @property
    def tasks(self) -> Sequence[seqio.Task]:
        return [task for task in super().tasks if any(map(task.source.has, correction.SPLITS))]


CORRECT_ALL = seqio.MixtureRegistry.add(
    "correct_all", [*(task.TASK.name for task in (asr, ocr, mt, gec)), *RIGHT], default_rate=by_size
)

for _task in (asr, ocr, mt, gec, tn, itn):
    _right = [(name, rate) for name, rate in RIGHT if name == f"{_task.TASK.name}_right"]
    seqio.MixtureRegistry.add(
        _task.TASK.name.replace("correct_", "correct_all_"), [_task.TASK.name, *_right], default_rate=by_size
    )

CORRECT_FIVE = seqio.MixtureRegistry.add(
    "correct_five",
    [*(task.TASK.name for task in (asr, ocr, mt, gec, tn, itn)), *RIGHT],
    default_rate=lambda task: by_size(task) if task.source.has("train") else 0.0,
    mixture_cls=Present,
)

BASE_RATES = {denoise: 110.0, mt: 24.0, gec: 14.0, asr: 12.0, ocr: 10.0}

CORRECT_BASE = seqio.MixtureRegistry.add(
    "correct_base", [(module.TASK.name, rate) for module, rate in BASE_RATES.items()]
)

TRANSLATE_AND_DENOISE = seqio.MixtureRegistry.add(
    "translate_and_denoise",
    [translate.TASKS[direction].name for direction in translation.TRAINED],
    default_rate=by_size,
)

TRANSLATE_DENOISE_EDIT = seqio.MixtureRegistry.add(
    "translate_denoise_edit",
    [translate.TASKS[direction].name for direction in (*translation.TRAINED, *translation.POST_EDIT)],
    default_rate=by_size,
)

TRANSLATE_ALL = seqio.MixtureRegistry.add(
    "translate_all",
    [translate.TASKS[direction].name for direction in translation.trained()],
    default_rate=by_size,
)

TRANSLATE_FROM_EN = seqio.MixtureRegistry.add(
    "translate_from_en",
    [translate.TASKS[direction].name for direction in translation.trained("en")],
    default_rate=by_size,
)
