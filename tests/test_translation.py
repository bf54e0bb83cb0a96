"""Translation as tasks: the corpus, the numbers of directions, what a model reads and writes, the rates of outputs."""

import gzip
import itertools
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_jax.tasks
from moe_jax import main, prepare, seqio_data
from moe_jax.data import Prepared
from moe_jax.metrics import language
from moe_jax.packing import Packable
from moe_jax.tasks import correction, preprocessors, translate, translation
from moe_jax.tasks.builders import parallel, translation_tokeniser
from moe_jax.tasks.builders.splits import HeldOut, letters
from moe_jax.tasks.families import FAMILIES, MAX_FAMILIES
from moe_jax.tasks.quiet import seqio
from moe_jax.text.prompt import READ, WRITE, check_layout, encode_example
from moe_jax.text.tokeniser import EOS, FIX, Tokeniser, Unigram, train

DATA = Path(moe_jax.tasks.__path__[0]) / "data"
SPLITS = ("train", "valid", "test")
TEXTS = [
    {"en": "press any key now", "de": "drücken Sie jetzt eine Taste", "set": "made"},
    {"en": "the cat sleeps", "de": "die Katze schläft", "fr": "le chat dort", "set": "made"},
    {"de": "guten Tag", "fr": "bonjour", "set": "made"},
]


@cache
def rows(split: str) -> list[dict[str, str]]:
    return [row for _, row in translation.read(DATA / f"translate.{split}.jsonl.gz")]


@cache
def tokeniser() -> Unigram:
    loaded = Tokeniser.load(DATA / "translate.model")
    assert isinstance(loaded, Unigram)
    return loaded


def refused(message: str, call, *args, **kwargs) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)


# --- the corpus -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_sentences_in_two_languages_or_more(split):
    for row in rows(split):
        assert set(row) <= {*translation.LANGUAGES, "set"} and len(row) > 2
        assert row["set"] in parallel.SETS  # what may be shipped
        assert all(text.strip() and "\n" not in text for text in row.values())


def test_no_sentence_is_in_two_splits():
    by_split = {split: {letters(text) for row in rows(split) for text in parallel.sentences(row)} for split in SPLITS}
    held_out = HeldOut(text for split in SPLITS[1:] for row in rows(split) for text in parallel.sentences(row))
    assert not by_split["valid"] & by_split["test"]
    assert not any(text in held_out for row in rows("train") for text in parallel.sentences(row))
    for path in DATA.glob("*.jsonl.gz"):  # nor a reference of a correction task
        task, split = path.name.split(".")[:2]
        if task != translation.FAMILY:
            lines = gzip.decompress(path.read_bytes()).splitlines()
            references = {letters(json.loads(line)["reference"]) for line in lines}
            for other in {*SPLITS} - {split}:
                assert not references & by_split[other], (path.name, other)


def test_readme_counts_are_true():
    counts = Counter((row["set"], split, name) for split in SPLITS for row in rows(split) for name in row)
    for line in (DATA / "README.md").read_text().splitlines():
        cells = [cell.strip().replace(",", "") for cell in line.split("|")[1:-1]]
        if len(cells) == 2 + len(translation.LANGUAGES) and cells[1] in SPLITS:
            for name, shown in zip(translation.LANGUAGES, cells[2:], strict=True):
                assert counts.pop((cells[0], cells[1], name), 0) == int(shown), line
    assert {name for _, _, name in counts} == {"set"}, "what the table lacks"


def test_every_set_has_a_licence():
    licences = (DATA / "LICENSES.md").read_text()
    assert all(f"`{name}` (translate)" in licences for name in {row["set"] for split in SPLITS for row in rows(split)})
    assert sum(path.stat().st_size for path in DATA.glob("translate.*")) < 3 << 20


def row(*texts: str, name: str = "gnome-help") -> dict[str, str]:
    return dict(zip(("en", "de"), texts, strict=True)) | {"set": name}


def test_rows_that_another_split_has_are_left_out(monkeypatch):
    monkeypatch.setattr(parallel, "VERSES", {"train": 1, "valid": 0, "test": 1})
    candidates = {
        "test": [row("One more thing.", "Noch etwas."), row("In asr.", "In der Spracherkennung.")],
        "valid": [row("Something else.", "Noch etwas!"), row("Good morning to you.", "Guten Morgen.")],
        "train": [
            row("He said: good morning to you, all of you.", "Anders."),
            row("Fine.", "Gut."),
            *(row(f"Verse {number}.", f"Vers {number}.", name="bible") for number in range(3)),
        ],
    }
    found = parallel.select(candidates, {"train": ["in ASR"], "valid": [], "test": []})
    assert found["test"] == candidates["test"][:1] and found["valid"] == candidates["valid"][1:]
    assert [row["set"] for row in found["train"]] == ["gnome-help", "bible"] and found["train"][0]["en"] == "Fine."


def test_the_builder_keeps_what_may_be_shipped(tmp_path):
    import lzma

    lines = [
        {"en": "a", "es": "b", "de": "c", "pl": "d", "set": "asterisk", "domain": "x"},
        {"en": "a", "de": "b", "set": "gettext"},
        {"en": "a", "es": "b", "set": "asterisk"},
    ]
    path = tmp_path / "x.train.jsonl.xz"
    path.write_bytes(lzma.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    assert list(parallel.rows(path)) == [{"en": "a", "de": "c", "set": "asterisk"}]
    verses = [{"es": "a", "ca": str(n), "set": "bible"} for n in range(3)]  # without English, too
    assert len(parallel.drawn(verses, 2)) == 2
    path.write_bytes(lzma.compress(b'{"set": "bible", "en": "a", "es": "b"}\n[1]\n'))
    refused("train.jsonl.xz:2: not an object", list, parallel.rows(path))
    path.write_bytes(b"not xz")
    refused("cannot be read", list, parallel.rows(path))


# --- directions and ids -----------------------------------------------------------------------------------------------


def test_ids_are_fixed_and_fit_the_tables():
    ids = translation.direction_ids()
    assert correction.task_ids(ids) == FAMILIES | ids
    assert max(ids.values()) < MAX_FAMILIES
    # Checkpoints hold these: append only.
    fixed = {
        "en-de": 16,
        "cs-en": 29,
        "cs-ru": 35,
        "fr-ca": 36,
        "sv-en": 39,
        "en-en": 40,
        "sv-sv": 48,
        "mt-en": 49,
        "mt-es": 50,
    }
    assert all(ids[f"translate/{direction}"] == number for direction, number in fixed.items())
    assert {source for pair in translation.DIRECTIONS for source in translation.languages(pair)} == {
        *translation.LANGUAGES,
        "mt",
    }
    assert {*translation.own_adapter().values()} == {*range(33)}  # as many as a model of static adapters has


def test_what_is_held_back_is_otherwise_known():
    seen = {
        side for direction in translation.TRAINED for side in zip("st", translation.languages(direction), strict=True)
    }
    for direction in translation.ZERO_SHOT:
        source, target = translation.languages(direction)
        assert {("s", source), ("t", target)} <= seen
    new = {name for direction in translation.NEW for name in translation.languages(direction)} - {"en"}
    assert not any(name in direction for direction in translation.TRAINED for name in new)


def test_groups_are_what_directions_share():
    ids = {name.removeprefix("translate/"): number for name, number in translation.direction_ids().items()}

    def together(by, *directions):
        group = translation.grouped(by)
        return len({group[ids[direction]] for direction in directions}) == 1

    assert together("target", "en-de", "de-de") and not together("target", "en-de", "de-en")
    assert together("source", "en-de", "en-sv", "en-en") and not together("source", "en-de", "es-it")
    assert together("type", "en-de", "fr-ca") and together("type", "de-de", "sv-sv")
    assert not together("type", "en-de", "de-de")
    assert not {translation.grouped("type")[ids[d]] for d in translation.POST_EDIT} & {1, 2}
    for by, count in (("target", 9), ("source", 10), ("pair", len(ids)), ("type", 3)):
        group = translation.grouped(by)
        assert list(group) == list(ids.values()) and {*group.values()} == {*range(1, count + 1)}
    refused("choose target, source, pair, type", translation.grouped, "script")
    refused("choose target, source, pair, type", translation.grouped, "target+script")


def test_granularities_can_be_joined():
    ids, group = translation.direction_ids(), translation.grouped("target+type")
    of = {name.partition("/")[2]: group[number] for name, number in ids.items()}
    assert {*of.values()} == {*range(1, 2 * len(translation.LANGUAGES) + 3)}
    assert of["es-ca"] == of["en-ca"] != of["ca-ca"] and of["en-en"] != of["de-en"] == of["ru-en"]


# --- the tokeniser and the prompt -------------------------------------------------------------------------------------


def test_tags_are_tokens_that_no_text_can_spell():
    ids = {i for name in translation.LANGUAGES if (i := tokeniser().control(f"<2{name}>"))}
    assert len(ids) == len(translation.LANGUAGES)
    assert tokeniser().control("<2xx>") is None and tokeniser().vocab_size == 8000
    for text in ("<2de>", "x<2de> y", "▁", "drücken  Sie\n", "\0 日本"):
        assert not ids & {*tokeniser().encode(text)}
        assert tokeniser().decode(tokeniser().encode(text)) == text
    words = tokeniser().encode("Drücken Sie")
    assert tokeniser().decode([*ids, *words, EOS]) == "Drücken Sie"
    assert Tokeniser.load(tokeniser().model).sha256 == tokeniser().sha256


def test_a_tokeniser_with_symbols_differs_in_them_alone():
    sentences = ["the cat sat on the mat", "die Katze saß auf der Matte"] * 5
    plain, tagged = train(sentences, 284), train(sentences, 286, symbols=["<2en>", "<2de>"])
    assert [i + 2 for i in plain.encode("the cat ▁ ¿")] == tagged.encode("the cat ▁ ¿")
    assert plain.symbols == () and plain.control("<2de>") is None
    assert (tagged.control("<2en>"), tagged.control("<2de>")) == (9, 10)


def test_the_vocabulary_comes_from_the_train_split(tmp_path):
    path = tmp_path / "translate.train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows("train")[:60]))
    small = translation_tokeniser.tokeniser(path, 600)
    assert small.symbols == tokeniser().symbols and small.vocab_size == 600
    path.write_text('{"en": 1}\n')
    refused("jsonl:1: not an object of texts", translation_tokeniser.tokeniser, path, 600)
    path.write_text('{"en": "Stop.", "de": " "}\n')
    refused("jsonl:1: the text of de is empty", translation_tokeniser.tokeniser, path, 600)


def test_a_tagged_prompt_by_hand():
    source, target = "die Katze schläft", "the cat sleeps"
    example = encode_example(
        tokeniser(), [source], (), target, max_length=64, layout="tagged", family="translate/de-en"
    )
    assert example is not None
    prompt = [tokeniser().control("<2en>"), *tokeniser().encode(source), FIX]
    written = [*tokeniser().encode(target), EOS]
    assert example.tokens == prompt + written
    assert example.roles == [READ] * len(prompt) + [WRITE] * len(written)
    asked = encode_example(tokeniser(), [source], max_length=64, layout="tagged", family="translate/de-en")
    assert asked is not None and asked.tokens == prompt
    assert encode_example(tokeniser(), [source], (), target, max_length=8, layout="tagged", family="x/a-de") is None


@pytest.mark.parametrize(
    ("layout", "tags"), [("untagged", []), ("tagged", ["<2en>"]), ("tagged+source", ["<2de>", "<2en>"])]
)
def test_what_a_prompt_says_of_its_direction(layout, tags):
    text = "die Katze"
    asked = encode_example(tokeniser(), [text], max_length=64, layout=layout, family="translate/de-en")
    assert asked is not None and asked.tokens == [*map(tokeniser().control, tags), *tokeniser().encode(text), FIX]


def test_a_direction_or_a_tokeniser_without_tags_is_refused():
    refused("has no tags such as <2de>", check_layout, Tokeniser.load(DATA / "tokeniser.model"), "tagged")
    for family in ("translate/de-xx", "translate", None):
        refused(
            "no tag for task .*<2en>", encode_example, tokeniser(), ["a"], max_length=64, layout="tagged", family=family
        )


# --- tasks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    for split in SPLITS:
        lines = "".join(json.dumps(row) + "\n\n" for row in TEXTS)
        (tmp_path / f"translate.{split}.jsonl").write_text(lines)
    monkeypatch.setenv("MOE_JAX_DATA", str(tmp_path))
    return tmp_path


SETTINGS: dict[str, Any] = {"tokeniser": DATA / "translate.model", "layout": "tagged"}


def drawn(name: str, split: str = "train", **how: Any) -> list[Packable]:
    ids = correction.task_ids(translation.direction_ids())
    return list(seqio_data.draw(name, length=128, seed=0, split=split, ids=ids, **SETTINGS, **how))


def texts(example: Packable) -> tuple[str, str]:
    sides: tuple[list[int], list[int]] = ([], [])
    for token, role in zip(example.tokens, example.roles, strict=True):
        sides[int(role == WRITE)].append(token)
    assert sides[0][-1] == FIX and sides[1][-1] == EOS
    return tokeniser().decode(sides[0]), tokeniser().decode(sides[1])


def test_a_direction_reads_the_rows_that_have_both_languages(corpus):
    found = drawn("translate_de_en", passes=1)
    assert {texts(e) for e in found} == {(r["de"], r["en"]) for r in TEXTS[:2]}
    assert {e.task for e in found} == {translation.direction_ids()["translate/de-en"]}
    assert {e.tokens[0] for e in found} == {tokeniser().control("<2en>")}
    assert set(translate.TASKS["de-en"].splits) == {*SPLITS}
    refused("its split 'train' has no examples", drawn, "translate_es_it", passes=1)
    (corpus / "translate.train.jsonl").write_text(json.dumps(TEXTS[0]) + '\n{"en": 1}')
    refused("translate.train.jsonl:2: not an object of texts", drawn, "translate_de_en", passes=1)
    (corpus / "translate.train.jsonl").write_text("\n[")
    refused("translate.train.jsonl:2: not JSON", drawn, "translate_de_en", passes=1)


def test_what_a_machine_translated_is_edited_beside_its_source(corpus):
    rows = [
        {"hypotheses": ["der Haus", "Haus"], "sources": {"en": "the house", "es": "la casa"}, "reference": "das Haus"},
        {"hypotheses": ["la maison"], "sources": {"en": "the house"}, "reference": "la casa"},
        {"hypotheses": ["a cat"], "sources": {}, "reference": "the cat"},
    ]
    lines = [json.dumps({"task": "mt", "lang": lang} | row) for lang, row in zip(("de", "es", "en"), rows, strict=True)]
    (corpus / "mt.train.jsonl").write_text("\n".join(lines))
    (found,) = drawn("postedit_es", passes=1)
    assert texts(found) == ("la maison _ the house", "la casa") and found.tokens[0] == tokeniser().control("<2es>")
    assert found.task == translation.direction_ids()["translate/mt-es"]
    assert [texts(e) for e in drawn("postedit_en", passes=1)] == [("a cat", "the cat")]
    (corpus / "mt.train.jsonl").write_text(lines[0] + "\n{")
    refused("mt.train.jsonl", drawn, "postedit_es", passes=1)


def test_missing_drafts_are_said_in_a_line(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.jsonl"):
        translation.drafts(tmp_path / "absent.jsonl", "mt-es")


def test_shipped_drafts_are_scored_as_a_direction():
    found = main.parallel("test", ["mt-es", "mt-en", "de-en"])
    assert all(translation.BETWEEN in draft for draft, _ in found["mt-es"]) and len(found["mt-es"]) > 100 < len(
        found["mt-en"]
    )
    assert found["de-en"] == main.parallel("test", ["de-en"])["de-en"]


def test_a_mixture_weighs_directions_by_the_root_of_their_size(corpus):
    mixture = seqio_data.find("translate_and_denoise")
    assert mixture.get_rate(translate.TASKS["en-de"]) == pytest.approx(2**0.5)
    assert mixture.get_rate(translate.TASKS["de-de"]) == pytest.approx(3**0.5)
    refused("its split 'train' has no examples", drawn, "translate_all", passes=1)  # no Spanish here


def test_mixtures_train_on_what_is_not_held_back():
    names, with_noise = (
        {task.name for task in seqio_data.find(name).tasks} for name in ("translate_all", "translate_and_denoise")
    )
    held = {translate.TASKS[direction].name for direction in (*translation.ZERO_SHOT, *translation.NEW)}
    assert len(names) == 20 and not with_noise & held
    assert with_noise - names == {f"denoise_{name}" for name in translation.LANGUAGES if name != "sv"}
    edited = {task.name for task in seqio_data.find("translate_denoise_edit").tasks}
    assert edited - with_noise == {"postedit_en", "postedit_es"}
    assert all(task.num_input_examples(split) for task in translate.TASKS.values() for split in SPLITS)


def test_preparing_says_directions(corpus, tmp_path, capsys):
    ids = translation.direction_ids()
    model = main.shipped("translate.model")
    rates = {"translate_en_de": 2.0, "translate_fr_en": 1.0, "denoise_de": 1.0}
    prepare.prepare(str(tmp_path / "p"), mixture=rates, tokeniser=model, layout="tagged", passes=2, ids=ids)
    meta = Prepared.open(tmp_path / "p").meta
    assert {name: tally["examples"] for name, tally in meta["tasks"].items()} == {
        **{"translate/en-de": 4, "translate/fr-en": 2, "translate/de-de": 6},
    }
    table = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["translate/en-de", "4", "33.3%", "2.00"] in [line[:4] for line in table]


def test_what_is_too_long_for_a_side_is_left_out(corpus, tmp_path):
    ids, model = translation.direction_ids(), main.shipped("translate.model")
    long = {"en": "press any key now " * 9, "de": "ja", "set": "made"}
    (corpus / "translate.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*TEXTS, long]))
    about: dict[str, Any] = {
        "mixture": "translate_en_de",
        "tokeniser": model,
        "layout": "tagged",
        "passes": 1,
        "ids": ids,
    }
    prepare.prepare(str(tmp_path / "p"), **about, length=48, sides=(24, 24))
    meta = Prepared.open(tmp_path / "p").meta
    assert meta["tasks"]["translate/en-de"]["examples"] == 2 and meta["tasks"]["translate/en-de"]["skipped"] == 1
    assert meta["sides"] == [24, 24] and meta["longest_read"] <= 24 and meta["max_targets"] <= 24
    prepare.prepare(str(tmp_path / "p"), **about, length=48, sides=(24, 24))  # is there already
    refused("prepared with sides", prepare.prepare, str(tmp_path / "p"), **about, length=48)
    refused("must be two, that together have the length, 48", prepare.prepare, "q", **about, length=48, sides=(24, 25))


def test_denoising_masks_the_source_anew_in_each_epoch(corpus):
    found = [texts(e) for e in drawn("denoise_en", examples=40)]
    assert {target for _, target in found} == {row["en"] for row in TEXTS[:2]}
    assert len({*found}) > 4
    assert all(translate.MARK in source.split() and source != target for source, target in found)
    assert found == [texts(e) for e in drawn("denoise_en", examples=40)]


def test_masks_take_a_third_of_the_words():
    rng = np.random.default_rng(0)
    words = [f"w{number}" for number in range(40)]
    lengths = []
    for _ in range(50):
        masked = translate.mask(" ".join(words), rng).split()
        left = [word for word in masked if word != translate.MARK]
        assert len(left) == 26 and left == sorted(left, key=words.index)  # 35 % of 40 are gone
        assert not any(a == b == translate.MARK for a, b in itertools.pairwise(masked))
        lengths.append(14 / (len(masked) - len(left)))
    assert 2 < np.mean(lengths) < 6
    assert translate.mask("one", rng) == "one"


def test_seqio_scores_translations(corpus):
    def predict(dataset, model_feature_shapes=None):  # what a model would write that is right
        return [(i, tokeniser().decode(row["tokens"][row["roles"] == WRITE])) for i, row in dataset.as_numpy_iterator()]

    with correction.using(**SETTINGS):  # the evaluator draws when it is made
        evaluator = seqio.Evaluator(
            "translate_de_en",
            feature_converter=seqio_data.CorrectionConverter(pack=False, apply_length_check=False),
            eval_split="valid",
            sequence_length=dict.fromkeys(seqio_data.FEATURES, 64),
            target_field_name="tokens",
            async_compute_metrics=False,
        )
        metrics, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict)
    scores = metrics.result()["translate_de_en"]
    assert (scores["bleu"], scores["chrf"]) == pytest.approx((1.0, 1.0))
    record = preprocessors.parse_row(b'{"hypotheses": ["a"], "reference": "a b c d e"}', b"", 1)
    assert 0 < translate.scores([record], ["a b c d x"])["bleu"] < translate.scores([record], ["a b c d e"])["bleu"]


# --- languages of outputs ---------------------------------------------------------------------------------------------


def test_off_target_counts_lines_in_another_language():
    pytest.importorskip("py3langid")
    german, english = "Drücken Sie jetzt bitte eine Taste.", "Please press any key to go on."
    outputs, references = [german, english, english, "Ja.", "Yes."], [german, german, german, "Ja.", "Ja."]
    found = language.off_target(outputs, references, ["de"] * 5, translation.LANGUAGES)
    assert found == language.OffTarget(rate=2 / 3, lines=3, reference_rate=0.0, reference_lines=3)
    nothing = language.off_target(["Ja."], [german], ["de"], ["de", "en"])
    assert (nothing.rate, nothing.lines, nothing.reference_lines) == (None, 0, 1)
    refused("asked for fr, not among", language.off_target, ["a"], ["a"], ["fr"], ["de"])
    refused("xx", language.off_target, ["a"], ["a"], ["de"], ["de", "xx"])


def test_the_detector_knows_the_corpus():
    pytest.importorskip("py3langid")
    pairs = [(name, r[name]) for r in rows("test")[:140] for name in translation.LANGUAGES if name in r]
    names, sentences = zip(*pairs, strict=True)
    found = language.off_target(sentences, sentences, names, translation.LANGUAGES)
    assert found.reference_rate is not None and found.reference_rate < 0.01 and found.lines > 700


def test_without_a_detector_the_rate_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "py3langid.langid", None)
    language._detector.cache_clear()
    refused(r"pip install moe_jax\[translate\]", language.off_target, ["a"], ["a"], ["de"], ["de"])
