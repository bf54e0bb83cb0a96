"""`correct_ocr`: corrects text recognition, from one or more readings."""

from moe_jax.tasks import correction

TASK = correction.register("correct_ocr", "ocr", correction.data_folder, "ocr.")
RIGHT = correction.register(
    "correct_ocr_right", "ocr", correction.data_folder, "ocr.", splits=("train",), right_first=True
)
