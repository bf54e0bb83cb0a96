"""What is known of the machine below: compiler options that measured faster, and how fast it could be."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

# YNNPACK's fusions are a seventh slower than the loops and products of XLA and Eigen in a training step (jaxlib 0.10).
CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}

# Dense bfloat16 products a second of one device, from the vendors' data sheets, by the beginning of `device_kind`.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p calls itself so
    "TPU v6 lite": 918e12,
}


@functools.cache
def options(platform: str | None = None) -> dict[str, str]:
    """For `jax.jit(..., compiler_options=options())`; none where this jaxlib lacks them.

    `platform`: of the devices that are compiled for (the default backend's).
    """
    if (platform or jax.default_backend()) != "cpu" or jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=CPU).lower(jnp.zeros(())).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return dict(CPU)


@functools.cache
def peak_flops() -> float:
    """FLOP/s of all devices together: what model FLOPs utilisation is measured against.

    For a device that is not in `PEAK_FLOPS`, such as a CPU, that of a large float32 product, timed here and now.
    """
    kind = jax.devices()[0].device_kind
    known = [peak for name, peak in PEAK_FLOPS.items() if kind.startswith(name)]
    if known:
        return known[0] * jax.device_count()
    size, best = 1024, float("inf")
    x = jnp.ones((size, size))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    for _ in range(5):
        began = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    # Virtual devices of one CPU share its cores.
    return 2 * size**3 / best * (jax.process_count() if jax.default_backend() == "cpu" else jax.device_count())
