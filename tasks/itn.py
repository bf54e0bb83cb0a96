"""`correct_itn`: the inverse of text normalisation: what is spoken, as it is written.

The embedded corpus has no rows of it: tasks/data/README.md.
"""

from moe_jax.tasks import correction

TASK = correction.register("correct_itn", "itn", correction.data_folder, "itn.")
