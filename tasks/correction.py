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
import os
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax import formats
from moe_jax.formats.record import Record
from moe_jax.tasks import preprocessors
from moe_jax.tasks.families import family_id
from moe_jax.tasks.quiet import seqio, tf
from moe_jax.text.prompt import Example, encode_example
from moe_jax.text.tokeniser import Tokeniser

PACKAGED = Path(__file__).parent / "data"
SPLITS = ("train", "valid", "test")
MAX_TASK_IDS = 256  # of the vocabulary of `tasks`; families are uint8 in prepared data
SHUFFLE_LINES = 200_000  # lines held in memory to shuffle; a larger file is shuffled over a window of them


@dataclasses.dataclass(frozen=True)
class Settings:
    """What turns rows into ids; the same for all tasks of a mixture."""

    tokeniser: Tokeniser | str | os.PathLike = PACKAGED / "tokeniser.model"
    layout: str = "aligned"
    max_hypotheses: int = 5
    max_sources: int = 0

    @functools.cached_property
    def loaded(self) -> Tokeniser:
        return self.tokeniser if isinstance(self.tokeniser, Tokeniser) else Tokeniser.load(self.tokeniser)

    def encode(self, record: Record, max_length: int) -> Example | None:
        return encode_example(
            self.loaded,
            record.hypotheses,
            record.sources,
            record.reference,
            max_length=max_length,
            layout=self.layout,
            max_hypotheses=self.max_hypotheses,
            max_sources=self.max_sources,
        )


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
    """One `.jsonl` or `.jsonl.gz` file a split, as {"line", "path", "number"}: where a line is, for messages.

    Shuffles lines itself, anew in each epoch: cheaper than examples, and over whole files. (seqio's cache in
    memory keeps the first order; `try_in_mem_cache=False` turns it off.)
    """

    def __init__(self, family: str, folder: Callable[[], Path], stem: str, splits: Sequence[str] = SPLITS):
        """`folder` is asked at use; a file is `stem` + split + suffix in it."""
        super().__init__(splits, caching_permitted=False, performs_internal_shuffling=True)
        self.family, self._folder, self._stem = family, folder, stem

    def path(self, split: str) -> Path:
        """Raises ValueError, in one line, if there is no file for the split."""
        return formats.split_file(self._folder(), split, self._stem)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        return [str(self.path(split))]

    def num_input_examples(self, split: str) -> int:
        path = self.path(split)
        return _count_lines(path, path.stat().st_mtime_ns)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        path = self.path(split)
        lines = tf.data.TextLineDataset(str(path), compression_type="GZIP" if path.suffix == ".gz" else "")
        rows = lines.enumerate(1).map(
            lambda number, line: {"line": line, "path": tf.constant(str(path)), "number": number}
        )
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


def features() -> dict[str, seqio.Feature]:
    """The output features of every correction task: ids in, ids out, nothing appended."""

    def of(size: int) -> seqio.Feature:
        return seqio.Feature(seqio.PassThroughVocabulary(size), add_eos=False, dtype=tf.int32)

    return {"tokens": of(1 << 16), "roles": of(3), "tasks": of(MAX_TASK_IDS)}


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
    name: str, family: str, folder: Callable[[], Path], stem: str, splits: Sequence[str] = SPLITS
) -> seqio.Task:
    """Registers a seqio task. Raises ValueError for a taken or malformed name, or an unknown family."""
    if name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names():
        raise ValueError(f"a task or mixture called {name!r} is registered already; choose another name")

    def correction_metrics(targets, predictions):
        return metrics(targets, predictions, family=family)

    encode_rows = functools.partial(
        preprocessors.encode_rows, get_encode=lambda: settings().encode, task_id=family_id(family)
    )
    return seqio.TaskRegistry.add(
        name,
        source=JsonLines(family, folder, stem, splits),
        preprocessors=[encode_rows],
        output_features=features(),
        postprocess_fn=postprocess,
        metric_fns=[correction_metrics],
        shuffle_buffer_size=None,  # the source shuffles
    )


def register_jsonl_task(name: str, family: str, folder: str | os.PathLike) -> seqio.Task:
    """A task of the user's own from `train.jsonl`, `valid.jsonl` and `test.jsonl` (or .jsonl.gz) in `folder`.

    Each line is an object with "hypotheses" (a list, best first) and "reference", and "sources" if any, or
    with the keys of another tool that `moe_jax.formats` knows (such as HyPoradise's "input" and "output").
    Raises ValueError, in one line, without `train.jsonl`, or if the name cannot be used.
    """
    folder = Path(folder).absolute()
    JsonLines(family, lambda: folder, "").path("train")
    splits = [split for split in SPLITS if any((folder / f"{split}.jsonl{end}").is_file() for end in ("", ".gz"))]
    return register(name, family, lambda: folder, "", splits)
