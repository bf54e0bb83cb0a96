"""The evidence: documents agree with the tables, and the tables with their form."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from benchmarks import arms, chain, kept, results, task_moe, u2pp
from moe_jax import checkpoint, describe, main, tree
from moe_jax.layers.param import Rngs
from moe_jax.metrics import translation
from moe_jax.models.translator import Translator
from moe_jax.speech import evaluate

ROOT = Path(__file__).parents[1]
TABLES = sorted((ROOT / "results").glob("*/table.json"))


def test_the_documents_agree_with_the_tables():
    command = [sys.executable, "-m", "benchmarks.results", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.parent.name)
def test_every_row_has_the_keys_of_an_evidence_table(path):
    rows = json.loads(path.read_text())["rows"]
    assert rows
    for row in rows:
        assert {"arm", "seed", "task", "set", "metric", "value", "ci95", "p_value"} <= set(row)
        assert row["value"] >= 0 or row["metric"] in ("npf", "interference")


ROUTING = {
    "tasks": ["asr", "ocr"],
    "experts": ["0", "1"],
    "load": [[[1.0, 0.0], [0.0, 1.0]]],
    "agreement": {"asr": 0.5},
}


def test_arms_are_compared_on_the_lines_and_seeds_that_both_have(tmp_path, monkeypatch):
    def finish(arm: str, seed: int, corrections: list[str]) -> None:
        folder = tmp_path / arms.run_folder("x", arm, seed)
        folder.mkdir(parents=True)
        (folder / "scores.json").write_text("{}")
        (folder / "routing.json").write_text(json.dumps(ROUTING))
        lines = [
            {"task": task, "reference": "a b", "correction": c, "reference_nll": len(c) / 2, "reference_tokens": 2}
            for task, c in zip(("asr", "ocr"), corrections, strict=True)
        ]
        (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        kept.write("x", f"{arm}-{seed}", arms.of_run(folder))

    monkeypatch.setattr(kept, "ROOT", tmp_path)
    finish("moe", 0, ["a b", "a c"])
    finish("moe", 1, ["a b", "a b"])
    finish("dense", 0, ["a c", "a c"])
    finish("dense", 1, ["a c", "a c"])
    finish("dense", 2, ["a b", "a b"])
    shutil.rmtree(tmp_path / "runs")  # what is compared lies beside the table
    asked = ["moe", "dense"], [0, 1, 2]
    runs = arms.read("x", *asked)
    found = {(c["metric"], c["task"]): c for c in arms.comparisons(runs, *asked, "dense")}
    assert {(c["arm"], c["against"], tuple(c["seeds"])) for c in found.values()} == {("moe", "dense", (0, 1))}
    changes = {key: c["relative_change"] for key, c in found.items()}
    asr, ocr, mean = -1, 1 / 2 - 1, 1 / 4 - 1  # none of two word errors, one of two, one of four
    assert changes == {
        ("wer", "asr"): asr,
        ("wer", "ocr"): ocr,
        ("wer", "mean"): pytest.approx(mean),
        **{("nll", task): pytest.approx(0) for task in ("asr", "ocr", "mean")},
    }
    assert (found["wer", "asr"]["alike"], found["wer", "ocr"]["alike"]) == (2, 1)
    rows = {(r["task"], r["metric"]): r["value"] for r in arms.likelihoods("moe", 0, runs["moe", 0])}
    assert rows["mean", "nll"] == pytest.approx(3 / 4) and rows["asr", "agreement"] == 0.5
    assert rows["all", "told apart"] == pytest.approx(1)
    assert ">moe<" in (arms.picture(runs, ["moe"], 0) or "")


def test_a_run_becomes_rows_of_its_arm_and_the_references_stand_once():
    row = {"task": "asr", "set": "all", "metric": "wer", "lines": 2, "first_pass": 0.5, "corrected": 0.4}
    row |= {"oracle_nb": 0.3, "oracle_cp": None, "relative_change": -0.2, "ci95": [-0.3, -0.1], "p_value": 0.01}
    row |= {"fixed": 1, "broken": 0, "untouched": 1}
    (mine,) = arms.rows_of("neko", 0, {"rows": [row]})
    assert (mine["arm"], mine["seed"], mine["value"]) == ("neko", 0, 0.4)
    references = arms.references_of({"rows": [row]})
    assert [(r["arm"], r["value"]) for r in references] == [("first pass", 0.5), ("oracle n-best", 0.3)]


def translator(folder: Path) -> None:
    """A checkpoint that says of what model it is."""
    model = Translator(d=8, encoder_layers=1, decoder_layers=1, ffn=tiny.moe(), vocab=16, rngs=Rngs(params=0))
    table = {name: np.asarray(x) for name, x in tree.flatten(model).items()}
    checkpoint.write_safetensors(str(folder / "model.safetensors"), table, {"model": describe.describe(model)})


def test_translators_become_means_over_groups_and_a_table_of_a_new_language(tmp_path):
    def finish(arm: str, scores: dict[str, float]) -> Path:
        folder = tmp_path / f"{arm}-0"
        folder.mkdir()
        rows = [{"task": d, "metric": m, "value": v} for d, v in scores.items() for m in ("chrf", "bleu", "off-target")]
        (folder / "scores.json").write_text(json.dumps({"rows": rows}))
        translator(folder)
        return folder

    def measured(folder: Path, **about: Any) -> dict[str, Any]:
        return {"scores": json.loads((folder / "scores.json").read_text())["rows"], "routing": {}, **about}

    plain = finish("top_k", {"en-de": 0.2, "en-es": 0.4, "de-ru": 0.1})
    rows = task_moe.rows_of("top_k", 0, measured(plain, sizes=task_moe.sizes_of(plain)))
    assert {r["task"]: r["value"] for r in rows if r["metric"] == "chrf" and r["task"] in ("en-xx", "zero-shot")} == {
        "en-xx": pytest.approx(0.3),
        "zero-shot": 0.1,
    }
    said = ["old", "new"]
    base = finish("static_adapters", {"en-de": 0.6, "de-en": 0.4, "en-es": 0.1, "fr-ca": 0.1})
    new = finish("direction_static", {"fr-ca": 0.3, "de-ru": 0.5, "en-de": 0.5, "de-en": 0.4})
    for folder, written in ((base, said), (new, ["old", "other"])):
        lines = [
            [d, f"source {i}", text, "reference"] for d in ("en-de", "fr-ca", "de-ru") for i, text in enumerate(written)
        ]
        (folder / "translations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    leaf, moved = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    moved[1] = 1.0  # the other rows are of other directions, and stood still
    checkpoint.write_safetensors(str(base / "model.safetensors"), {"a": leaf, "b": leaf}, {})
    checkpoint.write_safetensors(str(new / "adapters.safetensors"), {"a": moved}, {})
    rows += task_moe.rows_of("direction_static", 0, measured(new, later=task_moe.later_of("direction_static", 0, new)))
    meta = {"command": "c", "split": "test", "date": "2026-01-01", "signatures": {"chrf": "nc:6"}}
    meta |= {"low-resource": ["it-en 512"], "high-resource": []}
    change = {
        "arm": "top_k",
        "against": "dense",
        "task": "trained",
        "metric": "chrf",
        "relative_change": 0.1,
        "ci95": [0.0, 0.2],
        "p_value": 0.03,
    }
    text = results.task_moe({"experiment": "task_moe", "meta": meta, "rows": rows, "comparisons": [change]})
    assert "| direction_static | 1 | 4 | 10.00 | 40.00 | 40.00 | 40.0 | 1 | 2 | 60.00 | 50.00 |" in text
    assert "| top_k | 30.0 () | 10.0 () |" in text  # of the trained directions, and of the others
    assert "| top_k | dense | trained | chrF | +10.0 % | +0.0 to +20.0 | 0.0300 |" in text
    assert "chrF (`nc:6`)" in text and "(it-en 512)" in text
    sizes = [r["value"] for r in rows if r["task"] == "all"]
    assert len(sizes) == 2 and sizes[0] > sizes[1] > 0  # experts that a token does not meet
    assert f"| top_k | 1 | {sizes[0] / 1e6:.2f} | {sizes[1] / 1e6:.2f} | 30.00 |" in text.replace("±", "")


def test_directions_of_related_languages_are_told_from_others():
    use = {"tasks": ["en-de", "en-es", "en-ca", "es-en"], "load": [[[1.0, 0.0], [0.2, 0.8], [0.4, 0.6], [0.0, 1.0]]]}
    assert task_moe.shared({"adapters": use}) == [
        ("related", "adapters in common", pytest.approx(0.8)),  # en-es and en-ca
        ("unrelated", "adapters in common", pytest.approx((0.2 + 0.4) / 2)),  # German with each; es-en differs twice
    ]


def test_a_rate_that_no_direction_has_is_left_out(tmp_path):
    rows = [{"task": d, "metric": "off-target", "value": v} for d, v in (("en-sv", None), ("sv-en", 0.5))]
    (tmp_path / "scores.json").write_text(json.dumps({"rows": rows}))
    assert task_moe.of_some(tmp_path, ["en-sv", "sv-en"], "off-target") == 0.5
    assert task_moe.of_some(tmp_path, ["en-sv"], "off-target") is None


def test_recognisers_are_compared_on_the_utterances_of_the_dense_arm(tmp_path):
    def finish(arm: str, texts: list[str]) -> dict[str, Any]:
        folder = tmp_path / arm
        folder.mkdir()
        said = [
            {"reference": "a b", "lang": lang, "texts": {"whole, rescored": text}, "lists": {"whole": [text, "a b"]}}
            for lang, text in zip(("en", "es", "es"), texts, strict=True)
        ]
        (folder / "transcripts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
        (folder / "scores.json").write_text(json.dumps({"rows": evaluate.rows(said)}))
        spent = {"start": 30.0, "compile": 60.0, "compute": 150.0, "down": 999.0}
        (folder / "goodput.json").write_text(json.dumps({"seconds": spent}))
        checkpoint.write_safetensors(str(folder / "model.safetensors"), {"a": np.zeros((1000, 1000), np.float32)}, {})
        return u2pp.of_run(folder)

    dense, moe = finish("dense", ["a c", "a c", "a c"]), finish("moe", ["a b", "a b", "a c"])
    rows = u2pp.rows_of("prompts", "dense", 0, dense, None) + u2pp.rows_of("prompts", "moe", 0, moe, dense)
    found = {(r["set"], r.get("decoding"), r["metric"]): r for r in rows if r["arm"] == "moe"}
    mine = found["all", "whole, rescored", "wer"]
    assert mine["value"] == pytest.approx(1 / 6) and mine["relative_change"] == pytest.approx(1 / 3 - 1)
    assert found["es", "whole, rescored", "wer"]["value"] == pytest.approx(1 / 4)
    assert found["all", "whole, oracle", "wer"]["value"] == 0
    text = results.u2pp({"experiment": "u2pp", "meta": {"command": "c", "split": "test", "date": "d"}, "rows": rows})
    assert "| whole, rescored | moe | 1.00 | 4 | 1 | 16.67 |" in text and "-66.7 %" in text
    assert "| WER %, whole, rescored | en | es |" in text and "| moe | 0.00 | 25.00 |" in text
    other = finish("other", ["a c", "a c", "a b"])
    runs = [moe, other]
    rows += u2pp.rows_of("prompts", "moe", 1, other, dense) + u2pp.over_seeds("prompts", "moe", runs, [dense] * 2)
    (over,) = (
        r
        for r in rows
        if r["seed"] is None and (r["set"], r["decoding"], r["metric"]) == ("all", "whole, rescored", "wer")
    )
    assert over["value"] == pytest.approx(3 / 12) and over["relative_change"] == pytest.approx(3 / 6 - 1)
    assert over["lines"] == 3
    text = results.u2pp({"experiment": "u2pp", "meta": {"command": "c", "split": "test", "date": "d"}, "rows": rows})
    assert "| whole, rescored | moe | 1.00 | 4 | 2 | 25.00" in text and "-50.0 %" in text and "-66.7 %" not in text


def test_the_table_of_recognisers_says_what_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(u2pp, "ROOT", tmp_path)
    monkeypatch.setattr(u2pp.kept, "read", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["u2pp", "--collect", "--corpora", "digits=a.jsonl", "prompts", "--arms", "moe"])
    u2pp.run_all()
    said = json.loads((tmp_path / "results/u2pp/table.json").read_text())["meta"]["command"]
    assert said == "python -m benchmarks.u2pp --corpora digits=a.jsonl prompts --seeds 0 1 2 --arms moe"


@pytest.mark.parametrize("made", [u2pp.run_all, chain.run])
@pytest.mark.parametrize("given, said", [("a.jsonl", "a.jsonl is not there: "), (".", ". is a folder: give a file")])
def test_what_is_not_a_list_of_utterances_is_refused_in_a_line(made, given, said, monkeypatch, capsys):
    option = ["--corpora", f"digits={given}"] if made is u2pp.run_all else ["--list", given]
    monkeypatch.setattr("sys.argv", ["benchmark", *option])
    with pytest.raises(SystemExit, match="2"):
        made()
    assert said in capsys.readouterr().err


def test_a_speaker_that_is_held_out_is_in_no_other_split(tmp_path, monkeypatch):
    monkeypatch.setattr(u2pp, "ROOT", tmp_path)
    speakers, splits = ("ann", "bob", "eve"), ("train", "valid", "test")
    rows = [{"audio": "x.wav", "text": "a", "speaker": who, "split": split} for who in speakers for split in splits]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = [json.loads(line) for line in u2pp.hold_out("bob", tmp_path / "l.jsonl").read_text().splitlines()]
    assert len(made) == len(rows) and {row["speaker"] for row in made if row["split"] == "test"} == {"bob"}
    assert {row["speaker"] for row in made if row["split"] != "test"} == {"ann", "eve"}
    with pytest.raises(ValueError, match="has no speaker 'joe'; it has ann, bob, eve"):
        u2pp.hold_out("joe", tmp_path / "l.jsonl")


def scored(folder: Path, lines: list[list[str]]) -> dict[str, Any]:
    """What is kept of a run that wrote `lines`."""
    folder.mkdir()
    (folder / "scores.json").write_text(json.dumps({"rows": []}))
    translator(folder)
    (folder / "routing.json").write_text(json.dumps({"experts": USE} if "top_k" in folder.name else {}))
    (folder / "translations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return json.loads(json.dumps(task_moe.of_run(*folder.name.split("-"), folder)))


USE = {"tasks": ["en-de"], "load": [[[0.5, 0.5]]], "told_apart": [0.0]}


def test_translators_are_compared_on_the_lines_of_all_seeds(tmp_path, monkeypatch):
    rows = [{"en": f"source {i}", "de": "eine klare Antwort", "fr": "une réponse claire"} for i in range(4)]
    monkeypatch.setattr(main, "multiparallel", lambda split: rows)
    task_moe.test_rows.cache_clear()
    said = {"dense": "eine karge Antwort", "top_k": "eine klare Antwort", "task_gated": "no"}
    runs = {}
    for (arm, text), seed in itertools.product(said.items(), (0, 1)):
        lines = [["en-de", row["en"], text, row["de"]] for row in rows]
        lines += [["en-fr", row["en"], "une réponse", row["fr"]] for row in rows[:2]]
        runs[arm, seed] = scored(tmp_path / f"{arm}-{seed}", lines)
    assert runs["dense", 0]["lines"]["en-fr"]["row"] == [0, 1]  # the same clusters as of en-de
    assert ">top_k, experts<" in (task_moe.picture(runs, 0) or "")
    del runs["task_gated", 1]  # not finished: compared with nothing
    found = {(c["arm"], c["against"], c["metric"]): c for c in task_moe.comparisons(runs, [0, 1])}
    assert {arm for arm, _, _ in found} == {"top_k", "dense"}
    chrf = translation.chrf()
    german, french = (
        chrf.corpus([text], [reference])[0]
        for text, reference in ((said["dense"], rows[0]["de"]), ("une réponse", rows[0]["fr"]))
    )
    # The mean over directions, however many lines each has.
    change = (1 + french) / (german + french) - 1
    assert found["top_k", "dense", "chrf"]["relative_change"] == pytest.approx(change)
    assert found["top_k", "dense", "chrf"]["p_value"] > 0.1  # near 2 / 2^4: four sentences in six lines
    runs["dense", 1]["lines"]["en-fr"]["row"] = [0, 2]
    with pytest.raises(ValueError, match="different lines"):
        task_moe.comparisons(runs, [0, 1])
    runs["dense", 0]["lines"]["en-fr"]["row"] = [0, 2]
    with pytest.raises(ValueError, match="top_k and dense were"):
        task_moe.comparisons(runs, [0, 1])
    task_moe.test_rows.cache_clear()


def test_a_new_language_is_compared_with_what_was_before_and_with_training_everything(tmp_path, monkeypatch):
    rows = [{"en": f"source {i}", "sv": "ett tydligt svar"} for i in range(3)]
    monkeypatch.setattr(main, "multiparallel", lambda split: rows)
    monkeypatch.setattr(task_moe, "later_of", lambda *_: [])
    task_moe.test_rows.cache_clear()
    said = {"before_static": "svar", "static": "ett svar", "dynamic": "ett", "full": "ett tydligt svar"}
    runs = {
        (arm, 0): scored(tmp_path / f"{arm}-0", [["en-sv", row["en"], text, row["sv"]] for row in rows])
        for arm, text in ((f"language_{name}", text) for name, text in said.items())
    }
    found = [c for c in task_moe.comparisons(runs, [0]) if c["metric"] == "chrf"]
    assert {(c["arm"], c["against"], c["task"]): c["relative_change"] > 0 for c in found} == {
        ("language_static", "language_before_static", "new"): True,
        ("language_full", "language_before_static", "new"): True,
        ("language_static", "language_full", "new"): False,
        ("language_dynamic", "language_full", "new"): False,  # its own beginning is not there
    }
    task_moe.test_rows.cache_clear()


def test_the_table_says_which_arms_were_asked_for_and_has_its_pictures(tmp_path, monkeypatch):
    rows = [{"en": f"source {i}", "de": "eine klare Antwort"} for i in range(3)]
    monkeypatch.setattr(main, "multiparallel", lambda split: rows)
    monkeypatch.setattr(task_moe, "ROOT", tmp_path)
    monkeypatch.setattr(kept, "ROOT", tmp_path)
    task_moe.test_rows.cache_clear()
    for arm in ("dense", "top_k"):
        kept.write(
            "task_moe", f"{arm}-0", scored(tmp_path / f"{arm}-0", [["en-de", r["en"], arm, r["de"]] for r in rows])
        )
    monkeypatch.setattr(sys, "argv", ["task_moe", "--collect", "--seeds", "0", "--arms", "dense", "top_k"])
    task_moe.run_all()
    table = json.loads((tmp_path / "results" / "task_moe" / "table.json").read_text())
    assert table["meta"]["command"] == "python -m benchmarks.task_moe --seeds 0 --arms dense top_k"
    assert {c["arm"] for c in table["comparisons"]} == {"dense", "top_k"}
    assert ">top_k, experts<" in (tmp_path / "results" / "task_moe" / "routing.svg").read_text()
    task_moe.test_rows.cache_clear()


def test_what_is_kept_of_another_list_is_not_taken_for_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "ROOT", tmp_path)
    for name in "ab":
        (tmp_path / name).write_text(name)
    a, b = (kept.digest(tmp_path / name) for name in "ab")
    assert a != b != kept.digest(tmp_path / "b", "--gin.STEPS=1")
    kept.claim(tmp_path / "run", a)
    kept.claim(tmp_path / "run", a)
    with pytest.raises(ValueError, match="run: is of another list"):
        kept.claim(tmp_path / "run", b)
    assert kept.once("e", "r", lambda: {"x": 1}, a) == kept.once("e", "r", lambda: {"x": 2}, a) == {"x": 1, "of": a}
    with pytest.raises(ValueError, match="is of another list"):
        kept.once("e", "r", lambda: {"x": 2}, b)
    assert kept.once("e", "old", lambda: {"x": 3}) == kept.once("e", "old", lambda: {}, a) == {"x": 3}
