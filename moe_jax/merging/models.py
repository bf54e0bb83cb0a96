"""What can be merged: a checkpoint of ours (a safetensors file or a run folder) or a Hugging Face folder. Arrays are
read a matrix at a time; of stacked layers and experts each has its own."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax import checkpoint, describe, tree
from moe_jax.data import Dataset, Pairs, Prepared, misnumbered
from moe_jax.interop import huggingface
from moe_jax.interop.tensors import InteropError
from moe_jax.moe.task_routers import Subset
from moe_jax.speech.data import Speech

Dtypes = Mapping[str, np.dtype]


class MergeError(ValueError):
    """One line: what, where, how to mend it."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One array that a method sees: leaf `name` at `index` of its stacked dims (layers, experts).

    Attributes:
      depth: 0 for the first layer to 1 for the last; None outside of layers.
      matrix: whether it has two dims that are inputs and outputs.
    """

    name: str
    index: tuple[int, ...]
    depth: float | None
    matrix: bool


class Model(abc.ABC):
    """One opened model.

    Attributes:
      shapes: name -> shape.  dtypes: name -> dtype.
      about: what models that are merged must have in common, by what it is called.
      order: name -> for each index of the first stacked dim, in which order to read the experts (`align`).
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]
    about: dict[str, Any]

    def __init__(self, path: str):
        self.path = path
        self.order: dict[str, np.ndarray] = {}

    @abc.abstractmethod
    def files(self) -> list[Path]:
        """The files of its arrays."""

    @abc.abstractmethod
    def slice(self, name: str, index: tuple[int, ...]) -> np.ndarray:
        """Part `index` of an array, in its own dtype."""

    @abc.abstractmethod
    def stacked(self, name: str) -> int:
        """How many of the leading dims are stacks."""

    @abc.abstractmethod
    def depth(self, name: str, index: tuple[int, ...]) -> float | None:
        """0 for the first layer to 1 for the last; None outside of layers."""

    @abc.abstractmethod
    def write(self, output: Path, dtypes: Dtypes, arrays: Iterator[np.ndarray], note: Mapping[str, Any]) -> None:
        """A model like this one of other `arrays`, in the order of `shapes`; `note` goes into its metadata."""

    def read(self, site: Site) -> np.ndarray:
        """float32. Raises MergeError for what is not finite."""
        x = self.ordered(self.slice, site)
        if not np.isfinite(x).all():
            raise MergeError(f"{self.path}: {site.name} holds a number that is not finite; that model cannot be merged")
        return x

    def ordered(self, slice_of: Callable[[str, tuple[int, ...]], np.ndarray], site: Site) -> np.ndarray:
        """What `slice_of` has for a site, such as this model's weights, in the order of the base's experts; float32."""
        index = site.index
        if (order := self.order.get(site.name)) is not None and len(index) > 1:
            index = (index[0], int(order[index[0]][index[1]]), *index[2:])
        x = np.asarray(slice_of(site.name, index), np.float32)
        if order is not None and len(site.index) == 1:  # a router's column for each expert
            x = x[..., order[site.index[0]]]
        return x

    def sites(self, name: str) -> Iterator[Site]:
        stacked = self.stacked(name)
        matrix = len(self.shapes[name]) - stacked == 2
        for index in np.ndindex(self.shapes[name][:stacked]):
            yield Site(name, index, self.depth(name, index), matrix)

    def differs(self, other: Any) -> str | None:
        """What of `about` the other model has another of."""
        names = sorted(self.about.keys() | other.about.keys())
        return next((name for name in names if self.about.get(name) != other.about.get(name)), None)

    def digest(self) -> str:
        """SHA-256 of its arrays' files."""
        return digest(self.files())


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of files, one after another."""
    return _digest(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@functools.lru_cache(maxsize=256)  # a search opens the same models at each trial
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    found = hashlib.sha256()
    for path, _, _ in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()


class Ours(Model):
    def __init__(self, path: str):
        super().__init__(path)
        self._source = checkpoint.Source(path)
        self.meta = self._source.meta
        try:
            model = describe.abstract(self.meta["model"])
            words = tree.axes(model)
            about = {"tokenisers": self.meta["tokeniser"], "models": _architecture(describe.describe(model))}
            about |= {"prompt layouts": self.meta["layout"]}
            self.families: dict[str, int] = dict(self.meta["families"])
        except (KeyError, TypeError, ValueError) as error:
            raise MergeError(f"{path}: its description is incomplete or wrong ({error}); export it again") from None
        self.about, self._model = about, model
        self.shapes, self.dtypes = self._source.shapes, self._source.dtypes
        self.words = {n: tuple(w for w in words.get(n, ()) if w != "expert") for n in self.shapes}
        self.moe = {n for n, w in words.items() if "expert" in w}
        self.routed = {n for n in words if tree.is_router(n)}

    def files(self) -> list[Path]:
        return [self._source.path]

    def slice(self, name: str, index: tuple[int, ...]) -> np.ndarray:
        return self._source.slice(name, index)

    def stacked(self, name: str) -> int:
        return len(self.shapes[name]) - len(self.words[name])

    def depth(self, name: str, index: tuple[int, ...]) -> float | None:
        if not index or not (found := re.match(r"(?:(.*)/)?(dense_)?blocks/", name)):
            return None
        side: Any = getattr(self._model, found[1]) if found[1] else self._model  # an encoder's and a decoder's each
        dense = getattr(side, "dense_layers", ())
        layers = self.shapes[name][0] if not dense else side.layers
        numbers = [n for n in range(layers) if (n in dense) == bool(found[2])]
        return numbers[index[0]] / max(layers - 1, 1)

    def placed(self, layer: str) -> bool:
        """Whether a router of experts beside its gate has a map from tasks to experts' places that it keeps to when
        the model is used."""
        router = functools.reduce(getattr, layer.split("/"), self._model).router
        return isinstance(router, Subset) or getattr(router, "inference", None) == "forced"

    def write(self, output: Path, dtypes: Dtypes, arrays: Iterator[np.ndarray], note: Mapping[str, Any]) -> None:
        meta = {k: v for k, v in self.meta.items() if k not in ("guard", "step")}
        meta |= {"families": self.families, "merged": dict(note)}
        checkpoint.stream_safetensors(output, self.shapes, dtypes, arrays, {"moe_jax": json.dumps(meta)})


def _architecture(described: Any) -> Any:
    """A model's description without what changes no number of it but in training: how it is laid out and run."""
    if isinstance(described, Mapping):
        aside = ("remat", "unroll", "block", "auxiliary")
        return {key: _architecture(value) for key, value in described.items() if key not in aside}
    return [_architecture(value) for value in described] if isinstance(described, (list, tuple)) else described


# Of a config.json what makes no number of the model that is merged: where it comes from and how it is run, how texts
# are generated, the names of labels, and what acts in training alone. Tuning changes these. (Whisper, wav2vec 2, BERT,
# T5 and Llama with their kin.)
ASIDE = re.compile(
    r"_name_or_path|transformers_version|(torch_)?dtype|_?attn_implementation\w*|use_cache|return_dict\w*"
    r"|output_(attentions|hidden_states|scores|router_logits)"
    r"|forced_\w+_ids?|(begin_)?suppress_tokens|\w+_token_ids?|bad_words_ids|(min|max)_length|(min|max)_new_tokens"
    r"|num_beams|num_beam_groups|num_return_sequences|do_sample|temperature|top_[kp]|typical_p|early_stopping"
    r"|\w+_penalty|(encoder_)?no_repeat_ngram_size|remove_invalid_values|task_specific_params"
    r"|id2label|label2id|problem_type|finetuning_task"
    r"|\w*dropout\w*|\w*layerdrop\w*|apply_spec_augment|mask_(time|feature)_\w+|gradient_checkpointing"
    r"|initializer_\w+|init_std|ctc_(loss_reduction|zero_infinity)|router_(aux_loss_coef|jitter_noise)"
)


class HuggingFace(Model):
    """Its tensors keep their names; the files beside them come from the base."""

    KEPT = (".json", ".txt", ".model", ".jinja")

    def __init__(self, path: str):
        super().__init__(path)
        self._folder = huggingface.Folder(Path(path))
        config = huggingface.read_json(Path(path) / "config.json")
        if config.get("quantization_config"):
            raise MergeError(f"{path}: is quantised, which cannot be merged; take the folder of the unquantised model")
        try:  # by what it means, as each version of transformers writes it in its own way
            self.described: Any = huggingface.describe(config, path)
        except InteropError:
            self.described = None
        self.about = {f"{name!r} (config.json)": value for name, value in _meant(config).items()}
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"):
            if (Path(path) / name).is_file():
                self.about[f"tokenisers ({name})"] = _tokeniser(Path(path) / name)
        self.shapes, self.dtypes = dict(self._folder.shapes), dict(self._folder.dtypes)
        if config.get("tie_word_embeddings") and "model.embed_tokens.weight" in self.shapes:
            self.shapes.pop("lm_head.weight", None)  # some tools write it though it is the embedding
        self._layers: dict[str, int] = defaultdict(int)
        for name in self.shapes:
            if found := self._LAYER.search(name):
                stack = name[: found.start()]
                self._layers[stack] = max(self._layers[stack], int(found[1]) + 1)

    def differs(self, other: Any) -> str | None:
        """A folder without a tokeniser, as trainers often write it, is taken to have the other's; and what one
        configuration alone says, to be so in the other, unless it makes another model of it."""
        alike = self.described is not None and self.described == other.described
        for name in sorted(self.about.keys() & other.about.keys()):
            if self.about[name] != other.about[name] and not (alike and name.endswith("(config.json)")):
                return name
        known = self.described is not None and other.described is not None
        return "architectures (config.json)" if known and not alike else None

    _LAYER = re.compile(r"\b(?:layers|h|block|blocks|layer)\.(\d+)\.")

    def files(self) -> list[Path]:
        return self._folder.files()

    def slice(self, name: str, index: tuple[int, ...]) -> np.ndarray:
        return self._folder.slice(name, index)

    def stacked(self, name: str) -> int:
        return 1 if len(self.shapes[name]) == 3 and "expert" in name else 0  # fused experts

    def depth(self, name: str, index: tuple[int, ...]) -> float | None:
        found = self._LAYER.search(name)
        return int(found[1]) / max(self._layers[name[: found.start()]] - 1, 1) if found else None

    def write(self, output: Path, dtypes: Dtypes, arrays: Iterator[np.ndarray], note: Mapping[str, Any]) -> None:
        aside = output.with_name(f"{output.name}.{os.getpid()}.part")
        aside.mkdir(parents=True)
        try:
            meta = {"format": "pt", "merged": json.dumps(note)}
            checkpoint.stream_safetensors(aside / huggingface.WEIGHTS, self.shapes, dtypes, arrays, meta)
            for path in sorted(Path(self.path).iterdir()):
                if path.is_file() and path.name.endswith(self.KEPT) and path.name != huggingface.INDEX:
                    shutil.copyfile(path, aside / path.name)
            aside.rename(output)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _meant(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, and those within it, without what is `ASIDE`."""
    kept = {name: value for name, value in config.items() if not ASIDE.fullmatch(name)}
    return {name: _meant(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def _tokeniser(path: Path) -> Any:
    """What tells tokenisers apart: the words and merges of a tokenizer.json, however it is written; else a file's
    bytes."""
    if path.name == "tokenizer.json":
        given = huggingface.read_json(path)
        model, added = given.get("model"), given.get("added_tokens")
        if isinstance(model, dict) and isinstance(model.get("vocab"), (dict, list)):
            merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or ()]
            return model["vocab"], merges, [x.get("content") for x in added or () if isinstance(x, dict)]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_model(path: str) -> Model:
    """Raises MergeError, CheckpointError or InteropError, in one line, for what is no model."""
    if not Path(path).exists():
        raise MergeError(
            f"{path}: there is no such checkpoint; give a safetensors file, a run folder or a model folder"
        )
    return HuggingFace(path) if (Path(path) / "config.json").is_file() and _is_theirs(path) else Ours(path)


def _is_theirs(path: str) -> bool:
    return "model_type" in huggingface.read_json(Path(path) / "config.json")


def open_data(path: str, meta: Mapping[str, Any], folder: str) -> Dataset:
    """A prepared folder as the model of the checkpoint `path` reads it. Raises MergeError where it cannot."""
    kind = (meta.get("model") or {}).get("class")
    readers = {"Corrector": Prepared.open, "Translator": Pairs.open, "Conformer": Speech.open}
    if kind not in readers:
        raise MergeError(f"{path}: is a {kind}, which reads no prepared data; known: {', '.join(readers)}")
    data = readers[kind](folder)
    if data.meta["tokeniser"] != meta.get("tokeniser"):
        raise MergeError(f"{folder}: was prepared with another tokeniser than {path} has")
    own, theirs = meta.get("families") or {}, data.meta["families"]
    if odd := sorted(name for name in own.keys() & theirs.keys() if own[name] != theirs[name]):
        raise MergeError(f"{folder}: {odd[0]} has another number there than in {path}; prepare it with its ids")
    return data


def check_alike(first: Model, other: Model) -> None:
    """Raises MergeError where the two are not of one architecture, vocabulary and tokeniser."""
    if type(first) is not type(other):
        said = "one is a Hugging Face folder, the other a checkpoint of moe_jax"
        raise MergeError(f"{first.path} and {other.path}: {said}; import or export one of them")
    if what := first.differs(other):
        raise MergeError(f"{first.path} and {other.path} have different {what}: merge models tuned from one base")
    if isinstance(first, Ours) and isinstance(other, Ours):
        _unite(first, other)
    if odd := sorted(first.shapes.keys() ^ other.shapes.keys()):
        lacks = other if odd[0] in first.shapes else first
        raise MergeError(f"{lacks.path} lacks {odd[0]}: merge models tuned from one base")
    for name, shape in first.shapes.items():
        if other.shapes[name] != shape:
            raise MergeError(f"{other.path}: {name} is {other.shapes[name]}, in {first.path} {shape}: not of one base")


def _unite(first: Ours, other: Ours) -> None:
    """Adds the families that `other` knows to those of `first`: a model tuned on one family may know no other."""
    for name in misnumbered(first.families, other.families):
        said = f"{name} is {other.families[name]} in one only"
        raise MergeError(f"{first.path} and {other.path} number families differently: {said}")
    first.families = first.families | other.families
    own = {k: v for k, v in first.meta.items() if k != "trained"}
    if "trained" in first.meta and "trained" in other.meta:
        own["trained"] = [*dict.fromkeys((*first.meta["trained"], *other.meta["trained"]))]
    first.meta = own  # what one of them does not remember, their merge does not know
