"""A correction task as a seqio task: JSON lines in, `tokens`, `roles` and `tasks` out, then metrics.

    from moe_jax.tasks import correction
    correction.register_jsonl_task("my_dictation", "asr", "/data/dictation")   # train.jsonl, valid.jsonl, ...

Tasks read the tokeniser and the form of prompts when a dataset is built: see `Settings` and `using`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import json
import os
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax import formats
from moe_jax.formats.record import Record
from moe_jax.tasks import preprocessors
from moe_jax.tasks.families import FAMILIES, MAX_FAMILIES, family_id
from moe_jax.tasks.quiet import seqio, tf
from moe_jax.text.prompt import TAGGED, Example, check_layout, encode_example
from moe_jax.text.tokeniser import Tokeniser

PACKAGED = Path(__file__).parent / "data"
SPLITS = ("train", "valid", "test")
SHUFFLE_LINES = 200_000  # lines held in memory to shuffle; a larger file is shuffled over a window of them


@dataclasses.dataclass(frozen=True)
class Settings:
    """What turns rows into ids; the same for all tasks of a mixture. `ids` are those of `task_ids`."""

    tokeniser: Tokeniser | str | os.PathLike = PACKAGED / "tokeniser.model"
    layout: str = "aligned"
    max_hypotheses: int = 5
    max_sources: int = 0
    ids: Mapping[str, int] = dataclasses.field(default_factory=lambda: FAMILIES)

    @functools.cached_property
    def loaded(self) -> Tokeniser:
        return self.tokeniser if isinstance(self.tokeniser, Tokeniser) else Tokeniser.load(self.tokeniser)

    def encoder(self, family: str, right_first: bool = False) -> preprocessors.Encode:
        """Encodes rows of a family; with `right_first` as if the first pass had been right.

        Raises ValueError for a layout that the tokeniser cannot write.
        """
        check_layout(self.loaded, self.layout)
        by_set = self.layout in TAGGED or any(name.startswith(f"{family}/") for name in self.ids)

        def encode(record: Record, max_length: int) -> tuple[Example | None, int]:
            reference = record.reference
            source_set = json.loads(record.raw).get("source_set") if by_set else None
            task = f"{family}/{source_set}" if source_set else family
            example = encode_example(
                self.loaded,
                (reference, *record.hypotheses) if right_first and reference else record.hypotheses,
                record.sources,
                reference,
                max_length=max_length,
                layout=self.layout,
                max_hypotheses=self.max_hypotheses,
                max_sources=self.max_sources,
                family=task,
            )
            return example, self.ids.get(task, self.ids[family])

        return encode


def task_ids(ids: Mapping[str, int] | None = None) -> dict[str, int]:
    """`FAMILIES`, changed and extended by `ids`: of a family ("asr"), or of one data set of it ("asr/austen-whisper",
    the row's "source_set"), which then is a task of its own.

    Raises ValueError, in one line, for an unknown family, or for an id that is taken or out of range.
    """
    table = FAMILIES | dict(ids or {})
    for name, number in table.items():
        family_id(name.split("/")[0])
        if type(number) is not int or not 0 < number < MAX_FAMILIES:
            raise ValueError(f"task {name!r} has the id {number!r}; give it one of 1 to {MAX_FAMILIES - 1}")
        if twins := [other for other in table if other != name and table[other] == number]:
            raise ValueError(f"tasks {name!r} and {twins[0]!r} have the same id {number}; give each its own")
    return table


_settings = Settings()


def settings() -> Settings:
    return _settings


def set_tokeniser(tokeniser: Tokeniser | str | os.PathLike) -> None:
    """Datasets built from now on use this tokeniser. Raises ValueError if it cannot be read."""
    global _settings
    changed = dataclasses.replace(_settings, tokeniser=tokeniser)
    if changed.loaded:  # read now, so that a bad path changes nothing and is not reported while drawing
        _settings = changed


@contextlib.contextmanager
def using(**changes: Any) -> Generator[Settings]:
    """Datasets built inside the block use these `Settings`."""
    global _settings
    before = _settings
    _settings = dataclasses.replace(before, **changes)
    try:
        yield _settings
    finally:
        _settings = before


def data_folder() -> Path:
    """Where the corpus is: `MOE_JAX_DATA`, or the embedded one."""
    return Path(os.environ.get("MOE_JAX_DATA") or PACKAGED)


class JsonLines(seqio.DataSource):
    """One `.jsonl`, `.jsonl.gz` or `.json` file a split, as {"line", "path", "number"}: where a line is, for messages.

    Shuffles lines itself, anew in each epoch: cheaper than examples, and over whole files. (seqio's cache in
    memory keeps the first order; `try_in_mem_cache=False` turns it off.)
    """

    def __init__(self, family: str, folder: Callable[[], Path], stem: str, splits: Sequence[str] = SPLITS):
        """`folder` is asked at use; a file is `stem` + split + suffix in it."""
        super().__init__(splits, caching_permitted=False, performs_internal_shuffling=True)
        self.family, self._folder, self._stem = family, folder, stem

    def has(self, split: str) -> bool:
        try:
            return bool(self.path(split))
        except ValueError:
            return False

    def path(self, split: str) -> Path:
        """Raises ValueError, in one line, if there is no file for the split."""
        return formats.split_file(self._folder(), split, self._stem)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        return [str(self.path(split))]

    def listed(self, path: Path) -> tuple[list[bytes], list[int]] | None:
        """Rows of a file that is read whole, and their lines; None for one that is read line by line."""
        return _records(path, path.stat().st_mtime_ns) if path.suffix == ".json" else None

    def num_input_examples(self, split: str) -> int:
        path = self.path(split)
        listed = self.listed(path)
        return len(listed[0]) if listed else _count_lines(path, path.stat().st_mtime_ns)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        path = self.path(split)
        if listed := self.listed(path):
            lines, numbers = listed
            numbered = tf.data.Dataset.from_tensor_slices((tf.constant(numbers, tf.int64), lines))
        else:
            compression = "GZIP" if path.suffix == ".gz" else ""
            numbered = tf.data.TextLineDataset(str(path), compression_type=compression).enumerate(1)
        rows = numbered.map(lambda number, line: {"line": line, "path": tf.constant(str(path)), "number": number})
        rows = rows.filter(lambda row: tf.strings.length(tf.strings.strip(row["line"])) > 0)
        if shard_info and shard_info.num_shards > 1:
            rows = rows.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            rows = rows.shuffle(min(self.num_input_examples(split), SHUFFLE_LINES) or 1, seed=seed)
        return rows


@functools.lru_cache
def _count_lines(path: Path, mtime: int) -> int:
    """Lines that are not blank; `mtime` makes the cache see a file that has changed."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            return sum(bool(line.strip()) for line in file)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot read ({error})") from None


@functools.lru_cache(maxsize=4)
def _records(path: Path, mtime: int) -> tuple[list[bytes], list[int]]:
    """The records of a JSON list, as they stand in the file, and their lines. Raises FormatError, in one line."""
    records = list(formats.read(path))
    return [record.raw.encode() for record in records], [record.line for record in records]


def features() -> dict[str, seqio.Feature]:
    """The output features of every correction task: ids in, ids out, nothing appended."""

    def of(size: int) -> seqio.Feature:
        return seqio.Feature(seqio.PassThroughVocabulary(size), add_eos=False, dtype=tf.int32)

    return {"tokens": of(1 << 31), "roles": of(3), "tasks": of(MAX_FAMILIES)}


def postprocess(output: Any, example: Mapping[str, Any] | None = None, is_target: bool = False) -> Any:
    """The text of written ids, or, for a target, the record that it was made of."""
    if is_target and example is not None:
        return preprocessors.parse_row(example["line"], example["path"], example["number"])
    return output if isinstance(output, str) else settings().loaded.decode(output)


def metrics(targets: Sequence[Record], predictions: Sequence[str], *, family: str) -> dict[str, float]:
    """Scores of corrections: {"wer": ..., "cer": ...}, with those of the family (see `moe_jax.metrics`)."""
    from moe_jax.metrics import scoring  # here, so that preparing data does not wait for it

    examples = [
        {"task": family, "source_set": "", "hypotheses": record.hypotheses, "reference": record.reference}
        for record in targets
    ]
    rows = scoring.score(examples, predictions)
    return {row["metric"]: row["corrected"] for row in rows if row["set"] == scoring.ALL}


def register(
    name: str, family: str, folder: Callable[[], Path], stem: str, splits: Sequence[str] = SPLITS, **how: Any
) -> seqio.Task:
    """Registers a task over `JsonLines`. Raises ValueError as `add`, which `how` is for."""
    return add(name, family, JsonLines(family, folder, stem, splits), **how)


def add(
    name: str,
    family: str,
    source: seqio.DataSource,
    to_rows: Sequence[Callable[[tf.data.Dataset], tf.data.Dataset]] = (),
    shuffle_buffer_size: int | None = None,
    right_first: bool = False,
    metric_fn: Callable[[Sequence[Record], Sequence[str]], Mapping[str, float]] | None = None,
) -> seqio.Task:
    """Registers a seqio task over a source of the rows of `JsonLines`, or of what `to_rows` makes them of.

    With `right_first` the reference stands before the hypotheses: what a recogniser that is right would have given.
    Who learns from errors alone mends what is right. Without `metric_fn` scores are those of the family (`metrics`).

    Raises ValueError for a taken or malformed name, or an unknown family.
    """
    if name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names():
        raise ValueError(f"a task or mixture called {name!r} is registered already; choose another name")
    family_id(family)

    def correction_metrics(targets, predictions):
        return metrics(targets, predictions, family=family)

    encode_rows = functools.partial(
        preprocessors.encode_rows, get_encode=lambda: settings().encoder(family, right_first)
    )
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[*to_rows, encode_rows],
        output_features=features(),
        postprocess_fn=postprocess,
        metric_fns=[metric_fn or correction_metrics],
        shuffle_buffer_size=shuffle_buffer_size,  # None: the source shuffles
    )


def register_jsonl_task(name: str, family: str, folder: str | os.PathLike) -> seqio.Task:
    """A task of the user's own from `train.jsonl`, `valid.jsonl` and `test.jsonl` in `folder`.

    (Or .jsonl.gz, or .json: a list.) Each line is an object with "hypotheses" (a list, best first) and "reference",
    and "sources" if any, or with the keys of another tool that `moe_jax.formats` knows (such as HyPoradise's "input"
    and "output"). Raises ValueError, in one line, without a train file, or if the name cannot be used.
    """
    folder = Path(folder).absolute()
    source = JsonLines(family, lambda: folder, "")
    source.path("train")
    return register(name, family, lambda: folder, "", [split for split in SPLITS if source.has(split)])
