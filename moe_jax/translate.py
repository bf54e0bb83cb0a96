"""Translate lines: `moe-jax translate`, and the scores of a translator by direction.

One line in, one line out, in the same order; an empty line stays empty. Lines that are longer than the model reads are
translated in pieces, or refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moe_jax import checkpoint, decode, describe, hosts, sharding
from moe_jax.data import Pairs
from moe_jax.metrics import language, translation
from moe_jax.partfile import nobody_reads, unfit, write_text
from moe_jax.report.atlas import told_apart
from moe_jax.report.heatmap import heat_maps
from moe_jax.text.prompt import check_layout, encode_example, room_to_write
from moe_jax.text.tokeniser import Tokeniser

FAMILY = "translate"
WINDOW = 512  # lines of which those of like lengths are translated together
SENTENCE = re.compile(r"(?<=[.!?…;:])\s+")
Sides = Mapping[str, Sequence[tuple[str, str]]]  # direction -> sentences and their references


@dataclasses.dataclass
class Translate:
    """A model ready to translate.

    Attributes:
      tasks: task -> its number; the directions are those named "translate/de-en".
      longest: tokens of the longest source that it reads, its tag and end among them: of those that it was trained on
        or, where a checkpoint does not remember them, half of the tokens of a pair.
      trained: the tasks that it was trained on; None where a checkpoint does not remember them.
      beams, alpha: of the search and of its length penalty.
      mesh: that the model is divided over, and batches with it; of several hosts all must translate the same lines.
    """

    model: Any
    tokeniser: Tokeniser
    tasks: Mapping[str, int]
    layout: str
    longest: int
    beams: int = 4
    alpha: float = 0.6
    batch_size: int = 32
    trained: Sequence[str] | None = None
    mesh: sharding.Mesh | None = None

    def __post_init__(self) -> None:
        self.batch_size = sharding.full(self.batch_size, self.mesh)

    @classmethod
    def load(cls, path: str | Path, *, mesh: sharding.Mesh | None = None, **options: Any) -> Translate:
        """From a run folder or a safetensors file; on a mesh no device, and no host, need have room for the whole.

        Raises CheckpointError, in one line, for what is no translator.
        """
        source = checkpoint.Source(path)
        meta = source.meta
        try:
            tokeniser = Tokeniser.of_meta(meta)
            if meta["model"]["class"] != "Translator":
                raise ValueError(f"it is a {meta['model']['class']}; moe-jax correct is for those")
            model = describe.filled(describe.abstract(meta["model"]), source, mesh)
            check_layout(tokeniser, meta["layout"])
            own = dict(meta["families"]), meta["layout"], int(meta.get("longest_read") or meta["length"] // 2)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise checkpoint.CheckpointError(f"{path}: cannot translate: {error}") from error
        return cls(model, tokeniser, *own, trained=meta.get("trained"), mesh=mesh, **options)

    @property
    def directions(self) -> list[str]:
        return [name.partition("/")[2] for name in self.tasks if name.startswith(f"{FAMILY}/")]

    def task(self, direction: str) -> str:
        """Its name. Raises ValueError for a direction that the model does not know."""
        if direction not in self.directions:
            raise ValueError(f"unknown direction {direction}; this model has {', '.join(self.directions)}")
        return f"{FAMILY}/{direction}"

    def __call__(
        self, texts: Sequence[str], direction: str, *, split: bool = True, progress: bool = False
    ) -> list[str]:
        """The translation of each text; for the rest, see `stream`."""
        return list(self.stream(texts, direction, split=split, progress=progress))

    def stream(
        self, texts: Sequence[str], direction: str, *, split: bool = True, progress: bool = False
    ) -> Iterator[str]:
        """The translations in order, each as soon as it and those before it are there.

        Args:
          split: translate in pieces what is too long. Otherwise, raises ValueError naming the first such line.
        """
        task = self.task(direction)
        prompts = [self._prompts(" ".join(text.split()), task) for text in texts]
        if long := [n for n, parts in enumerate(prompts, 1) if len(parts) > 1 and not split]:
            raise ValueError(
                f"line {long[0]} has more than {self.longest} tokens, the longest that this model reads: split it"
            )
        with tqdm(None, "translating", sum(map(len, prompts)), disable=None if progress else True) as bar:
            for start in range(0, len(prompts), WINDOW):
                yield from self._window(prompts[start : start + WINDOW], task, bar)

    def _window(self, prompts: Sequence[Sequence[list[int]]], task: str, bar: Any) -> Iterator[str]:
        """The translations of lines, in batches of like lengths."""
        pieces = [(line, part) for line, parts in enumerate(prompts) for part in range(len(parts))]
        pieces.sort(key=lambda at: len(prompts[at[0]][at[1]]))
        written: list[dict[int, str]] = [{} for _ in prompts]
        done = 0
        for start in range(0, len(pieces) or 1, self.batch_size):  # once where all lines are empty
            mine = pieces[start : start + self.batch_size]
            found = self._written([prompts[i][j] for i, j in mine], task) if mine else []
            for (line, part), text in zip(mine, found, strict=True):
                written[line][part] = text
            bar.update(len(mine))
            while done < len(prompts) and len(written[done]) == len(prompts[done]):
                parts = [text for _, text in sorted(written[done].items())]
                yield " ".join(" ".join(parts).split())  # what is written may hold a line break
                done += 1

    def _prompts(self, text: str, task: str) -> list[list[int]]:
        """Of the text, or of parts of it that fit: halves at the end of a sentence, else between words."""
        if not text:
            return []
        room = self.longest + room_to_write(self.tokeniser, text)  # what is written lies on the decoder's side
        prompt = encode_example(self.tokeniser, [text], max_length=room, layout=self.layout, family=task)
        if prompt is not None:
            return [prompt.tokens]
        for parts, joint in ((SENTENCE.split(text), " "), (text.split(" "), " "), (list(text), "")):
            if len(parts) > 1:
                half = _middle(parts)
                return [p for some in (parts[:half], parts[half:]) for p in self._prompts(joint.join(some), task)]
        raise ValueError(f"a single character is more than {self.longest} tokens, the longest that this model reads")

    @sharding.within
    def _written(self, prompts: Sequence[list[int]], task: str) -> list[str]:
        padded = [*prompts, *[prompts[-1]] * (self.batch_size - len(prompts))]  # one program for all batches
        read = decode.prefill(self.model, padded, tasks=[self.tasks[task]] * len(padded))
        limits = [min(2 * len(prompt) + 16, decode.ROOMS[-1]) for prompt in padded]
        eos = self.tokeniser.eos
        found = decode.search(self.model, read, beams=self.beams, max_new=limits, alpha=self.alpha, eos=eos)
        return [self.tokeniser.decode(d.tokens) for d in found[: len(prompts)]]


def _middle(parts: Sequence[str]) -> int:
    """Where to cut parts in two halves of about the same number of characters, neither empty."""
    ends = np.cumsum([len(part) for part in parts])
    return int(np.clip(np.searchsorted(ends, ends[-1] / 2) + 1, 1, len(parts) - 1))


def untrained(task: str, trained: Sequence[str] | None) -> str | None:
    """What to say of a task that was never trained, of a direction whose languages were, each on its side, in others;
    None where it was, or where the checkpoint does not remember (`trained` is None).

    Raises ValueError for one of which nothing can be expected.
    """
    if trained is None or task in trained:
        return None
    family, _, direction = task.partition("/")
    source, _, target = direction.partition("-")
    pairs = [name.partition("/")[2].partition("-")[::2] for name in trained if name.startswith(f"{FAMILY}/")]
    known = f"it was trained on {', '.join(trained)}"
    if family != FAMILY:
        raise ValueError(f"{task}: this model was not trained on it; {known}")
    for what, code, seen in (("read", source, {a for a, _ in pairs}), ("write", target, {b for _, b in pairs})):
        if code not in seen:
            raise ValueError(f"{task}: in training this model never had {code} to {what}; {known}")
    return f"{task}: no such pair was trained on, only {source} with others and {target} with others (zero-shot)"


# --- scores -----------------------------------------------------------------------------------------------------------


def evaluate(
    run_dir: str,
    *,
    test: Sides,
    valid_data: str,
    beams: int = 4,
    lines: int | None = None,
    mesh: Callable[[], sharding.Mesh] | None = None,
    about: Mapping[str, str] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Translates test sentences, and writes into the run folder: scores.json, scores.md, translations.jsonl, and
    routing.json and routing.svg (which experts, and adapters, each direction uses on `valid_data`). Returns the rows of
    the scores. Of several hosts each must ask for it; the first one writes.

    Args:
      test: direction -> sentences and references, of which `lines` are taken (None: all), spread evenly: a file goes
        from one source of text to the next.
      mesh: makes that which the model and its batches are divided over, as in training; None: one device.
    """
    check(test)
    folder = Path(run_dir)
    progress = progress and hosts.first()
    pipeline = Translate.load(folder, beams=beams, mesh=sharding.several(mesh))
    rows: list[dict[str, Any]] = []
    kept: list[str] = []
    measures = (translation.bleu(), translation.chrf())
    for direction, pairs in tqdm(test.items(), "directions", disable=None if progress else True):
        sources, references = (list(side) for side in zip(*spread(pairs, lines), strict=True))
        written = pipeline(sources, direction)
        found: dict[str, tuple[float | None, str | None]] = {m.name: m.corpus(written, references) for m in measures}
        asked = [direction.partition("-")[2]] * len(sources)
        known = {code for pair in pipeline.directions for code in pair.split("-")}
        off = language.off_target(written, references, asked, known)
        found |= {"off-target": (off.rate, None), "references off-target": (off.reference_rate, None)}
        about_it = {"task": direction, "lines": len(sources)}
        rows += [{**about_it, "metric": m, "value": v, "signature": s} for m, (v, s) in found.items()]
        texts = zip(sources, written, references, strict=True)
        kept += [json.dumps([direction, *text], ensure_ascii=False) + "\n" for text in texts]
    used = usage(pipeline, valid_data)
    meta = {"beams": beams, "date": datetime.date.today().isoformat(), **(about or {})}
    _write(folder, rows, meta, kept, used)
    return rows


@hosts.alone
def _write(folder: Path, rows: list[dict[str, Any]], meta: Mapping[str, Any], kept: list[str], used: Any) -> None:
    write_text(folder / "translations.jsonl", "".join(kept))
    write_text(folder / "scores.json", json.dumps({"rows": rows, "meta": meta}, indent=1))
    write_text(folder / "scores.md", to_markdown(rows))
    write_text(folder / "routing.json", json.dumps(used))
    if used:
        write_text(folder / "routing.svg", heat_maps(used))
    print(to_markdown(rows))


def check(test: Sides) -> None:
    """Raises ValueError for what `evaluate` could not score, before anything is trained to be scored."""
    if empty := [direction for direction, pairs in test.items() if not pairs]:
        raise ValueError(f"no test sentences for {', '.join(empty)}: leave them out, or is MOE_JAX_DATA right?")
    language.check({code for direction in test for code in direction.split("-")})


def spread(pairs: Sequence[Any], number: int | None) -> list[Any]:
    """So many of them, evenly spaced; all where there are no more, or `number` is None."""
    kept = len(pairs) if number is None else min(number, len(pairs))
    return [pairs[i * len(pairs) // kept] for i in range(kept)]


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a direction, a column a metric, rates in per cent."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    out = [f"| direction | lines | {' | '.join(metrics)} |", f"|---|--:|{'--:|' * len(metrics)}"]
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = {row["metric"]: row for row in rows if row["task"] == task}
        lines = next(iter(mine.values()))["lines"]
        cells = (f"{100 * mine[m]['value']:.1f}" if m in mine and mine[m]["value"] is not None else "" for m in metrics)
        out.append(f"| {task} | {lines} | {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def usage(pipeline: Translate, valid_data: str, batches: int = 16, batch_size: int = 16) -> dict[str, Any]:
    """Which experts, and which adapters, each direction's tokens go to: part -> {tasks, load_NxTxE, told_apart_N}, for
    layers N of the encoder and then of the decoder; nothing of dense parts."""
    data, model = Pairs.open(valid_data), pipeline.model
    batch_size = sharding.full(batch_size, pipeline.mesh)

    @jax.jit
    def step(model: Any, batch: Any) -> Any:
        encoded, *read = model.encode(batch.source)
        *_, stats, adapted = model.decode(batch.tokens_BxL, batch.info, (encoded, batch.source.info))
        of = lambda pair: None if pair[0] is None else jnp.concatenate([s.task_load_TxE for s in pair])  # noqa: E731
        return jax.tree.map(sharding.whole, {"experts": of((read[0], stats)), "adapters": of((read[1], adapted))})

    total: Any = None
    for batch in data.sample(batches * batch_size, batch_size):
        with sharding.use(pipeline.mesh):
            found = jax.device_get(step(model, batch))
        total = found if total is None else jax.tree.map(np.add, total, found)
    names = {number: name.partition("/")[2] for name, number in data.meta["families"].items()}
    out = {}
    for part in ("experts", "adapters"):
        if total[part] is None:
            continue
        load_NxTxE = total[part]
        present = np.flatnonzero(load_NxTxE.sum((0, 2)))
        share = load_NxTxE[:, present] / np.maximum(load_NxTxE[:, present].sum(-1, keepdims=True), 1)
        apart = [told_apart(layer) for layer in share.tolist()]
        out[part] = {"tasks": [names[t] for t in present], "load": share.tolist(), "told_apart": apart}
    return out


# --- the command ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a run folder, or a safetensors file")
    parser.add_argument("--source-lang", required=True, metavar="LANG", help="of the input, such as de")
    parser.add_argument("--target-lang", required=True, metavar="LANG", help="of the output, such as en")
    parser.add_argument("--input", help="a text file, a sentence a line (default: standard input)")
    parser.add_argument("--output", help="where to write (default: standard output)")
    parser.add_argument("--reference", help="a text file of as many lines, to score against")
    parser.add_argument("--beam", type=int, default=4, help="width of the search (default: 4)")
    parser.add_argument("--long", choices=("split", "refuse"), default="split", help="lines beyond the model's length")
    parser.add_argument("--mesh", metavar="AXES", help="divide the model over devices, as correct does")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT")


def main(args: argparse.Namespace) -> int:
    """Raises ValueError, in one line, before anything is translated, for what cannot be."""
    if args.beam < 1:
        raise ValueError(f"--beam is {args.beam}, it must be 1 or more")
    output = Path(args.output) if args.output else None
    if output and (said := unfit(output, args.overwrite, [path for path in (args.input, args.reference) if path])):
        raise ValueError(said)
    pipeline = Translate.load(args.checkpoint, beams=args.beam, mesh=sharding.asked(args.mesh))
    direction = f"{args.source_lang}-{args.target_lang}"
    if said := untrained(pipeline.task(direction), pipeline.trained):
        print(f"warning: {said}", file=sys.stderr)
    references = _lines(args.reference) if args.reference else None
    lines = _lines(args.input)
    if references is not None and len(references) != len(lines):
        raise ValueError(f"{args.reference} has {len(references)} lines, the input {len(lines)}: they must be pairs")
    written = []
    try:
        for line in pipeline.stream(lines, direction, split=args.long == "split", progress=True):
            written.append(line)
            if not output:
                sys.stdout.buffer.write(f"{line}\n".encode())  # whatever the locale
                sys.stdout.buffer.flush()
    except BrokenPipeError:  # who reads has enough, as `head` does
        nobody_reads()
        return 128 + signal.SIGPIPE
    if output:
        write_text(output, "".join(f"{line}\n" for line in written))
    if references:
        for metric in (translation.bleu(), translation.chrf()):
            value, signature = metric.corpus(written, references)
            print(f"{metric.name} {100 * value:.2f} ({signature})", file=sys.stderr)
    return 0


def _lines(path: str | None) -> list[str]:
    name = path or "standard input"
    try:
        data = Path(path).read_bytes() if path else sys.stdin.buffer.read()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{name}: cannot read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}: line {line} is not UTF-8; convert it first") from None
    return text.removesuffix("\n").split("\n") if text else []
