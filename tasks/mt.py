"""`correct_mt`: corrects machine translation, from one or more translations."""

from moe_jax.tasks import correction

TASK = correction.register("correct_mt", "mt", correction.data_folder, "mt.")
