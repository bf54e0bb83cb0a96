"""Mixtures of the correction tasks.

correct_all   the four families, each by the square root of its size (temperature 2), so that small ones count
correct_base  the same families and as many rows of generated noise, to pretrain a base model
"""

import functools

from moe_jax.tasks import asr, denoise, gec, mt, ocr
from moe_jax.tasks.quiet import seqio

by_size = functools.partial(seqio.mixing_rate_num_examples, temperature=2.0)

CORRECT_ALL = seqio.MixtureRegistry.add(
    "correct_all", [task.TASK.name for task in (asr, ocr, mt, gec)], default_rate=by_size
)

CORRECT_BASE = seqio.MixtureRegistry.add("correct_base", [(denoise.TASK.name, 1.0), (CORRECT_ALL.name, 1.0)])
