"""Merging methods: functions on deltas (tuned minus base), one array at a time, blind to paths.

    sparsify (each delta alone)  ->  consensus (what of all of them stays)  ->  combine (all into one)  ->  times scale

`METHODS` lists the published ones, each a row of these four. What a paper trims over a whole model is trimmed here
within each array, so that a merge streams; the rows say which options are a paper's, all others are our defaults.

Letters: M models, I x O a matrix; elementwise steps take any shape.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.types import Array

Statistics = Sequence[Array] | None  # of each model, about this array: Fisher information, or Gram matrices of inputs


# --- sparsify: (delta, key, **options) -> delta -----------------------------------------------------------------------


def largest(x: Array, keep: Array | int) -> Array:
    """Which are the `keep` largest of numbers >= 0: exactly so many, of equal ones the first.

    Bisects on their bits, which are in the order of the numbers: 31 counts, where sorting a matrix takes far longer.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)

    def halve(i: Array, found: Array) -> Array:
        higher = found | (1 << (30 - i))
        return jnp.where((bits >= higher).sum() >= keep, higher, found)

    least = jax.lax.fori_loop(0, 31, halve, jnp.int32(0))  # the smallest that is kept
    above, equal = bits > least, bits == least
    return above | (equal & (jnp.cumsum(equal.ravel()).reshape(x.shape) <= keep - above.sum()))


def magnitude(delta: Array, key: Array, *, density: float) -> Array:
    """Keeps the largest `density` of the entries by magnitude, the others become 0."""
    return jnp.where(largest(jnp.abs(delta), int(delta.size * density)), delta, 0)


def breadcrumbs(delta: Array, key: Array, *, density: float, outliers: float) -> Array:
    """Drops the largest `outliers` of the entries, then keeps `density` (of all) of the next largest."""
    size = jnp.abs(delta)
    size = jnp.where(largest(size, int(delta.size * outliers)), 0, size)
    return jnp.where(largest(size, int(delta.size * density)) & (size > 0), delta, 0)


def dare(delta: Array, key: Array, *, density: float) -> Array:
    """Drops entries at random and scales what is kept by 1 / density: the delta's expectation stays."""
    return jnp.where(jax.random.bernoulli(key, density, delta.shape), delta / density, 0)


def della(delta: Array, key: Array, *, density: float, spread: float) -> Array:
    """As `dare`, but of each row the larger entries stay likelier: the chance rises over `spread` around `density` with
    the rank of the magnitude. A row is along the last dim: all outputs of an input unit in our checkpoints (IxO), all
    inputs of an output unit in Hugging Face folders (OxI)."""

    def likely(row: Array) -> Array:
        number = jnp.arange(row.size)
        rank = jnp.zeros_like(number).at[jnp.argsort(jnp.abs(row))].set(number, unique_indices=True)
        return density - spread / 2 + spread * rank / max(row.size - 1, 1)

    rows = delta.reshape(-1, max(delta.shape[-1] if delta.ndim else 1, 1))
    chance = jax.lax.map(likely, rows, batch_size=min(1024, max(len(rows), 1))).reshape(delta.shape)
    return jnp.where(jax.random.bernoulli(key, chance), delta / chance, 0)


def svd(x_IxO: Array, rank: int, key: Array, kind: str = "exact") -> tuple[Array, Array, Array]:
    """The first `rank` singular triplets (U_IxR, s_R, Vt_RxO).

    Args:
      kind: exact, or randomised (Halko, Martinsson & Tropp 2011, algorithm 4.4 with P = 10 columns more than asked and
        2 turns of subspace iteration). Without those turns, their theorem 10.5 bounds what its range misses: in
        expectation, ||X - Q Q^T X||_F <= sqrt(1 + R / (P - 1)) times the least possible; the turns only better it.

    Raises ValueError for another kind.
    """
    rank = min(rank, *x_IxO.shape)
    if kind == "exact":
        u, s, vt = jnp.linalg.svd(x_IxO, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    if kind != "randomised":
        raise ValueError(f"unknown svd {kind!r}; known: exact, randomised")
    columns = min(rank + 10, *x_IxO.shape)
    q = jnp.linalg.qr(x_IxO @ jax.random.normal(key, (x_IxO.shape[1], columns), x_IxO.dtype))[0]
    for _ in range(2):
        q = jnp.linalg.qr(x_IxO @ jnp.linalg.qr(x_IxO.T @ q)[0])[0]
    u, s, vt = jnp.linalg.svd(q.T @ x_IxO, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vt[:rank]


def low_rank(delta_IxO: Array, key: Array, *, rank: int, svd_kind: str = "exact") -> Array:
    """The nearest matrix of this rank."""
    u, s, vt = svd(delta_IxO, rank, key, svd_kind)
    return (u * s) @ vt


def low_rank_plus_sparse(delta_IxO: Array, key: Array, *, rank: int, density: float, svd_kind: str = "exact") -> Array:
    """LoRS: the nearest matrix of this rank, and of what is left of the delta the largest `density` of its entries."""
    low = low_rank(delta_IxO, key, rank=rank, svd_kind=svd_kind)
    return low + magnitude(delta_IxO - low, key, density=density)


# --- consensus: (deltas, weights, **options) -> deltas ----------------------------------------------------------------


def elect_sign(deltas_Mx: Array, weight_M: Array) -> Array:
    """Keeps the entries whose sign, turned where the weight is negative, is that of the weighted sum."""
    elected = jnp.sign(jnp.tensordot(weight_M, deltas_Mx, 1))
    turned_Mx = jnp.where(jnp.expand_dims(weight_M, range(1, deltas_Mx.ndim)) < 0, -deltas_Mx, deltas_Mx)
    return jnp.where(jnp.sign(turned_Mx) == elected, deltas_Mx, 0)


def agreed(deltas_Mx: Array, weight_M: Array, *, threshold: float, agree: int) -> Array:
    """Consensus merging: keeps the entries that matter to `agree` models or more. To a model matters where its own
    delta is at least `threshold` times what all the others add (its TALL mask)."""
    others = jnp.sum(deltas_Mx, axis=0) - deltas_Mx
    matters = jnp.abs(deltas_Mx) >= threshold * jnp.abs(others)
    return jnp.where(matters.sum(axis=0) >= min(agree, len(deltas_Mx)), deltas_Mx, 0)


# --- combine: (deltas, weights, base, statistics, **options) -> delta -------------------------------------------------


def total(deltas_Mx: Array, weight_M: Array, base: Array, statistics: Statistics = None) -> Array:
    return jnp.tensordot(weight_M, deltas_Mx, 1)


def mean(deltas_Mx: Array, weight_M: Array, base: Array, statistics: Statistics = None) -> Array:
    """The mean weighted by numbers >= 0; where no model has a weight, nothing."""
    return total(deltas_Mx, jnp.where((weight_M == 0).all(), 0, weight_M / weight_M.sum()), base)


def disjoint_mean(deltas_Mx: Array, weight_M: Array, base: Array, statistics: Statistics = None) -> Array:
    """The weighted mean over the models that have something at an entry; of negative weights that of the negations."""
    there = jnp.tensordot(jnp.abs(weight_M), (deltas_Mx != 0).astype(deltas_Mx.dtype), 1)
    return total(deltas_Mx, weight_M, base) / jnp.where(there == 0, 1, there)


def slerp(deltas_Mx: Array, weight_M: Array, base: Array, statistics: Statistics = None) -> Array:
    """Along the great circle between the weights of two models. Raises ValueError for more, or fewer."""
    if len(deltas_Mx) != 2:
        raise ValueError(f"slerp goes from one model to one other, not over {len(deltas_Mx)}; merge two and two")
    a, b = base + deltas_Mx[0], base + deltas_Mx[1]
    t = weight_M[1] / weight_M.sum()
    norms = jnp.linalg.norm(a) * jnp.linalg.norm(b)
    cosine = jnp.clip(jnp.vdot(a, b) / jnp.where(norms == 0, 1, norms), -1, 1)
    angle = jnp.arccos(cosine)
    straight = (norms == 0) | (jnp.abs(cosine) > 0.9995)  # where sines vanish, as is usual
    sine = jnp.where(straight, 1, jnp.sin(angle))
    turned = (jnp.sin((1 - t) * angle) * a + jnp.sin(t * angle) * b) / sine
    between = jnp.where(straight, (1 - t) * a + t * b, turned) - base
    return jnp.where((weight_M == 0).all(), 0, between)


def orthogonalised(deltas_MxIxO: Array, weight_M: Array, base: Array, statistics: Statistics = None) -> Array:
    """Of each model its share of the singular triplets, the triplets of all made orthogonal to each other."""
    share = max(1, min(deltas_MxIxO.shape[1:]) // len(deltas_MxIxO))
    deltas_MxIxO = jnp.where((weight_M == 0)[:, None, None], 0, deltas_MxIxO)
    parts = [svd(delta, share, jax.random.key(0)) for delta in deltas_MxIxO]
    u_IxR = jnp.concatenate([u for u, _, _ in parts], axis=1)
    s_R = jnp.concatenate([w * s for w, (_, s, _) in zip(weight_M, parts, strict=True)])
    vt_RxO = jnp.concatenate([vt for _, _, vt in parts])
    return (_nearest_orthogonal(u_IxR) * s_R) @ _nearest_orthogonal(vt_RxO)


def _nearest_orthogonal(x: Array) -> Array:
    u, _, vt = jnp.linalg.svd(x, full_matrices=False)
    return u @ vt


def isotropic(deltas_MxIxO: Array, weight_M: Array, base: Array, statistics: Statistics = None) -> Array:
    """The sum, all its singular values replaced by their mean: what many models share loses its weight."""
    u, s, vt = jnp.linalg.svd(total(deltas_MxIxO, weight_M, base), full_matrices=False)
    return jnp.mean(s) * (u @ vt)


def fisher(deltas_Mx: Array, weight_M: Array, base: Array, statistics: Statistics = None) -> Array:
    """The mean of each entry, weighted by how much each model's loss depends on it (diagonal Fisher information)."""
    if statistics is None:
        return mean(deltas_Mx, weight_M, base)
    share = jnp.tensordot(jnp.diag(weight_M), jnp.stack(list(statistics)), 1)
    whole = share.sum(axis=0)
    even = mean(deltas_Mx, weight_M, base)
    return jnp.where(whole > 0, (share * deltas_Mx).sum(axis=0) / jnp.where(whole > 0, whole, 1), even)


def regmean(
    deltas_MxIxO: Array, weight_M: Array, base: Array, statistics: Statistics = None, *, off_diagonal: float
) -> Array:
    """The matrix whose outputs are nearest, in least squares, to each model's on its own inputs, known by their Gram
    matrices G_IxI, whose entries off the diagonal are multiplied by `off_diagonal`. Each G is scaled to a trace of 1:
    models count alike however large their inputs (ours). Without statistics the mean, as in the paper for what is no
    linear layer; of ours those outside of attention and MLP, too."""
    if statistics is None:
        return mean(deltas_MxIxO, weight_M, base)
    eye = jnp.eye(deltas_MxIxO.shape[1])
    grams = [g / jnp.maximum(jnp.trace(g), 1e-30) for g in statistics]
    grams = [g * jnp.where(eye == 1, 1, off_diagonal) + 1e-6 / len(eye) * eye for g in grams]
    grams = [w * g for w, g in zip(weight_M, grams, strict=True)]
    none = (weight_M == 0).all()
    whole = jnp.where(none, eye, sum(grams))
    return jnp.linalg.solve(whole, sum(g @ d for g, d in zip(grams, deltas_MxIxO, strict=True)))


# --- the table --------------------------------------------------------------------------------------------------------

# What of a path is attention or MLP: ours, and Hugging Face's (Llama's kin, Whisper, BERT, T5).
LAYERS = r"(?i)(attn|attention|cross|mlp|ffn|experts|fc[12]\b|feed_?forward|densereludense|intermediate|output\.dense)"
# What lies there and is neither: routers (ours; of Switch, Granite, Llama 4; of Mixtral, Qwen, DeepSeek), which choose
# experts, and tables of positions (T5, BERT, Swin, WavLM), which are read row by row.
ASIDE = (
    r"(?i)(\brouter\b|\b(mlp|moe|ffn|feed_forward|block_sparse_moe)\.gate\.|shared_expert_gate"
    r"|relative_attention_bias|relative_position_bias|distance_embedding|rel_attn_embed)"
)


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to merge, and for what.

    Attributes:
      combine, sparsify, consensus: steps with their options bound (`functools.partial`).
      scale: times the combined delta; None: 1 / models.
      matrices: the steps are for matrices whose paths match this, and not `ASIDE`; all else by `rest`. "": for every
        array.
      rest: "total" or "mean", of the whole deltas, with the same scale.
      statistics: "fisher" or "gram", what `combine` needs to know of each model.
      paper: where it is from. `theirs`: names of the options whose values are the paper's (or its authors' code's).
    """

    combine: Callable[..., Array]
    sparsify: Callable[..., Array] | None = None
    consensus: Callable[..., Array] | None = None
    scale: float | None = None
    matrices: str = ""
    rest: str = "total"
    statistics: str | None = None
    paper: str = ""
    theirs: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """All that can be chosen, with its value."""
        out: dict[str, Any] = {"scale": self.scale}
        for step in (self.sparsify, self.consensus, self.combine):
            out |= _options(step)
        return out

    def having(self, **options: Any) -> Method:
        """With some options of other values. Raises ValueError for one that no step has, or a value out of range."""
        known = self.options()
        for name, value in options.items():
            if name not in known:
                raise ValueError(f"this method has no option {name!r}; it has {', '.join(known)}")
            options[name] = _checked(name, value)
        changed: dict[str, Any] = {"scale": options.get("scale", self.scale)}
        for name in ("sparsify", "consensus", "combine"):
            step = getattr(self, name)
            own = {k: v for k, v in options.items() if k in _options(step)}
            if own:
                changed[name] = partial(step, **own)
        made = dataclasses.replace(self, **changed)
        density, spread = (made.options().get(name, 0.0) for name in ("density", "spread"))
        if spread and not spread / 2 < density <= 1 - spread / 2:
            raise ValueError(f"density {density:g} with spread {spread:g} leaves (0, 1]; take less spread")
        return made

    def __call__(
        self,
        deltas: Sequence[Array],
        weight_M: Array,
        keys: Sequence[Array],
        base: Array,
        statistics: Statistics = None,
    ) -> Array:
        """The merged delta of one array."""
        if self.sparsify is not None:
            deltas = [self.sparsify(delta, key) for delta, key in zip(deltas, keys, strict=True)]
        deltas_Mx = jnp.stack(list(deltas))
        if self.consensus is not None:
            deltas_Mx = self.consensus(deltas_Mx, weight_M)
        return self.factor(len(deltas_Mx)) * self.combine(deltas_Mx, weight_M, base, statistics)

    @property
    def is_mean(self) -> bool:
        """Whether weights are shares of a whole, which divides by their sum: then none may be negative."""
        return getattr(self.combine, "func", self.combine) in (mean, slerp, fisher, regmean)

    @property
    def pointwise(self) -> bool:
        """Whether what is after `sparsify` looks at each entry by itself: then an array can be combined in parts."""
        return getattr(self.combine, "func", self.combine) in (total, mean, disjoint_mean, fisher)

    def factor(self, models: int) -> float:
        return 1 / models if self.scale is None else self.scale

    def fits(self, path: str, matrix: bool) -> bool:
        """Whether the steps are for an array; else it is merged by `rest`. (Biases of experts are stacked as wide as
        a matrix, and none.)"""
        if not self.matrices:
            return True
        known = re.search(self.matrices, path) and not re.search(ASIDE, path)
        return matrix and not path.endswith("bias") and bool(known)

    def here(self, path: str, matrix: bool) -> Method:
        """What is done with an array: this, or the sum or mean of what the method is not for."""
        return self if self.fits(path, matrix) else Method({"total": total, "mean": mean}[self.rest], scale=self.scale)


def _options(step: Callable | None) -> dict[str, Any]:
    if step is None:
        return {}
    return {p.name: p.default for p in inspect.signature(step).parameters.values() if p.kind is p.KEYWORD_ONLY}


WHOLE = ("rank", "agree")  # options that are whole numbers


def is_number(x: Any) -> bool:
    """Whether it is one that a float can hold (`math.isfinite` raises for whole numbers that none can)."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


def _checked(name: str, value: Any) -> Any:
    """The value of an option, as the kind of number that its step takes."""
    if name == "svd_kind":
        if value not in ("exact", "randomised"):
            raise ValueError(f"svd_kind is {value!r}; known: exact, randomised")
        return value
    if not is_number(value):
        raise ValueError(f"{name} is {value!r}, it must be a number")
    if name in ("density", "outliers", "spread", "off_diagonal") and not 0 <= value <= 1:
        raise ValueError(f"{name} is {value:g}, it must be between 0 and 1")
    if name not in WHOLE:
        return float(value)
    if value != int(value) or value < 0:
        raise ValueError(f"{name} is {value!r}, it must be a whole number")
    return int(value)


_AUTHORS = "Zhao et al. 2025, arXiv 2502.17380, and the authors' code"

METHODS: dict[str, Method] = {
    "average": Method(mean, scale=1.0, paper="Wortsman et al. 2022, Model soups", theirs=("scale",)),
    "task_arithmetic": Method(total, paper="Ilharco et al. 2023, Editing models with task arithmetic"),
    "slerp": Method(slerp, scale=1.0, paper="Shoemake 1985, Animating rotation with quaternion curves"),
    "ties": Method(
        disjoint_mean,
        partial(magnitude, density=0.2),
        elect_sign,
        scale=1.0,
        paper="Yadav et al. 2023, TIES-Merging",
        theirs=("density", "scale"),
    ),
    "dare": Method(total, partial(dare, density=0.1), paper="Yu et al. 2024, Language models are super Mario"),
    "dare_ties": Method(
        disjoint_mean,
        partial(dare, density=0.1),
        elect_sign,
        scale=1.0,
        paper="Yu et al. 2024, with TIES",
    ),
    "della": Method(
        disjoint_mean,
        partial(della, density=0.3, spread=0.2),
        elect_sign,
        scale=1.0,
        paper="Deep et al. 2024, DELLA-Merging",
    ),
    "breadcrumbs": Method(
        total, partial(breadcrumbs, density=0.14, outliers=0.01), paper="Davari & Belilovsky 2024, Model breadcrumbs"
    ),
    "stitch": Method(
        disjoint_mean,
        partial(magnitude, density=0.05),
        scale=1.0,
        paper="He et al. 2024, Localize-and-Stitch (without data)",
        theirs=("density",),
    ),
    "consensus": Method(
        total,
        consensus=partial(agreed, threshold=0.4, agree=2),
        paper="Wang et al. 2024, TALL masks",
        theirs=("agree",),
    ),
    "magnitude": Method(
        total, partial(magnitude, density=0.2), scale=0.2, matrices=LAYERS, paper=_AUTHORS, theirs=("density", "scale")
    ),
    "singular_values": Method(
        total, partial(low_rank, rank=7), scale=0.2, matrices=LAYERS, paper=_AUTHORS, theirs=("rank", "scale")
    ),
    "lors": Method(
        total,
        partial(low_rank_plus_sparse, rank=7, density=0.2),
        scale=0.2,
        matrices=LAYERS,
        paper=_AUTHORS,
        theirs=("rank", "density", "scale"),
    ),
    "tsv": Method(
        orthogonalised,
        scale=1.0,
        matrices=LAYERS,
        rest="mean",
        paper="Gargiulo et al. 2025, Task singular vectors",
        theirs=("scale",),
    ),
    "isotropic": Method(
        isotropic, scale=1.0, matrices=LAYERS, rest="mean", paper="Marczak et al. 2025, No task left behind (Iso-C)"
    ),
    "fisher": Method(
        fisher,
        scale=1.0,
        statistics="fisher",
        paper="Matena & Raffel 2022, Merging models with Fisher-weighted averaging",
        theirs=("scale",),
    ),
    "regmean": Method(
        partial(regmean, off_diagonal=0.9),
        scale=1.0,
        matrices=LAYERS,
        rest="mean",
        statistics="gram",
        paper="Jin et al. 2023, Dataless knowledge fusion by merging weights of language models",
        theirs=("scale",),
    ),
}


def method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """That of the table, with `options` changed. Raises ValueError for an unknown name or option."""
    if name not in METHODS:
        raise ValueError(f"unknown merging method {name!r}; known: {', '.join(METHODS)}")
    try:
        return METHODS[name].having(**(options or {}))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
