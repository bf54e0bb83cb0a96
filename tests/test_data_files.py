"""The embedded corpus is whole, its splits do not touch, and the noise made from it is like its errors."""

import gzip
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import moe_jax.tasks
from moe_jax.tasks.builders import clean_text, denoise
from moe_jax.tasks.builders.alignment import align
from moe_jax.tasks.builders.char_noise import CharNoise, char_edits
from moe_jax.tasks.builders.noise import NoiseModel, speech
from moe_jax.tasks.builders.splits import HeldOut, letters, split_of

DATA = Path(moe_jax.tasks.__path__[0]) / "data"
TASKS = ("asr", "ocr", "mt", "gec")
SPLITS = ("train", "valid", "test")
FILES = [(task, split) for task in TASKS for split in SPLITS]


@cache
def rows(task, split):
    return denoise.read_rows(DATA / f"{task}.{split}.jsonl.gz")


@cache
def clean_sentences():
    return gzip.decompress((DATA / "clean.en.txt.gz").read_bytes()).decode().splitlines()


@cache
def english(task):
    return [row for row in rows(task, "train") if row["lang"] == "en"]


@cache
def model(task):
    return NoiseModel.fit(english(task)[:1500])


@pytest.mark.parametrize(("task", "split"), FILES)
def test_rows_are_well_formed(task, split):
    for row in rows(task, split):
        assert row["task"] == task
        assert 1 <= len(row["hypotheses"]) <= 5
        texts = [*row["hypotheses"], row["reference"], row["source_set"], row["lang"]]
        assert all(isinstance(text, str) and text.strip() and "\n" not in text for text in texts)
        assert set(row) <= {*("task", "source_set", "hypotheses", "reference", "lang", "reference_written", "sources")}
        assert ("sources" in row) == (task == "mt")


def test_readme_counts_are_true():
    counts = Counter((task, split, row["source_set"]) for task, split in FILES for row in rows(task, split))
    for line in (DATA / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 7 and cells[1] in TASKS:
            for split, shown in zip(SPLITS, cells[4:7], strict=True):
                assert counts.pop((cells[1], split, cells[2])) == int(shown.replace(",", "")), line
    assert not counts, "sets that the table of tasks/data/README.md lacks"
    assert f"{len(clean_sentences()):,} sentences" in (DATA / "README.md").read_text()


def test_every_set_has_a_licence():
    licences = (DATA / "LICENSES.md").read_text()
    for name in {row["source_set"] for task, split in FILES for row in rows(task, split)}:
        assert f"`{name}`" in licences or f"`{name.split('-')[0]}-*`" in licences


@pytest.mark.parametrize("path", sorted(DATA.glob("*.gz")), ids=lambda path: path.name)
def test_gzip_bytes_are_reproducible(path):
    assert path.read_bytes()[3:8] == bytes(5)  # no name, no time


def test_no_reference_is_in_two_splits():
    by_split = {split: {letters(row["reference"]) for task in TASKS for row in rows(task, split)} for split in SPLITS}
    by_split["train"] |= set(map(letters, clean_sentences()))
    assert not by_split["train"] & by_split["valid"]
    assert not by_split["train"] & by_split["test"]
    assert not by_split["valid"] & by_split["test"]


@pytest.mark.parametrize("task", ["asr", "ocr", "gec"])
def test_split_rule_agrees_with_the_files(task):
    for split in SPLITS:
        for row in rows(task, split):
            if row["lang"] == "en":
                assert split_of(row["reference"]) == split


def test_clean_text_is_held_apart_and_clean():
    held_out = HeldOut(row["reference"] for task in TASKS for s in ("valid", "test") for row in rows(task, s))
    lines = clean_sentences()
    assert len(lines) > 50_000
    assert len(set(map(letters, lines))) == len(lines)
    for line in lines:
        assert split_of(line) == "train"
        assert line not in held_out
        assert 4 <= len(line.split()) <= 40
        assert not re.search(r"[<>_\t]|--|  ", line)


def test_held_out_sees_equal_containing_and_contained():
    held_out = HeldOut(["She was quite sure of his good opinion.", "He was gone."])
    assert "SHE WAS QUITE sure, of his good opinion!" in held_out
    assert "I think she was quite sure of his good opinion of her." in held_out
    assert "Quite sure of his good" in held_out
    assert "He was gone" in held_out
    assert "He was gone to town." not in held_out  # too short to be told from common speech
    assert "She was quite sure of her good opinion." not in held_out


def test_sentences_of_a_novel():
    novel = 'CHAPTER I\n\nSorrow came--a _gentle_\nsorrow.--Mr. Weston came. "Oh!\nyes," said he. "I am\n\nglad."\n'
    assert [list(clean_text.sentences(p)) for p in clean_text.austen_passages(novel)][1:] == [
        ["Sorrow came—a gentle sorrow.", "Mr. Weston came.", '"Oh! yes," said he.', "I am"],
        ["glad."],
    ]


def test_sentences_of_a_bible():
    imp = (
        '$$$Genesis 1:0\n<chapter n="1"/>\n'
        '$$$Genesis 1:1\n<title>Title</title><w lemma="x">God</w><note n="1">a <b>note</b></note>'
        "<w>made</w> <w>light</w>,\n"
        "$$$Genesis 1:2\nand it was. “It was\n$$$Genesis 2:1\ngood.”\n"
    )
    passages = [" ".join(p.split()) for p in clean_text.bible_passages(imp)]
    assert passages == ["", "God made light, and it was. “It was", "good.”"]
    assert list(clean_text.sentences(passages[1])) == ["God made light, and it was.", "It was"]


def test_held_out_file_that_is_no_record_file_is_one_clear_line(tmp_path):
    for text, complaint in (("not json", "cannot be read"), ('{"a": 1}', "no sentence under")):
        path = tmp_path / "x.jsonl"
        path.write_text(text)
        with pytest.raises(SystemExit, match=complaint) as error:
            clean_text.held_out_sentences(path)
        assert "\n" not in str(error.value)
        assert "x.jsonl" in str(error.value)


@pytest.mark.parametrize("task", ["asr", "ocr", "gec"])
def test_alignment_rebuilds_every_hypothesis(task):
    for row in rows(task, "valid"):
        aligned = align(row["reference"], row["hypotheses"])
        for h, hypothesis in enumerate(row["hypotheses"]):
            rebuilt, at = [], 0
            for site in aligned.sites:
                rebuilt += aligned.words[at : site.start] + site.readings[h].split()
                at = site.end
            assert rebuilt + aligned.words[at:] == hypothesis.split()


def test_alignment_joins_what_several_hypotheses_change():
    aligned = align("a big log in here", ["a big login here", "a pig log in here", "a big log ian here now"])
    assert [(s.clean, s.readings) for s in aligned.sites] == [
        ("big", ("big", "pig", "big")),
        ("log in", ("login", "log in", "log ian")),
        ("", ("", "", "now")),
    ]


def test_character_edits_are_confusions_and_swaps():
    assert list(char_edits("turned", "tumed")) == [(2, "rn", "m")]
    assert list(char_edits("their", "thier")) == [(2, "ei", "ie")]
    noise = CharNoise([("turned", "tumed"), ("born", "bom"), ("corner", "comer")])
    assert noise.damage("adorned", 2, np.random.default_rng(0)) == "adomed"
    assert noise.damage("xyz", 2, np.random.default_rng(0)) == "xyz"


def test_speech_style_is_that_of_the_references():
    for row in rows("asr", "train"):
        assert speech(row["reference_written"]) == row["reference"]


@pytest.mark.parametrize("task", ["asr", "ocr", "gec"])
def test_noise_is_deterministic_and_never_empty(task):
    sentences = [*clean_sentences()[:100], "Oh.", "It", "x y"]
    first, second = ([model(task).nbest(s, rng) for s in sentences] for rng in map(np.random.default_rng, (1, 1)))
    assert first == second
    for lines in first:
        assert len(set(lines)) == len(lines) >= 1
        assert all(lines)
    again = NoiseModel.fit(english(task)[:1500])
    rng = np.random.default_rng(1)
    assert [again.nbest(s, rng) for s in sentences] == first
    assert len(model(task).nbest(sentences[0], np.random.default_rng(2), count=1)) == 1


@pytest.mark.parametrize("task", ["asr", "ocr", "gec"])
def test_noise_rates_are_those_of_the_real_lists(task):
    sample = english(task)[:1500]
    rng = np.random.default_rng(0)
    references = [row["reference"] for row in sample]
    noisy = [model(task).nbest(reference, rng) for reference in references]
    real = denoise.rates(references, [row["hypotheses"] for row in sample])
    made = denoise.rates(references, noisy)
    for name in ("WER", "CER", "oracle WER", "n-best"):
        assert made[name] == pytest.approx(real[name], rel=0.15), name
    assert made["untouched"] == pytest.approx(real["untouched"], abs=0.04)


def test_noisy_speech_has_the_best_hypothesis_first_on_average():
    references = [row["reference"] for row in english("asr")[:800]]
    rng = np.random.default_rng(0)
    noisy = [model("asr").nbest(reference, rng) for reference in references]
    first, last = (denoise.rates(references, [[lines[i]] for lines in noisy])["WER"] for i in (0, -1))
    assert first < 0.9 * last


@pytest.mark.parametrize("task", ["asr", "ocr", "gec"])
def test_a_stronger_recogniser_errs_less_and_first_in_its_first_reading(task):
    references = [row["reference"] for row in english(task)[:400]]
    lists = {s: [model(task).nbest(r, np.random.default_rng(7), strength=s) for r in references] for s in (0, 0.5, 1)}
    first = [denoise.rates(references, noisy)["WER"] for noisy in lists.values()]
    assert first[0] > 1.5 * first[1] > 0 and first[2] == 0
    assert all(lines[0] == model(task).style(r) for r, lines in zip(references, lists[1], strict=True))
    assert (task == "gec") == all(len(lines) == 1 for lines in lists[1])  # the other readings still err


def test_noise_reads_seen_words_as_the_recogniser_did():
    lists = [{"task": "ocr", "hypotheses": ["thc cat"], "reference": "the cat"}] * 30
    noisy = {NoiseModel.fit(lists).nbest("the cat", np.random.default_rng(i))[0] for i in range(30)}
    assert "thc cat" in noisy


def test_noise_of_several_families_is_refused():
    with pytest.raises(ValueError, match="asr and ocr"):
        NoiseModel.fit([english("asr")[0], english("ocr")[0]])
    with pytest.raises(ValueError, match="no rows"):
        NoiseModel.fit([])


def test_denoise_writes_the_same_records_again(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for task in ("asr", "ocr", "gec"):
        lines = [json.dumps(row) for row in english(task)[:60]]
        (data / f"{task}.train.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (data / "clean.en.txt.gz").write_bytes(gzip.compress("\n".join(clean_sentences()[:50]).encode()))
    written = []
    for name in ("a", "b"):
        out = str(tmp_path / name)
        monkeypatch.setattr("sys.argv", ["denoise", out, "--passes", "2", "--data", str(data)])
        denoise.main()
        written.append((tmp_path / name / "denoise.train.jsonl.gz").read_bytes())
    assert written[0] == written[1]
    assert "real / noise" in capsys.readouterr().out
    made = list(map(json.loads, gzip.decompress(written[0]).decode().splitlines()))
    assert len(made) == 2 * (50 + 3 * 60)
    assert {row["noise"] for row in made} == {"asr", "ocr", "gec"}
    assert all(row["task"] == "denoise" and row["hypotheses"] and row["reference"] for row in made)
    assert all(row["reference"] == speech(row["reference"]) for row in made if row["noise"] == "asr")


def test_denoise_without_a_corpus_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["denoise", str(tmp_path / "out"), "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="--data names the folder") as error:
        denoise.main()
    assert "\n" not in str(error.value)
    good = json.dumps(english("asr")[0])
    (tmp_path / "gec.train.jsonl.gz").write_bytes(gzip.compress(f'{good}\n{{"task": "gec"}}\n'.encode()))
    with pytest.raises(SystemExit, match=r"gec\.train\.jsonl\.gz:2: not a record") as error:
        denoise.main()
    assert "\n" not in str(error.value)
