"""The evidence: documents agree with the tables, and the tables with their form."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import arms, results, task_moe
from moe_jax import checkpoint

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


def test_arms_are_compared_on_the_lines_and_seeds_that_both_have(tmp_path, monkeypatch):
    def finish(arm: str, seed: int, corrections: list[str]) -> None:
        folder = tmp_path / arms.run_folder("x", arm, seed)
        folder.mkdir(parents=True)
        lines = [{"task": "asr", "reference": "a b", "correction": c} for c in corrections]
        (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(arms, "ROOT", tmp_path)
    finish("moe", 0, ["a b", "a c"])
    finish("moe", 1, ["a b", "a b"])
    finish("dense", 0, ["a c", "a c"])
    finish("dense", 1, ["a c", "a c"])
    finish("dense", 2, ["a b", "a b"])
    (found,) = arms.comparisons("x", ["moe", "dense"], [0, 1, 2])
    assert (found["arm"], found["against"], found["seeds"]) == ("moe", "dense", [0, 1])
    assert found["relative_change"] == pytest.approx(1 / 4 - 1)  # one word error against four


def test_a_run_becomes_rows_of_its_arm_and_the_references_stand_once():
    row = {"task": "asr", "set": "all", "metric": "wer", "lines": 2, "first_pass": 0.5, "corrected": 0.4}
    row |= {"oracle_nb": 0.3, "oracle_cp": None, "relative_change": -0.2, "ci95": [-0.3, -0.1], "p_value": 0.01}
    row |= {"fixed": 1, "broken": 0, "untouched": 1}
    (mine,) = arms.rows_of("neko", 0, {"rows": [row]})
    assert (mine["arm"], mine["seed"], mine["value"]) == ("neko", 0, 0.4)
    references = arms.references_of({"rows": [row]})
    assert [(r["arm"], r["value"]) for r in references] == [("first pass", 0.5), ("oracle n-best", 0.3)]


def test_translators_become_means_over_groups_and_a_table_of_a_new_language(tmp_path):
    def finish(arm: str, scores: dict[str, float]) -> Path:
        folder = tmp_path / f"{arm}-0"
        folder.mkdir()
        rows = [{"task": d, "metric": m, "value": v} for d, v in scores.items() for m in ("chrf", "bleu")]
        (folder / "scores.json").write_text(json.dumps({"rows": rows}))
        return folder

    rows = task_moe.rows_of("top_k", 0, finish("top_k", {"en-de": 0.2, "en-es": 0.4, "de-ru": 0.1}))
    assert {r["task"]: r["value"] for r in rows if r["metric"] == "chrf" and r["task"] in ("en-xx", "zero-shot")} == {
        "en-xx": pytest.approx(0.3),
        "zero-shot": 0.1,
    }
    new = finish("new_static", {"en-sv": 0.3, "sv-en": 0.5})
    checkpoint.write_safetensors(str(new / "adapters.safetensors"), {"a": np.zeros((3, 4), np.float32)}, {})
    rows += task_moe.rows_of("new_static", 0, new)
    meta = {"command": "c", "split": "test", "date": "2026-01-01"}
    change = {"arm": "top_k", "against": "dense", "relative_change": 0.1, "ci95": [0.0, 0.2], "p_value": 0.03}
    text = results.task_moe({"experiment": "task_moe", "meta": meta, "rows": rows, "comparisons": [change]})
    assert "| new_static | 1 | 12 | 40.00 | 40.00 |" in text
    assert "| top_k | dense | +10.0 % | +0.0 to +20.0 | 0.0300 |" in text
    assert "| top_k | 1 | 30.00 |" in text.replace("±", "")
