"""An output that was interrupted and resumed is the unbroken one, and nobody is left with a traceback."""

import argparse
import errno
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moe_jax import correct, formats
from moe_jax.correct import Correction
from moe_jax.partfile import Refused, Stopped

ROWS: list[dict[str, Any]] = [{"id": n, "hypotheses": [f"line {n} é", f"lime {n}"]} for n in range(50)]


def upper(records):
    return [Correction(r.hypotheses[0].upper(), kept=False) for r in records]


class Dies:
    """Corrects so many batches, then does something else."""

    fingerprint = ""

    def __init__(self, batches, then):
        self.left, self.then = batches, then

    def __call__(self, records):
        if not self.left:
            self.then()
        self.left -= 1
        return upper(records)


def write(path: Path, rows=ROWS) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), "utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    elif path.suffix == ".tsv":
        table = [["id", "hyp1", "hyp2"], *([str(row["id"]), *row["hypotheses"]] for row in rows)]
        path.write_bytes("".join("\t".join(cells) + "\r\n" for cells in table).encode())
    else:
        path.write_text("\n\n".join(row["hypotheses"][0] for row in rows) + "\n\n", "utf-8")
    return path


def run(source, output, correct_batch=upper, batch_size=8, **options: Any):
    return correct.run(correct_batch, source, output, batch_size=batch_size, progress=False, **options)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.txt", "x.tsv"])
def test_all_records_are_corrected_and_counted(tmp_path, name):
    source, output = write(tmp_path / name), tmp_path / f"out{Path(name).suffix}"
    summary = run(source, output)
    assert (summary.records, summary.corrected, summary.kept, summary.failed) == (50, 50, 0, 0)
    out = output.read_bytes().decode()
    assert all(f"LINE {n} É" in out for n in range(50))
    assert left(tmp_path) == sorted([name, output.name])
    assert "".join(p if isinstance(p, str) else p.raw for p in formats.parts(source)) == source.read_bytes().decode()


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.txt", "x.tsv", "x.txt.gz", "x.txt.xz"])
@pytest.mark.parametrize("batches", [0, 1, 6])
def test_resumed_equals_unbroken(tmp_path, name, batches):
    source, pack = write(tmp_path / name.removesuffix(".gz").removesuffix(".xz")), Path(name).suffix
    whole, output = (
        tmp_path / f"whole{''.join(Path(name).suffixes)}",
        tmp_path / f"out{''.join(Path(name).suffixes)}",
    )
    run(source, whole)

    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        run(source, output, Dies(batches, fail))
    assert not output.exists()
    with open(f"{output}.part", "ab") as part:  # a batch that was written but not yet counted
        part.write(b"half a bat" * 10_000)
    seen = []
    summary = run(source, output, lambda records: seen.extend(records) or upper(records))
    assert len(seen) == 50 - 8 * batches
    assert output.read_bytes() == whole.read_bytes()
    assert (summary.records, summary.corrected) == (50, 50)
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(pack, open)
    with opened(output, "rb") as file:
        assert file.read().count(b"LINE") == 50


SLOW = """
import sys, time
from moe_jax import correct
def slow(records):
    time.sleep(0.02)
    return [correct.Correction(r.hypotheses[0].upper(), False) for r in records]
try:
    correct.run(slow, sys.argv[1], sys.argv[2], batch_size=2)
except correct.Stopped as e:
    print(e)
    sys.exit(e.code)
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_loses_nothing(tmp_path, signum):
    source, whole, output = write(tmp_path / "x.json"), tmp_path / "whole.json", tmp_path / "out.json"
    run(source, whole, batch_size=2)
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, source, output],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    part, deadline = Path(f"{output}.part"), time.monotonic() + 20
    while not (part.exists() and part.stat().st_size > 200) and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signum)
    said, _ = child.communicate()
    if signum == signal.SIGKILL:
        assert child.returncode == -signal.SIGKILL
    else:
        assert child.returncode == 128 + signum
        assert "run the same command again to go on" in said
    assert part.exists() and not output.exists()
    summary = run(source, output, batch_size=2)
    assert output.read_bytes() == whole.read_bytes()
    assert summary.records == 50
    assert left(tmp_path) == ["out.json", "whole.json", "x.json"]


def test_a_signal_lets_the_batch_finish(tmp_path):
    source, output = write(tmp_path / "x.txt"), tmp_path / "out.txt"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=r"stopped after 16 records, saved in .*out\.txt\.part; run the same") as caught:
        run(source, output, Dies(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    # one that comes in the last batch stops nothing
    assert run(source, output, Dies(4, lambda: os.kill(os.getpid(), signal.SIGTERM))).records == 50


def test_a_bad_record_stops_and_can_be_mended(tmp_path):
    rows = [*ROWS[:20], {"id": "bad"}, *ROWS[21:]]
    source, output = write(tmp_path / "x.jsonl", rows), tmp_path / "out.jsonl"
    with pytest.raises(formats.FormatError, match=r"x\.jsonl:21: no hypotheses"):
        run(source, output)
    write(source)
    seen = []
    run(source, output, lambda records: seen.extend(records) or upper(records))
    assert len(seen) == 50 - 16  # the two batches before it are not done again
    run(source, tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_bad_records_are_kept_and_reported(tmp_path, capsys):
    rows = [*ROWS[:3], {"id": "bad"}, *ROWS[4:30], {"hypotheses": 3}]
    source, output = write(tmp_path / "x.jsonl", rows), tmp_path / "out.jsonl"
    assert main(source, output, "--on_bad_record=keep") == 0
    out, err = capsys.readouterr()
    assert f"{source}:4: no hypotheses" in err
    assert f"{source}: 2 bad records passed through as they were, from lines 4, 31" in err
    assert "31 records, 29 corrected, 0 kept by the guard" in out
    made = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [("corrected" in row, "correction_error" in row) for row in made].count((True, False)) == 29
    assert made[3]["id"] == "bad" and "no hypotheses" in made[3]["correction_error"]
    assert "corrected" not in made[30] and made[30]["hypotheses"] == 3


def test_a_stop_can_be_resumed_by_keeping(tmp_path):
    source, output = write(tmp_path / "x.jsonl", [*ROWS[:20], {}, *ROWS[21:]]), tmp_path / "out.jsonl"
    with pytest.raises(formats.FormatError):
        run(source, output)
    assert run(source, output, on_bad_record="keep").failed == 1
    run(source, tmp_path / "whole.jsonl", on_bad_record="keep")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def begun(tmp_path) -> tuple[Path, Path]:
    """An input, and an output of which two batches are done."""
    source, output = write(tmp_path / "x.jsonl"), tmp_path / "out.jsonl"
    with pytest.raises(ZeroDivisionError):
        run(source, output, Dies(2, lambda: 1 / 0))
    return source, output


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"batch_size": 4},
            "was started with batch_size=8, not batch_size=4; give the same, or pass --overwrite",
        ),
        ({"field": "b"}, "was started with field=corrected, not field=b; give the same, or pass --overwrite"),
        (
            {"fingerprint": "other"},
            "was started with model=, not model=other; give the same, or pass --overwrite",
        ),
    ],
)
def test_other_settings_do_not_resume(tmp_path, options, line):
    source, output = begun(tmp_path)
    with pytest.raises(Refused, match=line):
        run(source, output, **options)
    run(source, output, overwrite=True, **options)
    run(source, tmp_path / "whole.jsonl", **options)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_overwriting_can_be_resumed_but_never_begins_by_itself(tmp_path):
    source, output = write(tmp_path / "x.txt"), tmp_path / "out.txt"
    output.write_text("old")
    stop = Dies(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="run the same command again without --overwrite to go on"):
        run(source, output, stop, overwrite=True)
    assert output.read_text() == "old"
    seen = []
    run(source, output, lambda records: seen.extend(records) or upper(records))
    assert len(seen) == 50 - 16
    assert output.read_text("utf-8") == source.read_text("utf-8").upper()
    source, output = begun(tmp_path)
    output.write_text("somebody's")  # it came after the run had begun
    with pytest.raises(Refused, match="is there already; pass --overwrite to replace it"):
        run(source, output)
    assert output.read_text() == "somebody's"


def test_another_input_does_not_resume(tmp_path):
    source, output = begun(tmp_path)
    for rows in (ROWS[:5], [{"hypotheses": ["other"]}, *ROWS[1:]]):
        write(source, rows)
        with pytest.raises(Refused, match="the first 16 records of the input are not those that it was begun with"):
            run(source, output)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": 1, "done": {}, "offset": 0}', '{"settings": {}}'])
def test_a_damaged_state_is_refused(tmp_path, text):
    source, output = begun(tmp_path)
    Path(f"{output}.part.json").write_text(text)
    with pytest.raises(Refused, match="does not say how far it got; pass --overwrite to start anew"):
        run(source, output)


def test_tampered_counts_and_a_cut_part_are_refused(tmp_path):
    source, output = begun(tmp_path)
    state = Path(f"{output}.part.json")
    good = json.loads(state.read_text())
    for done in ({**good["done"], "records": "16"}, {**good["done"], "unknown": 1}):
        state.write_text(json.dumps({**good, "done": done}))
        with pytest.raises(Refused, match="does not say how far the work got"):
            run(source, output)
    state.write_text(json.dumps({**good, "offset": 10**6}))
    with pytest.raises(Refused, match=r"holds \d+ bytes where 1000000 were written"):
        run(source, output)


def test_two_runs_do_not_mix(tmp_path):
    source, output = write(tmp_path / "x.txt"), tmp_path / "out.txt"
    with pytest.raises(Refused, match="another process is writing it; wait for it or stop it"):
        run(source, output, Dies(1, lambda: run(source, output)))


def test_a_file_that_is_not_ours_is_not_overwritten(tmp_path):
    source, output = write(tmp_path / "x.txt"), tmp_path / "out.txt"
    Path(f"{output}.part").write_text("somebody's notes")
    with pytest.raises(Refused, match=r"out\.txt\.part\.json does not say how far it got"):
        run(source, output)
    assert Path(f"{output}.part").read_text() == "somebody's notes"


def test_what_cannot_be_written_is_refused_before_a_model_loads(tmp_path, capsys):
    source = write(tmp_path / "x.txt")
    there = write(tmp_path / "there.txt")
    (tmp_path / "link.txt").symlink_to(source)
    part = write(tmp_path / "p.txt.part")
    cases = [
        (source, source, "x.txt: would overwrite the input; give another --output"),
        (source, tmp_path / "link.txt", "link.txt: would overwrite the input"),
        (part, tmp_path / "p.txt", "p.txt: would overwrite the input"),
        (source, there, "there.txt: is there already; pass --overwrite to replace it, or give another"),
        (source, tmp_path / "none" / "out.txt", "none: no such folder; create it first"),
        (source, tmp_path, "is not a file; give the name of a file"),
        (source, "/dev/full", "/dev/full: is not a file; give the name of a file"),
        (
            source,
            tmp_path / "out.json",
            "out.json: would hold text, the format of the input, not json; give it",
        ),
        (source, tmp_path / ("n" * 300), "cannot be used: File name too long; give another --output"),
        (
            tmp_path / "none.txt",
            tmp_path / "o.txt",
            "none.txt: cannot be read: No such file or directory; check",
        ),
    ]
    for given, output, line in cases:
        options = ["--format=text"] if given == part else []
        assert main(given, output, *options, load=lambda args: 1 / 0) == 2
        err = capsys.readouterr().err
        assert line in err and err.count("\n") == 1
    assert main(source, tmp_path / "o.txt", "--field=a\tb", load=lambda args: 1 / 0) == 2
    assert "--field='a\\tb' is no name for a key or a column" in capsys.readouterr().err
    assert there.read_bytes() == source.read_bytes()


def test_a_full_disk_is_one_line_and_resumes(tmp_path, monkeypatch, capsys):
    source, output = write(tmp_path / "x.txt"), tmp_path / "out.txt"
    sync, calls = os.fsync, []

    def full(fd):
        calls.append(fd)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(fd)

    monkeypatch.setattr(os, "fsync", full)
    assert main(source, output) == 2
    line = "cannot be written: No space left on device; mend that and run the same command again to go on"
    assert capsys.readouterr().err == f"{output}.part: {line}\n"
    monkeypatch.setattr(os, "fsync", sync)
    assert main(source, output) == 0
    assert output.read_text("utf-8") == source.read_text("utf-8").upper()


def main(source, output, *options, load=lambda args: upper) -> int:
    parser = argparse.ArgumentParser()
    correct.add_arguments(parser)
    given = ["--checkpoint=runs/x", f"--input={source}", f"--output={output}", "--batch_size=8", *options]
    return correct.main(parser.parse_args(given), load)


def test_main_exit_codes(tmp_path, capsys):
    source, output = write(tmp_path / "x.txt"), tmp_path / "out.txt"
    assert main(source, output, load=lambda args: Dies(1, lambda: os.kill(os.getpid(), signal.SIGINT))) == 130
    assert "run the same command again to go on" in capsys.readouterr().err
    assert main(source, output, "--beam=4") == 2  # another decoder would give other corrections
    assert "beam=1" in capsys.readouterr().err

    def interrupted():
        raise KeyboardInterrupt

    assert main(source, output, load=lambda args: Dies(0, interrupted)) == 130
    assert "stopped at once; run the same command again to go on after the last whole batch" in capsys.readouterr().err
    assert main(source, output) == 0
    assert f"{output}: 50 records, 50 corrected, 0 kept by the guard, " in capsys.readouterr().out


def test_the_model_s_own_fingerprint_counts(tmp_path, capsys):
    source, output = write(tmp_path / "x.txt"), tmp_path / "out.txt"
    first = Dies(1, lambda: os.kill(os.getpid(), signal.SIGINT))
    first.fingerprint = "step 100"
    assert main(source, output, load=lambda args: first) == 130
    assert main(source, output) == 2
    assert "step 100" in capsys.readouterr().err


def test_options_are_checked(capsys):
    for option in ("--batch_size=0", "--beam=x", "--format=csv", "--on_bad_record=drop"):
        with pytest.raises(SystemExit) as caught:
            main("x", "y", option)
        assert caught.value.code == 2
    assert "argument --batch_size: '0' is not a whole number from 1" in capsys.readouterr().err


def test_kept_and_unchanged_are_not_counted_as_corrected(tmp_path):
    def guarded(records):
        return [Correction(r.hypotheses[0], kept=True, note="too long") for r in records]

    summary = run(write(tmp_path / "x.txt"), tmp_path / "out.txt", guarded)
    assert (summary.records, summary.corrected, summary.kept) == (50, 0, 50)
    assert (tmp_path / "out.txt").read_bytes() == (tmp_path / "x.txt").read_bytes()


def test_a_model_that_skips_a_record_is_caught(tmp_path):
    with pytest.raises(ValueError, match="correct_batch gave 7 corrections for 8 records"):
        run(write(tmp_path / "x.txt"), tmp_path / "out.txt", lambda records: upper(records[1:]))
