"""Tokenisers of pretrained models: text stays text, and what is wrong with a folder is one line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.text import tokeniser as tk

pytest.importorskip("tokenizers")

import hugging_face as hf

from moe_jax.text.pretrained import Pretrained, from_folder

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)


@pytest.fixture(scope="module")
def tokeniser(tmp_path_factory) -> Pretrained:
    return from_folder(hf.write(tmp_path_factory.mktemp("hf")))


@given(text=TEXT)
def test_every_text_round_trips(tokeniser, text):
    ids = tokeniser.encode(text)
    assert tokeniser.decode(ids) == text
    assert all(0 <= i < tokeniser.vocab_size for i in ids)


def test_what_its_files_say(tokeniser):
    assert tokeniser.vocab_size == hf.VOCAB_SIZE
    assert tokeniser.eos == (tokeniser.control(hf.STOP), tokeniser.control(hf.END))
    assert tokeniser.bos is None  # there is one, but nothing puts it in front of a text
    assert tokeniser.encode("!") == [0]
    assert len(tokeniser.encode("the cat sat on the mat")) > 4  # tokenizer.json asks for 4 at most


@pytest.mark.parametrize("text", [hf.END, hf.START, f"a {hf.STOP}{hf.STOP}b", "<tool>", f"{hf.START}user\nhi"])
def test_control_tokens_cannot_be_typed(tokeniser, text):
    ids = tokeniser.encode(text)
    assert not {tokeniser.control(name) for name in (hf.END, hf.START, hf.STOP)} & {*ids}
    assert tokeniser.decode(ids) == text


def test_decode_skips_control_tokens_and_padding_of_the_embedding(tokeniser):
    ids = [tokeniser.control(hf.START), *tokeniser.encode("a!"), hf.VOCAB_SIZE - 1, *tokeniser.eos]
    assert tokeniser.decode(ids) == "a!"
    with pytest.raises(ValueError, match="outside of"):
        tokeniser.decode([hf.VOCAB_SIZE])
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokeniser.encode("a\udc80")


def test_the_bytes_are_the_tokeniser(tokeniser, tmp_path):
    tokeniser.save(tmp_path / "tokeniser.model")
    for source in (tokeniser.model, tmp_path / "tokeniser.model"):
        again = tk.Tokeniser.load(source)
        assert isinstance(again, Pretrained) and again.sha256 == tokeniser.sha256
        assert (again.eos, again.bos, again.vocab_size) == (tokeniser.eos, None, hf.VOCAB_SIZE)
        assert again.encode("the cat") == tokeniser.encode("the cat")
    assert tk.Tokeniser.load(hf.write(tmp_path / "folder")).sha256 == tokeniser.sha256
    assert isinstance(
        tk.Tokeniser.load(tk.train(["the cat sat on the mat and looked at a bird"] * 3, 282).model), tk.Unigram
    )


def post_processor(name: str) -> dict:
    """One that puts a token in front of every text, as Llama 3 has it."""
    number = next(t["id"] for t in json.loads(hf.tokenizer_json())["added_tokens"] if t["content"] == name)
    pieces = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {name: {"id": name, "ids": [number], "tokens": [name]}}
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}


@pytest.mark.parametrize(
    ("changes", "bos"),
    [
        ({"tokenizer_config": {"add_bos_token": True}}, hf.START),
        ({"tokenizer": {"post_processor": post_processor(hf.END)}}, hf.END),
        ({"tokenizer": {"post_processor": post_processor(hf.END)}, "tokenizer_config": {"add_bos_token": False}}, None),
    ],
)
def test_what_stands_in_front_of_a_text(tmp_path, changes, bos):
    tokeniser = from_folder(hf.write(tmp_path / "hf", **changes))
    assert tokeniser.bos == (bos and tokeniser.control(bos))
    assert tokeniser.bos not in tokeniser.encode("a")  # prompts put it there, once


SPELLS = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], [hf.STOP, -1.0]]}
ADDED = next(token for token in json.loads(hf.tokenizer_json())["added_tokens"] if token["content"] == hf.STOP)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"vocab_size": 270}}, "ids up to 271, but an embedding of 270 rows"),
        ({"config": {"vocab_size": 560}}, "272 tokens for an embedding of 560 rows"),
        ({"config": {"vocab_size": None}}, "an embedding of None rows"),
        ({"config": {"vocab_size": "288"}}, "an embedding of 288 rows"),
        ({"generation_config": {"eos_token_id": []}, "tokenizer_config": {"eos_token": None}}, "no end-of-text token"),
        ({"generation_config": {"eos_token_id": 280}}, "280 is no token"),
        ({"generation_config": {"eos_token_id": [-1]}}, "-1 is no token"),
        ({"generation_config": {"eos_token_id": 1.5}}, "1.5 is no token"),
        ({"generation_config": {"eos_token_id": "\ud800"}}, r"'\\ud800', which is no text"),
        ({"tokenizer": {"model": {"type": "Pickle"}}}, "not a tokeniser that the package tokenizers reads"),
        ({"tokenizer": {"added_tokens": [{"id": "x"}]}}, "not a tokeniser that the package tokenizers reads"),
        (
            {
                "tokenizer": {"model": SPELLS, "pre_tokenizer": None, "added_tokens": [{**ADDED, "id": 1}]},
                "config": {"vocab_size": 4},
            },
            "would become the control token",
        ),
    ],
)
def test_a_wrong_folder_is_refused_in_one_line(tmp_path, changes, message):
    folder = hf.write(tmp_path / "hf", **changes)
    with pytest.raises(ValueError, match=message) as error:
        tk.Tokeniser.load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokenizer.json", None, "is this a Hugging Face model's folder"),
        ("config.json", None, "is this a Hugging Face model's folder"),
        ("tokenizer.json", b"{", "not JSON"),
        ("tokenizer.json", b"[" * 100_000, "not JSON"),
        ("config.json", b"\xff", "not JSON"),
        ("generation_config.json", b"[]", "not a JSON object"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, data, message):
    folder = hf.write(tmp_path / "hf")
    (folder / name).unlink()
    if data is not None:
        (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        from_folder(folder)
    assert f"{folder / name}:" in str(error.value) and "\n" not in str(error.value)


def test_what_is_not_the_bytes_of_a_tokeniser_is_refused(tokeniser):
    about = json.loads(tokeniser.model)
    for damaged, message in [
        (tokeniser.model[:-9], "not JSON"),
        (hf.tokenizer_json().encode(), "give the folder of the Hugging Face model"),
        (json.dumps({**about, "eos": 1}).encode(), "is no token"),
        (json.dumps({**about, "bos": "x"}).encode(), "'x' is no token"),
        (json.dumps({**about, "tokenizer": [1]}).encode(), "not a tokeniser"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            tk.Tokeniser.load(damaged)
        assert "\n" not in str(error.value)
