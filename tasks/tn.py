"""`correct_tn`: normalises text: what is written, as it is spoken.

The embedded corpus has no rows of it: tasks/data/README.md.
"""

from moe_jax.tasks import correction

TASK = correction.register("correct_tn", "tn", correction.data_folder, "tn.")
