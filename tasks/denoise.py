"""`correct_denoise`: clean text under noise learned from real errors, to pretrain a base model.

Its rows are generated, not shipped: `python -m moe_jax.tasks.builders.denoise FOLDER` makes them, and the
environment variable `MOE_JAX_DENOISE` names the folder (else they are looked for beside the corpus).
"""

import os
from pathlib import Path

from moe_jax.tasks import correction


def denoise_folder() -> Path:
    folder = Path(os.environ.get("MOE_JAX_DENOISE") or correction.data_folder())
    if not any(folder.glob("denoise.train.jsonl*")):
        make = "python -m moe_jax.tasks.builders.denoise FOLDER"
        raise ValueError(f"{folder}: no denoise.train.jsonl.gz; make it with {make}, then MOE_JAX_DENOISE=FOLDER")
    return folder


TASK = correction.register("correct_denoise", "denoise", denoise_folder, "denoise.", splits=("train",))
