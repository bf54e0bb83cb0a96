"""`correct_asr`: corrects speech recognition, from n-best lists."""

from moe_jax.tasks import correction

TASK = correction.register("correct_asr", "asr", correction.data_folder, "asr.")
RIGHT = correction.register(
    "correct_asr_right", "asr", correction.data_folder, "asr.", splits=("train",), right_first=True
)
