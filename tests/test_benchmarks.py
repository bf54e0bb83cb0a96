"""What benchmarks share: turns, rows, tables, files. How fast anything is, is no test."""

import json
import sys

import pytest

from benchmarks import measure, moe_layer, peer


def test_rivals_take_turns():
    calls = []
    times = measure.interleaved({n: lambda n=n: calls.append(n) for n in "ab"}, seconds=0, rounds=3)
    assert "".join(calls) == "ab" + "ab" * 3 and set(times) == {"a", "b"}


def test_a_table_says_where_a_target_is_missed():
    rows = [
        measure.row("fast", 1.0, 2.0, 0.6, unit="ms"),
        measure.row("slow", 2.0, 2.0, 0.6),
        {"case": "x", "n": 2000.0},
    ]
    head, _, fast, slow, other = measure.markdown(rows).splitlines()
    assert head == "| case | ours | rival | ratio | target | unit | n |"
    assert fast == "| fast | 1 | 2 | 0.5 | 0.6 | ms |  |"
    assert slow == "| slow | 2 | 2 | 1 (missed) | 0.6 |  |  |" and other.endswith("| 2,000 |")


@pytest.mark.parametrize("skewed", [False, True])
def test_the_layer_is_measured_in_time_and_memory(skewed):
    rows = list(moe_layer.against_dense(32, 16, 4, 2, skewed))
    assert [r["case"] for r in rows] == ["forward", "both", "memory"]
    assert all(r["ratio"] == r["ours"] / r["rival"] > 0 for r in rows)


def test_few_tokens_are_measured_against_reading_the_weights():
    (row,) = moe_layer.against_reading(1, 16, 4, 2)
    assert row["MiB"] == 2 * 3 * 16 * 32 * 4 / 2**20 and row["ours"] > 0  # two of four experts


def test_rows_are_written_after_each_case(tmp_path, monkeypatch, capsys):
    def breaks():
        raise KeyboardInterrupt

    path = tmp_path / "rows.json"
    cases = {"one": lambda: [measure.row("a", 1.0, 2.0, None)], "two": breaks}
    monkeypatch.setattr(sys, "argv", ["bench", "--json", str(path)])
    with pytest.raises(KeyboardInterrupt):
        measure.main("Doc.", cases)
    found = json.loads(path.read_text())
    assert found["rows"] == [{"case": "one: a", "ours": 1.0, "rival": 2.0, "ratio": 0.5, "target": None}]
    assert found["machine"]["platform"] == "cpu"
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "three"])
    with pytest.raises(SystemExit):
        measure.main("Doc.", cases)
    assert "no case contains 'three'; there are: one, two" in capsys.readouterr().err


def test_a_missing_peer_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    shape = peer.Shape(d=16, layers=1, heads=2, hidden=8, experts=2, vocab=16)
    with pytest.raises(SystemExit, match=r"needs torch and transformers: pip install -e '.\[bench\]'"):
        peer.theirs(shape, peer.ours(shape))
