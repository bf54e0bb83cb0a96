"""A model as data: what class with what arguments, in JSON, so that a checkpoint says how to rebuild itself without
running a config.

Convention: a module keeps every keyword argument of its constructor as an attribute of the same name; an argument
that is a configured class is kept as the sub-module that it made. Only the classes listed here can be built: a file
never names code to run.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax

from moe_jax import sharding, tree
from moe_jax.checkpoint import Source
from moe_jax.layers import attention, spec_augment
from moe_jax.layers import ffn as ffns
from moe_jax.layers.param import Module, Rngs
from moe_jax.models import conformer, corrector, translator
from moe_jax.moe import dispatch, experts, grouped, layer, routers, task_routers

KNOWN: dict[str, Callable] = {
    cls.__name__: cls
    for cls in (
        corrector.Corrector,
        translator.Translator,
        conformer.Conformer,
        spec_augment.spec_augment,
        attention.Attention,
        attention.CrossAttention,
        ffns.DenseFfn,
        ffns.PlainFfn,
        layer.MoeFfn,
        experts.Gated,
        experts.Bottleneck,
        experts.Plain,
        routers.Router,
        routers.Switch,
        routers.BiasBalanced,
        routers.SentenceLevel,
        routers.ExpertChoice,
        routers.Hash,
        task_routers.TaskMapped,
        task_routers.TaskBiased,
        task_routers.TaskLevel,
        task_routers.ByTask,
        task_routers.Subset,
        task_routers.Grouped,
        dispatch.dropless,
        dispatch.ragged,
        dispatch.exchanged,
        dispatch.slots,
        dispatch.gathered,
        dispatch.side_by_side,
        grouped.walk,
        grouped.ragged_dot,
        grouped.tokamax,
        grouped.megablox,
        grouped.mixed,
    )
}


def describe(thing: Any) -> Any:
    """A module, a dispatcher or a plain value as JSON."""
    if isinstance(thing, Module):
        names = [p.name for p in _signature(type(thing)).parameters.values() if p.kind is p.KEYWORD_ONLY]
        args = {n: describe(getattr(thing, n)) for n in names if n != "rngs"}
        return {"class": type(thing).__name__, "args": args}
    if isinstance(thing, partial):
        return {"class": thing.func.__name__, "args": {k: describe(v) for k, v in thing.keywords.items()}}
    if callable(thing):
        # A configuration tool may wrap the function; its name still says which one it is.
        return {"class": thing.__name__, "args": {}}
    if isinstance(thing, Mapping):
        return {str(k): describe(v) for k, v in thing.items()}
    if isinstance(thing, (tuple, list)):
        return [describe(v) for v in thing]
    return thing


def _signature(make: Callable) -> inspect.Signature:
    """That of a class's constructor without `self` (a class's own says only *args, **kwargs), or of a function."""
    if not inspect.isclass(make):
        return inspect.signature(make)
    signature = inspect.signature(make.__init__)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def configured(data: Any) -> Any:
    """The inverse: a callable with its arguments bound. Raises ValueError for a class that is not `KNOWN`."""
    if isinstance(data, Mapping) and "class" in data:
        if not isinstance(data["class"], str) or data["class"] not in KNOWN:
            raise ValueError(f"model description names {data['class']!r}; known: {', '.join(KNOWN)}")
        if not isinstance(data.get("args", {}), Mapping):
            raise ValueError(f"model description of {data['class']}: args are not an object")
        args = {k: configured(v) for k, v in data.get("args", {}).items()}
        try:
            _signature(KNOWN[data["class"]]).bind_partial(**args)
        except TypeError as error:
            raise ValueError(f"model description of {data['class']}: {error}") from None
        return partial(KNOWN[data["class"]], **args) if args else KNOWN[data["class"]]
    if isinstance(data, list):
        return tuple(configured(v) for v in data)
    return data


def abstract(data: Any) -> Any:
    """The model described, of shapes alone. Raises ValueError for what cannot be built."""
    return jax.tree.map(lambda leaf: leaf, _abstract(json.dumps(data)))  # a module of its own for each caller


@functools.lru_cache(maxsize=8)
def _abstract(data: str) -> Any:
    """Tracing a deep model takes a second, and merges and searches open many that are described alike."""
    make = configured(json.loads(data))
    return jax.eval_shape(lambda: make(rngs=Rngs(params=0)))


def completed(data: Any) -> Any:
    """A description that was made before some arguments were, with these as they are by default. Raises ValueError for
    what cannot be built."""
    return describe(abstract(data))


def filled(model: Any, source: Source, mesh: Any = None) -> Any:
    """`model`, which may be of shapes alone, with the arrays of a file; on a mesh divided as in training, so that no
    device, and no host, need have room for the whole.

    Raises ValueError naming paths that are missing or left over.
    """
    if mesh is None:
        return tree.unflatten(model, source)
    words = tree.axes(model)
    where = lambda name: sharding.placement(words.get(name, ()), source.shapes[name], mesh)  # noqa: E731
    return tree.unflatten(model, {name: source.placed(name, where(name)) for name in source})


def like(
    path: str,
    *,
    vocab: int | None,
    ffn: Callable | None = None,
    router: Callable | None = None,
    dense_layers: Sequence[int] = (),
    shared: float | None = None,
    auxiliary: Mapping[str, float] | None = None,
    remat: str = "none",
    unroll: int = 1,
    rngs: Rngs,
) -> Module:
    """A new model as deep and wide as that of the checkpoint at `path`: what `train.model` is for a pretrained base.

    Args:
      vocab: what the tokeniser has; it must be the checkpoint's. None: as many.
      ffn: in place of the dense layer there, with its units and activation (upcycling). None: as it is.
      router: of a base that is a mixture of experts already, in place of its own, whose gate it goes on with (NeKo
        from Mixtral). It must choose as many experts, and weigh them, as the base's does.
      dense_layers: numbers of the layers that keep the dense one.
      shared: not None: beside the experts there is a shared one, as the dense layer is (`checkpoint.upcycle`).
      auxiliary, remat, unroll: of `Corrector`; none of them is the checkpoint's.

    Raises ValueError where the tokeniser is another, there is no dense layer or no router to take the place of, or the
    new router works otherwise than the old.
    """
    made = configured(Source(path).meta.get("model"))
    if getattr(made, "func", None) is not corrector.Corrector:
        raise ValueError(f"{path} does not describe a corrector; make it with moe-jax import or export")
    was = made.keywords
    if vocab not in (None, was["vocab"]):
        raise ValueError(f"{path} has {was['vocab']} tokens, the data {vocab}: prepare them with its tokeniser")
    changes: dict[str, Any] = dict(auxiliary=auxiliary or (), remat=remat, unroll=unroll)
    if ffn is not None:
        dense = was["ffn"]
        if dense.func is not ffns.DenseFfn:
            raise ValueError(f"{path} is a mixture of experts already: leave ffn as it is")
        own = partial(experts.Gated, activation=dense.keywords["activation"])
        beside = {} if shared is None else {"shared": dense}
        changes["ffn"] = partial(ffn, hidden=dense.keywords["hidden"], experts=own, **beside)
        if dense_layers:
            changes |= {"dense": dense, "dense_layers": tuple(dense_layers)}
    if router is None:
        return made(**changes, rngs=rngs)
    if ffn is not None or was["ffn"].func is not layer.MoeFfn:
        raise ValueError(f"{path} has no router to take the place of: make it a mixture of experts by ffn alone")
    model = made(**changes | {"ffn": partial(was["ffn"], router=router)}, rngs=rngs)
    old = was["ffn"].keywords["router"].keywords
    for name in ("k", "weights"):
        mine, given = (
            getattr(model.ffn.router, name),
            old.get(name, _signature(routers.Router).parameters[name].default),
        )
        if mine != given:
            raise ValueError(f"{path} routes with {name}={given!r}, the new router with {mine!r}: give it the base's")
    return model
