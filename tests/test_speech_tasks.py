"""Speech as seqio tasks: what a list or a dataset of TFDS says is what is prepared; and the recordings we ship."""

import json
import uuid

import numpy as np
import pytest

seqio = pytest.importorskip("seqio", reason="tasks need seqio (pip install '.[data]')")
sf = pytest.importorskip("soundfile", reason="reading audio needs soundfile (pip install '.[speech]')")

import tensorflow_datasets as tfds  # noqa: E402

from moe_jax import main, prepare  # noqa: E402
from moe_jax.formats import audio, manifest  # noqa: E402
from moe_jax.speech import data  # noqa: E402
from moe_jax.tasks import speech  # noqa: E402
from moe_jax.tasks.builders.splits import letters  # noqa: E402

RATE = 8000
PROMPTS = main.shipped("prompts/prompts.jsonl")


def tone(i: int) -> np.ndarray:
    return np.round(3000 * np.sin(np.arange(4000 + 300 * i) * (0.1 + 0.05 * i))).astype(np.int16)


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """A folder with a list, NeMo's, and Kaldi's, of the same four utterances; the last is not there."""
    folder = tmp_path_factory.mktemp("lists")
    for i in range(3):
        sf.write(folder / f"{i}.wav", tone(i), RATE)
    ours = [{"audio": f"{i}.wav", "text": f"word{i % 3}", "split": "train", "lang": "xx"} for i in range(4)]
    nemo = [{"audio_filepath": f"{i}.wav", "text": f"word{i % 3}", "duration": len(tone(i)) / RATE} for i in range(4)]
    for name, lines in (("ours", ours), ("nemo", nemo)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "kaldi").mkdir()
    (folder / "kaldi" / "wav.scp").write_text("".join(f"u{i} {folder}/{i}.wav\n" for i in range(4)))
    (folder / "kaldi" / "text").write_text("".join(f"u{i} word{i % 3}\n" for i in range(4)))
    return folder


def name() -> str:
    return f"speech_{uuid.uuid4().hex[:8]}"


@pytest.mark.parametrize("kind", ["ours.jsonl", "nemo.jsonl", "kaldi"])
def test_a_task_holds_what_the_list_says(lists, kind, tmp_path, capsys):
    lang = "xx" if kind == "ours.jsonl" else ""
    given = str(lists / kind) if kind == "ours.jsonl" else {"train": str(lists / kind)}
    task = speech.register_manifest_task(name(), given)
    found = list(speech.utterances(task.name, "train"))
    assert [type(one).__name__ for one in found] == ["Recorded"] * 3 + ["Skipped"]
    for i, one in enumerate(found[:3]):
        assert isinstance(one, manifest.Recorded) and (one.text, one.lang, one.rate) == (f"word{i}", lang, RATE)
        np.testing.assert_array_equal(one.samples_S, tone(i))
    assert isinstance(found[3], manifest.Skipped) and "no such file" in found[3].reason
    options = {"rate": RATE, "mels": 20, "lengths": 1}
    prepare.speech(str(tmp_path / "task"), task=task.name, **options)
    data.prepare(str(tmp_path / "list"), manifest=str(lists / kind), **options)
    by_task, by_list = (data.Speech.open(tmp_path / which) for which in ("task", "list"))
    assert by_task.tokeniser.sha256 == by_list.tokeniser.sha256
    for column in ("features_FxC", "index_RxVx2", "tokens_RxU"):
        np.testing.assert_array_equal(getattr(by_task, column), getattr(by_list, column))
    assert capsys.readouterr().out.count("skipped 1: audio that cannot be read") == 2
    before = (tmp_path / "task" / "meta.json").stat().st_mtime_ns
    prepare.speech(str(tmp_path / "task"), task=task.name, **options)
    assert (tmp_path / "task" / "meta.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="prepared with another manifest"):
        prepare.speech(str(tmp_path / "task"), task=task.name, split="valid", **options)


def test_what_is_too_long_is_not_read(lists, monkeypatch):
    seconds = len(tone(0)) / RATE
    task = speech.register_manifest_task(name(), {"train": str(lists / "nemo.jsonl")}, longest=seconds - 0.01)
    monkeypatch.setattr(audio, "read", lambda *args, **options: pytest.fail("it is read"))
    found = list(speech.utterances(task.name, "train"))
    assert [one.reason.partition(":")[0] for one in found[:3]] == [f"longer than {seconds - 0.01:g} s"] * 3


class Calls(tfds.core.GeneratorBasedBuilder):
    """Two recordings."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"audio": tfds.features.Audio(sample_rate=RATE), "label": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(2):
            yield i, {"audio": tone(i).astype(np.int64), "label": f"word{i}"}


def test_a_tfds_dataset_is_a_task_and_mixes_with_a_list(lists, tmp_path):
    tfds.builder("calls", data_dir=tmp_path).download_and_prepare()
    calls = speech.register_tfds_task(name(), "calls:1.0.0", text="label", data_dir=str(tmp_path), lang="en")
    found = sorted(speech.utterances(calls.name, "train"), key=lambda one: one.text)
    for i, one in enumerate(found):
        assert (one.text, one.lang, one.rate) == (f"word{i}", "en", RATE)
        np.testing.assert_array_equal(one.samples_S, tone(i))
    own = speech.register_manifest_task(name(), str(lists / "ours.jsonl"))
    both = seqio.MixtureRegistry.add(name(), [(calls.name, 1.0), (own.name, 5.0)])
    assert len(list(speech.utterances(both.name, "train"))) == 2 + 4
    with pytest.raises(ValueError, match=r"calls:1\.0\.0: no feature 'text'; it has audio, label"):
        wrong = speech.register_tfds_task(name(), "calls:1.0.0", data_dir=str(tmp_path))
        list(speech.utterances(wrong.name, "train"))


def test_wrong_names_and_splits_are_one_line():
    for task, split, said in (
        ("speech_promts", "train", "speech_promts"),
        ("speech_prompts", "dev", "no split 'dev'; it has train, valid, test"),
        ("correct_asr", "train", "correct_asr is no task of speech"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            from moe_jax import seqio_data

            list(seqio_data.utterances(task, split))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="there is a task or mixture 'speech_prompts' already"):
        speech.register_manifest_task("speech_prompts", "x")


def test_the_shipped_recordings_can_be_read_and_their_splits_share_no_sentence():
    splits = {split: list(manifest.read(PROMPTS, split)) for split in ("train", "valid", "test")}
    assert {split: len(found) for split, found in splits.items()} == {"train": 442, "valid": 20, "test": 19}
    said = {split: {letters(one.text) for one in found} for split, found in splits.items()}
    assert not (said["train"] & said["test"] or said["train"] & said["valid"] or said["valid"] & said["test"])
    for one in splits["test"]:
        samples = one.samples(16_000)
        assert 3_000 < len(samples) < 30 * 16_000 and np.abs(samples).max() > 500
    assert {audio.rate(one.audio) for one in splits["valid"]} == {16_000}
