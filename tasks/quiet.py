"""Imports seqio, and with it TensorFlow, without its start-up noise and without taking the accelerators.

The tasks and `moe_jax/seqio_data.py` take `seqio` and `tf` from here, so that this always happens first.
"""

import contextlib
import os
import sys
from collections.abc import Generator

if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # 1 is what JAX sets on import, not a user's wish
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


@contextlib.contextmanager
def _no_stderr() -> Generator[None]:
    """TensorFlow's libraries write a few lines while they load, whatever the log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


try:
    with _no_stderr():
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
