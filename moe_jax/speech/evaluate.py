"""The job that scores a trained recogniser on a list of utterances, whole and in chunks, in every way to decode."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moe_jax import hosts, partfile
from moe_jax.formats import manifest as manifests
from moe_jax.formats.audio import LONGEST, AudioError
from moe_jax.formats.manifest import Skipped, Utterance
from moe_jax.metrics import errors, oracles, significance
from moe_jax.metrics.errors import ErrorCounts
from moe_jax.metrics.normalisers import family_normaliser
from moe_jax.metrics.scoring import finite, markdown
from moe_jax.speech.recognise import WAYS, Recogniser
from moe_jax.speech.transcribe import record

ALL, BEST = "all", "rescored"
Row = dict[str, Any]


@hosts.alone
def listed(*, manifest: str, split: str | None = "test") -> None:
    """Raises ValueError where no utterance is listed to score: it would be said after training."""
    if not any(isinstance(one, Utterance) for one in manifests.read(manifest, split)):
        raise ValueError(f"{manifest}: lists no utterance of the split {split!r}, on which a run is scored")


def error_rates(
    run_dir: str,
    *,
    manifest: str,
    split: str | None = "test",
    chunks: Sequence[int] = (16, 4),
    beam: int = 10,
    nbest: int = 5,
) -> None:
    """Word and character error rates of a run's best model on a list of utterances: whole recordings, and as streams in
    chunks of so many frames hear them, each decoded in every way, and the oracle of the n-best. What is longer than
    `LONGEST` seconds is left out and listed, as what cannot be read is.

    Writes into `run_dir`: wer.md, the table; scores.json, its rows; transcripts.jsonl, every text; nbest.json, the
    n-best of whole recordings with their references, as HyPoradise has them.

    Raises ValueError where no utterance can be read.
    """
    by = Recogniser.load(run_dir, beam=beam)
    heard_as = {"whole": by} | {f"chunks of {size}": dataclasses.replace(by, chunk=size) for size in chunks}
    said: list[Row] = []
    records, took, seconds = [], 0.0, 0.0
    skipped: list[str] = []
    for found in tqdm(read(manifest, split, by.rate), unit=" utterances", disable=None):
        if isinstance(found, Skipped):
            skipped.append(f"- {found.where}: {found.reason}\n")
            continue
        samples, one = found
        texts: dict[str, str] = {}
        lists: dict[str, list[str]] = {}
        for name, how in heard_as.items():
            began = time.perf_counter()
            heard = how.heard(samples)
            encoded = time.perf_counter() - began
            for way in WAYS:
                began = time.perf_counter()
                nbest_found = dataclasses.replace(how, way=way).read(*heard)
                if (name, way) == ("whole", BEST):
                    took += encoded + time.perf_counter() - began
                    seconds += len(samples) / by.rate
                    records.append({**record(nbest_found, nbest), "output": one.text, "lang": one.lang})
                texts[f"{name}, {way}"] = nbest_found[0].text if nbest_found else ""
                if way == BEST:
                    lists[name] = [t.text for t in nbest_found[:nbest]] or [""]
        said.append({"reference": one.text, "lang": one.lang, "texts": texts, "lists": lists})
    if not said:
        raise ValueError(f"{manifest}: no utterance of the split {split!r} can be read")
    folder, found_rows = Path(run_dir), rows(said)
    about = f"{len(said)} utterances ({len(skipped)} could not be read), real-time factor {took / seconds:.3f}"
    signature = family_normaliser("asr").signature
    text = f"{_table(found_rows)}\n{about}, compiling included; words as {signature} has them.\n"
    text += f"\nCould not be read:\n\n{''.join(skipped)}" if skipped else ""
    meta = {"split": split, "utterances": len(said), "skipped": len(skipped), "normaliser": signature}
    partfile.write_text(folder / "wer.md", text)
    partfile.write_text(folder / "nbest.json", json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    partfile.write_text(
        folder / "transcripts.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in said)
    )
    partfile.write_text(folder / "scores.json", json.dumps({"meta": meta, "rows": found_rows}, indent=1) + "\n")
    print(text)


def counted(said: Sequence[Row], decoding: str, metric: str) -> np.ndarray:
    """Nx2: the errors of each line and its length, of the texts of one decoding; in words ("wer") or characters
    ("cer"). "<name>, oracle" is the best of the n-best."""
    normaliser, units = family_normaliser("asr"), {"wer": errors.words, "cer": errors.characters}[metric]

    def line(one: Row) -> ErrorCounts:
        wanted = units(normaliser(one["reference"]))
        if decoding.endswith(", oracle"):
            listed = one["lists"][decoding.removesuffix(", oracle")]
            return oracles.n_best(wanted, [units(normaliser(text)) for text in listed])
        return errors.count(wanted, units(normaliser(one["texts"][decoding])))

    return np.array([(c.errors, c.reference_length) for c in map(line, said)])


def rows(said: Sequence[Row]) -> list[Row]:
    """A row a decoding, metric and language, and over all of them where there are several."""
    langs = list(dict.fromkeys(one["lang"] for one in said))
    groups = {lang or ALL: [one for one in said if one["lang"] == lang] for lang in langs}
    groups |= {ALL: list(said)}
    out = []
    for name, mine in groups.items():
        for decoding in (*said[0]["texts"], *(f"{way}, oracle" for way in said[0]["lists"])):
            for metric in ("wer", "cer"):
                lines = counted(mine, decoding, metric)
                ci95 = significance.compare(lines, lines).corrected_ci95
                about = {"task": "asr", "set": name, "decoding": decoding, "metric": metric}
                rate = float(significance.error_rate(lines.sum(0, keepdims=True))[0])
                out.append({**about, "value": rate, "value_ci95": [finite(end) for end in ci95], "lines": len(lines)})
    return out


def _table(found: Sequence[Row]) -> str:
    sets = list(dict.fromkeys(row["set"] for row in found))
    head = ("", *(f"{name} {metric.upper()} %" for name in sets for metric in ("wer", "cer")))
    cells = {(row["decoding"], row["set"], row["metric"]): f"{100 * row['value']:.2f}" for row in found}
    lines = [
        (decoding, *(cells[decoding, name, metric] for name in sets for metric in ("wer", "cer")))
        for decoding in dict.fromkeys(row["decoding"] for row in found)
    ]
    return markdown([head, ("---", *["--:"] * (len(head) - 1)), *lines])


def read(path: str, split: str | None, rate: int) -> Iterator[tuple[np.ndarray, Utterance] | Skipped]:
    """The samples of each utterance, and it; none of what is too long."""
    for one in list(manifests.read(path, split)):
        if isinstance(one, Skipped):
            yield one
            continue
        try:
            if (seconds := one.seconds) > LONGEST:
                yield Skipped(one.where, manifests.too_long(LONGEST, seconds))
            else:
                yield one.samples(rate), one
        except AudioError as error:
            yield Skipped(one.where, str(error))
