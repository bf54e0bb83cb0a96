"""What `benchmarks.merging` merges: a model, the tasks that it is tuned on apart, and how its outputs are scored."""

from __future__ import annotations

import abc
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks.arms import make_base
from benchmarks.launch import ROOT, launch
from moe_jax import branches, evaluate, formats, main, partfile, prepare, translate
from moe_jax.data import Prepared
from moe_jax.formats import manifest
from moe_jax.merging.search import Loss
from moe_jax.metrics import errors, significance, translation
from moe_jax.metrics.normalisers import family_normaliser
from moe_jax.pipeline import Pipeline
from moe_jax.speech import data as speech
from moe_jax.speech.evaluate import counted
from moe_jax.speech.recognise import Recogniser
from moe_jax.tasks import translation as directions

Nll = Callable[[str], dict[str, float]]


def trained(file: str, bindings: Mapping[str, Any]) -> Path:
    """The run folder RUN_DIR, made by `python -m moe_jax.main` where it has no model yet. Paths are those of ROOT."""
    folder = ROOT / bindings["RUN_DIR"]
    if not (folder / "model.safetensors").exists():
        print(f"--- {file} -> {bindings['RUN_DIR']}", flush=True)
        launch([file], bindings)
    return folder


class Setting(abc.ABC):
    """A model and its tasks.

    Attributes:
      name: `corrector`, ...: of its gin file, too.
      tasks: in the order of sequential training.
      joint: the name of the prepared data of all of them.
      steps: of all tasks together, in joint training and apart.
      metric, score: of the text: its name, and what makes it of what `lines` has.
      scales: of a merge, that are tried.
      rows: of validation and test data that nll is of.
      to_experts: whether its dense models become the experts of one.
      every: what its gin file calls the steps between evaluations.
    """

    name: str
    tasks: tuple[str, ...]
    joint: str
    steps: int
    metric: str
    score: Callable[[np.ndarray], np.ndarray] = staticmethod(significance.error_rate)
    scales: tuple[float, ...] = (0.1, 0.2, 0.35, 0.6, 1.0)
    rows = 128
    to_experts = False
    every = "EVERY"

    @abc.abstractmethod
    def base(self) -> Path:
        """The run folder of what is tuned, made where it is not."""

    @abc.abstractmethod
    def data(self, task: str | None) -> str:
        """The name of the prepared data of a task, or of all."""

    @abc.abstractmethod
    def prepare(self) -> None:
        """Makes what `nll` reads."""

    @abc.abstractmethod
    def sizes(self) -> dict[str, int]:
        """task -> how much of the joint data it is."""

    @abc.abstractmethod
    def nll(self, split: str) -> Nll:
        """A function of a checkpoint: task -> nll a token (of the recogniser: its loss an utterance)."""

    @abc.abstractmethod
    def lines(self, path: Path, task: str, told: bool) -> list[list[float]]:
        """Of each test line what `score` takes the sums of; `told`: the model is told the task."""

    def tune(self, task: str | None, steps: int, start: Path, folder: Path, seed: int) -> Path:
        """The run folder `folder`: `start` trained on a task, or on all."""
        about = {
            "RUN_DIR": folder.relative_to(ROOT),
            "START": start.relative_to(ROOT),
            "STEPS": steps,
            self.every: steps,
        }
        return trained(f"experiments/merging/{self.name}.gin", about | {"SEED": seed} | self.bindings(task))

    def bindings(self, task: str | None) -> dict[str, Any]:
        """What its gin file is told of a task."""
        of = f"prepared/{self.data(task)}"
        return {"DATA": of, "VALID_DATA": f"{of}.valid"}


class Text(Setting):
    """Trained on seqio mixtures; `named`: a task as prepared data have it."""

    tokeniser: str
    named = "{}"
    about: Mapping[str, Any] = MappingProxyType({})

    def bindings(self, task: str | None) -> dict[str, Any]:
        return super().bindings(task) | {"MIXTURE": self.data(task)}

    def prepare(self) -> None:
        about = {"mixture": self.joint, "tokeniser": main.shipped(self.tokeniser), "passes": 1, **self.about}
        for split in ("valid", "test"):
            prepare.prepare(str(ROOT / "prepared" / f"{self.joint}.{split}"), split=split, **about)

    def sizes(self) -> dict[str, int]:
        seen = Prepared.open(ROOT / "prepared" / self.joint).meta["tasks"]
        return {task: seen[self.named.format(task)]["tokens"] for task in self.tasks}

    def nll(self, split: str) -> Nll:
        loss = Loss(str(ROOT / "prepared" / f"{self.joint}.{split}"), self.rows)

        def of(path: str) -> dict[str, float]:
            found = loss.by_family(path)
            return {task: found[self.named.format(task)] for task in self.tasks}

        return of


class Corrector(Text):
    """On the four families of the embedded corpus, from a base that knows text and noise."""

    name, tasks, joint, steps, metric = "corrector", branches.FAMILIES, "correct_all", 240, "wer"
    tokeniser, to_experts = "tokeniser.model", True
    scales, rows = (0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0), 256
    LINES = 250  # of each family

    def base(self) -> Path:
        return make_base()

    def data(self, task: str | None) -> str:
        return f"correct_all_{task}" if task else self.joint

    def lines(self, path: Path, task: str, told: bool) -> list[list[float]]:
        records, rows = evaluate.read_rows(main.corpus("test", [task]))
        chosen = {id(record) for record in formats.sample(records, self.LINES)}
        kept = [(record, row) for record, row in zip(records, rows, strict=True) if id(record) in chosen]
        pipeline = Pipeline.load(path, task=task if told else None)
        texts = [p.guarded(-math.inf).text for p in evaluate.propose(pipeline, [record for record, _ in kept])]
        found = errors.line_errors([row["reference"] for _, row in kept], texts, family_normaliser(task))
        return [[c.errors, c.reference_length] for c in found]


class Translator(Text):
    """From English into seven languages, from a translator of twenty directions."""

    name, joint, steps, metric = "translator", "translate_from_en", 140, "chrf"
    tasks = tuple(directions.trained("en"))
    score = staticmethod(translation.chrf().score)
    tokeniser, named, every = "translate.model", "translate/{}", "EVERY_STEPS"
    about = MappingProxyType({"layout": "tagged", "length": 128, "ids": directions.direction_ids()})
    LINES = 100  # of each direction

    def base(self) -> Path:
        return trained("experiments/task_moe/dense.gin", {"RUN_DIR": "runs/task_moe/dense-0", "SEED": 0})

    def data(self, task: str | None) -> str:
        return f"translate_{task.replace('-', '_')}" if task else self.joint

    def lines(self, path: Path, task: str, told: bool) -> list[list[float]]:
        sources, references = zip(*main.parallel("test", [task])[task][: self.LINES], strict=True)
        written = translate.Translate.load(path, beams=1)(list(sources), task)
        return translation.chrf().statistics(written, list(references)).tolist()


class Speech(Setting):
    """On the recorded prompts of several languages, from a Conformer of them all. `listed`: a list of utterances with
    audio, text, lang, seconds and split."""

    name, joint, steps, metric = "recogniser", "five", 250, "cer"

    def __init__(self, listed: Path):
        self.path = listed
        self.listed: dict[str, list[dict[str, Any]]] = {}
        for number, line in enumerate(map(json.loads, listed.read_text("utf-8").splitlines()), 1):
            if lacks := {"audio", "text", "lang", "seconds", "split"} - line.keys():
                sys.exit(f"{listed}:{number}: lacks {', '.join(sorted(lacks))}")
            audio = os.path.relpath(listed.parent / line["audio"], ROOT / "prepared")
            self.listed.setdefault(line["lang"], []).append(line | {"audio": audio})
        self.tasks = tuple(sorted(self.listed))

    def base(self) -> Path:
        about = {"RUN_DIR": "runs/merging/recogniser_base", "MANIFEST": self.path}
        return trained("experiments/merging/recogniser_base.gin", about)

    def data(self, task: str | None) -> str:
        return f"prompts_{task}" if task else self.joint

    def _list(self, task: str | None) -> str:
        """The path of the list of a task's utterances, or of all, from ROOT."""
        return f"prepared/{self.data(task)}.jsonl" if task else str(self.path)

    def bindings(self, task: str | None) -> dict[str, Any]:
        of = {"MANIFEST": self._list(task), "TOKENISER": f"prepared/{self.joint}" if task else None}
        return super().bindings(task) | of

    def prepare(self) -> None:
        self.base()  # which prepares the data of all
        joint = str(ROOT / "prepared" / self.joint)
        for task, lines in self.listed.items():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            partfile.write_text(ROOT / self._list(task), text)
            for split in ("valid", "test"):
                speech.prepare(self._scored(task, split), manifest=self._list(task), split=split, tokeniser=joint)

    def _scored(self, task: str, split: str) -> str:
        """The folder of all that nll is of, however long: what training looks at by the way leaves long ones out."""
        return str(ROOT / "prepared" / f"{self.data(task)}.{split}.all")

    def sizes(self) -> dict[str, int]:
        train = {task: [x["seconds"] for x in self.listed[task] if x["split"] == "train"] for task in self.tasks}
        return {task: round(sum(seconds)) for task, seconds in train.items()}

    def nll(self, split: str) -> Nll:
        folders = {task: self._scored(task, split) for task in self.tasks}
        # One at a time: larger batches are of like lengths, and filled up.
        of = {task: Loss(folder, speech.Speech.open(folder).rows, batch_size=1) for task, folder in folders.items()}
        return lambda path: {task: loss.by_family(path)["asr"] for task, loss in of.items()}

    def lines(self, path: Path, task: str, told: bool) -> list[list[float]]:
        by = Recogniser.load(path, way="greedy")
        said = []
        for one in manifest.read(ROOT / self._list(task), "test"):
            if isinstance(one, manifest.Skipped):
                raise ValueError(f"{one.where}: {one.reason}")
            found = by(one.samples(by.rate))
            said.append({"reference": one.text, "texts": {"greedy": found[0].text if found else ""}})
        return counted(said, "greedy", self.metric).tolist()
