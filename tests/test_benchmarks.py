"""What benchmarks share: turns, rows, tables, files. How fast anything is, is no test."""

import json
import sys
from functools import partial

import numpy as np
import pytest

from benchmarks import input_pipeline, measure, moe_layer, peer
from moe_jax.layers.attention import Attention
from moe_jax.layers.ffn import DenseFfn
from moe_jax.layers.param import Rngs
from moe_jax.models.corrector import Corrector


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


def test_made_up_examples_follow_the_laws_and_come_again():
    examples = input_pipeline.made_up(4000, 256, 300)
    again = input_pipeline.made_up(4000, 256, 300)
    assert all(
        (a.tokens == b.tokens).all() and (a.roles == b.roles).all() for a, b in zip(examples, again, strict=True)
    )
    sizes = np.array([len(e.tokens) for e in examples])
    assert sizes.min() >= input_pipeline.SHORTEST and sizes.max() == 256  # the longest of "mt" are cut
    for number, (share, mean, deviation) in enumerate(input_pipeline.LAWS.values(), 1):
        logs = np.log(sizes[[e.task == number for e in examples]])
        assert abs(len(logs) / 4000 - share) < 0.03 and abs(logs.mean() - mean) < 0.05
        assert abs(logs.std() - deviation) < 0.05
    assert all(e.tokens.min() > 0 and e.tokens.max() < 300 and {*e.roles} == {1, 2} for e in examples)


def test_rows_in_order_close_at_the_first_that_does_not_fit():
    assert [input_pipeline.in_order(sizes, 10) for sizes in ([], [10], [6, 4], [6, 5, 5], [6, 5, 4, 6])] == [
        0,
        1,
        1,
        2,
        3,
    ]


def test_the_input_is_measured_on_a_folder_of_its_own(monkeypatch):
    def once(rivals, **_):
        for call in rivals.values():
            call()
        return dict.fromkeys(rivals, 2.0)

    def tiny(vocab):
        parts = {"attention": partial(Attention, heads=2), "ffn": partial(DenseFfn, hidden=8)}
        return Corrector(d=16, layers=1, vocab=vocab, **parts, rngs=Rngs(params=0))

    monkeypatch.setattr(input_pipeline, "interleaved", once)
    monkeypatch.setattr(input_pipeline, "EXAMPLES", 300)
    monkeypatch.setattr(input_pipeline, "quickstart", tiny)
    rows = {
        (name, r["case"]): r for name in ("pack", "read B8", "wait", "resume") for r in input_pipeline.CASES[name]()
    }
    assert rows["read B8", "batch"]["rows/s"] == 4.0  # eight rows in the two seconds that it took
    assert rows["pack", "pack"]["rows/s"] == 1000 / rows["pack", "pack"]["ours"]
    assert rows["pack", "padding"]["ratio"] < 1 and rows["resume", "state"]["ours"] < 1000
    assert {("pack", "write"), ("read B8", "gather"), ("wait", "step"), ("resume", "first batch")} < set(rows)
