"""Sweeps: which runs there are, what is run again, and what stands in the table; and runs side by side."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from moe_jax import cli, compare, sweep

ROOT = Path(__file__).parents[1]
TOY = '''
import json, os, time
from pathlib import Path

def job(run_dir, rate, seed, word="x"):
    """Fails for a negative rate; else its score is a function of rate and seed."""
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "times", "a") as file:
        file.write("x")
    if rate < 0:
        raise ValueError(f"rate={rate} is below 0")
    if (folder.parent / "stop").exists():
        os._exit(143)
    if (folder.parent / "slow").exists():
        from moe_jax.partfile import Signals, Stopped
        with Signals("saving") as signals:
            (folder / "begun").touch()
            for _ in range(600):
                time.sleep(0.05)
                if signals.caught:
                    break
            time.sleep(1)  # to save
            (folder / "saved").touch()
            raise Stopped(signals.caught, "saved; the same command goes on")
    rows = [{"task": "asr", "set": "all", "metric": "wer", "corrected": rate + seed / 100},
            {"task": "asr", "set": "web", "metric": "wer", "corrected": 9.0}]
    (folder / "scores.json").write_text(json.dumps({"rows": rows}))
    log = [{"step": s, "loss": 1 / s, "valid/loss": rate + 1 / s} for s in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in log))
    bound = {"x/gin.macro": {"value": 1}, "RATE/gin.macro": {"value": rate}, "toy.job": {"word": word}}
    said = {"model": {"class": "M", "args": {"d": int(rate * 10)}}, "seed": seed, "config": bound}
    (folder / "config.json").write_text(json.dumps(said))
'''
GIN = """
import toy
from moe_jax import main
RATE = 0.5
SEED = 0
RUN_DIR = ''
main.run.jobs = [@toy.job]
toy.job.rate = %RATE
toy.job.seed = %SEED
toy.job.run_dir = %RUN_DIR
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "toy.gin").write_text("from __gin__ import dynamic_registration\n" + GIN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> int:
        return cli.entry(["sweep", "--gin_file=toy.gin", "--output=out", *arguments])

    return call


def test_a_grid_is_all_combinations_and_commas_in_brackets_belong_to_a_value():
    points = sweep.grid(["A=1,2", 'MAP={"asr": [0, 1]},None', "T='a,b'"])
    assert points == [{"A": a, "MAP": m, "T": "'a,b'"} for a in "12" for m in ('{"asr": [0, 1]}', "None")]
    assert sweep.grid([]) == [{}]
    for wrong in ("A", "=1", "A=", "A=,"):
        with pytest.raises(ValueError, match="write NAME=VALUE"):
            sweep.grid([wrong])
    with pytest.raises(ValueError, match="A is given twice"):
        sweep.grid(["A=1", "A=2"])


def test_names_are_plain_distinct_and_safe():
    points = [
        {},
        {"RATE": "0.1"},
        {"a/b.RATE": "0.1"},
        {"a/c.RATE": "0.1"},
        {"optim.adamw.weight_decay": "0.1"},
        {"optim.muon_adam.weight_decay": "0.1"},
        {"A": "1", "B": "2"},
        {"A": "1,B=2"},
        {"MAP": '{"asr": 1}'},
        {"MAP": '{"asr": 2}'},
        {"X": "../../etc"},
        {"X": "y" * 500},
    ]
    found = [sweep.name(p) for p in points]
    assert found[:2] == ["base", "RATE=0.1"] and len(set(found)) == len(points)
    assert found[2].startswith("RATE=0.1.")  # readable, and with a digest of what was left out
    assert all("/" not in n and len(n) < 100 for n in found)


def test_a_sweep_runs_what_is_not_finished_and_tables_all_of_it(toy, tmp_path, capfd):
    assert toy("--grid=RATE=0.1,0.2", "--seeds", "0", "1") == 0
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    found = {(r["point"]["RATE"], r["seed"], r["metric"]): r["value"] for r in rows}
    assert found["0.1", 1, "asr wer"] == pytest.approx(0.11) and found["0.2", 0, "valid loss"] == pytest.approx(0.7)
    assert len(found) == 8
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| RATE=0.1 | 2 | 0.6 ± 0 | 0.105 ± 0.064 |" in table  # t(0.975, 1) = 12.7, times 0.005
    picture = ET.fromstring((tmp_path / "out" / "table.svg").read_text())
    assert picture.tag.endswith("svg") and "RATE=0.2" in "".join(picture.itertext())
    assert toy("--grid=RATE=0.1,0.2,0.3", "--seeds", "0", "1") == 0  # grows
    times = {p.parent.name: p.read_text() for p in (tmp_path / "out").rglob("times")}
    assert len(times) == 6 and set(times.values()) == {"x"}
    assert "table.svg" in capfd.readouterr().out


def test_a_failure_is_said_and_the_others_go_on_and_a_stop_stops(toy, tmp_path, capfd):
    assert toy("--grid=RATE=-1.0,0.2") == 1
    said = capfd.readouterr().err
    assert "error: rate=-1.0 is below 0" in said and "1 of 2 runs failed: out/RATE=-1.0-0" in said
    (tmp_path / "out" / "stop").touch()
    assert toy("--grid=RATE=0.3,0.4") == 143
    assert "stopped; the same command goes on with out/RATE=0.3-0" in capfd.readouterr().err
    assert not (tmp_path / "out" / "RATE=0.4-0").exists()


@pytest.mark.parametrize(
    ("signum", "send", "times"),
    [(signal.SIGINT, os.killpg, 1), (signal.SIGINT, os.kill, 2), (signal.SIGTERM, os.kill, 1)],
    ids=["terminal", "notebook", "scheduler"],
)
def test_a_signal_stops_a_sweep_when_its_run_has_saved(signum, send, times, toy, tmp_path):
    """Ctrl-C goes to the whole group, from a terminal; to the sweep alone, maybe, from elsewhere."""
    run = tmp_path / "out" / "RATE=0.3-0"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "slow").touch()
    command = [sys.executable, "-m", "moe_jax.cli", "sweep", "--gin_file=toy.gin", "--output=out"]
    command += ["--grid=RATE=0.3,0.4"]
    sent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        until = time.monotonic() + 60
        while not (run / "begun").exists() and sent.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        for _ in range(times):
            send(sent.pid, signum)
            time.sleep(0.3)
        _, said = sent.communicate(timeout=60)
    finally:
        if sent.poll() is None:
            os.killpg(sent.pid, signal.SIGKILL)
    assert sent.returncode == 128 + signum, said
    assert (run / "saved").exists() and not (tmp_path / "out" / "RATE=0.4-0").exists()
    assert "stopped; the same command goes on with out/RATE=0.3-0" in said and "Traceback" not in said


def test_a_run_that_a_signal_ends_was_stopped_and_has_not_failed(toy, tmp_path, capfd, monkeypatch):
    for code, said in ((-signal.SIGINT, 130), (-signal.SIGTERM, 143), (130, 130), (143, 143)):
        monkeypatch.setattr(sweep, "_waited", lambda command, code=code: (code, 0))
        assert toy("--grid=RATE=0.3,0.4") == said
        assert "stopped; the same command goes on" in capfd.readouterr().err


def test_before_each_run_stands_how_far_it_is_and_how_long_it_takes(toy, tmp_path, capfd):
    assert toy("--grid=RATE=0.1,0.2") == 0
    out = capfd.readouterr().out
    assert "--- out/RATE=0.1-0 (0 of 2 done)" in out
    assert "--- out/RATE=0.2-0 (1 of 2 done, about 1 min left)" in out
    runs = [tmp_path / name for name in "abcd"]
    for run, seconds in zip(runs, (600, 1200), strict=False):
        run.mkdir()
        (run / "finished.json").write_text(json.dumps({"seconds": seconds}))
    runs[2].mkdir()
    (runs[2] / "scores.json").write_text("{}")  # run by hand: nobody knows how long
    assert sweep.status(runs) == "3 of 4 done, about 15 min left"
    assert sweep.status(runs[:2] * 8 + runs[3:] * 8) == "16 of 24 done, about 2.0 h left"
    assert sweep.status([*runs, *runs[3:]], failed=runs[3:]) == "3 of 5 done, 1 failed, about 15 min left"


def test_commands_are_printed_for_others_to_run(toy, tmp_path, capfd):
    (tmp_path / "points.jsonl").write_text('{"RATE": 0.25}\n\n{"RATE": 0.75, "toy.job.word": "a b"}\n')
    assert toy("--points=points.jsonl", "--seeds", "3", "--print") == 0
    commands = capfd.readouterr().out.splitlines()
    assert len(commands) == 2 and all(c.startswith("python -m moe_jax.main --gin_file=toy.gin ") for c in commands)
    assert not (tmp_path / "out" / "table.json").exists()
    for command in commands:
        run = command.replace("python", sys.executable, 1)
        assert subprocess.run(run, shell=True, capture_output=True).returncode == 0
    assert toy("--points=points.jsonl", "--seeds", "3", "--print") == 0 and not capfd.readouterr().out
    assert toy("--points=points.jsonl", "--seeds", "3") == 0
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert {r["value"] for r in rows if r["metric"] == "asr wer"} == {0.28, 0.78}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid=RATE"], "write NAME=VALUE"),
        (["--grid=A=1", "--points=p.jsonl"], "--grid or --points, not both"),
        (["--points=none.jsonl"], "none.jsonl: cannot be read"),
        (["--points=bad.jsonl"], "bad.jsonl:2: not a point"),
        (["--points=empty.jsonl"], "holds no points"),
        (["--grid=RATE=0.1,0.1"], "RATE=0.1 is given twice"),
        (["--grid=SEED=0,1"], "SEED is the sweep's own: give --seeds"),
        (["--gin.SEED=5"], "SEED is the sweep's own: give --seeds"),
        (["--gin_bindings=RUN_DIR = 'x'"], "RUN_DIR is the sweep's own: give --output"),
        (["--gin_file=latin.gin"], "latin.gin: cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, said, toy, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"A": 1}\n')
    (tmp_path / "bad.jsonl").write_text('{"A": 1}\n[1]\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.gin").write_bytes(b"# \xff\n")
    assert toy(*arguments) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


def test_a_run_that_failed_behind_its_scores_is_run_again(toy, tmp_path, capfd):
    text = (tmp_path / "toy.py").read_text()
    (tmp_path / "toy.py").write_text(text + "    raise ValueError('the report is lost')\n")
    assert toy() == 1 and not (tmp_path / "out" / "table.json").exists()
    assert (tmp_path / "out" / "base-0" / "scores.json").exists()
    assert toy() == 1  # and not 0, as of what is finished
    (tmp_path / "toy.py").write_text(text)
    assert toy() == 0 and (tmp_path / "out" / "table.json").exists()


def test_a_folder_has_one_sweep_at_a_time(toy, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with sweep.alone(tmp_path / "out"):
        assert toy() == 2 and toy("--print") == 0
    assert "out: another sweep is running here" in capsys.readouterr().err
    assert not (tmp_path / "out" / "base-0").exists()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("base-0/scores.json", "{}", '"rows" is not a list'),
        ("base-0/scores.json", '{"rows": [1]}', '"rows" is not a list of objects'),
        (
            "base-0/scores.json",
            '{"rows": [{"task": "asr", "metric": "wer", "value": "low"}]}',
            "asr wer is not a number",
        ),
        ("base-0/scores.json", '{"rows"', "scores.json: not whole JSON"),
        ("sweep.json", "[]", "sweep.json: must be a JSON object"),
        ("sweep.json", '{"gin', "sweep.json: not whole JSON"),
    ],
)
def test_damaged_files_are_said_in_one_line(name, text, said, toy, tmp_path, capfd):
    assert toy() == 0
    (tmp_path / "out" / name).write_text(text)
    (tmp_path / "out" / "base-0" / "finished.json").write_text("[]")
    capfd.readouterr()
    assert toy() == 2
    err = capfd.readouterr().err
    assert said in err and len(err.splitlines()) == 1
    if "scores" in name:
        assert cli.entry(["compare", "out/base-0", "out"]) == 2 and "out" in capfd.readouterr().err


def test_a_folder_of_another_sweep_is_refused(toy, capsys):
    assert toy("--print") == 0
    assert toy("--print", "--gin.RATE=0.1") == 2
    assert "holds a sweep of other gin files or bindings" in capsys.readouterr().err


def test_runs_of_an_edited_gin_file_are_not_mixed_with_those_of_before(toy, tmp_path, capsys):
    (tmp_path / "inner.gin").write_text("RATE = 0.5\n")
    text = (tmp_path / "toy.gin").read_text().replace("RATE = 0.5\n", 'include "inner.gin"\n')
    (tmp_path / "toy.gin").write_text(text)
    assert toy("--print") == 0 and toy("--print") == 0
    (tmp_path / "inner.gin").write_text("RATE = 0.75\n")
    assert toy("--print") == 2
    said = capsys.readouterr().err
    assert "out: inner.gin changed since this sweep began" in said and len(said.splitlines()) == 1
    (tmp_path / "inner.gin").unlink()
    assert toy("--print") == 2
    assert "inner.gin: no such gin file" in capsys.readouterr().err


def test_intervals_are_students():
    rows = [{"point": {"A": "1"}, "seed": s, "metric": "m", "value": v} for s, v in enumerate((1.0, 2.0, 3.0))]
    mean, half, number = sweep.summary(rows)["m"]["A=1"]
    assert (mean, number) == (2.0, 3) and half == pytest.approx(4.3027 * 1 / np.sqrt(3), rel=1e-4)


# --- runs side by side ----------------------------------------------------------------------------------------------


def test_runs_are_compared_by_what_differs_and_what_came_of_them(toy, tmp_path, capsys):
    assert toy("--grid=RATE=0.1,0.2") == 0
    capsys.readouterr()
    runs = [str(tmp_path / "out" / f"RATE=0.{i}-0") for i in (1, 2)]
    assert cli.entry(["compare", *runs, "--output=c.html"]) == 0
    out = capsys.readouterr().out
    assert "| setting | RATE=0.1-0 | RATE=0.2-0 |" in out and "| RATE | 0.1 | 0.2 |" in out
    assert "| model.args.d | 1 | 2 |" in out and "seed" not in out and "word" not in out
    assert "| asr wer | 0.1 | 0.2 |" in out and "| valid loss | 0.6 | 0.7 |" in out
    page = (tmp_path / "c.html").read_text()
    assert page.count("<figure>") == 2 and "RATE=0.2-0" in page


def test_without_a_page_the_course_of_each_metric_is_printed_and_its_last_value(toy, tmp_path, capsys):
    assert toy("--grid=RATE=0.1,0.2") == 0
    capsys.readouterr()
    runs = [str(tmp_path / "out" / f"RATE=0.{i}-0") for i in (1, 2)]
    with (tmp_path / "out" / "RATE=0.1-0" / "metrics.jsonl").open("a") as file:  # it goes on
        file.write('{"step": 3, "lo')
    assert cli.entry(["compare", *runs]) == 0
    out = capsys.readouterr().out
    assert "| curve | RATE=0.1-0 | RATE=0.2-0 |" in out and "curves: give --output page.html" in out
    assert re.search(r"\| loss \| `█+▁` 0.5 \| `█+▁` 0.5 \|", out)
    assert re.search(r"\| valid/loss \| `▇+▁` 0.6 \| `█+▂` 0.7 \|", out)
    assert cli.entry(["compare", *runs, "--output=c.html"]) == 0
    assert "give --output" not in capsys.readouterr().out


def test_curves_of_runs_share_their_steps_and_their_scale():
    logs = {
        "a": {0: {"x": 0.0, "odd": 1.0}, 10: {"x": 1.0, "odd": float("nan")}, 20: {"x": 2.0}},
        "b": {0: {"x": 7.0}, 10: {"x": 7.0}, 20: {"y": 0.0}},
    }
    drawn = compare.curves(logs, width=3)
    assert drawn["x"] == {"a": "`▁▂▃` 2", "b": "`██ ` 7"}  # the second has no value at the last step
    assert drawn["odd"] == {"a": "`▁  ` nan", "b": None} and drawn["y"] == {"a": None, "b": "`  ▁` 0"}
    assert compare.curves({"a": {}, "b": {}}) == {}


def test_hostile_names_are_escaped():
    settings = {"a": {"<script>": "<b>", "y": 1}}
    page = compare.page(settings, {}, {"<script>": {1: {"<i>": 1.0}, 2: {"<i>": 2.0}}, "y": {}})
    assert "<script>" not in page and "<b>" not in page and "<i>" not in page and "&lt;script&gt;" in page


def test_a_page_that_cannot_be_written_is_said_first(toy, tmp_path, capsys):
    assert toy("--grid=RATE=0.1,0.2") == 0
    (tmp_path / "c").mkdir()
    assert cli.entry(["compare", "out/RATE=0.1-0", "out/RATE=0.2-0", "--output=c"]) == 2
    assert "c: is not a file" in capsys.readouterr().err and not list(tmp_path.glob("*.part"))


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("[]")
    assert cli.entry(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "is no run's folder" in capsys.readouterr().err
    assert cli.entry(["compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 2
    assert "give two runs or more" in capsys.readouterr().err
