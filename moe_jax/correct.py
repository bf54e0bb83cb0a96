"""Correct a recogniser's output file: `moe-jax correct`.

The model is a callable; this file knows batches, progress, interruption and resumption. An output that was
interrupted and resumed equals an unbroken one byte for byte: batches always start at the same records.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import hashlib
import lzma
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from moe_jax import formats
from moe_jax.formats import Bad, FormatError, Part, PathLike, Record
from moe_jax.partfile import PartFile, Refused, Signals, Stopped, again, part_paths, unfit

# A compressed output gets one member (gzip) or stream (xz) a batch, so that it too can be continued.
PACKERS = {".gz": functools.partial(gzip.compress, mtime=0), ".xz": lzma.compress}
OF_MODEL = ("task", "beam", "guard", "temperature", "top_k", "top_p", "seed", "weights")  # options that change texts
LISTED = 20  # bad records whose lines the report names


@dataclasses.dataclass(frozen=True)
class Correction:
    """What a model makes of one record.

    Attributes:
      text: the corrected text.
      kept: whether a guard put the first pass in the place of what the model wrote.
      note: why, such as "too long"; or None.
      score: the model's log-probability of `text`, in nats; or None.
    """

    text: str
    kept: bool
    note: str | None = None
    score: float | None = None


# One Correction a record, in order. Where it has an attribute `fingerprint`, a string that changes with the
# weights, it resumes only what the same weights began.
CorrectBatch = Callable[[Sequence[Record]], Sequence[Correction]]


@dataclasses.dataclass
class Summary:
    """What was done, by all the runs that one output took.

    Attributes:
      records: all records, bad ones included.
      corrected: whose text differs from their first hypothesis.
      kept: that a guard kept.
      failed: that could not be read and were passed through; `failed_lines` are the first of them.
      digest: of the input up to the last record done.
    """

    records: int = 0
    corrected: int = 0
    kept: int = 0
    failed: int = 0
    failed_lines: list[int] = dataclasses.field(default_factory=list)
    digest: str = ""
    seconds: float = 0.0


def check(
    input: PathLike,
    output: PathLike,
    fmt: str | None = None,
    field: str = "corrected",
    overwrite: bool = False,
) -> str:
    """The format of `input`. Raises FormatError or Refused for what shows before a model is loaded."""
    name, output = formats.detect(input, fmt), Path(output)
    if not field.strip() or not field.isprintable():
        raise Refused(f"--field={field!r} is no name for a key or a column; give one, such as corrected")
    try:
        begun = part_paths(output)[1].exists()  # if so, PartFile knows whether it may replace the output
        if said := unfit(output, overwrite or begun, [input]):
            raise Refused(said)
    except OSError as e:
        raise Refused(f"{output}: cannot be used: {e.strerror}; give another --output") from None
    told = formats.by_extension(output)
    if told not in (None, name, "json" if name == "jsonl" else name):
        raise Refused(f"{output}: would hold {name}, the format of the input, not {told}; give it another ending")
    return name


def run(
    correct_batch: CorrectBatch,
    input: PathLike,
    output: PathLike,
    *,
    fmt: str | None = None,
    field: str = "corrected",
    batch_size: int = 64,
    on_bad_record: str = "stop",
    overwrite: bool = False,
    progress: bool = True,
    fingerprint: str = "",
) -> Summary:
    """Writes `input` to `output` with corrections added, going on where a run with these settings stopped.

    Args:
      fmt: a key of `formats.FORMATS`, or None to tell it from the file.
      field: the key or column to add; plain text has none, its lines are replaced.
      on_bad_record: "stop" at the first, or "keep": pass it through, and report it on stderr.
      overwrite: replace `output`, and forget what an earlier run did.
      fingerprint: settings of the model; what another model began is not resumed.

    Raises:
      FormatError: the input is not what it should be.
      Refused: the output cannot be written, or does not belong to these settings or this input.
      Stopped: SIGINT or SIGTERM came; all finished batches are saved.
    """
    name, output = check(input, output, fmt, field, overwrite), Path(output)
    settings = {"format": name, "field": field, "batch_size": batch_size, "model": fingerprint}
    with PartFile(output, settings, overwrite) as part, Signals() as signals:
        job = _Job(correct_batch, formats.FORMATS[name], field, on_bad_record, _restored(part))
        parts = formats.parts(input, name, field)
        job.skip(parts, part)
        with _bar(input, job.read, progress) as bar:
            for batch, last in _batches(parts, batch_size):
                data = PACKERS.get(output.suffix.lower(), bytes)(job.correct(batch))
                if last:
                    part.finish(data)
                else:
                    part.append(data, dataclasses.asdict(job.summary))
                bar.set_postfix(records=job.summary.records, refresh=False)
                bar.update(job.read - bar.n)
                if signals.caught and not last:
                    done = f"stopped after {job.summary.records} records, saved in {part.path}"
                    raise Stopped(signals.caught, f"{done}; {part.again}")
    return job.summary


class _Job:
    """What `run` keeps from batch to batch."""

    def __init__(
        self,
        correct_batch: CorrectBatch,
        format: formats.Format,
        field: str,
        on_bad_record: str,
        summary: Summary,
    ) -> None:
        self.correct_batch, self.format, self.field = correct_batch, format, field
        self.stop = {"stop": True, "keep": False}[on_bad_record]
        self.summary = summary
        self.read = 0  # bytes of the input
        self._digest = hashlib.sha256()
        self._mark = time.monotonic()

    def skip(self, parts: Iterator[Part], part: PartFile) -> None:
        """Passes the records that are done. Raises Refused unless they are still what they were.

        What follows them may have changed: that is how a bad record is mended without doing all again.
        """
        todo = self.summary.records
        while todo:
            done = next(parts, None)
            if done is None:
                break
            self._note(done)
            todo -= not isinstance(done, str)
        if self.summary.records and (todo or self.summary.digest != self._digest.hexdigest()):
            what = f"the first {self.summary.records} records of the input are not those that it was begun with"
            raise Refused(f"{part.path}: {what}; give the same input, or pass --overwrite to start anew")

    def correct(self, batch: list[Part]) -> bytes:
        """The batch as the output has it. Raises FormatError at a bad record under "stop"."""
        records = [part for part in batch if isinstance(part, Record)]
        bad = [part for part in batch if isinstance(part, Bad)]
        for part in bad:
            if self.stop:
                raise part.error
            tqdm.write(str(part.error), file=sys.stderr)
        corrections = self.correct_batch(records) if records else []
        if len(corrections) != len(records):
            raise ValueError(f"correct_batch gave {len(corrections)} corrections for {len(records)} records")
        self._count(records, corrections, bad)
        queue = iter(corrections)
        text = []
        for part in batch:
            self._note(part)
            if isinstance(part, Record):
                part = self.format.corrected(part, next(queue).text, self.field)
            text.append(self.format.failed(part) if isinstance(part, Bad) else part)
        self.summary.digest = self._digest.hexdigest()
        return _bytes("".join(text))

    def _count(self, records: list[Record], corrections: Sequence[Correction], bad: list[Bad]) -> None:
        summary, now = self.summary, time.monotonic()
        summary.records += len(records) + len(bad)
        summary.corrected += sum(c.text != r.hypotheses[0] for r, c in zip(records, corrections, strict=True))
        summary.kept += sum(c.kept for c in corrections)
        summary.failed += len(bad)
        lines = [part.error.line for part in bad if part.error.line is not None]
        summary.failed_lines = (summary.failed_lines + lines)[:LISTED]
        summary.seconds += now - self._mark
        self._mark = now

    def _note(self, part: Part) -> None:
        data = _bytes(part if isinstance(part, str) else part.raw)
        self._digest.update(data)
        self.read += len(data)


def _batches(parts: Iterator[Part], size: int) -> Iterator[tuple[list[Part], bool]]:
    """(parts up to and with the last of `size` records, whether the file ends here)."""
    batch: list[Part] = []
    records = 0
    for part in parts:
        batch.append(part)
        records += not isinstance(part, str)
        if records == size:
            yield batch, False
            batch, records = [], 0
    yield batch, True


def _restored(part: PartFile) -> Summary:
    blank = Summary()
    if not all(type(value) is type(getattr(blank, key, None)) for key, value in part.done.items()):
        raise Refused(f"{part.state}: does not say how far the work got; pass --overwrite to start anew")
    return Summary(**part.done)


def _bar(input: PathLike, read: int, progress: bool) -> tqdm:
    size = None if Path(input).suffix.lower() in PACKERS else os.path.getsize(input)
    off = None if progress else True  # None: off where stderr is not a terminal
    return tqdm(desc="correct", total=size, initial=read, unit="B", unit_scale=True, disable=off)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `moe-jax correct`."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a run's folder, such as runs/quickstart")
    add(
        "--input",
        required=True,
        metavar="FILE",
        help="hypotheses: .json .jsonl .txt .tsv, also with .gz or .xz",
    )
    add(
        "--output",
        required=True,
        metavar="FILE",
        help="the same with corrections; FILE.part until it is whole",
    )
    add("--format", choices=formats.FORMATS, help="the input's format, where its name does not tell")
    add("--field", default="corrected", help="the key or column to add (default: corrected)")
    add("--batch_size", type=_positive, default=64, metavar="N", help="records at a time (default: 64)")
    add(
        "--on_bad_record",
        choices=("stop", "keep"),
        default="stop",
        help="stop at the first, or keep it as it is, name it and go on (default: stop)",
    )
    add("--overwrite", action="store_true", help="replace the output and what an unfinished run left")
    add("--task", help="the family of all records that name none, such as asr (default: unknown)")
    add("--beam", type=_positive, default=1, metavar="N", help="beams or samples of a record (default: 1)")
    add("--guard", type=float, metavar="X", help="threshold of the guard, in place of the checkpoint's")
    add("--temperature", type=float, metavar="X", help="sample at this temperature, in place of searching")
    add("--top_k", type=_positive, metavar="N", help="sample of the N likeliest tokens alone")
    add("--top_p", type=float, metavar="X", help="sample of the fewest tokens that have probability X together")
    add("--seed", type=int, default=0, metavar="N", help="of sampling (default: 0)")
    add("--continuous", action="store_true", help="let a new record in where one is done: for many records a batch")
    add("--weights", choices=("float32", "bfloat16", "int8"), default="float32", help="how matrices lie in memory")
    add("--mesh", metavar="AXES", help="divide the model over this machine's devices, such as fsdp=4,expert=2")


def main(args: argparse.Namespace, load: Callable[[argparse.Namespace], CorrectBatch]) -> int:
    """Runs `moe-jax correct`; `load` makes the model of the options, once the files have been looked at.

    Returns the exit code: 0, 2 where something must be mended, 130 or 143 after Ctrl-C or SIGTERM.
    """
    try:
        check(args.input, args.output, args.format, args.field, args.overwrite)
        correct_batch = load(args)
        model = " ".join([os.path.abspath(args.checkpoint), *(f"{n}={getattr(args, n)}" for n in OF_MODEL)])
        summary = run(
            correct_batch,
            args.input,
            args.output,
            fmt=args.format,
            field=args.field,
            batch_size=args.batch_size,
            on_bad_record=args.on_bad_record,
            overwrite=args.overwrite,
            fingerprint=f"{model} {getattr(correct_batch, 'fingerprint', '')}".strip(),
        )
    except FormatError as e:
        print(e, file=sys.stderr)
        part, _ = part_paths(Path(args.output))
        if part.exists():
            print(f"what is done is in {part}; {again(args.overwrite)}", file=sys.stderr)
        return 2
    except Refused as e:
        print(e, file=sys.stderr)
        return 2
    except Stopped as e:
        print(e, file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        print(f"stopped at once; {again(args.overwrite)} after the last whole batch", file=sys.stderr)
        return 128 + signal.SIGINT
    _report(summary, args)
    return 0


def _report(summary: Summary, args: argparse.Namespace) -> None:
    if summary.failed:
        lines = ", ".join(map(str, summary.failed_lines)) + (", ..." if summary.failed > LISTED else "")
        what = f"{args.input}: {summary.failed} bad records passed through as they were, from lines {lines}"
        print(what, file=sys.stderr)
    rate = (summary.records - summary.failed) / max(summary.seconds, 1e-9)
    counts = f"{summary.records} records, {summary.corrected} corrected, {summary.kept} kept by the guard"
    print(f"{args.output}: {counts}, {rate:.1f} sentences/s")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
