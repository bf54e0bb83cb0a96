"""Training: build, step, loop. Reads top to bottom; takes callables and knows no model.

A run folder holds: checkpoints/ (Orbax), metrics.jsonl (deterministic), speed.jsonl (wall-clock), skipped.jsonl (the
rows of updates that were left out, if any), tensorboard/, config.json. Everything that a step does depends on
(configuration, seed, step) alone, so a resumed run goes on to the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import inspect
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from moe_jax import checkpoint, describe, hosts, losses, optim, profile, sharding, tree, xla
from moe_jax.adapters import EVERYTHING, Adapters, differentiated, factor_words, fingerprint, summary, trained
from moe_jax.data import Dataset, Prepared, drawn, misnumbered
from moe_jax.goodput import Goodput
from moe_jax.health import Health, Watchdog
from moe_jax.layers.param import Rngs
from moe_jax.logs import Logs
from moe_jax.partfile import Stopped
from moe_jax.pipeline import export
from moe_jax.types import Array, Batch, Metrics

Table = dict[str, Array]


@dataclasses.dataclass
class State:
    """`params` are what moves, `frozen` what stands still (`adapters.Adapters.split`)."""

    params: Table
    opt: Any
    step: int
    frozen: Table = dataclasses.field(default_factory=dict)


# --- build ------------------------------------------------------------------------------------------------------------


def build(model: Callable, *, vocab: int | None, seed: int) -> Any:
    """The initial model: a function of (configuration, seed)."""
    return model(vocab=vocab, rngs=Rngs(params=jax.random.fold_in(jax.random.key(seed), 1)))


def _sources(init_from: str | Sequence[str] | None) -> list[checkpoint.Source]:
    return [checkpoint.Source(path) for path in ([init_from] if isinstance(init_from, str) else init_from or ())]


def _inherited(data: Dataset, init_from: str | Sequence[str] | None) -> dict[str, Any]:
    """What a model has of its bases: "positions", how many a pretrained one was made for, which whoever exports it
    wants to know; and what it was trained on, before this run too: "trained", its tasks, and "longest_read", the most
    tokens that an example had to read. Nothing of what is not known of the data or of a base."""
    metas = [source.meta for source in _sources(init_from)]
    trained = [name for name, tally in data.meta.get("tasks", {}).items() if tally["examples"]]
    own = {"trained": trained, "longest_read": data.meta.get("longest_read", 0)}
    found = [own, *metas]
    out: dict[str, Any] = {k: v for meta in metas for k, v in meta.items() if k == "positions"}
    if all(meta.get("trained") for meta in found):
        out["trained"] = [*dict.fromkeys(name for meta in found for name in meta["trained"])]
    if all(meta.get("longest_read") for meta in found):
        out["longest_read"] = max(meta["longest_read"] for meta in found)
    return out


def initial(
    make: Callable[[], Any],
    init_from: str | Sequence[str] | None,
    rules: Sequence[checkpoint.Rule],
    tokeniser: str,
    mesh: Any,
    families: Mapping[str, int] | None = None,
) -> Any:
    """`make()`, with arrays taken from `init_from` by `rules`; they are read, and fresh ones are made, where they lie
    on the mesh, so that no device ever holds them all.

    Raises ValueError (also CheckpointError) for sources that do not fit the model, the tokeniser, the data's `families`
    or each other.
    """
    sources = _sources(init_from)
    for source in sources:
        if source.meta.get("tokeniser") != tokeniser:
            raise ValueError(
                f"{source.path} was trained with another tokeniser than the data: prepare the data with its own"
            )
        _same_numbers(source, families or {})
    model = jax.eval_shape(make)
    table = tree.flatten(model)
    words = tree.axes(model)
    if sources:
        described = describe.describe(model)
        for source in sources:
            _same_groups(source, described)
        where = lambda name, shape: sharding.placement(words[name], shape, mesh)  # noqa: E731
        table = checkpoint.transplant(table, sources, rules, where=where)
    fresh = {path: x for path, x in table.items() if isinstance(x, jax.ShapeDtypeStruct)}

    def made() -> Table:
        whole = tree.flatten(make())  # once: a stack of layers takes long to trace
        return {path: whole[path] for path in fresh}

    laid_out = sharding.shardings(words, fresh, mesh)
    return tree.unflatten(model, table | jax.jit(made, out_shardings=laid_out)())


def _same_numbers(source: checkpoint.Source, families: Mapping[str, int]) -> None:
    """Raises ValueError where a number is another task's in the source, whose rows of routers and adapters it would
    take, or a task has two numbers."""
    there = source.meta.get("families", {})
    for name in misnumbered(there, families):
        number = families[name]
        owner = next((other for other in there if there[other] == number and other != name), None)
        was = f"{owner} has it" if owner else f"it has {there[name]}"
        raise ValueError(
            f"{name} is task {number} in the data, but {was} in {source.path}: give tasks the numbers that they "
            "have there, and new ones new numbers (prepare.prepare.ids)"
        )


def _same_groups(source: checkpoint.Source, model: Any) -> None:
    """Raises ValueError where a task has another row of a gate (`Grouped`), or another adapter (`ByTask`), in the
    source than in the model that takes them."""
    here, there = _numbered(model), _numbered(source.meta.get("model"))
    families = source.meta.get("families", {})
    for place in here.keys() & there.keys():
        for name in source.meta.get("trained") or families:
            number = families.get(name)
            was, now = (places.get(number) for places in (there[place], here[place]))
            if was and was != now:
                raise ValueError(
                    f"{name} has {was} in {place} of {source.path}, and {now or 'nothing'} in this model: "
                    "configure groups of tasks and maps as they were when it was trained"
                )


def _numbered(described: Any, place: str = "") -> dict[str, dict[int, Any]]:
    """Where a described model has rows or experts that belong to tasks -> task id -> which."""
    if not isinstance(described, Mapping):
        return {}
    args = described.get("args", {})
    found: dict[str, dict[int, Any]] = {}
    if described.get("class") == "Grouped":
        found[place] = dict(map(tuple, args["groups"]))
    if described.get("class") == "ByTask":
        found[place] = {task: list(experts) for task, experts in enumerate(args["experts"])}
    for name, inner in args.items():
        found |= _numbered(inner, f"{place}.{name}".removeprefix("."))
    return found


def _split(model: Any, adapters: Adapters, seed: int) -> tuple[Table, Table]:
    return adapters.split(tree.flatten(model), tree.axes(model), jax.random.fold_in(jax.random.key(seed), 2))


def check(model: Callable, adapters: Adapters = EVERYTHING) -> None:
    """Raises what `train` would raise of a model that cannot be built, or of adapters that do not fit it. No array is
    made."""
    vocab = None if inspect.unwrap(model) is describe.like else 64  # the tokeniser's to say, or the checkpoint's
    made = jax.eval_shape(functools.partial(build, model, vocab=vocab, seed=0))
    jax.eval_shape(lambda model: _split(model, adapters, 0), made)


def layout(
    model: Any, optimizer: optax.GradientTransformation, mesh, adapters: Adapters = EVERYTHING
) -> tuple[dict[str, jax.ShapeDtypeStruct], Any, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes and shardings of what moves, of the optimiser state, whose leaves lie as their parameters do, and of what
    is frozen."""
    params, frozen = jax.eval_shape(lambda model: _split(model, adapters, 0), model)
    words = tree.axes(model)
    where = sharding.shardings(words | factor_words(words), params, mesh)

    def beside(path, leaf):  # an optimiser leaf of a parameter's shape, under its path, lies as the parameter does
        own = next((k.key for k in path if getattr(k, "key", None) in where), None)
        lies = where[own] if own and params[own].shape == leaf.shape else sharding.replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies)

    opt = jax.tree_util.tree_map_with_path(beside, jax.eval_shape(optimizer.init, trained(params)))
    still = sharding.shardings(words, frozen, mesh)

    def placed(table: Table, where: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        return {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[p]) for p, x in table.items()}

    return placed(params, where), opt, placed(frozen, still)


def start(
    model: Any, optimizer: optax.GradientTransformation, mesh, adapters: Adapters = EVERYTHING, *, seed: int = 0
) -> State:
    """Parameters and optimiser state laid out on the mesh; new factors are a function of `seed`."""
    like, like_opt, still = layout(model, optimizer, mesh, adapters)
    params, frozen = _split(model, adapters, seed)
    params = {path: jax.device_put(x, like[path].sharding) for path, x in params.items()}
    frozen = {path: jax.device_put(x, still[path].sharding) for path, x in frozen.items()}
    opt = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda s: s.sharding, like_opt))(trained(params))
    return State(params, opt, 0, frozen)


# --- step -------------------------------------------------------------------------------------------------------------


def make_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    micro: int,
    dtype: str,
    max_targets: int,
    adapters: Adapters = EVERYTHING,
    apart: bool = False,
):
    """(params, opt, step, batch, frozen) -> (params, opt, metrics); gradients, of what trains alone, are summed over
    `micro` slices of the batch.

    With `apart` two programs: one for gradients and one for what is done with them. Where batches have several shapes
    the second is compiled once, and the first, which takes the longest, serves runs of other seeds, steps and learning
    rates too (from JAX's cache on disk).
    """

    def loss_fn(own: Table, rest: Table, batch: Batch, key: Array, normaliser: Array):
        made = compute(model, adapters.merge(own, rest), dtype)
        return made.loss(batch, key, normaliser=normaliser, max_targets=max_targets)

    def gradients_fn(
        params: Table, root: Array, step: Array, batch: Batch, frozen: Table | None
    ) -> tuple[Table, Metrics]:
        """`root`: the seed's key. The metrics have the loss among them."""
        keys = jax.random.split(jax.random.fold_in(root, step), micro)
        normaliser = jnp.maximum(batch.weights_BxL.sum(), 1) / micro
        slices = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, micro, *x.shape[1:]), 1, 0), batch)
        own = trained(params)
        whole = (frozen or {}) | params
        rest = {path: x for path, x in whole.items() if path not in own}

        def gradients(batch: Batch, key: Array):
            return jax.value_and_grad(loss_fn, has_aux=True)(own, rest, batch, key, normaliser)

        def add(total, piece):
            (loss, metrics), grads = gradients(*piece)
            return jax.tree.map(jnp.add, total, ((loss, metrics), grads)), None

        first = jax.tree.map(lambda x: x[0], (slices, keys))
        if micro == 1:
            (loss, metrics), grads = gradients(*first)
        else:
            zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradients, *first))
            ((loss, metrics), grads), _ = jax.lax.scan(add, zero, (slices, keys))
        return jax.tree.map(lambda g: g / micro, grads), metrics | {"loss": loss / micro}

    def update_fn(
        params: Table, opt: Any, grads: Table, metrics: Metrics, frozen: Table | None
    ) -> tuple[Table, Any, Metrics]:
        own = trained(params)
        whole = (frozen or {}) | params
        updates, opt = optax.with_extra_args_support(optimizer).update(grads, opt, own, loss=metrics["loss"])
        whole |= cast(Table, optax.apply_updates(own, updates))
        after = after_step(model, {path: whole[path] for path in tree.flatten(model)}, metrics)
        if isinstance(opt, optim.Guarded):
            metrics |= {"skipped": opt.in_row}
            after = {path: jnp.where(opt.in_row > 0, whole[path], x) for path, x in after.items()}
        whole |= after
        if "stats" in metrics:  # the statistics of slices add up, the losses made of them do not
            metrics |= {name: loss_of(metrics["stats"]) for name, loss_of in losses.AUXILIARY.items()}
        moved = {path: whole[path] for path in params}
        return moved, opt, metrics | {"grad_norm": optax.tree.norm(grads)}

    def step_fn(
        params: Table, opt: Any, step: Array, batch: Batch, frozen: Table | None = None
    ) -> tuple[Table, Any, Metrics]:
        found = gradients_fn(params, jax.random.key(seed), step, batch, frozen)
        return update_fn(params, opt, *found, frozen)

    stays: Any = None
    grads_stay: Any = None
    if mesh := sharding.mesh():  # else XLA would lay out what comes back as it likes, and the next step as that is
        like, like_opt, _ = layout(model, optimizer, mesh, adapters)
        stays = (*jax.tree.map(lambda s: s.sharding, (like, like_opt)), None)
        grads_stay = ({path: x.sharding for path, x in trained(like).items()}, None)
    options = xla.options(sharding.kind()[0])
    if not apart:
        return jax.jit(step_fn, donate_argnums=(0, 1), out_shardings=stays, compiler_options=options)

    @functools.partial(jax.jit, out_shardings=grads_stay, compiler_options=options)
    def gradients(params: Table, root: Array, step: Array, batch: Batch, frozen: Table | None):
        return gradients_fn(params, jax.random.wrap_key_data(root), step, batch, frozen)

    update = jax.jit(update_fn, donate_argnums=(0, 1), out_shardings=stays, compiler_options=options)
    root = np.asarray(jax.random.key_data(jax.random.key(seed)))

    def steps_apart(params: Table, opt: Any, step: Array, batch: Batch, frozen: Table | None = None):
        return update(params, opt, *gradients(params, root, step, batch, frozen), frozen)

    return steps_apart


def compute(model: Any, params: Table, dtype: str) -> Any:
    """The model in the dtype of computation; routers stay float32, and so does the master copy that is updated."""
    return tree.unflatten(model, {p: x if tree.is_router(p) else x.astype(dtype) for p, x in params.items()})


def after_step(model: Any, params: Table, metrics: Metrics) -> Table:
    """Routers that balance without a loss move their bias by this step's load."""
    if "stats" not in metrics:
        return params
    return tree.flatten(tree.unflatten(model, params).after_step(metrics["stats"]))


def make_evaluation(model: Any, *, dtype: str, max_targets: int, adapters: Adapters = EVERYTHING):
    """(params, frozen, batch) -> metrics, with free routing and nothing dropped."""

    def evaluation(params: Table, frozen: Table, batch: Batch) -> Metrics:
        return compute(model, adapters.merge(params, frozen), dtype).loss(batch, max_targets=max_targets)[1]

    return jax.jit(evaluation, compiler_options=xla.options())


# --- what is logged ---------------------------------------------------------------------------------------------------


def readable(metrics: Metrics, families: Mapping[str, int]) -> dict[str, float]:
    """Sums over a batch -> named scalars: mean nll in all and of each family, auxiliary losses, entropy, drops, expert
    load by family, and that of each layer's busiest expert (over the mean load: 1 is even).
    """
    m = jax.device_get(metrics)
    out = {k: float(v) for k, v in m.items() if k != "stats" and np.ndim(v) == 0}
    out["nll"] = float(m["nll_T"].sum() / max(m["weight_T"].sum(), 1))
    for name, i in families.items():
        if m["weight_T"][i] > 0:
            out[f"loss/{name}"] = float(m["nll_T"][i] / m["weight_T"][i])
    if "stats" in m:
        s = m["stats"]
        out["router/entropy"] = float((s.entropy / np.maximum(s.count, 1)).mean())
        out["router/dropped"] = float(s.dropped.sum() / max(s.load_E.sum(), 1))
        mean_N = np.maximum(s.load_E.mean(-1), 1e-9)
        out |= {f"router/busiest/{n}": float(x) for n, x in enumerate(s.load_E.max(-1) / mean_N)}
        share = s.task_load_TxE.sum(0)
        for name, i in families.items():
            if share[i].sum() > 0:
                for e, x in enumerate(share[i] / share[i].sum()):
                    out[f"load/{name}/{e}"] = float(x)
    return out


def active_params(model: Any, paths: Collection[str] | None = None) -> int:
    """Matrix parameters, of all paths or of some, that one token is multiplied with: an expert counts k / E; of a tied
    embedding, the output product.
    """
    table = tree.flatten(model)
    return sum(int(x.size * model.active(path)) for path, x in table.items() if paths is None or path in paths)


def training_flops(model: Any, moving: Collection[str]) -> float:
    """A token: two a parameter on the way there and two on the way back, and two more where its gradient is wanted.
    Where an encoder has some of the tokens and a decoder the others, each has half of them."""
    return (4 * active_params(model) + 2 * active_params(model, moving)) / getattr(model, "sides", 1)


# --- loop -------------------------------------------------------------------------------------------------------------


def train(
    run_dir: str,
    *,
    model: Callable,
    optimizer: Callable[[], optax.GradientTransformation],
    data: str,
    valid_data: str,
    read: Callable[[str], Dataset] = Prepared.open,
    mesh: Callable = sharding.make_mesh,
    steps: int = 1000,
    batch_size: int = 16,
    micro_batches: int = 1,
    valid_batches: int = 8,
    log_every: int = 20,
    eval_every: int = 200,
    save_every: int = 200,
    seed: int = 0,
    dtype: str = "float32",
    init_from: str | Sequence[str] | None = None,
    init_rules: Sequence[checkpoint.Rule] = (),
    adapters: Adapters = EVERYTHING,
    config: Mapping[str, Any] | None = None,
    profile_steps: int = 0,
    progress: bool = True,
    spike: float = 0.0,
    patience: int = 10,
    hang_after: float = 1800.0,
    abort_after: float = 0.0,
) -> State:
    """Train to `steps`, going on from the latest checkpoint of `run_dir` if there is one.

    Args:
      model: configured class, called with (vocab=..., rngs=...).
      optimizer: configured factory of the optax transformation.
      data, valid_data: prepared folders (`moe_jax.data`).
      read: opens them; what it returns makes the batches that the model reads.
      steps: 0 keeps and exports the initial model: what a run starts from, to be scored like the others.
      micro_batches: gradient accumulation.
      init_from: safetensors files or run folders to start from, one or several, changed by `init_rules`
        (`checkpoint.transplant`).
      adapters: what of the model trains. Where something is frozen, the checkpoints hold what moves alone (the rest is
        read from `init_from` again), and the run exports `adapters.safetensors` beside the merged model.
      config: the resolved configuration, kept as JSON beside the checkpoints (never executed).
      profile_steps: so many steps are traced, in `run_dir`/profile (`moe_jax.profile`).
      spike, patience: an update whose gradient or loss is not finite, or whose gradient is (0: never) beyond `spike`
        times the running mean of its norm, is left out and its rows are named (`optim.guarded`), all of them in
        `run_dir`/skipped.jsonl; `patience` of them in a row end the run.
      hang_after: seconds without a step after which the stacks of all threads are printed, again and again; 0: never.
      abort_after: seconds without a step after which the process ends with 134, for a supervisor to start it again; 0:
        never. Longer than any validation takes; four times as long, as `hang_after`, until the first step.

    Raises:
      Stopped: SIGINT or SIGTERM came; a checkpoint holds everything.
      ValueError (also `checkpoint.CheckpointError`): one line on data, model or checkpoint that do not fit.
      FloatingPointError: `patience` updates in a row were left out, or the validation loss is not finite; the last
        checkpoint is untouched.
    """
    if batch_size % micro_batches:
        raise ValueError(f"batch_size={batch_size} does not divide into micro_batches={micro_batches}")
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with Watchdog(hang_after, abort_after) as watchdog:
        clock = Goodput(folder, enabled=hosts.first())
        train_set, valid_set = read(data), read(valid_data)
        if train_set.meta["tokeniser"] != valid_set.meta["tokeniser"]:
            raise ValueError(f"{data} and {valid_data} were prepared with different tokenisers: prepare both again")
        max_targets = max(train_set.meta["max_targets"], valid_set.meta["max_targets"])
        families = train_set.meta["families"]
        devices = mesh()
        make = functools.partial(build, model, vocab=train_set.tokeniser.vocab_size, seed=seed)
        network = initial(make, init_from, init_rules, train_set.meta["tokeniser"], devices, families)
        transform = optim.guarded(optimizer(), spike=spike)
        about = {
            "model": describe.describe(network),
            "data": {"sha256": train_set.meta["sha256"]},
            **train_set.tokeniser.meta(),
            "families": families,
            "layout": train_set.meta.get("layout", "aligned"),
            **{k: train_set.meta[k] for k in ("max_hypotheses", "max_sources") if k in train_set.meta},
            "length": train_set.meta["length"],
            **_inherited(train_set, init_from),
            "batch_size": batch_size,
            "seed": seed,
        }
        with sharding.use(devices):
            state = start(network, transform, devices, adapters, seed=seed)
            if state.frozen:
                if not init_from:
                    raise ValueError("adapters freeze what nothing has trained: name a base in init_from")
                base = tree.flatten(network)
                about["base"] = fingerprint({path: hosts.Whole(base[path]) for path in state.frozen})
                about["adapters"] = dataclasses.asdict(adapters)
                del base
            network = jax.eval_shape(lambda: network)  # the arrays are the state's alone
            store = checkpoint.Run(folder)
            state = _latest(store, state, about)
            shown = {k: v for k, v in about.items() if k != "tokeniser_model"}
            if hosts.first():
                (folder / "config.json").write_text(
                    json.dumps({**shown, "config": dict(config or {})}, indent=2) + "\n"
                )
            step_fn = make_step(
                network,
                transform,
                seed=seed,
                micro=micro_batches,
                dtype=dtype,
                max_targets=train_set.meta["max_targets"],
                adapters=adapters,
                apart=len(train_set.meta.get("lengths", ())) > 1,
            )
            evaluate = make_evaluation(network, dtype=dtype, max_targets=max_targets, adapters=adapters)
            logs = Logs(folder, state.step, enabled=hosts.first())
            if progress and hosts.first():
                _announce(folder, network, state, steps, train_set, batch_size)
            try:
                _loop(
                    state,
                    step_fn,
                    functools.partial(_validate, evaluate, valid_set, batch_size, valid_batches, families, devices),
                    lambda s: sharding.put_batch(_rows(train_set, s, seed, batch_size, devices), devices),
                    store,
                    logs,
                    clock,
                    health=Health(
                        logs, functools.partial(train_set.rows_of, seed=seed, batch_size=batch_size), patience
                    ),
                    watchdog=watchdog,
                    about=about,
                    families=families,
                    steps=steps,
                    log_every=log_every,
                    eval_every=eval_every,
                    save_every=save_every,
                    progress=progress,
                    # As a share of the machine's peak: MFU (attention scores are not counted).
                    flops_per_token=training_flops(network, differentiated(state.params)),
                    tracing=profile.Steps(folder / "profile", state.step, profile_steps),
                )
            finally:
                logs.close()
                store.close()
                clock.saved()
        watchdog.alive()
        _export_best(folder, state, adapters)
        clock.write(ended=True)
    return state


def _export_best(folder: Path, state: State, adapters: Adapters) -> None:
    """The best checkpoint as `model.safetensors`, to correct with and to start other runs from; what moved of it as
    `adapters.safetensors`, where something stood still."""
    store = checkpoint.Run(folder)
    step = store.best()
    assert step is not None, "a finished run has a checkpoint"
    meta = store.meta(step)
    params: dict[str, Any] = {p: hosts.Whole(x) for p, x in store.params(step, _abstract(state.params)).items()}
    frozen = {p: np.asarray(hosts.Whole(x)) for p, x in state.frozen.items()}
    if frozen:  # factors are multiplied
        params = {p: np.asarray(x) for p, x in params.items()}
    if hosts.first():
        export(folder / "model.safetensors", adapters.merge(params, frozen), meta)
        if frozen:
            export(folder / "adapters.safetensors", params, meta, adapters=meta["adapters"], base=meta["base"])
    else:
        for x in params.values():  # all hosts take part in making each whole
            np.asarray(x)
    hosts.wait("export")  # all of them may read it next
    store.close()


def _loop(
    state: State,
    step_fn,
    validate,
    fetch,
    store: checkpoint.Run,
    logs: Logs,
    clock: Goodput,
    *,
    health: Health,
    watchdog: Watchdog,
    about: Mapping[str, Any],
    families: Mapping[str, int],
    steps: int,
    log_every: int,
    eval_every: int,
    save_every: int,
    progress: bool,
    flops_per_token: float,
    tracing: profile.Steps,
) -> None:
    valid: dict[str, float] = {}

    def finite(name: str, x: float) -> None:
        if not math.isfinite(x):
            raise FloatingPointError(
                f"{name} is {x} at step {state.step}; the last checkpoint is step {store.latest()}: "
                "lower the learning rate or look at the data"
            )

    def save(write=store.save) -> None:
        nonlocal valid
        clock.now("validate")
        valid = valid or validate(state)
        finite("validation loss", valid["valid/loss"])
        clock.now("save")
        write(state.step, state.params, state.opt, {**about, "step": state.step}, valid["valid/loss"])
        logs.sync()
        clock.saving()

    def save_at_once() -> None:
        """A machine that is taken away gives half a minute, and validation may take longer, or fail."""
        clock.now("save")
        store.save(state.step, state.params, state.opt, {**about, "step": state.step}, None)
        logs.sync()
        clock.saving()

    if state.step and not store.validated(state.step):  # what `save_at_once` left out
        clock.now("validate")
        if state.step % eval_every == 0 or state.step == steps:
            valid = validate(state)
            logs.metrics(state.step, valid)
        if state.step % save_every == 0 or state.step == steps:
            save(store.replace)
    if state.step >= steps:
        if store.latest() is None:
            save()
            logs.metrics(state.step, valid)
        return
    peak, compiled = xla.peak_flops(), set()
    bar = tqdm(total=steps, initial=state.step, unit="step", disable=None if progress else True, mininterval=1)
    since, tokens, waited, due = time.monotonic(), 0, clock.seconds["input"], False
    with hosts.Stop("saving") as stop, bar, tracing:
        while state.step < steps:
            tracing(state.step, state.params)
            clock.now("input")
            batch = fetch(state.step)
            shapes = tuple(x.shape for x in jax.tree.leaves(batch))
            clock.now("compute" if shapes in compiled else "compile")
            compiled.add(shapes)
            state.params, state.opt, metrics = step_fn(
                state.params, state.opt, np.int32(state.step), batch, state.frozen
            )
            clock.now("compute")
            state.step += 1
            watchdog.alive()
            if clock.pending and not store.writing():
                clock.saved()
            health.saw(state.step, metrics.pop("skipped"), metrics["grad_norm"], metrics["loss"])
            valid = {}
            tokens += metrics["tokens"]
            bar.update()
            if state.step % log_every == 0 or state.step == steps:
                scalars = readable(metrics, families)
                health.settle()
                seconds = time.monotonic() - since
                rate = float(tokens) / seconds
                logs.metrics(state.step, {name: x for name, x in scalars.items() if math.isfinite(x)})
                flops = rate * flops_per_token
                clock.write()
                speed = {
                    "tokens_per_s": rate,
                    "input_wait": (clock.seconds["input"] - waited) / seconds,
                    "flops_per_s": flops,
                    "mfu": flops / peak,
                    "goodput": clock.share,
                    **{f"goodput/{kind}": spent for kind, spent in clock.seconds.items()},
                }
                logs.speed(state.step, speed)
                bar.set_postfix_str(f"nll {scalars['nll']:.3f}, {rate:.0f} tokens/s")
                since, tokens, waited = time.monotonic(), 0, clock.seconds["input"]
            caught = stop.at(state.step)
            if caught:
                health.settle()
                save_at_once()
                raise Stopped(caught, f"stopped at step {state.step} of {steps}; the same command goes on from there")
            if state.step % eval_every == 0 or state.step == steps:
                clock.now("validate")
                began = time.monotonic()
                valid = validate(state)
                logs.metrics(state.step, valid)
                watchdog.alive()
                since += time.monotonic() - began  # speed is that of training alone
            due |= state.step % save_every == 0
            if due or state.step == steps:
                health.settle()
                if health.well or state.step == steps:  # what may be ill waits until it is well
                    save()
                    due = False
                watchdog.alive()


def _rows(data: Dataset, step: int, seed: int, batch_size: int, mesh: Any) -> Batch:
    """What this process brings of a batch. Hosts that hold the same rows read the same ones."""
    part, parts = sharding.part_of_batch(mesh)
    return data.batch(step, seed=seed, batch_size=batch_size, process_index=part, process_count=parts)


def _validate(evaluate, data: Dataset, batch_size: int, batches: int, families, mesh, state: State) -> dict[str, float]:
    """Mean nll over the first rows of the validation set: the same rows at every call."""
    total: Metrics = {}
    for i in range(data.batches(batches * batch_size, batch_size)):
        metrics = evaluate(state.params, state.frozen, sharding.put_batch(_rows(data, i, 0, batch_size, mesh), mesh))
        total = metrics if not total else jax.tree.map(jnp.add, total, metrics)
        # Several hosts on CPUs: programs with sums over devices that wait for each other's threads would hang.
        jax.block_until_ready(total)
    scalars = readable(total, families)
    named = ("loss/", "load/", "router/busiest/", "router/entropy")
    kept = {k: v for k, v in scalars.items() if k.startswith(named)}
    return {"valid/loss": scalars["nll"], **{f"valid/{k}": v for k, v in kept.items()}}


def _latest(store: checkpoint.Run, like: State, about: Mapping[str, Any]) -> State:
    """The state of the newest step that the disk has kept; `like` where there is none yet. Steps that are damaged are
    set aside, and said to be.

    Raises CheckpointError where the run is another one, or all of its steps are damaged; and OSError (EAGAIN) where a
    step is damaged that several hosts would go on from: some may see it, and others wait for them in vain.
    """
    steps = store.steps()
    for step in steps:
        try:
            return _resume(store, step, like, about)
        except checkpoint.Damaged as error:
            if step == steps[-1]:
                raise
            said = f"{error}; it is in {store.set_aside(step)} now, and the"
            if hosts.several():  # they begin again together
                raise OSError(errno.EAGAIN, f"{said} same command goes on from the step before") from error
            print(f"{said} run goes on from the step before", file=sys.stderr)
    return like


def _resume(store: checkpoint.Run, step: int, like: State, about: Mapping[str, Any]) -> State:
    """The state at `step`. Raises CheckpointError where model, data, seed, adapters or their base are not the run's."""
    was = store.meta(step)
    if was.get("model") != about["model"]:
        with contextlib.suppress(ValueError, TypeError):
            was["model"] = describe.completed(was["model"])
    for key in ("model", "data", "tokeniser", "families", "batch_size", "seed", "adapters", "base"):
        if json.dumps(was.get(key), sort_keys=True) != json.dumps(about.get(key), sort_keys=True):
            raise checkpoint.CheckpointError(
                f"{store.folder}/{step} was made with another {key}: use its configuration, or another run folder"
            )
    return State(store.params(step, _abstract(like.params)), store.opt(step, _abstract(like.opt)), step, like.frozen)


def _abstract(arrays: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)


def _announce(folder: Path, model: Any, state: State, steps: int, data: Dataset, batch_size: int) -> None:
    sizes = tree.count(tree.flatten(model)), active_params(model)
    print(f"{'resuming' if state.step else 'training'} in {folder}: step {state.step} of {steps}")
    print(f"  {sizes[0] / 1e6:.2f} M parameters, {sizes[1] / 1e6:.2f} M active a token; devices: {jax.device_count()}")
    if state.frozen:
        print(f"  {summary(state.params, state.frozen)}")
    terms = ", ".join(f"{n} x {w}" for n, w in model.auxiliary if w) or "none"
    print(f"  auxiliary losses: {terms}; {data.rows} rows of {data.meta['length']} tokens")
    times = steps * batch_size / data.rows
    if epochs := {name: times * number for name, number in drawn(data.meta).items()}:
        least, most = min(epochs, key=epochs.__getitem__), max(epochs, key=epochs.__getitem__)
        ends = f"{epochs[least]:.2f} ({least}) to {epochs[most]:.2f} ({most})"
        print(f"  they are read {times:.2f} times: {ends} epochs of a task")
