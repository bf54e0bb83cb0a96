"""Eight virtual CPU devices for every test; flags parsed, no configuration left over from the test before."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # also of child processes; must precede the first import of jax
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # tests compile much and compute little

import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True)
def _no_configuration():
    """gin keeps bindings for the whole process."""
    yield
    if gin := sys.modules.get("gin"):
        gin.clear_config()
