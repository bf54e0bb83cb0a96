"""Scores by hand, other systems beside ours, and nothing dropped, filled in or half-written."""

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import shipped  # noqa: F401  a fixture: a tiny checkpoint with a guard of 2.5 nats

from benchmarks import zero_shot
from moe_jax import cli, evaluate, formats, pipeline, score
from moe_jax.metrics.normalisers import HYPO2TRANS, SPEECH

# Word errors of the first pass, o_nb and o_cp: 1 1 0 of 2, 1 0 0 of 3, 2 1 1 of 5.
ONE = [
    {"input": ["a x", "y b"], "output": "a b"},
    {"input": ["the cat sit", "the cat sat"], "output": "The cat sat."},
]
TWO = [
    {
        "input1": "he went home to.",
        "input2": "he went home today. he want home too. ",
        "output": "he went home it's today",
    }
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows), "utf-8")
    return path


@pytest.fixture
def one(tmp_path) -> Path:
    return write(tmp_path / "one.json", ONE)


@pytest.fixture
def two(tmp_path) -> Path:
    path = tmp_path / "two.json.xz"
    path.write_bytes(lzma.compress(json.dumps(TWO).encode()))
    return path


def run(*argv: Any, load=lambda checkpoint: 1 / 0) -> int:
    parser = argparse.ArgumentParser()
    score.add_arguments(parser)
    return score.main(parser.parse_args([str(a) for a in argv]), load)


def mends(records):
    """Rewrites every first pass; its guard lets only short ones through."""
    return [
        ("a b" if len(r.hypotheses[0]) < 5 else r.hypotheses[0], "a b" if len(r.hypotheses[0]) < 5 else "no")
        for r in records
    ]


def rows_of(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(r["set"], r["arm"]): r for r in json.loads((folder / "table.json").read_text())["rows"]}


def test_first_pass_oracles_average_and_pooled_by_hand(one, two, tmp_path):
    assert run("--input", one, two, "--output", tmp_path / "out") == 0
    found = {key: row["value"] for key, row in rows_of(tmp_path / "out").items()}
    names = (score.FIRST, *score.ORACLES)
    for name, values in {
        "one": (2 / 5, 1 / 5, 0),
        "two": (2 / 5, 1 / 5, 1 / 5),
        score.AVERAGE: (2 / 5, 1 / 5, 1 / 10),
        score.ALL: (4 / 10, 2 / 10, 1 / 10),
        "distinct hypotheses: 2": (2 / 5, 1 / 5, 0),
        "distinct hypotheses: 3": (2 / 5, 1 / 5, 1 / 5),
    }.items():
        assert [found[name, arm] for arm in names] == pytest.approx(values), name
    assert rows_of(tmp_path / "out")[score.ALL, score.FIRST]["lines"] == 3


def test_as_hypo2trans_scores_punctuation_is_deleted_and_lines_weigh_alike(one, tmp_path):
    assert run("--input", one, "--normaliser=hypo2trans", "--output", tmp_path / "out") == 0
    row = rows_of(tmp_path / "out")["one", score.FIRST]
    assert row["value"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert (row["metric"], row["normaliser"]) == ("mean_line_wer", "hypo2trans|v1")
    assert HYPO2TRANS("It's twenty-one, 21 of_them\nThat is all") == "its twentyone of_them"


def test_a_checkpoint_stands_guarded_and_unguarded_beside_another_system(one, two, tmp_path, capsys):
    (tmp_path / "api.txt").write_text("a b\nthe cat sat", "utf-8")
    (tmp_path / "api.jsonl").write_text('{"id": 7, "prediction": ""}\n')
    out = tmp_path / "out"
    given = [f"api={tmp_path / name}" for name in ("api.txt", "api.jsonl")]
    loaded = []
    argv = ["--checkpoint", "runs/x", "--input", one, two, "--output", out, "--predictions", *given]
    assert run(*argv, load=lambda checkpoint: loaded.append(checkpoint) or mends) == 0
    assert loaded == ["runs/x"]
    found = rows_of(out)
    values = {arm: [found[s, arm]["value"] for s in ("one", "two")] for arm in ("x", "x, unguarded", "api")}
    assert values == {"x": [1 / 5, 2 / 5], "x, unguarded": [3 / 5, 1.0], "api": [0.0, 1.0]}
    ours = found["one", "x"]
    assert (ours["relative_change"], ours["fixed"], ours["broken"]) == (pytest.approx(-0.5), 1, 0)
    assert ours["p_value"] == 1 and found["one", score.FIRST]["p_value"] is None  # one line differs: no evidence
    assert found[score.AVERAGE, "api"]["value"] == 0.5 and found[score.ALL, "api"]["value"] == 0.5
    printed = capsys.readouterr().out
    assert printed == (out / "table.md").read_text("utf-8")
    assert "| one | 2 | 40.00 | 20.00 | 0.00 | 20.00 (-50.0 %) | 60.00 (+50.0 %) | 0.00 (-100.0 %) |" in printed
    assert sorted(path.name for path in out.iterdir()) == ["one.jsonl", "table.json", "table.md", "two.jsonl"]
    # what was written is itself a file of predictions
    assert score.read_predictions(out / "one.jsonl", 2) == ["a b", "the cat sit"]
    assert score.read_predictions(out / "one.jsonl", 2, ("unguarded",)) == ["a b", "no"]


def test_intervals_hold_the_value_and_a_clear_change_is_starred():
    records = [line("a b c d", "a b c x") for _ in range(40)]
    texts = {"s": ["a b c d"] * 30 + ["a b c x"] * 10}
    rows = score.score({"s": records}, {("ours", None): texts}, family="asr", normaliser=SPEECH)
    mine = next(row for row in rows if row["arm"] == "ours")
    assert mine["value"] == 10 / 160 and mine["value_ci95"][0] < 10 / 160 < mine["value_ci95"][1]
    assert mine["ci95"][0] < mine["relative_change"] == -0.75 < mine["ci95"][1] < 0
    assert mine["p_value"] < 0.001
    assert "| 6.25 (-75.0 %*) |" in score.to_markdown(rows)


def line(reference: str, *hypotheses: str) -> score.Record:
    return score.Record(1, hypotheses, (), None, reference, "", 1)


def test_seeds_share_a_column():
    texts = {seed: {"s": [text]} for seed, text in ((0, "a b"), (1, "a x"))}
    systems = {("ours", seed): of_set for seed, of_set in texts.items()}
    table = score.to_markdown(score.score({"s": [line("a b", "a x")]}, systems, family="asr", normaliser=SPEECH))
    assert "| oracle compositional | ours (2 seeds) |" in table
    assert "| s | 1 | 50.00 | 50.00 | 50.00 | 25.00 (-50.0 %) |" in table


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "a b\n", "p.txt: 1 predictions for 2 records: record 2 has no prediction; give one a record, in"),
        ("p.txt", "a\nb\nc\n", "p.txt: 3 predictions for 2 records: record 3 has no counterpart; give one"),
        ("p.txt", "\na b\n", 'p.txt:1: no prediction for record 1; write one, or give JSONL with {"corrected": ""}'),
        ("p.txt", "a\n \nb\n", "p.txt:2: no prediction for record 2; write one, or give JSONL"),
        ("p.txt", "a\nb\udcff\n", "p.txt:2: not UTF-8: byte 0xff"),
        (
            "p.jsonl",
            '{"prediction": "a"}\n{"prediction": null}',
            "p.jsonl:2: no prediction for record 2; give it a text",
        ),
        ("p.jsonl", '{"prediction": "a"}\n{"hypotheses": ["a"]}', "p.jsonl:2: no prediction for record 2; give it a"),
        ("p.jsonl", '{"prediction": "a"}\n{"prediction": ', "p.jsonl:2: not JSON"),
        ("p.jsonl", '{"prediction": "a"}\n{"prediction": "\udcff"}', "p.jsonl:2: not UTF-8"),
        (
            "p.json",
            '[{"corrected": 3}, {"corrected": "b"}]',
            "p.json:1: no prediction for record 1; give it a text under",
        ),
        ("p.json", '["a", "b"]', "p.json:1: no prediction for record 1"),
        ("p.tsv", "a\nb\n", "p.tsv: predictions in columns are not read; give text, JSON or JSONL"),
        ("p.csv", "a\nb\n", "p.csv: cannot tell its format from its name"),
        ("p.txt", "", "p.txt: the file is empty"),
    ],
)
def test_predictions_that_are_missing_are_named(one, tmp_path, name, text, said):
    path = tmp_path / name
    path.write_text(text, "utf-8", "surrogateescape")
    with pytest.raises(ValueError) as caught:
        run("--input", one, "--checkpoint", "x", "--output", tmp_path / "out", "--predictions", f"api={path}")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_predictions_in_json_need_no_hypotheses(tmp_path):
    path = write(tmp_path / "p.json", [{"prediction": "a"}, {"input": ["x"], "corrected": "b", "prediction": "c"}])
    assert score.read_predictions(path, 2) == ["a", "b"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"input": ["a"]}], "s.json:1: the record has no reference; scoring needs the right text under"),
        (
            [{"input": ["a"], "output": "a", "task": "ocr"}],
            "its task is 'ocr', not 'asr'; score it apart, with --family ocr",
        ),
        ([{"output": "a"}], "s.json:1: record 1: no hypotheses"),
        ([], "s.json: holds no records"),
    ],
)
def test_sets_that_cannot_be_scored_are_named(tmp_path, rows, said):
    with pytest.raises(ValueError) as caught:
        run("--input", write(tmp_path / "s.json", rows))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_names_are_given_once(one, two, tmp_path):
    text = tmp_path / "p.txt"
    text.write_text("a b\nb\n")
    (tmp_path / "b").mkdir()
    other = write(tmp_path / "b" / "one.json", ONE)
    for argv, said in [
        (["--input", one, other], "a set called 'one' would stand in the table twice; rename the file"),
        (["--input", write(tmp_path / "all.json", ONE)], "a set called 'all' would stand"),
        (
            ["--input", one, two, "--predictions", f"api={text}"],
            "1 files of 'api' for 2 sets; give api=FILE once a set",
        ),
        (["--input", one, "--predictions", f"{text}"], "write NAME=FILE, with a name that the table does not have"),
        (["--input", one, "--predictions", f"first pass={text}"], "write NAME=FILE"),
        (["--input", one, "--checkpoint", "runs/x", "--predictions", f"x={text}"], "two systems are called 'x'"),
        (["--input", one, "--output", tmp_path / "b"], "b: is there already; give another --output"),
        (["--input", one, "--output", tmp_path / "none" / "out"], "none: no folder to write to; create it"),
    ]:
        with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
            run(*argv)
        assert said in str(caught.value)


def test_a_stop_leaves_nothing(one, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    argv = ["--input", one, "--checkpoint", "x", "--output", tmp_path / "out"]
    assert run(*argv, load=lambda checkpoint: interrupted) == 130
    assert capsys.readouterr().err.endswith("stopped; nothing was written\n")
    monkeypatch.setattr(score.os, "replace", interrupted)  # all is written aside by then
    assert run(*argv, load=lambda checkpoint: mends) == 130
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_scores_and_says_what_is_wrong_in_one_line(one, tmp_path, capsys):
    assert cli.entry(["score", "--input", str(one)]) == 0
    assert "| one | 2 | 40.00 | 20.00 | 0.00 |" in capsys.readouterr().out
    assert cli.entry(["score", "--input", str(tmp_path / "none.json")]) == 2
    err = capsys.readouterr().err
    assert "none.json: cannot be read" in err and err.count("\n") == 1


def test_a_checkpoint_is_guarded_as_it_says_itself(one, shipped, monkeypatch):  # noqa: F811
    margins = iter([2.0, 3.0])

    def propose(_, records, progress=True):
        return [pipeline.Proposal(r.hypotheses[0], "new", next(margins), 0.0) for r in records]

    monkeypatch.setattr(evaluate, "propose", propose)
    correct = cli.scored(str(shipped))
    assert correct(score.read_sets([one], "asr")["one"]) == [("a x", "new"), ("new", "new")]


def test_zero_shot_corrects_a_set_once(one, two, tmp_path):
    assert zero_shot.system(Path("runs/neko/neko-0")) == ("neko", 0)
    assert zero_shot.system(Path("x/base.safetensors")) == ("base.safetensors", None)
    sets = score.read_sets([one, two], "asr")
    (tmp_path / "m.safetensors").write_bytes(b"weights")
    (tmp_path / "cache").mkdir()
    made = zero_shot.corrected(tmp_path / "m.safetensors", sets, tmp_path / "cache", lambda checkpoint: mends)
    again = zero_shot.corrected(tmp_path / "m.safetensors", sets, tmp_path / "cache", lambda checkpoint: 1 / 0)
    assert made == again == score.corrected(mends, sets)
    (tmp_path / "m.safetensors").write_bytes(b"others")
    with pytest.raises(ZeroDivisionError):
        zero_shot.corrected(tmp_path / "m.safetensors", sets, tmp_path / "cache", lambda checkpoint: 1 / 0)
    table = zero_shot.table(sets, score.ours(("m", None), *made), "the command")
    assert {row["metric"] for row in table["rows"]} == {"wer", "mean_line_wer"}
    assert table["meta"]["command"] == "the command"


def test_mixed_sets_are_grouped_sampled_by_a_hash_and_leave_out_what_was_trained(tmp_path):
    def row(task, name, i):
        return {"task": task, "source_set": name, "hypotheses": [f"a {i}"], "reference": f"b {i}"}

    rows = [row("ocr", "old", i) for i in range(5)] + [row("gec", "new", i) for i in range(9)]
    rows += [row("tn", f"nemo-{kind}", 0) for kind in ("date", "time")]
    file, turned = tmp_path / "m.jsonl", tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    turned.write_text("".join(json.dumps(r) + "\n" for r in reversed(rows)))
    sets = zero_shot.mixed([file], 4, known={("ocr", "old")})
    assert {name: len(records) for name, records in sets.items()} == {"gec/new": 4, "tn/nemo": 2}
    again = zero_shot.mixed([turned], 4, known={("ocr", "old")})
    assert {r.reference for r in sets["gec/new"]} == {r.reference for r in again["gec/new"]}
    systems = {("perfect", 0): {name: [str(r.reference) for r in records] for name, records in sets.items()}}
    made = zero_shot.unseen(sets, systems, "the command")
    perfect = [r for r in made["rows"] if r["arm"] == "perfect"]
    assert {(r["task"], r["set"], r["value"]) for r in perfect} == {("gec", "gec/new", 0), ("tn", "tn/nemo", 0)}
    file.write_text(json.dumps({"hypotheses": ["a"], "reference": "b", "task": "ocr"}) + "\n")
    with pytest.raises(formats.FormatError, match=r"m\.jsonl:1.*source_set"):
        zero_shot.mixed([file], 4, known=set())


def test_shipped_sets_are_known():
    assert {("asr", "austen-whisper"), ("ocr", "web"), ("gec", "codespell-web")} <= zero_shot.shipped()
