"""What benchmarks share: turns, rows, tables, files. How fast anything is, is no test."""

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import jax
import numpy as np
import pytest

from benchmarks import (
    chain,
    exchange,
    gpu,
    input_pipeline,
    measure,
    merging,
    merging_align,
    moe_layer,
    peer,
    results,
    rtf,
    scaling,
    stream,
    tpu_aot,
)
from benchmarks.merging_settings import Corrector as Merged
from moe_jax import main, tree
from moe_jax.layers.attention import Attention
from moe_jax.layers.ffn import DenseFfn
from moe_jax.layers.param import Rngs
from moe_jax.models.corrector import Corrector
from moe_jax.moe import dispatch
from moe_jax.speech.recognise import Text, Update


def test_rivals_take_turns():
    calls = []
    times = measure.interleaved({n: lambda n=n: calls.append(n) for n in "ab"}, seconds=0, rounds=3)
    assert "".join(calls) == "ab" + "ab" * 3 and set(times) == {"a", "b"}
    calls.clear()
    measure.interleaved({n: lambda n=n: calls.append(n) for n in "ab"}, seconds=0, rounds=2, rouse=1)
    assert "".join(calls) == "ab" + "aabb" * 2


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


def test_points_are_for_the_file_not_for_the_table():
    assert measure.markdown([{"case": "a", "points": {1: 2.0}, "n": 3}]).splitlines()[0] == "| case | n |"


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
    assert found["machine"]["platform"] == "cpu" and found["machine"]["processor"]
    assert found["date"].count("-") == 2 and found["command"]
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "three"])
    with pytest.raises(SystemExit):
        measure.main("Doc.", cases)
    assert "no case contains 'three'; there are: one, two" in capsys.readouterr().err


def test_cases_that_were_measured_apart_lie_in_one_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    cases = {
        name: (lambda n=n: [measure.row("a", float(n), 2.0, None)]) for n, name in enumerate(("one", "two", "six"))
    }

    def measured(*given: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["bench", "--json", str(path), *given])
        measure.main("Doc.", cases)
        return json.loads(path.read_text())

    measured("--only", "six")
    measured("--only", "one")
    cases["one"] = lambda: [measure.row("b", 9.0, 2.0, None)]
    found = measured("--only", "one")
    assert [(r["case"], r["ours"]) for r in found["rows"]] == [("one: b", 9.0), ("six: a", 2.0)]
    assert [c.split(" --only ")[1] for c in found["command"].split("; ")] == ["'six'", "'one'"]
    path.write_text(path.read_text().replace('"platform": "cpu"', '"platform": "tpu"'))
    assert [r["case"] for r in measured("--only", "one")["rows"]] == ["one: b"]  # of another machine
    assert len(measured()["rows"]) == 3


def test_a_missing_peer_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    shape = peer.Shape(d=16, layers=1, heads=2, hidden=8, experts=2, vocab=16)
    with pytest.raises(SystemExit, match=r"needs torch and transformers: pip install -e '.\[bench\]'"):
        peer.theirs(shape, peer.ours(shape))


def test_what_a_program_moves_is_read_from_its_text():
    hlo = """
%body (p: f32[4]) -> f32[4] {
  %a = (f32[2,8]{1,0}, f32[2,8]{1,0}) all-to-all(%x, %y), replica_groups={{0,1},{2,3}}, dimensions={0}
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %b = bf16[4,100]{1,0} all-gather(%p), replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}
  %c = f32[10]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
  %d = f32[] fusion(%b), calls=%all-reduce-like
  %e = (s32[], pred[3]{0}) collective-permute(%b), source_target_pairs={{0,1},{1,2}}
}
"""
    assert list(exchange.collectives(hlo)) == [
        ("all-to-all", True, 128 / 2),  # one of two parts stays
        ("all-gather", False, 800 * 3 / 4),
        ("all-reduce", False, 40 * 2 * 3 / 4),  # as a reduce-scatter and an all-gather
        ("collective-permute", False, 7),
    ]


@pytest.mark.parametrize("skewed", [False, True])
def test_expert_parallelism_is_counted(skewed, monkeypatch):
    monkeypatch.setattr(exchange, "FORMS", {"slots": dispatch.slots})
    (row,) = exchange.compare({"data": 4, "expert": 2}, skewed, (8, 16, 8, 4, 2))
    assert row["case"] == "slots" and row["all-to-all"] == "4 + 0" and row["ratio"] == 1
    # Four times C = 1.25 * 16 * 2 / 4 slots of four experts, of 8 numbers each: half of them go to the other device.
    assert row["moved MiB"] * 2**20 > 4 * 4 * 10 * 8 * 4 / 2


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


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 0.5, 2.0])
def test_a_fit_finds_the_law_that_made_the_points(exponent):
    x = np.array([4, 8, 16, 32, 64])
    found, error = scaling.fit(x, 3 * x**exponent)
    assert found == pytest.approx(exponent, abs=1e-9) and error < 1e-9
    noisy = [scaling.fit(x, x**exponent * np.exp(np.random.default_rng(i).normal(0, 0.1, 5))) for i in range(200)]
    slopes, errors = np.transpose(noisy)
    assert np.mean(np.abs(slopes - exponent) < 3 * errors) > 0.9  # Student's t of three degrees: 0.94
    assert slopes.std() == pytest.approx(np.sqrt(np.mean(errors**2)), rel=0.2)


def test_a_law_that_bends_shows_its_upper_half():
    straight = scaling.law("time", {x: 5.0 * x for x in (1, 2, 4, 8)}, 1, "ms")
    assert straight["ours"] == pytest.approx(1) and straight["ratio"] == pytest.approx(1)
    assert straight["upper half"] is None and straight["points"][8] == 40.0
    bent = scaling.law("time", {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0, 16: 4.0, 32: 16.0, 64: 64.0}, 0, "ms")
    assert bent["upper half"] > bent["ours"] > 0.5
    assert bent["ratio"] == pytest.approx(2 ** bent["ours"]) and bent["ratio"] > bent["target"]


def test_a_sweep_has_a_row_for_each_cost(monkeypatch):
    """Each point costs as many milliseconds as it has tokens, and as many bytes as its input."""
    program = lambda function, moe, x, *_: measure.Program(lambda: None, x.nbytes, 0.0, str)  # noqa: E731
    costs = lambda rivals, **_: {name: 1e-3 * int(name.split()[1]) for name in rivals}  # noqa: E731
    monkeypatch.setattr(scaling, "program", program)
    monkeypatch.setattr(scaling, "interleaved", costs)
    rows = list(scaling.swept(scaling.Sweep("T", (16, 32, 64), 1, 2, scaling.Shape(d=8, E=2, k=1))))
    assert [r["case"] for r in rows] == ["forward, time", "both, time", "forward, memory", "both, memory"]
    assert [r["rival"] for r in rows] == [1, 1, 2, 2]
    assert rows[0]["points"] == pytest.approx({16: 16, 32: 32, 64: 64}) and rows[0]["ratio"] == pytest.approx(1)
    assert rows[3]["points"] == {T: T * 8 * 4 / 2**20 for T in (16, 32, 64)} and rows[3]["ratio"] == pytest.approx(0.5)


def test_devices_share_rows_and_experts():
    """On the eight devices of the tests; the sweep has a process for each number of them."""
    found = {layout: scaling.per_device(layout, scaling.Shape(T=64, d=16)) for layout in ("data", "expert")}
    weights = 8 * 3 * 16 * 32 * 4 / 2**20
    assert found["data"]["arguments"] > weights > 4 * found["expert"]["arguments"]
    assert all(cost > 0 for of in found.values() for cost in of.values())


def test_a_drawing_stands_alone():
    rows = [scaling.law(f"a < {n}", {x: float(x**n) for x in (1, 2, 4, 8)}, n, "ms") for n in (1, 2)]
    root = ElementTree.fromstring(scaling.draw("tokens", rows))
    names = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a < 1: 1.00 ± 0.00, law 1" in names and "a < 2: 2.00 ± 0.00, law 2" in names
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) == 4  # two costs and their two laws


def counter(first: int):
    numbers = iter(range(first, 100))
    return lambda times: [next(numbers) for _ in range(times)]


def test_a_rival_apart_keeps_its_state_in_its_own_process():
    with measure.apart(counter, 5) as call:
        assert (call(2), call(1)) == ([5, 6], [7])


def test_collectives_are_counted_once_though_they_start_and_end():
    hlo = """
      %a2a = (bf16[8]{0}, bf16[8]{0}) all-to-all(%x, %y), channel_id=1
      %start = (f32[2]{0:T(128)}, f32[16]{0}) all-gather-start(%z), dimensions={0}
      %done = f32[16]{0} all-gather-done(%start)
      ROOT %sum = f32[] all-reduce(%done), to_apply=%add.all-reduce
      %use = f32[] fusion(%all-reduce.3), calls=%all-to-all.clone
      %other = f32[8]{0} all-gather(%w), dimensions={0}
    """
    assert tpu_aot.collectives(hlo) == {"all-gather": 2, "all-reduce": 1, "all-to-all": 1}


def test_kernels_are_counted_by_what_they_declare():
    hlo = """
      %a = f32[8]{0} custom-call(%x), backend_config={"custom_call_config":{"cost_estimate":{"flops":"12",\
"transcendentals":"0","bytes_accessed":"34","remote_bytes_transferred":"0"}}}
      %b = f32[8]{0} custom-call(%x), custom_call_target="AllocateBuffer"
    """.replace("\\\n", "")
    assert tpu_aot.kernels(hlo) == [(12, 34)]


def test_a_row_of_two_programs_names_both():
    ours = tpu_aot.Estimate(2e-3, 2**20, 3e9, 4e9, {"all-to-all": 4, "all-reduce": 1}, [], 1.0)
    row = tpu_aot.beside("x", ours, tpu_aot.Estimate(1e-3, 2**21, 1e9, 1e9, {}, [], 1.0), 1.25)
    assert (row["ours"], row["rival"], row["ratio"], row["unit"]) == (2.0, 1.0, 2.0, "ms")
    assert (row["MiB"], row["rival MiB"], row["GFLOP"], row["GB"]) == (1.0, 2.0, 3.0, 4.0)
    assert row["collectives"] == "4 all-to-all, 1 all-reduce" and row["rival collectives"] == ""


def test_a_missing_compiler_for_tpus_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs libtpu, the compiler for TPUs: pip install -e '.\[tpu-aot\]'"):
        tpu_aot.devices("v5e:2x2")


ONE_LAYER = """
from benchmarks import tpu_aot
forward, *_ = tpu_aot.layer("v5e", tpu_aot.Shape(256, 128, 4, 2, T=512, L=256))
assert forward["ours"] > 0 and forward["GFLOP"] >= 0.9 * forward["rival GFLOP"] > 0 and not forward["collectives"]
"""


def test_a_layer_compiles_for_a_tpu_or_one_line_says_what_is_missing():
    """In a process of its own: libtpu takes a lock."""
    done = subprocess.run([sys.executable, "-c", ONE_LAYER], stderr=subprocess.PIPE, text=True, timeout=300)
    if importlib.util.find_spec("libtpu"):
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            "this benchmark needs libtpu, the compiler for TPUs: pip install -e '.[tpu-aot]'"
        ]


def test_grouped_products_are_measured_beside_a_dense_one_and_the_layer_too():
    shape = gpu.Shape(T=16, d=8, hidden=4, E=4, k=2)
    rows = list(gpu.rates(shape, skewed=True))
    assert [r["case"] for r in rows] == [f"{n}, {way}" for n in ("product", "gradients") for way in gpu.WAYS]
    assert gpu.loads(32, 4, True).tolist()[0] == 16 and all(
        gpu.loads(32, 4, skew).sum() == 32 for skew in (True, False)
    )
    assert [r["case"] for r in gpu.layers(shape)] == ["forward", "both", "memory"]


def test_rivals_of_equal_size():
    made = jax.eval_shape(lambda: rtf.models(16, 1, 32, 12))
    sizes = {name: tree.count(tree.flatten(m)) for name, m in made.items()}
    assert sizes["moe top 1"] == sizes["moe top 2"] > 2 * sizes["dense"]
    assert 0.95 < sizes["wide"] / sizes["moe top 2"] < 1.05
    work = {name: sum(x.size * m.active(path) for path, x in tree.flatten(m).items()) for name, m in made.items()}
    for ours, rival, target in rtf.RIVALS:
        assert target is None or 0.95 < work[ours] / work[rival] < 1.1
    assert made["moe top 1"].ffn.router.k == 1 and made["moe top 2"].ffn.router.k == 2


@pytest.mark.parametrize("models", [1, 2, 3, 4, 5, 7])
def test_models_that_merge_two_and_two_all_count_alike(models):
    def shares(recipe, whole=1.0):
        total = sum(part["weight"] for part in recipe["models"])
        for part in recipe["models"]:
            share = whole * part["weight"] / total
            yield from shares(part["merge"], share) if "merge" in part else [(part["path"], share)]

    names = "abcdefg"[:models]
    recipe = merging.paired([*names], "slerp")
    assert len(recipe["models"]) <= 2 and dict(shares(recipe)) == pytest.approx(dict.fromkeys(names, 1 / models))


def test_a_merge_is_measured_from_the_base_to_the_tasks_own_models():
    class Two(Merged):
        tasks = ("asr", "ocr")

    def run(asr: float, ocr: float, wrong: int) -> dict:
        return {
            "nll": {"asr": asr, "ocr": ocr},
            "lines": {t: [[wrong, 10]] * 9 for t in ["asr", "ocr"]},
            "date": "d",
        }

    found = {
        ("base", 0): run(3.0, 2.0, 4),
        ("separate/asr", 0): run(1.0, 9.0, 1),  # of its own task alone
        ("separate/ocr", 0): run(9.0, 1.0, 1),
        ("joint", 0): run(1.5, 1.0, 2),
        ("lors", 0): run(2.0, 1.5, 3),
    }
    rows = merging.table(Two(), found, "command")["rows"]
    value = {(r["arm"], r["task"], r["metric"]): r["value"] for r in rows}
    assert {arm: value[arm, "mean", "npf"] for arm in ("base", "separate", "joint", "lors")} == {
        "base": 0.0,
        "separate": 1.0,
        "joint": pytest.approx((2.5 - 1.25) / 1.5),
        "lors": pytest.approx(0.5),
    }
    assert value["lors", "asr", "interference"] == 1.0 and value["lors", "ocr", "interference"] == 0.5
    assert value["lors", "asr", "wer"] == pytest.approx(0.3)
    (change,) = (r for r in rows if (r["arm"], r["task"], r["metric"]) == ("lors", "ocr", "wer"))
    assert change["relative_change"] == pytest.approx(0.5) and change["p_value"] < 0.05
    for (arm, seed), one in list(found.items()):
        found[arm, seed + 1] = run(1.5, 1.0, 2) if arm == "lors" else one  # as `joint`: no change, and it counts
    line = next(x for x in results.merging(merging.table(Two(), found, "c")).splitlines() if x.startswith("| lors"))
    assert line == "| lors | 2 | 25.00 (+25.0 %) | 25.00 (+25.0 %) | 0.67 ± 0.24 | +0.750, +0.250 |"
    found["base", 0]["base"], found["lors", 0]["base"] = "a", "b"
    with pytest.raises(ValueError, match="2 different bases"):
        merging.table(Two(), found, "c")


def test_the_table_of_aligned_merges():
    nll = {"asr": 1.0, "ocr": 2.0}
    pair = {"nll": {arm: nll for arm in merging_align.ARMS}, "moved": 0.75, "date": "d"}
    made = merging_align.table({"0": {"nll": {"alone": nll}, "date": "d"}, "0-1": pair, "0-2": pair}, "c")
    lines = results.align(made).splitlines()
    assert "| aligned | 2 | 1.000 ± 0.000 | 2.000 ± 0.000 | 1.500 ± 0.000 | 75 |" in lines
    assert "| alone | 1 | 1.000 | 2.000 | 1.500 |  |" in lines


def test_the_table_of_a_chain_has_a_first_pass_a_seed():
    row = dict(
        task="asr", set="all", metric="wer", first_pass=0.3, corrected=0.2, oracle_nb=0.1, oracle_cp=0.05, lines=9
    )
    row |= dict(oracle_cp=0.05, relative_change=-0.33, ci95=[-0.5, -0.1], p_value=0.01, fixed=3, broken=1)
    found = {"scores": {"rows": [row], "meta": {"split": "test", "date": "d"}}}
    made = chain.table({0: found, 1: found}, "c")
    values = {(r["arm"], r["seed"]): r["value"] for r in made["rows"]}
    assert values["first pass", 0] == values["first pass", 1] == 0.3
    assert values["corrected", 1] == 0.2 and values["oracle n-best", 0] == 0.1
    assert "| asr | wer ↓ | corrected | 20.00 ± 0.00 | 2 | -33.0 % |" in results.table(made)


def test_a_chain_lists_what_every_reader_hears(tmp_path, capsys):
    class Reader:
        rate = 16000

        def __init__(self, *texts):
            self.texts = texts

        def __call__(self, samples):
            return [Text(t, 0.0, ()) for t in self.texts]

    path = tmp_path / "list.jsonl"
    wav = main.shipped("prompts/prompts.jsonl")
    line = json.loads(Path(wav).read_text("utf-8").splitlines()[0])
    line |= {"audio": str(Path(wav).parent / line["audio"]), "split": "train"}
    (tmp_path / "torn.wav").write_bytes(b"RIFF")
    unfit = [line | {"audio": audio, "duration": 1.0} for audio in ("torn.wav", "none.wav")]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*unfit, line]))
    found = chain.lists([Reader("a", "b"), Reader()], str(path), "train")
    assert found == [{"hypotheses": h, "reference": line["text"]} for h in (["a", "b"], [""])]
    said = capsys.readouterr().out
    assert "train: 2 utterances are left out:" in said and "torn.wav" in said and f"{path}:2" in said


def test_a_stream_is_timed_where_the_encoder_runs_and_its_memory_all_along(monkeypatch):
    """Ten seconds: a chunk fills at every fourth portion, and memory has a peak that passes before the end."""
    number = round(10 / stream.PORTION)
    updates = [
        Update([], False, stream.PORTION * i, 0.02 if i % 4 == 0 else 0.001, 0.0, 0.64 * (i // 4))
        for i in range(1, number + 1)
    ]
    updates.append(Update([], True, 10.0, 0.3, 0.0, 10.0))
    held = iter([100.0, 110.0] + [105.0] * 20 + [220.0] + [105.0] * number)
    monkeypatch.setattr(stream, "memory", lambda: next(held))
    rows = {row["case"]: row for row in stream.timed(updates, 10 / 60)}
    assert [rows[f"portion, p{p}"]["ours"] for p in (50, 95, 99, 100)] == [0.02] * 4
    assert rows["portion, p50"]["number"] == number // 4 and rows["final, p50"]["ours"] == 0.3
    assert (rows["memory"]["ours"], rows["memory"]["rival"]) == (220.0, 110.0)
    assert rows["real-time factor"]["ours"] == pytest.approx(sum(u.took for u in updates) / 10)
