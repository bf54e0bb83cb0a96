"""The grouped product on TPU: JAX's Pallas kernels (megablox, after MegaBlocks, arXiv 2211.15841) and how they tile.

XLA:TPU has a kernel of its own for `jax.lax.ragged_dot`, but not for its gradient with respect to the matrices, which
it computes for every expert over all rows: E times the work (benchmarks/tpu_aot.py). `matmul` has these kernels for
all three products: they compute little more than the rows, and transpose no copy of the matrices for the rows'
gradient. `mixed` leaves the two products of rows to XLA's, which is estimated to be faster on v5e and v6e. Off TPU the
kernels are interpreted, for their values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial

import jax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from moe_jax.types import Array

ROWS = (512, 256, 128)  # of a tile; the number of rows must be a multiple of the last
LANES = 128  # of a vector register: blocks of columns are whole ones
VMEM = 13 << 20  # bytes for the blocks of a kernel: 16 MiB of a core are its own by default
# FLOPs that a chip computes while it reads a byte: 166 on v5p, 240 on v5e, 560 on v6e. One number for all: by `work`
# v6e takes a fifth less time with it than with 240 (d 4096, hidden 14336, 8 experts), the others 1.5 % more.
INTENSITY = 400
# What a step of the kernel costs besides its rows, in rows, as the compiler schedules it for v5p: filling the matrix
# unit, and adding up a gradient of the matrices.
FILL, ADD = 32, 144


def _rows(x_RxI: Array, w_ExIxO: Array, size_E: Array, *, transpose: bool) -> Array:
    (R, I), O = x_RxI.shape, w_ExIxO.shape[1 if transpose else 2]
    tiles = tiling(R, I, O, len(size_E), x_RxI.dtype.itemsize)
    options = dict(preferred_element_type=x_RxI.dtype, tiling=tiles, transpose_rhs=transpose)
    return _kernel(gmm, x_RxI, w_ExIxO, size_E, **options)


def _xla_rows(x_RxI: Array, w_ExIxO: Array, size_E: Array, *, transpose: bool) -> Array:
    return jax.lax.ragged_dot(x_RxI, w_ExIxO.swapaxes(1, 2) if transpose else w_ExIxO, size_E)


def _product(rows: Callable[..., Array]) -> Callable[[Array, Array, Array], Array]:
    def back(saved: tuple[Array, Array, Array], dy_RxO: Array) -> tuple[Array, Array, None]:
        x_RxI, w_ExIxO, size_E = saved
        E, I, O = w_ExIxO.shape
        tiles = tiling(len(x_RxI), I, O, E, x_RxI.dtype.itemsize, weights=True)
        dw = _kernel(tgmm, x_RxI.T, dy_RxO, size_E, preferred_element_type=w_ExIxO.dtype, tiling=tiles)
        return rows(dy_RxO, w_ExIxO, size_E, transpose=True), dw, None

    forth = partial(rows, transpose=False)
    product = jax.custom_vjp(lambda x, w, size: forth(x, w, size))
    product.defvjp(lambda x, w, size: (forth(x, w, size), (x, w, size)), back)
    return product


# y[r] = x[r] @ w[its expert], (x_RxI, w_ExIxO, size_E) -> y_RxO, of int32 sizes; rows beyond their sum may hold
# anything, and give anything.
matmul, mixed = _product(_rows), _product(_xla_rows)


def _kernel(kernel: Callable, *args: Array, **options) -> Array:
    """By the platform that it is lowered for, which need not be the one that lowers."""
    compiled, interpreted = (partial(kernel, **options, interpret=i) for i in (False, True))
    with jax.numpy_rank_promotion("allow"):
        return jax.lax.platform_dependent(*args, tpu=compiled, default=interpreted)


Tiles = tuple[int, int, int]  # rows, inputs, outputs


def work(
    rows: int, inputs: int, outputs: int, experts: int, itemsize: int, tiles: Tiles, *, weights: bool = False
) -> tuple[int, int]:
    """(FLOPs, bytes moved) of the products of all rows, or of their gradients of `weights`, in such tiles.

    An expert's first and last tile of rows are also its neighbours', and a step costs a little besides its rows: small
    tiles waste fewer rows, large ones fewer steps. A block of columns is read again for each block of the other
    operand. Only with all inputs in one block do an expert's matrices stay from one tile of its rows to the next.
    """
    r, i, o = tiles
    steps, blocks_i, blocks_o = rows // r + experts, -(-inputs // i), -(-outputs // o)
    flops = 2 * steps * (r + (ADD if weights else FILL)) * blocks_i * i * blocks_o * o
    matrices = inputs * outputs * (experts if weights or blocks_i == 1 else steps)
    moved = rows * (blocks_o * inputs + outputs * (blocks_i if weights else 1)) + matrices
    return flops, itemsize * moved


@functools.cache
def tiling(rows: int, inputs: int, outputs: int, experts: int, itemsize: int, *, weights: bool = False) -> Tiles:
    """The tiles that fit and should take the least time."""

    def time(tiles: Tiles) -> float:
        flops, moved = work(rows, inputs, outputs, experts, itemsize, tiles, weights=weights)
        return max(flops / INTENSITY, moved)

    def fits(tiles: Tiles) -> bool:
        r, i, o = tiles
        out = i * o if weights else r * o  # also kept in float32, where it is added up
        return 2 * itemsize * (r * i + i * o + r * o) + 4 * out <= VMEM

    def blocks(size: int) -> Iterator[int]:
        yield size
        for parts in range(2, -(-size // LANES) + 1):
            yield -(-size // (parts * LANES)) * LANES

    fitting = [r for r in ROWS if rows % r == 0]
    return min((t for r in fitting for i in blocks(inputs) for o in blocks(outputs) if fits(t := (r, i, o))), key=time)
