"""Compiler options never stand in the way, and the peak is a plausible number."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax import xla


@pytest.fixture(autouse=True)
def fresh():
    xla.options.cache_clear()
    yield
    xla.options.cache_clear()


def test_options_compile_here():
    f = jax.jit(lambda x: x @ x, compiler_options=xla.options())
    assert float(f(2 * jnp.eye(2))[0, 0]) == 4


def test_an_option_that_this_compiler_lacks_is_left_out(monkeypatch):
    monkeypatch.setattr(xla, "CPU", {"xla_cpu_no_such_option": ""})
    assert xla.options() == {}


def test_the_peak_is_that_of_all_devices(monkeypatch):
    assert 1e9 < xla.peak_flops() < 1e16
    xla.peak_flops.cache_clear()
    monkeypatch.setattr(xla, "PEAK_FLOPS", {jax.devices()[0].device_kind[:2]: 5.0})
    assert xla.peak_flops() == 5.0 * jax.device_count()
    xla.peak_flops.cache_clear()
