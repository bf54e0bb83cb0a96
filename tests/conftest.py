"""Eight virtual CPU devices for every test; flags parsed, no configuration left over from the test before."""

import gc
import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # also of child processes; must precede the first import of jax
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("GLIBC_TUNABLES", "")  # or a command called here would put itself in the place of pytest
# Tests compile much and compute little. (XLA aborts on a flag that it does not know, so this one goes by version.)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # who called each operation is a twentieth of the time
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
# What is compiled twice, also by a child process or another worker, is compiled once.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax-cache-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax
import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()
gc.set_threshold(100_000, 20, 50)  # tracing makes many objects that stay: looking for others is another twentieth


@pytest.fixture(autouse=True)
def _no_configuration():
    """gin keeps bindings for the whole process."""
    yield
    if gin := sys.modules.get("gin"):
        gin.clear_config()


@pytest.fixture(scope="module", autouse=True)
def _no_programs():
    """A process that kept those of all tests would hold gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _few_programs():
    """Each lies in several mappings, of which Linux allows a process 65,530: beyond, XLA dies. Those of
    test_translator alone are more."""
    began = time.monotonic()
    yield
    if time.monotonic() - began > 1 and mappings() > 30_000:
        jax.clear_caches()


def mappings() -> int:
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture
def ranks_must_match():
    """(B, L) with (L,) is an error, so that a sum over the wrong dim cannot hide in a broadcast.

    Not for every test: norms and convolutions scale their last dim by broadcasting.
    """
    with jax.numpy_rank_promotion("raise"):
        yield


def pytest_sessionfinish():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
