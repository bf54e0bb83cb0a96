"""Prompts in plain text: what they look like, and that no text gets out of its field."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.tasks.families import FAMILIES
from moe_jax.text import templates
from moe_jax.text import tokeniser as tk
from moe_jax.text.prompt import READ, WRITE, encode_example, room_to_write

pytest.importorskip("tokenizers")

import hugging_face as hf

from moe_jax.text.pretrained import Pretrained, from_folder

PLAIN = [name for name in templates.TEMPLATES if name != "chatml"]
ROUND = st.sampled_from(["###", "### Response:", "#", "\n", "\r\n", "\u2028", "\x85", "Correction:", hf.STOP, hf.START])
TEXT = st.lists(ROUND | st.text(st.characters(codec="utf-8"), max_size=5), max_size=6).map("".join)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Pretrained:
    return from_folder(hf.write(tmp_path_factory.mktemp("hf")))


@functools.cache
def own() -> tk.Unigram:
    return tk.train(["the cat sat on the mat and looked at a bird"] * 3, 282)


def shown(layout: str, hypotheses, sources=(), family=None) -> str:
    """The prompt, with control tokens as they are spelled."""
    name, *switches = layout.split("+")
    instruction = templates.INSTRUCTIONS[family] if family and "task" in switches else templates.NEUTRAL
    clean = [[templates.one_line(text) for text in texts] for texts in (hypotheses, sources)]
    return "".join(templates.TEMPLATES[name](instruction, *clean))


def test_instruct_by_hand():
    assert shown("instruct", ["a b", "a c"], ["x"]) == (
        f"{templates.NEUTRAL}\n\nHypotheses:\n1. a b\n2. a c\n\nSources:\n1. x\n\nCorrection:\n"
    )
    assert shown("instruct+task", ["a"], family="gec").startswith(templates.INSTRUCTIONS["gec"] + "\n\n")


def test_chatml_by_hand(pretrained):
    text = f"{templates.NEUTRAL}\n\nHypotheses:\n1. a b"
    start, stop = pretrained.control(hf.START), pretrained.control(hf.STOP)
    ids = templates.encode(pretrained, "chatml", ["a b"], [])
    spelled = [start, *pretrained.encode(f"user\n{text}"), stop, *pretrained.encode("\n"), start]
    assert ids == [*spelled, *pretrained.encode("assistant\n")]


def test_alpaca_by_hand():
    assert shown("alpaca", ["a", "b"]) == (
        f"{templates.ALPACA}\n\n### Instruction:\n{templates.NEUTRAL}\n\n"
        "### Input:\nHypotheses:\n1. a\n2. b\n\n### Response:\n"
    )


def test_h2t_by_hand():
    fields = "### Best-hypothesis:\na\n\n### Other-hypothesis:\nb\nc\n\n### Response:\n"
    assert shown("h2t", ["a", "b", "c"]) == f"{templates.H2T}\n\n{fields}"
    assert shown("h2t", ["a"]) == f"{templates.H2T}\n\n### Best-hypothesis:\na\n\n### Response:\n"


@pytest.mark.parametrize("layout", templates.TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(hypotheses=st.lists(TEXT, min_size=1, max_size=3), sources=st.lists(TEXT, max_size=2))
def test_no_text_leaves_its_field(pretrained, layout, hypotheses, sources):
    names = [f"h{i}" for i in range(len(hypotheses))], [f"s{i}" for i in range(len(sources))]
    lines, plain = (shown(layout, *texts) for texts in ((hypotheses, sources), names))
    assert len(lines.splitlines()) == len(plain.splitlines())
    for line, same in zip(lines.split("\n"), plain.split("\n"), strict=True):
        assert line == same or any(name in same for name in (*names[0], *names[1]))
    assert lines.count("###") == plain.count("###")
    controls = [pretrained.control(name) for name in (hf.START, hf.STOP)]
    ids, plain = (templates.encode(pretrained, layout, *texts) for texts in ((hypotheses, sources), names))
    assert [i for i in ids if i in controls] == [i for i in plain if i in controls]


@given(text=TEXT)
def test_one_line_is_one_line_and_says_the_same(text):
    line = templates.one_line(text)
    assert len(line.splitlines()) <= 1 and "###" not in line
    assert templates.one_line(line) == line
    assert "".join(line.split()) == "".join(text.split())


@pytest.mark.parametrize("layout", PLAIN)
def test_plain_templates_are_for_any_tokeniser(pretrained, layout):
    for tokeniser in (own(), pretrained):
        example = encode_example(
            tokeniser, ["a cat", "a bat"], ["x"], "the cat", max_length=999, layout=layout, max_sources=1
        )
        assert example is not None
        read = [i for i, role in zip(example.tokens, example.roles, strict=True) if role == READ]
        written = [i for i, role in zip(example.tokens, example.roles, strict=True) if role == WRITE]
        assert tokeniser.decode(read) == shown(layout, ["a cat", "a bat"], ["x"])
        assert written == [*tokeniser.encode("the cat"), tokeniser.eos[0]]


def test_a_prompt_begins_with_bos_where_the_model_has_one(tmp_path):
    tokeniser = from_folder(hf.write(tmp_path / "hf", tokenizer_config={"add_bos_token": True}))
    ids = templates.encode(tokeniser, "instruct", ["a"], [])
    assert ids[0] == tokeniser.bos and tokeniser.bos not in ids[1:]


def test_the_task_is_said_only_when_asked_for(pretrained):
    def ids(layout, family):
        example = encode_example(pretrained, ["a"], max_length=999, layout=layout, family=family)
        assert example is not None
        return example.tokens

    assert ids("chatml", "asr") == ids("chatml", None) == ids("chatml+task", None) == ids("chatml+task", "denoise")
    assert len({tuple(ids("chatml+task", family)) for family in templates.INSTRUCTIONS}) == len(templates.INSTRUCTIONS)
    assert {*templates.INSTRUCTIONS} == {*FAMILIES} - {"denoise", "translate"}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [("instruct", ["a", "b"]), ("instruct+pad", ["a", "b", "a", "b"]), ("instruct+task+pad", ["a", "b", "a", "b"])],
)
def test_hypotheses_are_distinct_and_padded_if_wanted(layout, expected):
    assert templates.fill(layout, ["a", "a", "b"], 4) == expected
    assert templates.fill(layout, ["a", "b", "c", "d", "e"], 4) == ["a", "b", "c", "d"]


def test_too_long_drops_hypotheses_then_sources_then_gives_none(pretrained):
    hypotheses, kept = ["one", "two", "three"], []
    for max_length in range(400, 0, -1):
        example = encode_example(pretrained, hypotheses, ["zzz"], max_length=max_length, layout="chatml", max_sources=1)
        if example:
            assert len(example.tokens) + room_to_write(pretrained, "one") <= max_length
        text = pretrained.decode(example.tokens) if example else ""
        kept.append((sum(h in text for h in ("1. one", "2. two", "3. three")), "zzz" in text))
    assert list(dict.fromkeys(kept)) == [(3, True), (2, True), (1, True), (1, False), (0, False)]


def test_layouts_that_a_tokeniser_cannot_write_are_refused(pretrained):
    for tokeniser, layout, message in [
        (pretrained, "aligned", "choose a template: instruct, chatml, alpaca, h2t"),
        (pretrained, "list", "own tokeniser"),
        (own(), "chatml", "no token <|im_start|>; choose instruct, alpaca, h2t"),
        (
            own(),
            "instrukt",
            r"unknown prompt layout 'instrukt'; known: aligned, list \(both with \+task if wanted\), tagged, "
            r"tagged\+source, untagged, and the templates instruct",
        ),
        (own(), "instruct+tsk", r"each with \+task and \+pad"),
    ]:
        with pytest.raises(ValueError, match=message.replace("|", r"\|")) as error:
            encode_example(tokeniser, ["a"], max_length=99, layout=layout)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="at least one"):
        encode_example(pretrained, [], max_length=99, layout="instruct")
