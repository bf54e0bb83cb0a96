"""What Fisher-weighted merging and RegMean know of a model beside its weights, from one pass over prepared data."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moe_jax import checkpoint, describe, tree
from moe_jax.merging.models import MergeError, open_data, open_model
from moe_jax.types import Array

KINDS = ("fisher", "gram")


def gather(
    model: str, data: str, kind: str, output: str, *, rows: int = 64, batch_size: int = 8, progress: bool = True
) -> dict[str, Any]:
    """Writes a safetensors file with what is known of the leaves of the checkpoint `model`; returns its table.

    fisher: the diagonal of the empirical Fisher information, the mean over rows of the squared gradient of a row's
      log-likelihood a token. (Matena & Raffel take the expectation over the model's own labels; the data's are the
      usual approximation.) Packed rows hold several examples, whose gradients are squared together.
    gram: G_IxI = the mean over positions of x x^T of the inputs of each matrix, for leaves that are used by a product
      with the whole matrix; experts, embeddings and norms have none.

    Args:
      data: a prepared folder, of which the first `rows` rows are read.

    Raises MergeError for another kind, for data that the model does not read, or where nothing was found.
    """
    if kind not in KINDS:
        raise MergeError(f"unknown statistics {kind!r}; known: {', '.join(KINDS)}")
    if Path(output).exists():
        raise MergeError(f"{output}: is there already; remove it, or give another output")
    params, meta = checkpoint.read_safetensors(model)
    prepared = open_data(model, meta, data)
    empty = describe.abstract(meta["model"])
    per = 1 if kind == "fisher" else batch_size
    batches = prepared.sample(rows, per)
    found = {"fisher": _fisher, "gram": _grams}[kind](
        empty, params, tqdm(batches, f"{kind} statistics", unit="batch", disable=None if progress else True)
    )
    if not found:
        raise MergeError(f"{model}: no matrix of it has {kind} statistics")
    table = {name: np.asarray(x, np.float32) for name, x in found.items()}
    about = {"statistics": kind, "of": str(model), "sha256": open_model(model).digest(), "rows": len(batches) * per}
    checkpoint.write_safetensors(output, table, about)
    return table


def _fisher(empty: Any, params: dict[str, Array], batches) -> dict[str, Array]:
    @jax.jit
    def add(params, total, batch):
        gradients = jax.grad(lambda p: tree.unflatten(empty, p).loss(batch)[0])(params)
        return {name: total[name] + gradients[name] ** 2 for name in total}

    total, count = {name: jnp.zeros(x.shape, jnp.float32) for name, x in params.items()}, 0
    for batch in batches:
        total, count = add(params, total, batch), count + 1
    return {name: x / count for name, x in total.items()}


@jax.tree_util.register_pytree_node_class
class Watched:
    """A matrix that adds up the Gram matrices of what it is multiplied with from the left: it stands in a model where
    the matrix stood, and the model knows nothing of it. Only outside of `jit`."""

    def __init__(self, value: Any, name: str, seen: dict[str, list[Array]]):
        self.value, self.name, self.seen = value, name, seen

    def __rmatmul__(self, x_RxI: Array) -> Array:
        self.seen[self.name].append(x_RxI.T @ x_RxI / len(x_RxI))
        return x_RxI @ self.value

    def __getitem__(self, index: Any) -> Any:
        if index is Ellipsis:
            return self
        return (
            Watched(self.value[index], self.name, self.seen) if isinstance(index, (int, slice)) else self.value[index]
        )

    def __len__(self) -> int:
        return len(self.value)

    shape = property(lambda self: self.value.shape)
    ndim = property(lambda self: self.value.ndim)
    dtype = property(lambda self: self.value.dtype)

    def astype(self, dtype: Any) -> Watched:
        return Watched(self.value.astype(dtype), self.name, self.seen)

    def tree_flatten(self):
        return (self.value,), (self.name, id(self.seen), _Same(self.seen))

    @classmethod
    def tree_unflatten(cls, about, children):
        return cls(children[0], about[0], about[2].it)


class _Same:
    """Equal to itself alone, whatever it holds: pytrees compare what they carry beside arrays."""

    def __init__(self, it: Any):
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.it is self.it

    def __hash__(self) -> int:
        return id(self.it)


def _grams(empty: Any, params: dict[str, Array], batches) -> dict[str, Array]:
    """Padding that layers make 0 adds nothing, and `methods.regmean` does not look at the scale of a Gram matrix. What
    is behind a bias, or of positions, is not 0 there, and counts."""
    words = tree.axes(empty)
    total: dict[str, Any] = defaultdict(float)
    for batch in batches:
        seen: dict[str, list[Array]] = defaultdict(list)
        watched = {n: Watched(x, n, seen) if _is_matrix(words[n]) else x for n, x in params.items()}
        with jax.disable_jit(), jax.default_matmul_precision("highest"):
            tree.unflatten(empty, watched).loss(batch)
        for name, grams in seen.items():
            layers = params[name].shape[0] if params[name].ndim > 2 else 1
            if len(grams) % layers:
                raise MergeError(f"{name}: is used {len(grams)} times in {layers} layers")
            # One layer after another, each as often as the others.
            gram = jnp.stack(grams).reshape(layers, -1, *grams[0].shape).mean(1)
            total[name] = total[name] + (gram if params[name].ndim > 2 else gram[0])
    return dict(total)


def _is_matrix(words: tuple[str | None, ...]) -> bool:
    """Of inputs and outputs; not the taps of a convolution, nor what is read row by row."""
    return len(words) == 2 and not {None, "vocab"} & set(words)
