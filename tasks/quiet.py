"""Imports seqio, and with it TensorFlow, without its start-up noise and without taking the accelerators.

The tasks and `moe_jax/seqio_data.py` take `seqio` and `tf` from here, so that this always happens first.
"""

import contextlib
import os

if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # 1 is what JAX sets on import, not a user's wish
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

try:
    import seqio
    import tensorflow as tf
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is not installed: preparing data needs it; pip install 'moe_jax[data]'",
        name=error.name,
    ) from None

for _kind in ("GPU", "TPU"):
    with contextlib.suppress(RuntimeError):  # another library of this process already uses them
        tf.config.set_visible_devices([], _kind)

__all__ = ["seqio", "tf"]
