"""The tokeniser and the prompt: exact round trips, and nothing of a hypothesis lost."""

import functools
import itertools
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.text import prompt as prompts
from moe_jax.text import tokeniser as tk
from moe_jax.text.prompt import Prompt, align, encode_example

SENTENCES = [
    "the cat sat on the mat and looked at 1905 birds",
    "a dog wrestles with it, don't you think so?",
    "кіт сидить на килимку і дивиться",
    "el gato está en la casa  con dos espacios",
]
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
WORDS = st.lists(st.sampled_from(["a", "b", "c", "", "the"]), max_size=8).map(tuple)
HYPOTHESES = st.lists(WORDS, min_size=1, max_size=5)


@functools.cache
def tokeniser() -> tk.Tokeniser:
    return tk.train(SENTENCES * 5, 310)


@given(TEXT)
def test_every_text_round_trips(text):
    ids = tokeniser().encode(text)
    assert tokeniser().decode(ids) == text
    assert all(tk.FIRST_BYTE <= i < tokeniser().vocab_size for i in ids)


@pytest.mark.parametrize("text", ["", " ", "a  b ", "▁", "a▁▁b", "\r\n\t", "\0", "😀 日本", "e\u0301"])
def test_awkward_texts_round_trip(text):
    assert tokeniser().decode(tokeniser().encode(text)) == text


@pytest.mark.parametrize("text", [*tk.CONTROLS, "<pad>", "</s>", "<unk>", "<0x41>", "x<hyp>y"])
def test_control_tokens_cannot_be_typed(text):
    ids = tokeniser().encode(text)
    assert min(ids) >= tk.FIRST_BYTE
    assert tokeniser().decode(ids) == text


@given(st.lists(TEXT.map(lambda t: t.replace(" ", "")), max_size=6), st.integers(0, 6))
def test_words_have_the_same_pieces_wherever_they_stand(words, cut):
    encode = tokeniser().encode_words
    assert encode(words) == encode(words[:cut]) + encode(words[cut:])
    assert tokeniser().decode_words(encode(words)) == words


def test_decode_skips_control_tokens_and_mends_broken_bytes():
    ids = [tk.HYP, *tokeniser().encode("the cat"), tk.EOS, tk.PAD]
    assert tokeniser().decode(ids) == "the cat"
    assert tokeniser().decode([tk.FIRST_BYTE + 0xFF]) == "\ufffd"
    with pytest.raises(ValueError, match="outside of"):
        tokeniser().decode([tokeniser().vocab_size])


def test_training_is_deterministic_and_files_round_trip(tmp_path):
    again = tk.train(SENTENCES * 5, 310)
    assert again.sha256 == tokeniser().sha256
    again.save(tmp_path / "t.model")
    assert tk.Tokeniser.load(tmp_path / "t.model").sha256 == again.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["t.model"]


def test_bad_models_and_texts_are_refused_in_one_line(tmp_path):
    (tmp_path / "torn.model").write_bytes(tokeniser().model[:100])
    for bad, message in [
        (b"", "damaged"),
        (tmp_path / "torn.model", "torn.model"),
        (tmp_path / "no", "cannot read"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            tk.Tokeniser.load(bad)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokeniser().encode("a\udc80")
    with pytest.raises(ValueError, match="cannot train"):
        tk.train(["short"], 4000)


def test_fair_sample_lifts_small_languages():
    texts = {"en": [f"en{i:07d}" for i in range(900)], "uk": [f"uk{i:07d}" for i in range(100)], "none": []}
    drawn = list(tk.fair_sample(texts, 36_000, seed=1))
    assert drawn == list(tk.fair_sample(texts, 36_000, seed=1)) != list(tk.fair_sample(texts, 36_000, seed=2))
    uk = [text for text in drawn if text.startswith("uk")]
    assert len(uk) / len(drawn) == pytest.approx(0.25, abs=0.01)  # sqrt(100) / (sqrt(900) + sqrt(100))
    assert set(uk) == set(texts["uk"])


def spellings(strand: prompts.Strand) -> set[tuple[str, ...]]:
    return {tuple(itertools.chain(*path)) for path in itertools.product(*strand)}


@given(HYPOTHESES)
def test_every_hypothesis_is_a_path_through_the_network(hypotheses):
    first, *others = hypotheses
    strand = align(first, others)
    assert tuple(itertools.chain(*(span[0] for span in strand))) == first
    assert spellings(strand) >= set(hypotheses)
    assert all(len(set(span)) == len(span) for span in strand)


@settings(max_examples=200)
@given(
    st.lists(WORDS.map(" ".join), min_size=1, max_size=5),
    st.lists(TEXT, max_size=2),
    st.sampled_from(prompts.LAYOUTS),
)
def test_prompts_read_back(hypotheses, sources, layout):
    prompt = Prompt.build(hypotheses, sources, layout)
    assert Prompt.decode(tokeniser(), prompt.encode(tokeniser())) == prompt
    assert prompt.first == hypotheses[0]
    texts = {" ".join(words) for strand in prompt.strands for words in spellings(strand)}
    assert texts >= set(hypotheses)


def test_the_aligned_layout_by_hand():
    prompt = Prompt.build(["mitch cal wrestles now", "mitch cal rascals now", "a mitch cal wrestles now", "no way"])
    network, apart = prompt.strands
    assert network == (
        ((), ("a",)),
        (("mitch", "cal"),),
        (("wrestles",), ("rascals",)),
        (("now",),),
    )
    assert apart == ((("no", "way"),),)


def test_touching_edits_of_two_hypotheses_share_a_span():
    strand = align(("a", "b", "c"), [("a", "x", "c"), ("a", "b", "y")])
    assert strand == ((("a",),), (("b", "c"), ("x", "c"), ("b", "y")))


def test_pieces_in_alternatives_look_as_in_the_target():
    ids = Prompt.build(["a dog wrestles", "a dog sat"]).encode(tokeniser())
    target = tokeniser().encode("a dog wrestles")
    alt = ids.index(tk.ALT)
    assert ids[1:alt] + ids[alt + 1 : ids.index(tk.OR)] == target


@pytest.mark.parametrize(
    "ids, message",
    [
        ([], "no <fix>"),
        ([tk.FIX], "misplaced <fix>"),
        ([300, tk.FIX], "begins with token 300"),
        ([tk.HYP, tk.OR, tk.FIX], "misplaced <or>"),
        ([tk.HYP, tk.ALT, 300, tk.END_ALT, tk.FIX], "misplaced </alt>"),
        ([tk.HYP, 300, tk.SRC, tk.HYP, tk.FIX], "misplaced <hyp>"),
    ],
)
def test_what_is_not_a_prompt_is_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        Prompt.decode(tokeniser(), ids)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown prompt layout"):
        Prompt.build(["a"], layout="tree")
    with pytest.raises(ValueError, match="at least one"):
        encode_example(tokeniser(), [], max_length=50)


def test_examples_end_with_the_reference_and_eos():
    example = encode_example(tokeniser(), ["the cat", "the cat"], ["el gato"], "the mat", max_length=99, max_sources=1)
    prompt = Prompt.build(["the cat"], ["el gato"]).encode(tokeniser())
    target = [*tokeniser().encode("the mat"), tk.EOS]
    assert example is not None
    assert example.tokens == prompt + target
    assert example.roles == [prompts.READ] * len(prompt) + [prompts.WRITE] * len(target)


@pytest.mark.parametrize("layout", prompts.LAYOUTS)
def test_a_prompt_says_its_task_where_it_is_asked_to_and_the_task_is_known(layout):
    make = functools.partial(encode_example, tokeniser(), ["the cat"], reference="the mat", max_length=99)
    bare = make(layout=layout)
    assert bare == make(layout=layout, family="asr") == make(layout=f"{layout}+task")
    for family in ("asr", "asr/austen-whisper"):
        said = make(layout=f"{layout}+task", family=family)
        name = tokeniser().encode("asr")
        assert said.tokens == [*name, *bare.tokens] and said.roles == [*[prompts.READ] * len(name), *bare.roles]


@pytest.mark.parametrize("layout", prompts.LAYOUTS)
@pytest.mark.parametrize("reference", [None, "the cat sat on the mat"])
def test_too_long_drops_hypotheses_then_sources_then_gives_none(layout, reference):
    rng = random.Random(0)
    words = SENTENCES[0].split()
    hypotheses = [" ".join(rng.choices(words, k=6)) for _ in range(5)]
    sources = [SENTENCES[3], SENTENCES[2]]
    make = functools.partial(encode_example, tokeniser(), hypotheses, sources, reference, layout=layout, max_sources=2)
    kept = []
    for max_length in range(300, 0, -1):
        example = make(max_length=max_length)
        if example is None:
            kept.append((0, 0))
            continue
        reserve = 0 if reference else int(1.3 * len(tokeniser().encode(hypotheses[0]))) + 16
        assert len(example.tokens) + reserve <= max_length
        prompt = Prompt.decode(tokeniser(), example.tokens)
        texts = {" ".join(path) for strand in prompt.strands for path in spellings(strand)}
        assert prompt.first == hypotheses[0]
        kept.append((next((n for n, h in enumerate(hypotheses) if h not in texts), 5), len(prompt.sources)))
    assert kept == sorted(kept, reverse=True)
    assert set(kept) >= {(5, 2), (1, 2), (1, 1), (1, 0), (0, 0)}


def test_the_text_package_needs_neither_jax_nor_tensorflow():
    code = "import sys, moe_jax.text.prompt; print({'jax', 'tensorflow', 'seqio'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
