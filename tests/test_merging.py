"""Merging: what each method promises, the authors' algorithm written again, recipes, cards, and what is refused."""

import base64
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import tracemalloc
from functools import partial
from pathlib import Path

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import yaml
from safetensors.numpy import load_file, save_file

from benchmarks import merging_align
from moe_jax import checkpoint, cli, describe, main, tree
from moe_jax.data import Prepared, write_prepared
from moe_jax.formats.record import Record
from moe_jax.layers.ffn import PlainFfn
from moe_jax.layers.param import Rngs
from moe_jax.merging import align, experts, merge, methods, recipe, search, statistics
from moe_jax.merging.methods import METHODS, method
from moe_jax.merging.models import MergeError, open_model
from moe_jax.models.conformer import Conformer
from moe_jax.models.translator import Translator
from moe_jax.moe import task_routers
from moe_jax.packing import Packable
from moe_jax.pipeline import Pipeline
from moe_jax.speech import data as speech_data
from moe_jax.text.tokeniser import Tokeniser

TWO = {"slerp"}  # methods for two models
WHOLE = {  # options with which a method drops nothing of a delta
    "ties": {"density": 1.0},
    "dare": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "della": {"density": 1.0, "spread": 0.0},
    "breadcrumbs": {"density": 1.0, "outliers": 0.0},
    "stitch": {"density": 1.0},
    "magnitude": {"density": 1.0},
    "singular_values": {"rank": 12},
    "lors": {"rank": 3, "density": 1.0},
}
# Not the identity on equals: isotropic levels the singular values whatever the models are, and tsv has of each model
# but its share of the triplets, which it makes orthogonal to the same ones of the others.
NOT_SAME = {"isotropic", "tsv"}
ROWS, COLUMNS = 12, 20


def keys(number: int, seed: int = 0):
    return list(jax.random.split(jax.random.key(seed), number))


def deltas(number: int = 3, seed: int = 0) -> list:
    return [jax.random.normal(key, (ROWS, COLUMNS)) for key in keys(number, seed)]


def merged(name: str, given, weights=None, seeds=None, **options):
    weight_M = jnp.ones(len(given)) if weights is None else jnp.asarray(weights)
    base = jax.random.normal(jax.random.key(9), given[0].shape)
    return method(name, options)(given, weight_M, seeds or keys(len(given)), base)


def taken(name: str) -> list:
    return deltas(2 if name in TWO else 3)


# --- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_scale_zero_is_the_base(name):
    np.testing.assert_array_equal(merged(name, taken(name), scale=0.0), 0)


@pytest.mark.parametrize("name", METHODS)
def test_without_any_weight_it_is_the_base(name):
    np.testing.assert_array_equal(merged(name, taken(name), weights=[0.0] * len(taken(name))), 0)


def test_options_may_be_any_number_of_their_kind():
    assert method("lors", {"rank": 2.0}).options()["rank"] == 2
    given = deltas()
    np.testing.assert_allclose(merged("dare", given, density=1), sum(given) / 3, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_models_does_not_matter(name):
    given = taken(name)
    seeds = keys(len(given))
    turned = merged(name, given[::-1], seeds=seeds[::-1])
    np.testing.assert_allclose(turned, merged(name, given, seeds=seeds), atol=2e-5)


@pytest.mark.parametrize("name", sorted(set(METHODS) - NOT_SAME))
def test_equal_models_merge_to_themselves(name):
    """With nothing dropped, and a sum's scale 1 / models; of a mean, by statistics or not, whatever the weights."""
    one = deltas(1)[0]
    given = [one] * len(taken(name))
    mean = METHODS[name].is_mean or METHODS[name].combine is methods.disjoint_mean
    options = WHOLE.get(name, {}) | {"scale": 1.0 if mean else 1 / len(given)}
    np.testing.assert_allclose(merged(name, given, **options), one, atol=1e-5)
    if mean:
        np.testing.assert_allclose(merged(name, given, [0.2, 0.7, 3.0][: len(given)], **options), one, atol=1e-5)


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_equal_models_merge_to_themselves_whatever_their_statistics(name):
    one, rng = deltas(1)[0], np.random.default_rng(0)
    about = [rng.random((ROWS, COLUMNS)) for _ in range(3)]
    about = [x @ x.T for x in about] if name == "regmean" else about
    found = METHODS[name](
        [one] * 3, jnp.array([0.2, 0.7, 3.0]), keys(3), one, [jnp.asarray(x, jnp.float32) for x in about]
    )
    np.testing.assert_allclose(found, one, atol=1e-3)


@pytest.mark.parametrize("name", sorted(NOT_SAME))
def test_equal_models_merge_to_something_else(name):
    """But isotropic leaves what is level already, and tsv what is alone."""
    one = deltas(1)[0]
    scale = 1 / 3 if name == "isotropic" else 1.0
    assert np.abs(merged(name, [one] * 3, scale=scale) - one).max() > 0.1
    level = jnp.linalg.qr(one.T)[0].T if name == "isotropic" else one
    count = 3 if name == "isotropic" else 1
    np.testing.assert_allclose(merged(name, [level] * count, scale=scale), level, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("magnitude", {"density": 1.0}),
        ("singular_values", {"rank": ROWS}),
        ("lors", {"rank": ROWS, "density": 0.0}),
        ("lors", {"rank": 1, "density": 1.0}),
        ("dare", {"density": 1.0}),
        ("breadcrumbs", {"density": 1.0, "outliers": 0.0}),
        ("consensus", {"agree": 0}),
    ],
)
def test_with_all_of_it_a_method_is_task_arithmetic(name, whole):
    given = deltas()
    found = merged(name, given, scale=0.3, **whole)
    np.testing.assert_allclose(found, 0.3 * sum(given), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_lors_is_the_authors_algorithm(seed):
    """Written from their description in NumPy: SVD, the first seven triplets, the largest fifth of what is left."""
    given = [np.random.default_rng((seed, i)).normal(size=(48, 64), scale=0.05) for i in range(5)]  # as of weights
    total = np.zeros((48, 64))
    for tau in given:
        u, s, vt = np.linalg.svd(tau, full_matrices=False)
        low = u[:, :7] @ np.diag(s[:7]) @ vt[:7]
        rest = (tau - low).ravel()
        rest[np.argsort(-np.abs(rest))[int(rest.size * 0.2) :]] = 0
        total += low + rest.reshape(tau.shape)
    found = merged("lors", [jnp.asarray(x, jnp.float32) for x in given])
    np.testing.assert_allclose(found, 0.2 * total, atol=1e-6)


def test_ranks_and_densities_are_as_asked():
    (delta,) = deltas(1)
    low = methods.low_rank(delta, keys(1)[0], rank=3)
    assert np.linalg.matrix_rank(low, tol=1e-4) == 3
    both = methods.low_rank_plus_sparse(delta, keys(1)[0], rank=3, density=0.2)
    assert np.count_nonzero(np.abs(both - low) > 1e-6) == int(ROWS * COLUMNS * 0.2)
    assert np.count_nonzero(methods.magnitude(delta, keys(1)[0], density=0.37)) == int(ROWS * COLUMNS * 0.37)
    crumbs = np.asarray(methods.breadcrumbs(delta, keys(1)[0], density=0.5, outliers=0.1))
    assert np.count_nonzero(crumbs) == 120
    assert np.abs(crumbs).max() <= np.sort(np.abs(delta).ravel())[-25]


@pytest.mark.parametrize("keep", [0, 1, 5, 99, 100])
@pytest.mark.parametrize("kind", ["distinct", "ties", "zeros"])
def test_largest_keeps_exactly_so_many(keep, kind):
    x = np.abs(np.random.default_rng(0).normal(size=100)).astype(np.float32)
    x = {"distinct": x, "ties": np.round(x), "zeros": np.zeros(100, np.float32)}[kind]
    kept = np.asarray(methods.largest(jnp.asarray(x.reshape(10, 10)), keep)).ravel()
    assert kept.sum() == keep
    if 0 < keep < 100:
        assert x[kept].min() >= x[~kept].max()


def test_dropping_at_random_keeps_the_expectation():
    delta = jnp.ones((200, 500))
    for name, options in (("dare", {"density": 0.1}), ("della", {"density": 0.3, "spread": 0.2})):
        kept = METHODS[name].having(**options).sparsify(delta, keys(1)[0])
        assert abs(float(kept.mean()) - 1) < 0.03, name
    big = jnp.where(jnp.arange(500) < 250, 3.0, 1.0) * jnp.ones((200, 1))
    kept = np.asarray(methods.della(big, keys(1)[0], density=0.3, spread=0.2)) != 0
    assert kept[:, :250].mean() > kept[:, 250:].mean() + 0.05


@pytest.mark.parametrize(("name", "options"), [("dare", {"density": 0.3}), ("della", {"density": 0.5, "spread": 0.4})])
def test_over_many_seeds_what_is_dropped_is_made_up_for(name, options):
    """Each entry's mean is the plain delta, within five standard errors: delta^2 (1 / chance - 1) is its variance."""
    (delta,), number = deltas(1), 4000
    step = METHODS[name].having(**options).sparsify
    found = np.asarray(jax.vmap(lambda key: step(delta, key))(jax.random.split(jax.random.key(0), number))).mean(0)
    least = options["density"] - options.get("spread", 0) / 2
    assert np.all(np.abs(found - delta) <= 5 * np.abs(delta) * np.sqrt((1 / least - 1) / number))


def test_della_ranks_along_the_last_dim():
    """Of each row of an IxO matrix the outputs; of a Hugging Face folder's OxI the inputs."""
    big = jnp.where(jnp.arange(400) < 200, 3.0, 1.0)
    for x, side in ((jnp.ones((300, 1)) * big, np.s_[:, :200]), ((jnp.ones((300, 1)) * big).T, np.s_[:200])):
        kept = np.asarray(methods.della(x, keys(1)[0], density=0.5, spread=0.8)) != 0
        assert (kept[side].mean() > 0.65) == (x.shape[-1] == 400), side


def test_the_randomised_svd_is_within_its_bound():
    """Of spectra that fall fast and slowly, against the least possible error times Halko et al.'s factor."""
    rng = np.random.default_rng(0)
    for decay in (0.5, 0.1, 0.01):
        u, v = (np.linalg.qr(rng.normal(size=(80, 60)))[0] for _ in range(2))
        s = np.exp(-decay * np.arange(60))
        x = (u * s) @ v.T
        u7, s7, vt7 = methods.svd(jnp.asarray(x, jnp.float32), 7, keys(1)[0], "randomised")
        error = np.linalg.norm(x - (np.asarray(u7) * np.asarray(s7)) @ np.asarray(vt7))
        assert error <= np.sqrt(1 + 7 / 9) * np.linalg.norm(s[7:]) + 1e-5
        assert error <= 1.02 * np.linalg.norm(s[7:]) + 1e-5  # and with its two turns far nearer


def test_ties_by_hand():
    given = [jnp.array([[4.0, -3.0, 0.1]]), jnp.array([[2.0, 5.0, -0.2]]), jnp.array([[-1.0, 1.0, 3.0]])]
    found = merged("ties", given, density=0.67)  # two of three entries each
    np.testing.assert_allclose(found, [[3.0, 5.0, 3.0]])  # -1 and -3 lose the vote, +1 is trimmed


SIGNED = [name for name in METHODS if METHODS[name].combine is methods.disjoint_mean]


@pytest.mark.parametrize("name", SIGNED)
def test_a_negative_weight_takes_away(name):
    """The delta of a model with a negative weight is voted on and averaged as its negation with the weight's size: no
    entry is larger than the largest that was given."""
    given, weights = deltas(), [1.0, -0.999, 0.5]
    whole = {"density": 1.0, "spread": 0.0} if name == "della" else {"density": 1.0}
    turned = [jnp.sign(w) * x for w, x in zip(weights, given, strict=True)]
    found = merged(name, given, weights=weights, **whole)
    np.testing.assert_allclose(found, merged(name, turned, weights=np.abs(weights), **whole), atol=1e-6)
    assert np.abs(found).max() <= max(np.abs(x).max() for x in given) + 1e-6


def test_consensus_drops_what_matters_to_one():
    given = [jnp.array([[1.0, 1.0]]), jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.0]])]
    np.testing.assert_allclose(merged("consensus", given, scale=1.0), [[3.0, 0.0]])


def test_slerp_keeps_the_length():
    base = jnp.zeros((1, 2))
    found = methods.slerp(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]), jnp.array([1.0, 1.0]), base)
    np.testing.assert_allclose(found, [[2**-0.5, 2**-0.5]], atol=1e-6)
    with pytest.raises(ValueError, match="slerp goes from one model to one other"):
        merged("slerp", deltas(3))


def test_orthogonal_and_isotropic_singular_values():
    one = deltas(1)[0]
    np.testing.assert_allclose(methods.orthogonalised(one[None], jnp.ones(1), one), one, atol=1e-5)
    even = np.linalg.svd(np.asarray(methods.isotropic(jnp.stack(deltas()), jnp.ones(3), one)))[1]
    np.testing.assert_allclose(even, even.mean(), rtol=1e-5)


def test_fisher_and_regmean_follow_their_statistics():
    given = jnp.stack(deltas(2))
    certain = [jnp.ones((ROWS, COLUMNS)), jnp.zeros((ROWS, COLUMNS))]
    np.testing.assert_allclose(methods.fisher(given, jnp.ones(2), given[0], certain), given[0])
    inputs = [np.random.default_rng(i).normal(size=(50, ROWS)) * (np.arange(ROWS) % 2 == i) for i in range(2)]
    grams = [jnp.asarray(x.T @ x, jnp.float32) for x in inputs]
    found = methods.regmean(given, jnp.ones(2), given[0], grams, off_diagonal=1.0)
    for x, delta in zip(inputs, given, strict=True):  # what each model reads it answers as that model
        np.testing.assert_allclose(x @ np.asarray(found), x @ np.asarray(delta), atol=2e-3)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("nonsense", {}, "unknown merging method"),
        ("lors", {"depth": 1}, "no option 'depth'; it has scale, rank, density, svd_kind"),
        ("lors", {"density": 1.5}, "between 0 and 1"),
        ("lors", {"rank": 2.5}, "whole number"),
        ("lors", {"rank": float("inf")}, "must be a number"),
        ("lors", {"rank": 10**400}, "must be a number"),
        ("lors", {"scale": 10**400}, "must be a number"),
        ("lors", {"scale": float("nan")}, "must be a number"),
        ("lors", {"svd_kind": "fast"}, "known: exact, randomised"),
    ],
)
def test_wrong_options_are_refused(name, options, said):
    with pytest.raises(ValueError, match=said):
        method(name, options)


LIVE = importlib.util.find_spec("torch") and importlib.util.find_spec("peft")


@pytest.mark.skipif(not LIVE, reason="needs torch and PEFT: pip install torch peft")
@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "magnitude"])
def test_it_is_what_peft_computes(name):
    import torch
    from peft.utils import merge_utils

    given = deltas(3)
    theirs, weights = [torch.tensor(np.asarray(x)) for x in given], torch.tensor([1.0, 1.0, 1.0])
    if name == "ties":
        said = merge_utils.ties(theirs, weights, density=0.2, majority_sign_method="total")
        ours = merged(name, given, density=0.2)
    elif name == "magnitude":
        said, ours = merge_utils.magnitude_prune(theirs, weights, density=0.2), merged(name, given, scale=1.0)
    else:
        said, ours = merge_utils.task_arithmetic(theirs, weights), merged(name, given, scale=1.0)
    np.testing.assert_allclose(ours, said.numpy(), atol=1e-6)


KIT = shutil.which("mergekit-yaml")
KITS = {  # method -> how many models, our options, and what the kit calls both
    "average": (3, {}, {"merge_method": "linear"}),
    "task_arithmetic": (3, {"scale": 0.5}, {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}}),
    "ties": (3, {"density": 0.2}, {"merge_method": "ties", "parameters": {"density": 0.2, "normalize": True}}),
    # Of what drops at random all: what is kept is by other numbers in each.
    "dare": (3, {"density": 1.0, "scale": 1.0}, {"merge_method": "dare_linear", "parameters": {"density": 1.0}}),
    "dare_ties": (
        3,
        {"density": 1.0},
        {"merge_method": "dare_ties", "parameters": {"density": 1.0, "normalize": True}},
    ),
    "della": (
        3,
        {"density": 1.0, "spread": 0.0},
        {"merge_method": "della", "parameters": {"density": 1.0, "epsilon": 1e-6, "normalize": True}},
    ),
    "breadcrumbs": (
        3,
        {"scale": 0.25},
        {"merge_method": "breadcrumbs", "parameters": {"density": 0.14, "gamma": 0.01, "lambda": 0.25}},
    ),
    "slerp": (2, {}, {"merge_method": "slerp", "parameters": {"t": 0.5}}),
}


@pytest.mark.skipif(not KIT, reason="needs mergekit-yaml in PATH: pip install mergekit, in an environment of its own")
@pytest.mark.parametrize("name", KITS)
def test_folders_merge_as_mergekit_merges_them(name, tmp_path):
    count, options, theirs = KITS[name]
    folders = [tmp_path / f"model{i}" for i in range(count + 1)]
    for i, folder in enumerate(folders):
        hf_models.write(folder, "llama")
        table, noise = load_file(folder / "model.safetensors"), np.random.default_rng(i)
        for key, x in table.items() if i else ():
            table[key] = x + 0.05 * noise.standard_normal(x.shape, np.float32)
        save_file(table, folder / "model.safetensors", metadata={"format": "pt"})
    base, *models = map(str, folders)
    merge.merge(str(tmp_path / "ours"), base=base, models=models, method=name, options=options, progress=False)
    asked = {"models": [{"model": m, "parameters": {"weight": 1.0}} for m in models], "dtype": "float32", **theirs}
    asked |= {"slerp": {"base_model": models[0]}, "average": {}}.get(name, {"base_model": base})
    asked["parameters"] = {"normalize": name == "average", **theirs.get("parameters", {})}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asked))
    subprocess.run([str(KIT), tmp_path / "recipe.yaml", tmp_path / "theirs"], check=True, capture_output=True)
    ours, said = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == said.keys()
    for key, x in said.items():
        np.testing.assert_allclose(ours[key], x, atol=1e-6, err_msg=key)


# --- checkpoints ------------------------------------------------------------------------------------------------------

FAMILIES = {"asr": 1, "ocr": 2, "mt": 3, "gec": 4}


@pytest.fixture(scope="module")
def tokeniser() -> Tokeniser:
    return Tokeniser.load(main.shipped("tokeniser.model"))


def written(
    path, tokeniser, *, shift: int = 0, ffn=tiny.dense, families=FAMILIES, change=None, dtype=None, make=None
) -> str:
    """A tiny corrector (or what `make` makes), `shift` telling tuned ones from their base (0)."""
    make = make or tiny.configured(ffn)
    model = jax.jit(lambda: make(vocab=tokeniser.vocab_size, rngs=Rngs(params=0)))()
    table = {n: np.asarray(x) for n, x in tree.flatten(model).items()}
    if shift:
        noise = np.random.default_rng(shift)
        table = {n: x + 0.1 * x.std() * noise.standard_normal(x.shape, x.dtype) for n, x in table.items()}
    meta = {
        "model": describe.describe(model),
        "families": families,
        "layout": "aligned",
        "length": 64,
        "tokeniser": tokeniser.sha256,
        "tokeniser_model": base64.b64encode(tokeniser.model).decode(),
    }
    table, meta = change(table, meta) if change else (table, meta)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_safetensors(path, table, json.loads(json.dumps(meta)), dtype=dtype)
    return str(path)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tokeniser) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: written(folder / f"{name}.safetensors", tokeniser, shift=i) for i, name in enumerate(["base", *"abc"])
    }


def merging(tuned, output, names="abc", **how) -> dict:
    table, _ = checkpoint.read_safetensors(tuned["base"])
    merge.merge(str(output), base=tuned["base"], models=[tuned[n] for n in names], progress=False, **how)
    made, _ = checkpoint.read_safetensors(output)
    assert made.keys() == table.keys()
    return made


def tables(tuned, names="abc") -> list[dict]:
    return [checkpoint.read_safetensors(tuned[name])[0] for name in names]


def test_a_checkpoint_is_merged_matrix_by_matrix(tuned, tmp_path):
    made = merging(tuned, tmp_path / "m.safetensors", method="lors", options={"rank": 2})
    base, *parts = tables(tuned, ("base", *"abc"))
    for name in base:
        given = [p[name] - base[name] for p in parts]
        if name.startswith("blocks/attention/") or name.startswith("blocks/ffn/"):
            expected = [merged("lors", [g[i] for g in given], rank=2) for i in range(2)]
        else:  # embedding, norms and biases: the whole delta
            expected = 0.2 * sum(given)
        np.testing.assert_allclose(
            made[name] - base[name],
            jnp.stack(expected) if isinstance(expected, list) else expected,
            atol=2e-6,
            err_msg=name,
        )
    pipeline = Pipeline.load(tmp_path / "m.safetensors", batch_size=4)
    assert pipeline.families == FAMILIES


@pytest.mark.parametrize("name", ["average", "dare_ties", "consensus", "lors", "slerp"])
def test_one_device_in_parts_and_eight_side_by_side_merge_alike(name, tuned, tmp_path, monkeypatch):
    many = merging(tuned, tmp_path / "eight.safetensors", "ab", method=name)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(merge, "BLOCK", 1000)
    one = merging(tuned, tmp_path / "one.safetensors", "ab", method=name)
    for path in one:
        np.testing.assert_allclose(one[path], many[path], atol=1e-6, err_msg=path)


def test_another_scale_compiles_nothing_anew(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    made = [merging(tuned, tmp_path / f"{s}.safetensors", method="ties", options={"scale": s}) for s in (0.5, 1.0)]
    kept = merge._program.cache_info().misses
    made.append(merging(tuned, tmp_path / "0.safetensors", method="ties", options={"scale": 0.0}))
    assert merge._program.cache_info().misses == kept
    for path in made[0]:
        half = (made[1][path] + made[2][path]) / 2
        np.testing.assert_allclose(made[0][path], half, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", ["dare", "della"])
def test_random_methods_follow_the_seed_alone(tuned, tmp_path, name):
    first, again, other = (
        merging(tuned, tmp_path / f"{i}.safetensors", names, method=name, seed=seed)
        for i, (names, seed) in enumerate([("abc", 1), ("cab", 1), ("abc", 2)])
    )
    path = "blocks/ffn/gate"
    np.testing.assert_allclose(first[path], again[path], atol=1e-6)
    assert np.abs(first[path] - other[path]).max() > 1e-3


def test_stages_rules_and_weights(tuned, tmp_path):
    base, a, b, c = tables(tuned, ("base", *"abc"))
    models = [
        {"path": tuned["a"], "weight": [1.0, 0.0]},
        {
            "merge": {"method": "task_arithmetic", "options": {"scale": 0.5}, "models": [tuned["b"], tuned["c"]]},
            "weight": [{"match": "attention", "weight": 2.0}, {"match": "ffn", "weight": 1.0}],
        },
    ]
    rules = [{"match": "^embedding$", "method": "base"}, {"match": "norm", "method": "average"}]
    how = {"method": "task_arithmetic", "options": {"scale": 1.0}, "models": models, "rules": rules}
    card = merge.merge(str(tmp_path / "m.safetensors"), base=tuned["base"], progress=False, **how)
    made, _ = checkpoint.read_safetensors(tmp_path / "m.safetensors")
    stage = lambda name: 0.5 * (b[name] - base[name] + c[name] - base[name])  # noqa: E731
    depth = jnp.array([1.0, 0.0])[:, None, None]
    for name, factor in (("blocks/attention/q", 2.0), ("blocks/ffn/up", 1.0)):
        expected = base[name] + depth * (a[name] - base[name]) + factor * stage(name)
        np.testing.assert_allclose(made[name], expected, atol=1e-6)
    np.testing.assert_array_equal(made["embedding"], base["embedding"])
    assert [len(s["models"]) for s in card["stages"]] == [2, 2]
    by_method = {tuple(g["paths"]): g for g in card["stages"][0]["arrays"]}
    assert any(g["method"] == "base" and "embedding" in paths for paths, g in by_method.items())
    assert any(g["weights"] == [[1.0, 2.0], [0.0, 2.0]] for g in by_method.values())


@pytest.mark.parametrize("name", ["average", "slerp", "fisher", "tsv"])
def test_a_mean_of_negative_weights_is_refused(name, tuned, tmp_path):
    """Also that of what a method is not for, as in tsv. What is summed may be taken away."""
    models = [tuned["a"], {"path": tuned["b"], "weight": -0.999}]
    if name == "fisher":
        checkpoint.write_safetensors(tmp_path / "f", {}, {"statistics": "fisher"})
        models = [{"path": tuned[n], "weight": w, "statistics": str(tmp_path / "f")} for n, w in (("a", 1), ("b", -2))]
    with pytest.raises(MergeError, match=r"b.safetensors: its weight is -.* a mean, of weights >= 0"):
        merge.merge(str(tmp_path / "m"), base=tuned["base"], models=models, method=name, progress=False)
    base, a = tables(tuned, ("base", "a"))
    away = {"models": [{"path": tuned["a"], "weight": -1.0}], "method": "task_arithmetic"}
    merge.merge(str(tmp_path / "m"), base=tuned["base"], **away, progress=False)
    made, _ = checkpoint.read_safetensors(tmp_path / "m")
    np.testing.assert_allclose(made["embedding"], 2 * base["embedding"] - a["embedding"], atol=1e-6)


def test_the_card_says_what_was_done(tuned, tmp_path):
    merging(tuned, tmp_path / "m.safetensors", "ab", options={"rank": 3})
    card = json.loads((tmp_path / "m.safetensors.card.json").read_text())
    assert card["recipe"]["options"] == {"rank": 3}
    assert card["stages"][0]["methods"]["lors"]["options"] == {
        "scale": 0.2,
        "rank": 3,
        "svd_kind": "exact",
        "density": 0.2,
    }
    assert "2502.17380" in card["stages"][0]["methods"]["lors"]["paper"]
    hashes = [hashlib.sha256(Path(tuned[n]).read_bytes()).hexdigest() for n in "ab"]
    assert [m["sha256"] for m in card["models"]] == hashes
    assert card["output"] == hashlib.sha256((tmp_path / "m.safetensors").read_bytes()).hexdigest()
    found = [p for group in card["stages"][0]["arrays"] for p in group["paths"]]
    assert sorted(found) == sorted(tables(tuned, ["base"])[0])


def test_models_that_differ_in_how_they_run_alone_are_alike(tmp_path, tokeniser):
    """Such as those of an older version, whose descriptions say nothing of a newer setting."""

    def older(table, meta):
        described = json.loads(json.dumps(meta["model"]))
        del described["args"]["attention"]["args"]["causal"]
        return table, meta | {"model": described | {"args": described["args"] | {"unroll": 2, "remat": "dots"}}}

    base = written(tmp_path / "base", tokeniser, change=older)
    merge.merge(str(tmp_path / "m"), base=base, models=[written(tmp_path / "a", tokeniser, shift=1)], progress=False)
    assert json.loads((tmp_path / "m.card.json").read_text())["models"]


def test_families_of_models_tuned_apart_are_united(tmp_path, tokeniser):
    paths = {"base": written(tmp_path / "base.safetensors", tokeniser, families={})}
    for i, name in enumerate(("asr", "ocr"), 1):
        paths[name] = written(tmp_path / f"{name}.safetensors", tokeniser, shift=i, families={name: FAMILIES[name]})
    merging(paths, tmp_path / "m.safetensors", ("asr", "ocr"))
    assert checkpoint.Source(tmp_path / "m.safetensors").meta["families"] == {"asr": 1, "ocr": 2}


@pytest.mark.parametrize(("others", "after"), [(["ocr"], ["gec", "asr", "ocr"]), (None, None)])
def test_a_merge_was_trained_on_what_its_models_were_where_all_remember(tmp_path, tokeniser, others, after):
    paths = {}
    for i, (name, trained) in enumerate({"base": ["gec"], "a": ["gec", "asr"], "b": others}.items()):
        change = lambda t, m, trained=trained: (t, m | ({"trained": trained} if trained else {}))  # noqa: E731
        paths[name] = written(tmp_path / f"{name}.safetensors", tokeniser, shift=i, change=change)
    merging(paths, tmp_path / "m.safetensors", ("a", "b"))
    assert checkpoint.Source(tmp_path / "m.safetensors").meta.get("trained") == after


def test_nothing_is_rounded_further_than_the_models(tmp_path, tokeniser):
    paths = {n: written(tmp_path / n, tokeniser, shift=i, dtype="bfloat16") for i, n in enumerate(["base", "a"])}
    merge.merge(str(tmp_path / "m"), base=paths["base"], models=[paths["a"]], method="average", progress=False)
    assert {str(d) for d in checkpoint.Source(tmp_path / "m").dtypes.values()} == {"bfloat16"}
    tuned = written(tmp_path / "b", tokeniser, shift=2)
    merge.merge(str(tmp_path / "n"), base=paths["base"], models=[tuned], method="average", progress=False)
    assert {str(d) for d in checkpoint.Source(tmp_path / "n").dtypes.values()} == {"float32"}
    made, a = (checkpoint.read_safetensors(p)[0] for p in (tmp_path / "m", paths["a"]))
    for name in a:
        np.testing.assert_allclose(made[name], a[name], atol=1e-6)


def test_hugging_face_folders_merge_to_one(tmp_path):
    hf_models.write(tmp_path / "base", "mixtral")
    for i, name in enumerate("ab"):
        shutil.copytree(tmp_path / "base", tmp_path / name)
        table = load_file(tmp_path / name / "model.safetensors")
        noise = np.random.default_rng(i)
        save_file(
            {k: x + 0.01 * noise.normal(size=x.shape).astype(x.dtype) for k, x in table.items()},
            tmp_path / name / "model.safetensors",
        )
    output = tmp_path / "out"
    merge.merge(
        str(output),
        base=str(tmp_path / "base"),
        models=[str(tmp_path / n) for n in "ab"],
        method="average",
        progress=False,
    )
    made, a, b = (load_file(f / "model.safetensors") for f in (output, tmp_path / "a", tmp_path / "b"))
    for name in a:
        np.testing.assert_allclose(made[name], (a[name] + b[name]) / 2, atol=1e-6)
    assert (output / "config.json").exists() and (output / "tokenizer.json").exists()
    assert (tmp_path / "out.card.json").exists()
    cli.entry(["import", "--model", str(output), "--output", str(tmp_path / "ours.safetensors")])


def test_depth_is_that_of_the_whole_stack(tmp_path, tokeniser):
    """Dense layers between layers of experts lie in a stack of their own."""
    both = {"ffn": tiny.moe(), "dense": tiny.dense}
    corrector = open_model(written(tmp_path / "c", tokeniser, make=tiny.configured(**both, layers=3, dense_layers=[0])))
    make = partial(Translator, d=16, encoder_layers=3, decoder_layers=2, every=2, **both)
    translator = open_model(written(tmp_path / "t", tokeniser, make=make))
    for model, name, depths in (
        (corrector, "blocks/attention/q", [0.5, 1]),
        (corrector, "dense_blocks/attention/q", [0]),
        (translator, "encoder/blocks/attention/q", [0, 1]),
        (translator, "encoder/dense_blocks/attention/q", [0.5]),
        (translator, "decoder/blocks/cross/q", [1]),
        (translator, "embedding", [None]),
    ):
        assert [site.depth for site in model.sites(name)] == depths, name
    assert re.search(methods.LAYERS, "decoder/blocks/cross/q")  # its authors have those too


TURN = jnp.array([2, 0, 3, 1])


def permuted(table, meta):
    turned = {n: x[:, TURN] if "/experts/" in n else x[..., TURN] if "/router/" in n else x for n, x in table.items()}
    return turned, meta


def test_statistics_follow_the_order_of_experts(tmp_path, tokeniser):
    name = "blocks/ffn/experts/up"

    def tuned(table, meta):
        table, meta = permuted(table, meta)
        return table | {name: table[name] + 0.01}, meta

    ffn = tiny.moe()
    base = written(tmp_path / "base", tokeniser, ffn=ffn)
    models = {"a": base, "b": written(tmp_path / "b", tokeniser, ffn=ffn, change=tuned)}
    shape = checkpoint.Source(base).shapes[name]
    about = {"a": np.ones(shape), "b": np.arange(4.0)[:, None, None] * np.ones(shape)}
    for model, x in about.items():
        table = {name: x.astype(np.float32)}
        checkpoint.write_safetensors(tmp_path / f"{model}.fisher", table, {"statistics": "fisher"})
    parts = [{"path": path, "statistics": str(tmp_path / f"{n}.fisher")} for n, path in models.items()]
    how = {"method": "fisher", "align": True, "progress": False}
    merge.merge(str(tmp_path / "m"), base=base, models=parts, **how)
    delta = checkpoint.Source(tmp_path / "m")[name] - checkpoint.Source(base)[name]
    place = np.argsort(TURN)  # where each of the base's experts lies in b
    expected = np.broadcast_to((0.01 * place / (1 + place))[:, None, None], shape)
    np.testing.assert_allclose(delta, expected, atol=1e-6)


@pytest.mark.parametrize(
    "router",
    [
        task_routers.ByTask,
        partial(task_routers.TaskMapped, inference="forced"),
        partial(task_routers.Subset, experts=[[0, 1], [0, 1], [2, 3]], k=1),
    ],
)
def test_experts_that_a_task_knows_by_their_places_stay(router, tmp_path, tokeniser):
    ffn = tiny.moe(router)
    paths = [written(tmp_path / n, tokeniser, ffn=ffn, change=c) for n, c in (("base", None), ("a", permuted))]
    assert align.orders(*map(open_model, paths)) == {}


def test_experts_are_put_in_order_first(tmp_path, tokeniser):
    """A model whose experts were permuted is the same model: its mean with the other must be that model."""
    ffn = tiny.moe()
    base = written(tmp_path / "base", tokeniser, ffn=ffn)
    paths = {"base": base, "a": base, "b": written(tmp_path / "b", tokeniser, ffn=ffn, change=permuted)}
    aligned = merging(paths, tmp_path / "aligned", "ab", method="average", align=True)
    blind = merging(paths, tmp_path / "blind", "ab", method="average")
    table, _ = checkpoint.read_safetensors(base)
    for name in table:
        np.testing.assert_allclose(aligned[name], table[name], atol=1e-6, err_msg=name)
    assert np.abs(blind["blocks/ffn/experts/up"] - table["blocks/ffn/experts/up"]).max() > 0.1


def test_shuffled_experts_are_the_same_model_and_all_of_them_move(tmp_path, tokeniser):
    path = Path(written(tmp_path / "mixture.safetensors", tokeniser, ffn=tiny.moe()))
    other = merging_align.shuffled(path)
    assert merging_align.moved(path, other) == 1.0 and merging_align.moved(path, path) == 0.0
    record = Record(line=1, hypotheses=("teh cat",), sources=(), task=None, reference=None, raw="", number=1)
    said = [Pipeline.load(p).score([record], ["the cat"])[0].logprobs for p in (path, other)]
    np.testing.assert_allclose(*said, rtol=1e-4)


def folders(tmp_path, base: dict, tuned: dict, config=None) -> dict[str, str]:
    """Two Hugging Face folders of tables changed as told."""
    for name, change in (("base", base), ("a", tuned)):
        hf_models.write(tmp_path / name, "llama")
        file = tmp_path / name / "model.safetensors"
        save_file(
            {n: change.get("all", lambda x: x)(x) for n, x in load_file(file).items()} | change.get("more", {}), file
        )
    if config:
        about = json.loads((tmp_path / "a" / "config.json").read_text()) | config
        (tmp_path / "a" / "config.json").write_text(json.dumps(about))
    return {"base": str(tmp_path / "base"), "models": [str(tmp_path / "a")]}


def test_whole_numbers_stay_as_they_are(tmp_path):
    more = {"more": {"model.positions": np.arange(5) + (1 << 40)}}
    merge.merge(str(tmp_path / "m"), **folders(tmp_path, more, more), method="average", progress=False)
    made = load_file(tmp_path / "m" / "model.safetensors")["model.positions"]
    np.testing.assert_array_equal(made, more["more"]["model.positions"])


@pytest.mark.parametrize(
    ("factor", "config", "said"),
    [
        (1e4, None, "numbers beyond float16"),
        (1.0, {"rms_norm_eps": 1e-3}, r"different 'rms_norm_eps' \(config.json\)"),
        (1.0, {"quantization_config": {"bits": 4}}, "is quantised, which cannot be merged"),
    ],
)
def test_folders_that_cannot_be_merged(factor, config, said, tmp_path):
    half = {"all": lambda x: x.astype(np.float16)}
    much = {"all": lambda x: (factor * x).astype(np.float16)}
    with pytest.raises(MergeError, match=said):
        how = {"method": "task_arithmetic", "options": {"scale": 100.0}, "progress": False}
        merge.merge(str(tmp_path / "m"), **folders(tmp_path, half, much, config), **how)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "a"}


def test_a_folder_without_a_tokeniser_has_the_bases_own(tmp_path):
    given = folders(tmp_path, {}, {"all": lambda x: x + 1e-3})
    theirs = tmp_path / "a" / "tokenizer.json"
    about = json.loads(theirs.read_text())
    about["model"]["vocab"] |= {"another": len(about["model"]["vocab"])}
    theirs.write_text(json.dumps(about))
    with pytest.raises(MergeError, match=r"different tokenisers \(tokenizer.json\)"):
        merge.merge(str(tmp_path / "m"), **given, method="average", progress=False)
    theirs.unlink()
    merge.merge(str(tmp_path / "m"), **given, method="average", progress=False)
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()


def test_folders_that_are_written_otherwise_and_mean_the_same_merge(tmp_path):
    given = folders(tmp_path, {}, {"all": lambda x: x + 1e-3}, {"eos_token_id": 77, "pretraining_tp": 1})
    for name in ("tokenizer.json", "config.json"):
        file = tmp_path / "a" / name
        file.write_text(json.dumps(json.loads(file.read_text()), indent=7))
    (tmp_path / "a" / "vocab.txt").write_text("what some tools write besides")
    merge.merge(str(tmp_path / "m"), **given, method="average", progress=False)


@pytest.mark.parametrize(
    ("name", "base", "tuned", "alike"),
    [
        ("forced_decoder_ids", [[1, 50259], [2, 50359]], None, True),
        ("begin_suppress_tokens", [220, 50257], [], True),
        ("pad_token_id", 50257, 50256, True),
        ("max_length", 448, 225, True),
        ("attention_dropout", 0.0, 0.1, True),
        ("decoder_layerdrop", 0.0, 0.05, True),
        ("mask_time_prob", 0.05, 0.0, True),
        ("id2label", {"0": "A"}, {"0": "LABEL_0"}, True),
        ("text_config", {"torch_dtype": "float16", "d": 4}, {"torch_dtype": "float32", "d": 4}, True),
        ("text_config", {"d": 4}, {"d": 5}, False),
        ("decoder_attention_heads", 4, 2, False),
        ("max_target_positions", 448, 225, False),
        ("activation_function", "gelu", "relu", False),
    ],
)
def test_folders_of_unknown_architectures_are_compared_by_what_makes_their_numbers(name, base, tuned, alike, tmp_path):
    """Not by how they write texts, name labels or were trained, which fine-tuning changes."""
    given = folders(tmp_path, {}, {"all": lambda x: x + 1e-3})
    for model, value in (("base", base), ("a", tuned)):
        file = tmp_path / model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "whisper", name: value}))
    first, other = map(open_model, (given["base"], *given["models"]))
    assert first.differs(other) == (None if alike else f"'{name}' (config.json)")
    if alike:
        merge.merge(str(tmp_path / "m"), **given, method="average", progress=False)


def test_whole_numbers_of_other_values_are_refused(tmp_path):
    tables = [{"more": {"model.qweight": np.arange(5) + i}} for i in range(2)]
    with pytest.raises(MergeError, match="take the folders of the unquantised models"):
        merge.merge(str(tmp_path / "m"), **folders(tmp_path, *tables), method="average", progress=False)
    assert not (tmp_path / "m").exists()


def test_what_a_rule_leaves_is_the_base_to_the_bit(tmp_path):
    """In its own precision, whole numbers too, whatever the models have there."""
    fine = {"model.scale": np.pi + np.arange(3.0), "model.positions": np.arange(5)}
    given = folders(tmp_path, {"more": fine}, {"more": {name: 2 * x for name, x in fine.items()}})
    rules = [{"match": "scale|positions", "method": "base"}]
    merge.merge(str(tmp_path / "m"), **given, method="average", rules=rules, progress=False)
    made = load_file(tmp_path / "m" / "model.safetensors")
    for name, x in fine.items():
        assert made[name].dtype == x.dtype
        np.testing.assert_array_equal(made[name], x)


def test_a_merge_holds_a_few_arrays_and_never_a_model(tmp_path, monkeypatch):
    """On one device at its peak below three times the largest array times the models (of what NumPy allocates; the
    whole process is measured by benchmarks.merge_speed)."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    number, models = 12, 3
    tables = [{f"model.{n}.weight": np.full((1024, 768), 1 + i, np.float32) for n in range(number)} for i in range(2)]
    given = folders(tmp_path, {"more": tables[0]}, {"more": tables[1]})
    given["models"] = [str(shutil.copytree(tmp_path / "a", tmp_path / f"a{i}")) for i in range(models)]
    largest, whole = tables[0]["model.0.weight"].nbytes, sum(x.nbytes for x in tables[0].values())
    run = {"method": "task_arithmetic", "progress": False}
    merge.merge(str(tmp_path / "first"), **given, **run)  # compiles
    tracemalloc.start()
    merge.merge(str(tmp_path / "second"), **given, **run)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * largest * models < whole


def test_a_file_is_no_place_for_a_folder(tuned, tmp_path):
    (tmp_path / "m").touch()
    given = folders(tmp_path, {}, {})
    with pytest.raises(MergeError, match="a folder is to be written"):
        merge.merge(str(tmp_path / "m"), **given, overwrite=True, progress=False)
    with pytest.raises(MergeError, match="import or export one of them"):
        merge.merge(str(tmp_path / "n"), base=tuned["base"], models=given["models"], progress=False)


def test_dense_models_become_experts(tuned, tmp_path):
    models = {"asr": tuned["a"], "ocr": tuned["b"]}
    meta = experts.to_experts(str(tmp_path / "moe.safetensors"), models=models)
    made, _ = checkpoint.read_safetensors(tmp_path / "moe.safetensors")
    for i, path in enumerate(models.values()):
        own, _ = checkpoint.read_safetensors(path)
        np.testing.assert_array_equal(made["blocks/ffn/experts/up"][:, i], own["blocks/ffn/up"])
    model = describe.abstract(meta["model"])
    assert model.ffn.router.experts[:4] == ((), (0,), (1,), (0,))
    Pipeline.load(tmp_path / "moe.safetensors", task="ocr")


def test_the_card_of_experts_says_what_became_of_which_arrays(tuned, tmp_path):
    output, models = tmp_path / "moe.safetensors", {"asr": tuned["a"], "ocr": tuned["b"]}
    merge.card_path(str(output)).write_text("of a merge before")
    with pytest.raises(MergeError, match="is there already"):
        experts.to_experts(str(output), models=models)
    experts.to_experts(str(output), models=models, router="TaskMapped", k=2, overwrite=True)
    card = json.loads(merge.card_path(str(output)).read_text())
    assert card["recipe"] == {"experts": models, "router": "TaskMapped", "k": 2}
    hashes = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in models.values()]
    assert [m["sha256"] for m in card["models"]] == hashes
    assert card["output"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert card["router"]["args"] == {"experts": [[], [0], [1], [0], [0]], "k": 2}
    arrays = {group["method"]: group["paths"] for group in card["arrays"]}
    assert arrays["an expert of each model"] == [f"blocks/ffn/experts/{n}" for n in ("down", "gate", "up")]
    assert arrays["fresh, to be trained"] == ["blocks/ffn/router/gate"]
    made, meta = checkpoint.read_safetensors(output)
    assert sorted(path for paths in arrays.values() for path in paths) == sorted(made)
    whole = tree.flatten(describe.configured(meta["model"])(rngs=Rngs(params=0)))
    np.testing.assert_allclose(made["blocks/ffn/router/gate"], whole["blocks/ffn/router/gate"], rtol=1e-6)


def test_experts_of_unrelated_models_are_refused(tuned, tokeniser, tmp_path):
    """What is averaged of them would be of no model."""
    for change, said in (
        (unrelated, r"a cosine of -?0\.\d+ to those of .* take models tuned from one"),
        (nan, "not finite"),
    ):
        bad = written(tmp_path / "bad.safetensors", tokeniser, change=change)
        with pytest.raises(MergeError, match=said):
            experts.to_experts(str(tmp_path / "moe"), models={"asr": tuned["a"], "ocr": bad})
    assert [p.name for p in tmp_path.iterdir()] == ["bad.safetensors"]


def test_experts_are_written_an_array_at_a_time(tokeniser, tmp_path, monkeypatch):
    paths = [written(tmp_path / f"{i}", tokeniser, shift=i, ffn=partial(tiny.dense, hidden=4096)) for i in (1, 2)]
    stream, held = checkpoint.stream_safetensors, []

    def watched(path, shapes, dtypes, parts, metadata):
        def counted():
            for part in parts:
                held.append(sum(x.nbytes for x in jax.live_arrays()))
                yield part

        return stream(path, shapes, dtypes, counted(), metadata)

    monkeypatch.setattr(checkpoint, "stream_safetensors", watched)
    before = sum(x.nbytes for x in jax.live_arrays())
    experts.to_experts(str(tmp_path / "moe"), models=dict(zip(("asr", "ocr"), paths, strict=True)))
    sizes = sorted(x.nbytes for x in checkpoint.read_safetensors(tmp_path / "moe")[0].values())
    assert max(held) - before <= 2.1 * sizes[-1] < sum(sizes) * 0.7


def test_the_command_makes_experts(tuned, tmp_path, capsys):
    output = str(tmp_path / "moe.safetensors")
    command = ["merge", "--experts", f"asr={tuned['a']}", f"ocr={tuned['b']}", "--output", output]
    assert cli.entry(command) == 0
    assert "2 models as the experts of one, asr, ocr" in capsys.readouterr().out
    for change, said in (
        ([], "is there already"),
        (["--overwrite", "--method", "lors"], "there is no --method to it"),
        (["--overwrite", "--experts", "asr"], "is written FAMILY=PATH"),
        (["--overwrite", "--experts", "tts=x"], "x: "),
    ):
        assert cli.entry([*command, *change]) == 2
        assert said in capsys.readouterr().err


# --- statistics and search --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokeniser) -> str:
    folder = tmp_path_factory.mktemp("data") / "valid"
    rng = np.random.default_rng(0)
    examples = [Packable(rng.integers(9, 300, 12).tolist(), [1] * 6 + [2] * 6, 1 + i % 2) for i in range(40)]
    write_prepared(folder, examples, length=32, tokeniser=tokeniser, families=FAMILIES)
    return str(folder)


def test_grams_are_of_the_inputs(tuned, prepared, tmp_path):
    table = statistics.gather(tuned["a"], prepared, "gram", str(tmp_path / "g"), rows=4, batch_size=2, progress=False)
    params, _ = checkpoint.read_safetensors(tuned["a"])
    matrices = {f"blocks/attention/{n}" for n in "qkvo"} | {f"blocks/ffn/{n}" for n in ("gate", "up", "down")}
    assert table.keys() == matrices
    for name, gram in table.items():
        inputs = params[name].shape[-2]
        assert gram.shape == (2, inputs, inputs)
        assert np.linalg.eigvalsh(gram).min() > -1e-5
    np.testing.assert_allclose(table["blocks/ffn/gate"], table["blocks/ffn/up"])  # they read the same
    assert np.abs(table["blocks/attention/q"] - table["blocks/ffn/gate"]).max() > 1e-3


def translators(tmp_path, tokeniser, prepared) -> tuple[list[str], str]:
    make = partial(Translator, d=16, encoder_layers=1, decoder_layers=2, ffn=tiny.dense)
    return [written(tmp_path / f"t{i}", tokeniser, make=make, shift=i) for i in range(3)], prepared


def recognisers(tmp_path, tokeniser, prepared) -> tuple[list[str], str]:
    """And noise that they learn from."""
    sf = pytest.importorskip("soundfile", reason="reading audio needs soundfile (pip install '.[speech]')")
    for i in range(4):
        sf.write(tmp_path / f"{i}.wav", 0.1 * np.random.default_rng(i).standard_normal(4000), 8000)
    lines = [{"audio": f"{i}.wav", "text": f"word{i}"} for i in range(4)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    speech_data.prepare(str(tmp_path / "speech"), manifest=str(tmp_path / "list.jsonl"), rate=8000, mels=20, lengths=1)
    frontend = speech_data.frontend(str(tmp_path / "speech"))
    own = speech_data.Speech.open(tmp_path / "speech").tokeniser
    args = {"d": 16, "layers": 2, "decoder_layers": 1, "heads": 2, "width": 4, "frontend": frontend}
    make = partial(Conformer, **args, ffn=partial(PlainFfn, hidden=24))
    return [written(tmp_path / f"s{i}", own, make=make, shift=i) for i in range(3)], str(tmp_path / "speech")


@pytest.mark.parametrize("kind", [translators, recognisers])
def test_translators_and_recognisers_have_statistics_and_searches(kind, prepared, tokeniser, tmp_path):
    (base, *models), data = kind(tmp_path, tokeniser, prepared)
    params, _ = checkpoint.read_safetensors(models[0])
    for about in statistics.KINDS:
        made = statistics.gather(models[0], data, about, str(tmp_path / about), rows=4, batch_size=2, progress=False)
        assert made and all(np.isfinite(x).all() and np.abs(x).sum() > 0 for n, x in made.items() if "/k" not in n)
        if about == "gram":
            sides = {"encoder", "decoder"} if kind is translators else {"blocks", "left", "right"}
            assert sides <= {name.partition("/")[0] for name in made}
    recipe = {"base": base, "models": models, "method": "lors"}
    found = search.search(
        str(tmp_path / "x"), recipe=recipe, space={"scale": [0.0, 1.0]}, valid=data, rows=4, progress=False
    )
    assert len({row["loss"] for row in found.rows}) == 2
    regmean = [{"path": models[0], "statistics": str(tmp_path / "gram")}] * 2
    merge.merge(str(tmp_path / "r"), base=base, models=regmean, method="regmean", progress=False)
    ours, _ = checkpoint.read_safetensors(tmp_path / "r")
    for name, x in params.items():  # of one model alone, it is that model
        np.testing.assert_allclose(ours[name], x, atol=2e-3, err_msg=name)


def test_a_model_reads_its_own_kind_of_data(tuned, tmp_path, tokeniser, prepared):
    (base, *_), data = recognisers(tmp_path, tokeniser, prepared)
    with pytest.raises(ValueError, match="not format 1 of prepared data"):
        search.Loss(data)(tuned["a"])
    with pytest.raises(ValueError, match="not format 2 of prepared speech"):
        search.Loss(prepared)(base)


def test_fisher_is_the_mean_squared_gradient(tuned, prepared, tmp_path):
    table = statistics.gather(tuned["a"], prepared, "fisher", str(tmp_path / "f"), rows=3, progress=False)
    params, meta = checkpoint.read_safetensors(tuned["a"])
    data, empty = Prepared.open(prepared), describe.abstract(meta["model"])
    batches = [data.batch(i, seed=0, batch_size=1) for i in range(3)]
    grad = jax.jit(jax.grad(lambda p, b: tree.unflatten(empty, p).loss(b)[0]))
    grads = [grad(params, b) for b in batches]
    for name in table:
        np.testing.assert_allclose(table[name], sum(g[name] ** 2 for g in grads) / 3, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("name", "kind"), [("fisher", "fisher"), ("regmean", "gram")])
def test_merging_by_statistics(tuned, prepared, tmp_path, name, kind):
    models = []
    for model in "ab":
        statistics.gather(tuned[model], prepared, kind, str(tmp_path / model), rows=4, progress=False)
        models.append({"path": tuned[model], "statistics": str(tmp_path / model)})
    base, a, b = tables(tuned, ("base", *"ab"))
    merge.merge(str(tmp_path / "m"), base=tuned["base"], models=models, method=name, progress=False)
    made, _ = checkpoint.read_safetensors(tmp_path / "m")
    path = "blocks/ffn/up"
    assert np.abs(made[path] - (a[path] + b[path]) / 2).max() > 1e-4
    assert np.abs(made[path] - base[path]).max() < 1
    with pytest.raises(MergeError, match="make them with moe-jax statistics"):
        merging(tuned, tmp_path / "n", method=name)
    card = json.loads(merge.card_path(str(tmp_path / "m")).read_text())
    assert [one["path"] for one in card["statistics"]] == [str(tmp_path / "a"), str(tmp_path / "b")]
    how = {"base": tuned["base"], "method": name, "progress": False}
    merge.merge(str(tmp_path / "0"), models=models, options={"scale": 0}, **how)
    made, _ = checkpoint.read_safetensors(tmp_path / "0")
    for leaf, x in base.items():
        np.testing.assert_array_equal(made[leaf], x, err_msg=leaf)
    table, meta = checkpoint.read_safetensors(tmp_path / "b")
    wide = {path: jnp.pad(table[path], ((0, 0), (0, 1), (0, 1)))}
    checkpoint.write_safetensors(tmp_path / "wide", wide, meta)
    for file, said in ((models[0]["statistics"], "holds statistics of .* not of"), (str(tmp_path / "wide"), "must be")):
        with pytest.raises(MergeError, match=said):
            merge.merge(str(tmp_path / "n"), models=[models[0], models[1] | {"statistics": file}], **how)


@pytest.mark.parametrize("name", ["tsv", "isotropic", "lors"])
def test_a_scale_of_0_is_the_base_in_every_array(name, tuned, tmp_path):
    made = merging(tuned, tmp_path / "m", method=name, options={"scale": 0.0})
    for path, x in tables(tuned, ["base"])[0].items():
        np.testing.assert_array_equal(made[path], x, err_msg=path)


@pytest.mark.parametrize(
    ("path", "fits"),
    [
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("model.decoder.layers.0.fc1.weight", True),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", True),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", True),
        ("bert.encoder.layer.0.intermediate.dense.weight", True),
        ("layers.0.feed_forward.w1.weight", True),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", False),
        ("model.layers.0.mlp.gate_proj.weight", True),
        ("model.layers.0.mlp.shared_expert.gate_proj.weight", True),
        ("blocks.0.attention.gate.weight", True),
        ("blocks/ffn/gate", True),
        ("blocks/feed/ffn/experts/gate", True),
        ("blocks/ffn/router/gate", False),
        ("model.layers.0.mlp.gate.weight", False),
        ("model.layers.0.mlp.shared_expert_gate.weight", False),
        ("model.layers.0.block_sparse_moe.gate.weight", False),
        ("model.layers.0.feed_forward.router.weight", False),
        ("encoder.block.1.layer.1.mlp.router.classifier.weight", False),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", False),
        ("bert.encoder.layer.0.attention.self.distance_embedding.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_what_lors_takes_for_attention_and_mlp(path, fits):
    assert METHODS["lors"].fits(path, matrix=True) == fits


def test_a_method_of_matrices_that_are_not_there_is_refused(tuned, tmp_path):
    rules = [{"match": "embedding", "method": "lors"}]
    with pytest.raises(MergeError, match="lors is for matrices of attention and MLP"):
        merging(tuned, tmp_path / "m", method="average", rules=rules)


def test_a_search_goes_on_where_it_was_stopped(tuned, prepared, tmp_path):
    how = {"base": tuned["base"], "models": [tuned["a"], tuned["b"]], "method": "task_arithmetic"}
    asked = []

    def loss(path):
        asked.append(path)
        made, _ = checkpoint.read_safetensors(path)
        scale = json.loads(merge.card_path(path).read_text())["recipe"]["options"]["scale"]
        assert made and scale in (0.1, 0.3, 0.5)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return (scale - 0.3) ** 2

    given = dict(recipe=how, space={"scale": [0.1, 0.3, 0.5]}, valid=prepared, loss=loss, progress=False)
    with pytest.raises(KeyboardInterrupt):
        search.search(str(tmp_path / "s"), **given)
    found = search.search(str(tmp_path / "s"), **given)
    assert (found.options, len(found.rows), len(asked)) == ({"scale": 0.3}, 3, 4)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["search.json", "trials.jsonl"]
    with pytest.raises(MergeError, match="holds another search"):
        search.search(str(tmp_path / "s"), **given | {"space": {"scale": [0.2]}})


@pytest.mark.parametrize("theirs", ["trial/mine.txt", "trials.jsonl"])
def test_a_search_takes_no_folder_that_it_did_not_make(theirs, tuned, prepared, tmp_path):
    mine = tmp_path / "s" / theirs
    mine.parent.mkdir(parents=True)
    mine.write_text('{"options": {"scale": 0.1}, "loss": -1}\n')
    how = {"base": tuned["base"], "models": [tuned["a"]], "method": "task_arithmetic"}
    given = dict(recipe=how, space={"scale": [0.1]}, valid=prepared, loss=lambda path: 1.0, progress=False)
    with pytest.raises(MergeError, match=r"s: holds something other than a search"):
        search.search(str(tmp_path / "s"), **given)
    assert [p for p in (tmp_path / "s").rglob("*") if p.is_file()] == [mine]


def test_a_search_whose_first_trial_failed_is_begun_again(tuned, prepared, tokeniser, tmp_path):
    """With a model that was mended, or other values."""
    bad = written(tmp_path / "bad.safetensors", tokeniser, shift=1, change=nan)
    how = {"base": tuned["base"], "models": [bad], "method": "task_arithmetic"}
    given = dict(recipe=how, space={"scale": [0.1]}, valid=prepared, loss=lambda path: 1.0, progress=False)
    with pytest.raises(MergeError, match="not finite"):
        search.search(str(tmp_path / "s"), **given)
    written(tmp_path / "bad.safetensors", tokeniser, shift=1)
    assert len(search.search(str(tmp_path / "s"), **given).rows) == 1
    with pytest.raises(MergeError, match="holds another search"):
        search.search(str(tmp_path / "s"), **given | {"space": {"scale": [0.2]}})


def test_a_search_leaves_out_what_has_no_loss(tuned, prepared, tmp_path):
    how = {"base": tuned["base"], "models": [tuned["a"]], "method": "task_arithmetic"}
    losses = iter([float("nan"), 0.5, float("inf"), float("nan")])
    given = dict(recipe=how, valid=prepared, loss=lambda path: next(losses), progress=False)
    found = search.search(str(tmp_path / "s"), space={"scale": [0.1, 0.3, 0.5]}, **given)
    assert found.options == {"scale": 0.3} and [row["loss"] for row in found.rows] == [None, 0.5, None]
    with pytest.raises(MergeError, match="no trial has a finite loss"):
        search.search(str(tmp_path / "n"), space={"scale": [0.1]}, **given)
    with pytest.raises(MergeError, match="0 trials finds nothing"):
        search.search(str(tmp_path / "n"), space={"scale": (0.1, 1.0)}, trials=0, **given)
    with pytest.raises(MergeError, match="a range is a pair"):
        search.search(str(tmp_path / "n"), space={"scale": (0.1, 0.5, 1.0)}, **given)
    given["recipe"] = how | {"method": "della"}
    with pytest.raises(ValueError, match="take less spread"):
        search.search(str(tmp_path / "n"), space={"density": (0.0, 1.0)}, **given)


def test_nothing_is_chosen_by_test_data(tuned, prepared, tmp_path):
    data = tmp_path / "test"
    shutil.copytree(prepared, data)
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(meta | {"split": "test"}))
    how = {"base": tuned["base"], "models": [tuned["a"]], "method": "average"}
    with pytest.raises(MergeError, match="by which nothing is chosen"):
        search.search(str(tmp_path / "s"), recipe=how, space={"scale": [1.0]}, valid=str(data), progress=False)


def test_a_search_over_ranges_is_the_same_when_it_was_stopped(tuned, prepared, tmp_path):
    pytest.importorskip("optuna")
    how = {"base": tuned["base"], "models": [tuned["a"]], "method": "singular_values"}

    def loss(path):
        options = json.loads(merge.card_path(path).read_text())["recipe"]["options"]
        return (options["scale"] - 0.7) ** 2 + (options["rank"] - 3) ** 2

    given = dict(recipe=how, space={"scale": (0.0, 1.0), "rank": (1, 6)}, valid=prepared, loss=loss, progress=False)
    whole = search.search(str(tmp_path / "whole"), trials=6, **given)
    search.search(str(tmp_path / "parts"), trials=3, **given)
    assert search.search(str(tmp_path / "parts"), trials=6, **given).rows == whole.rows
    assert all(isinstance(row["options"]["rank"], int) for row in whole.rows)


def test_a_range_is_of_numbers_but_for_ranks(tuned, prepared, tmp_path):
    pytest.importorskip("optuna")
    how = {"base": tuned["base"], "models": [tuned["a"]], "method": "task_arithmetic"}
    loss = lambda path: json.loads(merge.card_path(path).read_text())["recipe"]["options"]["scale"]  # noqa: E731
    given = dict(recipe=how, space={"scale": (0, 1)}, valid=prepared, loss=loss, progress=False)
    found = search.search(str(tmp_path / "s"), trials=3, **given)
    assert all(0 < row["options"]["scale"] < 1 for row in found.rows)


def test_a_search_of_models_that_were_tuned_again_is_another(prepared, tmp_path, tokeniser):
    paths = [written(tmp_path / n, tokeniser, shift=i) for i, n in enumerate(["base", "a"])]
    how = {"base": paths[0], "models": paths[1:], "method": "task_arithmetic"}
    given = dict(recipe=how, space={"scale": [0.5]}, valid=prepared, loss=lambda path: 1.0, progress=False)
    search.search(str(tmp_path / "s"), **given)
    search.search(str(tmp_path / "s"), **given)
    written(tmp_path / "a", tokeniser, shift=9)
    with pytest.raises(MergeError, match="holds another search"):
        search.search(str(tmp_path / "s"), **given)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--valid", "nowhere"], "nowhere/meta.json: cannot read"),
        (["--score", "nowhere"], "nowhere/meta.json: cannot read"),
        (["--search", "rank=1"], "no option 'rank'"),
        (["--search", "scale=.5,"], "is written OPTION=V1,V2"),
        (["--search", "scale=a..1"], "is written OPTION=V1,V2"),
        (["--output", "there"], "is there already"),
    ],
)
def test_a_search_that_cannot_end_is_not_begun(tuned, prepared, tmp_path, monkeypatch, capsys, change, said):
    monkeypatch.chdir(tmp_path)
    Path("there").touch()
    given = {"--search": "scale=0.1", "--valid": prepared, "--output": "m", "--method": "average"}
    given |= dict([change])
    command = ["merge", "--base", tuned["base"], "--models", tuned["a"], *(x for pair in given.items() for x in pair)]
    assert cli.entry(command) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_the_loss_of_a_search_counts_families_alike(tuned, prepared):
    loss = search.Loss(prepared, rows=8, batch_size=4)
    families = loss.by_family(tuned["a"])
    assert families.keys() == {"asr", "ocr"}
    assert loss(tuned["a"]) == pytest.approx(sum(families.values()) / 2)


# --- the command, and what is refused ---------------------------------------------------------------------------------


def test_the_command_merges_by_a_recipe(tuned, prepared, tmp_path, capsys):
    text = f"base: {tuned['base']}\nmethod: ties\nmodels:\n  - {tuned['a']}\n  - path: {tuned['b']}\n    weight: 0.5\n"
    (tmp_path / "recipe.yaml").write_text(text)
    output = str(tmp_path / "m.safetensors")
    assert (
        cli.entry(["merge", "--recipe", str(tmp_path / "recipe.yaml"), "--set", "density=0.5", "--output", output]) == 0
    )
    assert "2 models merged by ties" in capsys.readouterr().out
    card = json.loads(merge.card_path(output).read_text())
    assert card["recipe"]["options"] == {"density": 0.5}
    assert cli.entry(["merge", "--recipe", str(tmp_path / "recipe.yaml"), "--output", output]) == 2
    assert "is there already" in capsys.readouterr().err
    searching = ["--search", "scale=0,0.2", "--valid", prepared, "--output", str(tmp_path / "s.safetensors")]
    assert cli.entry(["merge", "--base", tuned["base"], "--models", tuned["a"], tuned["b"], *searching]) == 0
    assert "best of 2 trials: scale=0" in capsys.readouterr().out
    scoring = ["--score", prepared, "--method", "average", "--output", str(tmp_path / "t.safetensors")]
    assert cli.entry(["merge", "--base", tuned["base"], "--models", tuned["a"], tuned["b"], *scoring]) == 0
    *_, base, a, _, merged = capsys.readouterr().out.splitlines()
    families = search.Loss(prepared).by_family(tuned["a"])
    assert (
        a == f"| {tuned['a']} | {' | '.join(f'{x:.4f}' for x in (*families.values(), np.mean([*families.values()])))} |"
    )
    assert base.startswith(f"| {tuned['base']} |") and merged.startswith(f"| {tmp_path / 't.safetensors'} |")
    assert cli.entry(["merge", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(f"| {name} |" in said for name in METHODS)
    assert "| lors | scale=0.2*, rank=7*, density=0.2*, svd_kind=exact |" in said


@pytest.mark.parametrize("spelt", ["m/model.safetensors", "./m/../m/model.safetensors", "link", "f", "s", "r.yaml"])
def test_an_output_that_is_an_input_is_refused(spelt, tuned, tokeniser, tmp_path, monkeypatch, capsys):
    """However its path is written: a run folder's file, a link, the base, statistics, the recipe."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "m" / "model.safetensors", tokeniser, shift=1)
    (tmp_path / "link").symlink_to(tmp_path / "m")
    for name in "fs":
        shutil.copyfile(tuned["base"], name)
    before = Path("m/model.safetensors").read_bytes()
    models = [{"path": "m", "statistics": "s"}]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"base": "f", "method": "average", "models": models}))
    output = {"link": "link/model.safetensors"}.get(spelt, spelt)
    assert cli.entry(["merge", "--recipe", "r.yaml", "--overwrite", "--output", output]) == 2
    assert f"{output}: is an input of this merge; give another output" in capsys.readouterr().err
    made = ["merge", "--experts", f"asr={tuned['a']}", "ocr=m", "--overwrite", "--output", "m/model.safetensors"]
    assert cli.entry(made) == 2
    assert "is an input of this merge" in capsys.readouterr().err
    assert Path("m/model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("flag", "values"), [("--set", ("rank=4", "rank=2")), ("--search", ("rank=4", "rank=2,3"))])
def test_an_option_is_given_once(flag, values, tuned, prepared, tmp_path, capsys):
    command = ["merge", "--base", tuned["base"], "--models", tuned["a"], "--output", str(tmp_path / "m")]
    command += ["--valid", prepared] if flag == "--search" else []
    assert cli.entry([*command, flag, *values]) == 2
    assert f"{flag}: rank is given twice" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_weights_by_path_leave_at_the_base_is_said(tuned, tmp_path, capsys):
    weight = [{"match": "attention", "weight": 1.0}]
    how = {"base": tuned["base"], "models": [tuned["a"], {"path": tuned["b"], "weight": weight}], "method": "average"}
    merge.merge(str(tmp_path / "m"), **how)
    table = tables(tuned, ["base"])[0]
    left = [name for name in table if "attention" not in name]
    said = f"{tuned['b']}: its weights match no path of {len(left)} of {len(table)} arrays, such as {left[0]}"
    assert capsys.readouterr().err.count(said) == 1
    weight.append({"match": "", "weight": 0.0})
    merge.merge(str(tmp_path / "n"), **how)
    assert "match no path" not in capsys.readouterr().err


def nan(table, meta):
    scale = table["norm/scale"].copy()
    scale[0] = np.nan
    return table | {"norm/scale": scale}, meta


def unrelated(table, meta):
    return {n: jax.random.normal(jax.random.key(5), x.shape) * jnp.std(x) for n, x in table.items()}, meta


REFUSED = {
    "another architecture": ({"ffn": tiny.moe()}, "different models: merge models tuned from one base"),
    "another tokeniser": ({"change": lambda t, m: (t, m | {"tokeniser": "0"})}, "different tokenisers"),
    "not finite": ({"change": nan}, "norm/scale holds a number that is not finite"),
    "not of this base": ({"change": unrelated}, "it was not tuned from that base"),
    "another number of a family": ({"families": {"asr": 2}}, "number families differently"),
    "fewer arrays": ({"change": lambda t, m: ({n: x for n, x in t.items() if n != "embedding"}, m)}, "lacks embedding"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_do_not_fit_are_refused(name, tuned, tokeniser, tmp_path, capsys):
    how, said = REFUSED[name]
    bad = written(tmp_path / "bad.safetensors", tokeniser, shift=7, **how)
    output = tmp_path / "m.safetensors"
    command = ["merge", "--base", tuned["base"], "--models", tuned["a"], bad, "--output", str(output)]
    assert cli.entry(command) == 2
    error = capsys.readouterr().err.strip()
    assert said in error.splitlines()[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.safetensors"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": None}, "base is missing"),
        ({"models": []}, "models is missing"),
        ({"models": ["nowhere.safetensors"]}, "nowhere.safetensors: there is no such checkpoint"),
        ({"models": [{"path": "x", "weigth": 1}]}, "unknown entry 'weigth'"),
        ({"models": [{"weight": 1}]}, "have one of path and merge"),
        ({"models": [{"path": "x", "weight": 10**400}]}, "weight is 1000+, it must be a number"),
        ({"method": "tise"}, "unknown merging method 'tise'"),
        ({"rules": [{"match": "(", "method": "average"}]}, "no regular expression"),
        ({"rules": [{"match": "decoder", "method": "average"}]}, "'decoder' matches no path"),
        ({"seed": "a"}, "seed is a whole number"),
        ({"seed": 1 << 70}, "must be from 0 to"),
        ({"options": {1: 2}}, "a mapping of numbers by name"),
        ({"align": True}, "align is for mixtures of experts"),
        ({"method": "slerp"}, "slerp goes from one model to one other"),
    ],
)
def test_recipes_that_ask_for_what_is_not_there_are_refused(tuned, tmp_path, change, said):
    given = {"base": tuned["base"], "models": [tuned["a"], tuned["b"], tuned["c"]]} | change
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        merge.merge(str(tmp_path / "m"), progress=False, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: &a [{merge: {models: *a}}]", "a stage is within itself"),
        ("models: [a]\noptions: [1]", "a mapping of numbers"),
    ],
)
def test_a_recipe_that_cannot_be_is_one_line(text, said, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(f"base: b\n{text}\n")
    command = ["merge", "--recipe", str(tmp_path / "r.yaml"), "--set", "rank=1", "--output", str(tmp_path / "m")]
    assert cli.entry(command) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", ["- a\n", "base: [", "!!python/object/apply:os.system [ls]", "\x00"])
def test_a_file_that_is_no_recipe_is_refused(text, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(MergeError, match=r"r\.yaml"):
        recipe.read(str(tmp_path / "r.yaml"))


def test_a_full_disk_leaves_nothing(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(checkpoint.CheckpointError, match="make room"):
        merging(tuned, tmp_path / "m")
    assert not list(tmp_path.iterdir())
