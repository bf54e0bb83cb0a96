"""Speech as seqio tasks: a list of utterances (`formats.manifest`: JSON lines, NeMo's, Kaldi's) or a TFDS dataset.

    from moe_jax.tasks import speech
    speech.register_manifest_task("my_calls", {"train": "/data/calls/train.jsonl", "valid": "/data/calls/valid.jsonl"})
    speech.register_tfds_task("yes_no", "yesno:1.0.0", text="label")

An example is {"samples": [S] float32 in the range of 16-bit integers, "rate", "text", "lang", "where", "error"}; one
that cannot be read has no samples, and "error" says why. `speech_prompts`, the recordings that are shipped, is such a
task. `prepare.speech` makes a prepared folder of a task or mixture.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.formats import audio, manifest
from moe_jax.tasks.correction import PACKAGED, SPLITS
from moe_jax.tasks.quiet import seqio, tf

TEXTS = ("text", "lang", "where", "error")
FEATURES = {"samples": (tf.float32, 1), "rate": (tf.int32, 0)} | dict.fromkeys(TEXTS, (tf.string, 0))
Example = dict[str, Any]


class Manifest(seqio.DataSource):
    """Utterances of lists, split -> list; or of one list whose rows say their split. Each is read when it comes, unless
    it is longer than `longest` seconds."""

    def __init__(self, lists: Mapping[str, str] | str, longest: float = audio.LONGEST):
        super().__init__(SPLITS if isinstance(lists, str) else list(lists), caching_permitted=False)
        self._lists, self._longest = lists, longest

    def found(self, split: str) -> list[manifest.Utterance | manifest.Skipped]:
        """Raises ValueError, in one line, where there is no such list."""
        if isinstance(self._lists, str):
            return list(manifest.read(self._lists, split))
        return list(manifest.read(self._lists[split]))

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> list[str]:
        return [self._lists if isinstance(self._lists, str) else self._lists[split]]

    def num_input_examples(self, split: str) -> int:
        return len(self.found(split))

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        found = self.found(split)
        rows = tf.data.Dataset.range(len(found))
        if shard_info and shard_info.num_shards > 1:
            rows = rows.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            rows = rows.shuffle(max(1, len(found)), seed=seed)

        def one(index: np.ndarray) -> list[Any]:
            made = example(found[int(index)], self._longest)
            return [made[name] for name in FEATURES]

        return rows.map(lambda index: _shaped(tf.numpy_function(one, [index], [d for d, _ in FEATURES.values()])))


def example(one: manifest.Utterance | manifest.Skipped, longest: float) -> Example:
    """An utterance at its file's own rate."""
    made: Example = dict(samples=np.zeros(0, np.float32), rate=np.int32(0), text="", lang="", where=one.where, error="")
    if isinstance(one, manifest.Skipped):
        return made | {"error": one.reason}
    made |= {"text": one.text, "lang": one.lang}
    try:
        if (seconds := one.seconds) > longest:
            return made | {"error": manifest.too_long(longest, seconds)}
        rate = audio.rate(one.audio)
        return made | {"samples": one.samples(rate), "rate": np.int32(rate)}
    except audio.AudioError as error:
        return made | {"error": f"audio that cannot be read: {error}"}


def _shaped(values: list[tf.Tensor]) -> Example:
    pairs = zip(FEATURES.items(), values, strict=True)
    return {name: tf.ensure_shape(value, [None] * rank) for (name, (_, rank)), value in pairs}


def register_manifest_task(name: str, lists: Mapping[str, str] | str, *, longest: float = audio.LONGEST) -> seqio.Task:
    """A task over lists of utterances, split -> list, or over one list whose rows say their "split".

    Args:
      longest: seconds; what is longer is not read, and its example says so.

    Raises ValueError, in one line, for a name that is taken.
    """
    return _add(name, Manifest(lists, longest), [])


def register_tfds_task(
    name: str,
    dataset: str,
    *,
    samples: str = "audio",
    text: str = "text",
    rate: int | None = None,
    lang: str = "",
    data_dir: str | None = None,
    splits: Mapping[str, str] | None = None,
) -> seqio.Task:
    """A task over a dataset that TFDS knows, with its version: "librispeech:2.1.0".

    Args:
      samples, text: names of its features: whole numbers of 16 bits (or floats within -1 and 1), and what was said.
      rate: of the samples, if the feature does not say it.
      lang: of all of it.
      data_dir, splits: as of `tasks.tfds.register_tfds_task`.
    """
    source = seqio.TfdsDataSource(dataset, data_dir, splits)

    def rows(examples: tf.data.Dataset) -> tf.data.Dataset:
        spec = examples.element_spec
        for feature in (samples, text):
            if feature not in spec:
                raise ValueError(f"{dataset}: no feature {feature!r}; it has {', '.join(spec)}")
        own = rate or getattr(source.tfds_dataset.builder.info.features[samples], "sample_rate", None)
        if not own:
            raise ValueError(f"{dataset}: {samples!r} does not say its rate; give rate=")

        def row(number: tf.Tensor, one: Mapping[str, tf.Tensor]) -> Example:
            scale = audio.SCALE if spec[samples].dtype.is_floating else 1
            where = tf.strings.join([dataset, ": example ", tf.strings.as_string(number)])
            said = {"text": one[text], "lang": tf.constant(lang), "where": where, "error": tf.constant("")}
            return {"samples": tf.cast(one[samples], tf.float32) * scale, "rate": tf.constant(own, tf.int32), **said}

        return examples.enumerate(1).map(row)

    return _add(name, source, [rows])


def _add(name: str, source: seqio.DataSource, steps: list[Any]) -> seqio.Task:
    if name in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
        raise ValueError(f"there is a task or mixture {name!r} already; choose another name")
    as_it_is = functools.partial(seqio.Feature, seqio.PassThroughVocabulary(0), add_eos=False)
    features = {n: as_it_is(dtype=dtype, rank=rank) for n, (dtype, rank) in FEATURES.items()}
    return seqio.TaskRegistry.add(name, source=source, preprocessors=steps, output_features=features)


def utterances(name: str, split: str) -> Iterator[manifest.Recorded | manifest.Skipped]:
    """Every example of a task, or of each task of a mixture once, whatever its rates, in the order of the source.

    Raises ValueError for an unknown name, and for a task that has no such split.
    """
    try:
        provider = seqio.get_mixture_or_task(name)
    except ValueError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    tasks = [provider] if isinstance(provider, seqio.Task) else provider.tasks
    for task in tasks:
        if set(task.output_features) != set(FEATURES):
            raise ValueError(f"{task.name} is no task of speech")
        if split not in task.splits:
            raise ValueError(f"{task.name} has no split {split!r}; it has {', '.join(task.splits)}")
        for one in task.get_dataset(None, split, shuffle=False, num_epochs=1).as_numpy_iterator():
            text, lang, where, error = (one[name].decode("utf-8", "replace") for name in TEXTS)
            if error:
                yield manifest.Skipped(where, error)
            else:
                yield manifest.Recorded(where, one["samples"], int(one["rate"]), text.strip(), lang)


register_manifest_task("speech_prompts", str(Path(PACKAGED) / "prompts" / "prompts.jsonl"))
