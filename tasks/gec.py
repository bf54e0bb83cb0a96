"""`correct_gec`: corrects a writer: grammar and spelling."""

from moe_jax.tasks import correction

TASK = correction.register("correct_gec", "gec", correction.data_folder, "gec.")
RIGHT = correction.register(
    "correct_gec_right", "gec", correction.data_folder, "gec.", splits=("train",), right_first=True
)
