"""Tasks of the user's own: other files, TFDS, ids by data set, files of many tasks, other tokenisers."""

import errno
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe_jax import main, prepare, seqio_data
from moe_jax.data import Prepared
from moe_jax.packing import Packable
from moe_jax.tasks import correction
from moe_jax.tasks import tfds as tfds_tasks
from moe_jax.tasks.builders import collect
from moe_jax.tasks.families import FAMILIES, MAX_FAMILIES
from moe_jax.tasks.quiet import tf
from moe_jax.text.prompt import WRITE, Prompt
from moe_jax.text.tokeniser import Tokeniser


def row(reference: str, family: str = "asr", source_set: str = "one") -> dict[str, Any]:
    return {"task": family, "source_set": source_set, "hypotheses": [f"{reference}!"], "reference": reference}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def refused(message: str, call, *args, **kwargs) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)


def drawn(name: str, **settings: Any) -> list[Packable]:
    return list(seqio_data.draw(name, length=256, seed=0, passes=1, **settings))


def text_of(example: Packable, tokeniser: Tokeniser | None = None) -> str:
    tokeniser = tokeniser or correction.settings().loaded
    return tokeniser.decode([t for t, role in zip(example.tokens, example.roles, strict=True) if role == WRITE])


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_folder_of_hyporadise_files_is_a_task(tmp_path):
    records = [{"input": ["a b", "a c"], "output": "a c"}, {"input1": "d e.", "input2": "d f. d g. ", "output": "d f"}]
    (tmp_path / "train.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "valid.json").write_text(json.dumps(records[:1]))
    prepare.prepare(
        str(tmp_path / "p"),
        mixture="test_hyporadise",
        tokeniser=main.shipped("tokeniser.model"),
        passes=1,
        own={"test_hyporadise": ("asr", str(tmp_path))},
    )
    assert Prepared.open(tmp_path / "p").meta["tasks"]["asr"]["examples"] == 2
    assert list(seqio_data.find("test_hyporadise").splits) == ["train", "valid"]
    assert sorted(map(text_of, drawn("test_hyporadise"))) == ["a c", "d f"]
    (tmp_path / "train.json").write_text(json.dumps([*records, {"input": [], "output": "x"}], indent=1))
    refused(r"train.json:\d+: record 3: no hypotheses", drawn, "test_hyporadise")


class Captions(tfds.core.GeneratorBasedBuilder):
    """Correction data that TFDS makes of a local file."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_FILE: Path

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"readings": tfds.features.Sequence(tfds.features.Text()), "text": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(self.MANUAL_FILE)}

    def _generate_examples(self, path):
        for number, line in enumerate(path.read_text("utf-8").splitlines()):
            value = json.loads(line)
            yield number, {"readings": value["hypotheses"], "text": value["reference"]}


def test_a_tfds_dataset_is_a_task(tmp_path):
    Captions.MANUAL_FILE = write(tmp_path / "x.jsonl", [row(f"satz ä{i}") for i in range(10)])
    tfds.builder("captions", data_dir=tmp_path).download_and_prepare()
    task = tfds_tasks.register_tfds_task(
        "test_tfds",
        "ocr",
        "captions:1.0.0",
        hypotheses="readings",
        reference="text",
        data_dir=tmp_path,
        splits={"train": "train[:70%]", "valid": "train[70%:]"},
    )
    examples = drawn("test_tfds")
    texts = set(map(text_of, examples))
    assert len(examples) == len(texts) == 7 and texts <= {f"satz ä{i}" for i in range(10)}
    assert {e.task for e in examples} == {FAMILIES["ocr"]}
    assert Prompt.decode(correction.settings().loaded, examples[0].tokens).first == text_of(examples[0]) + "!"
    assert task.num_input_examples("valid") == 3
    tfds_tasks.register_tfds_task("test_tfds_wrong", "ocr", "captions:1.0.0", reference="text", data_dir=tmp_path)
    refused("no feature 'hypotheses'; it has readings, text", drawn, "test_tfds_wrong")
    refused("unknown task family", tfds_tasks.register_tfds_task, "test_tfds_family", "ocx", "captions:1.0.0")


# --- ids --------------------------------------------------------------------------------------------------------------


def test_a_data_set_may_be_a_task_of_its_own(tmp_path, capsys, monkeypatch):
    rows = [row("a b"), row("c d", source_set="two"), row("e f", source_set="two"), {**row("g h"), "source_set": None}]
    write(tmp_path / "train.jsonl", rows)
    correction.register_jsonl_task("test_by_set", "asr", tmp_path)
    ids = {"asr": 15, "asr/two": 40}
    settings: dict[str, Any] = {"mixture": "test_by_set", "tokeniser": main.shipped("tokeniser.model"), "passes": 1}
    prepare.prepare(str(tmp_path / "p"), ids=ids, **settings)
    prepare.prepare(str(tmp_path / "p"), ids=ids, **settings)  # what is there is what was asked for
    prepared = Prepared.open(tmp_path / "p")
    assert prepared.meta["families"] == FAMILIES | ids
    assert {name: tally["examples"] for name, tally in prepared.meta["tasks"].items()} == {"asr": 2, "asr/two": 2}
    assert set(prepared.columns["tasks"][prepared.columns["segments"] > 0].tolist()) == {15, 40}
    assert (
        capsys.readouterr().err.count("asr/two            2  50.0%       ?") == 2
    )  # a run says it that finds them too
    refused("was prepared with ids=", prepare.prepare, str(tmp_path / "p"), **settings)
    write(tmp_path / "asr.train.jsonl", [row("another corpus")])
    monkeypatch.setenv("MOE_JAX_DATA", str(tmp_path))
    refused("corpus=None, not {'asr.train.jsonl': ", prepare.prepare, str(tmp_path / "p"), ids=ids, **settings)
    monkeypatch.delenv("MOE_JAX_DATA")
    assert {text_of(e): e.task for e in drawn("test_by_set")} == dict.fromkeys(("a b", "c d", "e f", "g h"), 1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"asl/one": 16}, "unknown task family 'asl'"),
        ({"asr": 0}, "give it one of 1 to"),
        ({"asr/one": MAX_FAMILIES}, "give it one of 1 to"),
        ({"asr/one": 16.0}, "give it one of 1 to"),
        ({"asr/one": 2}, "'ocr' and 'asr/one' have the same id 2"),
    ],
)
def test_bad_ids_are_refused(ids, message):
    refused(message, correction.task_ids, ids)


def test_ids_of_the_shipped_example_name_its_data_sets(tmp_path):
    import gin

    (tmp_path / "x.gin").write_text(
        "from __gin__ import dynamic_registration\nfrom moe_jax import main\nfrom moe_jax import prepare\n"
        'include "data/by_set.gin"\nmain.run.jobs = [@train_data/prepare.prepare]\n'
    )
    main.load([str(tmp_path / "x.gin")], [])
    ids = gin.query_parameter("%IDS")
    with gzip.open(correction.PACKAGED / "asr.train.jsonl.gz", "rt", encoding="utf-8") as file:
        assert {f"asr/{json.loads(line)['source_set']}" for line in file} == set(ids)
    assert correction.task_ids(ids) == FAMILIES | ids


# --- files of many tasks ----------------------------------------------------------------------------------------------


def collected(folder: Path) -> dict[str, list[str]]:
    return {
        path.name.removesuffix(".jsonl.gz"): [
            json.loads(line)["reference"] for line in gzip.decompress(path.read_bytes()).splitlines()
        ]
        for path in sorted(folder.iterdir())
    }


def test_files_of_many_tasks_become_a_corpus(tmp_path, monkeypatch, capsys):
    mixed = [row("A, b."), row("c d", "itn"), row("e f", "itn", "two"), row("g h", "ocr"), row("i j", "gec")]
    files = [
        write(tmp_path / "x.train.jsonl", [*mixed, row("k l", "mt")]),
        write(tmp_path / "x.valid.jsonl.gz", [row("E F"), row("k", "itn"), row("m", "mt")]),
        write(tmp_path / "x.test.jsonl", [row("a b", "tn"), row("M", "asr")]),
    ]
    monkeypatch.setattr("sys.argv", ["collect", *map(str, files), "--output", str(tmp_path / "corpus")])
    collect.main()
    assert collected(tmp_path / "corpus") == {
        "asr.test": ["M"],
        "asr.valid": ["E F"],
        "gec.train": ["i j"],
        "itn.train": ["c d"],
        "itn.valid": ["k"],
        "mt.train": ["k l"],
        "ocr.train": ["g h"],
        "tn.test": ["a b"],
    }
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["asr", "one", "0", "1", "1", "1"] in table and ["itn", "two", "0", "0", "0", "1"] in table
    refused("exists already", collect.collect, files, tmp_path / "corpus")


def test_what_cannot_be_collected_leaves_nothing(tmp_path):
    good = write(tmp_path / "a.train.jsonl", [row("a")])
    for name, value, message in [
        ("b.jsonl", row("b"), "cannot tell the split from its name"),
        ("b.test.train.jsonl", row("b"), "cannot tell the split from its name"),
        ("b.test.jsonl", row("b", "asl"), "b.test.jsonl:1: unknown task family"),
        ("b.train.jsonl", {"hypotheses": ["b"], "task": "asr"}, 'b.train.jsonl:1: a row needs "task" and "reference"'),
    ]:
        refused(message, collect.collect, [good, write(tmp_path / name, [value])], tmp_path / "corpus")
        (tmp_path / name).unlink()
        assert [path.name for path in tmp_path.iterdir()] == ["a.train.jsonl"]


def test_a_full_disk_says_which_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")  # a write knows no name

    monkeypatch.setattr(gzip.GzipFile, "write", full)
    files = write(tmp_path / "x.train.jsonl", [row("a")])
    monkeypatch.setattr("sys.argv", ["collect", str(files), "--output", str(tmp_path / "corpus")])
    with pytest.raises(SystemExit, match=rf"{tmp_path / 'corpus'}: No space left"):
        collect.main()
    assert not (tmp_path / "corpus").exists()


def test_the_mixture_of_five_goes_without_families_that_have_no_file(tmp_path, monkeypatch):
    for family in ("asr", "ocr", "mt", "gec"):
        write(tmp_path / f"{family}.train.jsonl.gz", [row(f"{family} one", family)])
    monkeypatch.setenv("MOE_JAX_DATA", str(tmp_path))
    refused("itn.train.jsonl.gz: no such file", drawn, "correct_itn")
    once, twice = ["mt one"], ["asr one", "gec one", "ocr one"]  # these also with a first pass that is right
    assert sorted(map(text_of, drawn("correct_five"))) == sorted([*once, *twice, *twice])
    write(tmp_path / "itn.train.jsonl.gz", [row("itn one", "itn")])
    assert "itn one" in map(text_of, drawn("correct_five"))
    mixture = seqio_data.find({"correct_five": 4.0, "correct_gec": 1.0})
    rates = {task.name.removeprefix("correct_"): mixture.get_rate(task) for task in mixture.tasks}
    share = 4 / 6.5  # of five families and three halves
    halves = {f"{family}_right": share / 2 for family in ("asr", "ocr", "gec")}
    whole = {"asr": share, "ocr": share, "mt": share, "gec": 1 + share, "itn": share}
    assert rates == pytest.approx(whole | halves)
    refused("asr.valid.jsonl.gz: no such file", drawn, "correct_five", split="valid")
    monkeypatch.setenv("MOE_JAX_DATA", str(tmp_path / "none"))
    refused("no split 'train'; it has none here: MOE_JAX_DATA", drawn, "correct_five")


# --- tokenisers of pretrained models ----------------------------------------------------------------------------------


@pytest.fixture
def pretrained(tmp_path) -> Path:
    """Its embedding has 70,000 rows, and "!" is its token 0."""
    pytest.importorskip("tokenizers")
    import hugging_face

    return hugging_face.write(tmp_path / "hf", more=69_720, config={"vocab_size": 70_000})


@pytest.fixture
def exclaimed(tmp_path, monkeypatch) -> list[str]:
    """References of `correct_asr`, full of token 0, also at both ends."""
    texts = ["!", "!! a !", "b!!c", "!d"]
    write(tmp_path / "asr.train.jsonl", [row(text) for text in texts])
    monkeypatch.setenv("MOE_JAX_DATA", str(tmp_path))
    return texts


def test_token_0_is_a_token_from_the_task_to_the_batch(tmp_path, pretrained, exclaimed):
    settings: dict[str, Any] = {"mixture": "correct_asr", "tokeniser": str(pretrained), "passes": 1}
    prepare.prepare(str(tmp_path / "p"), layout="chatml", length=2000, **settings)
    prepared = Prepared.open(tmp_path / "p")
    assert prepared.columns["tokens"].dtype == np.uint32
    (columns,) = ({name: column[i] for name, column in prepared.columns.items()} for i in range(prepared.rows))
    found = []
    for segment in range(1, 5):
        written = columns["tokens"][(columns["segments"] == segment) & (columns["roles"] == WRITE)]
        assert written[-1] == prepared.tokeniser.eos[0]
        found.append(prepared.tokeniser.decode(written))
    assert sorted(found) == sorted(exclaimed)
    batch = prepared.batch(0, seed=0, batch_size=1)
    assert (np.asarray(batch.targets_BxL)[np.asarray(batch.weights_BxL) > 0] == 0).sum() == 7
    assert "choose a template" in refusal(prepare.prepare, str(tmp_path / "q"), layout="aligned", **settings)
    assert not (tmp_path / "q").exists()


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("pack", [True, False])
def test_the_converter_keeps_token_0(pack):
    examples = [([0, 5, 0], [1, 2, 2], 3), ([0], [2], 1), ([7, 0, 0, 9], [1, 1, 2, 2], 2)]
    rows = [{"tokens": t, "roles": r, "tasks": [i] * len(t)} for t, r, i in examples]
    spec = {name: tf.TensorSpec([None], tf.int32) for name in seqio_data.FEATURES}
    ds = tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=spec)
    converter = seqio_data.CorrectionConverter(pack=pack, apply_length_check=False)
    found = []
    for row in converter(ds, dict.fromkeys(spec, 8)).as_numpy_iterator():
        for segment in range(1, row["segments"].max() + 1):
            at = row["segments"] == segment
            found.append((row["tokens"][at].tolist(), row["roles"][at].tolist(), row["tasks"][at][0]))
        assert not any(row[name][row["segments"] == 0].any() for name in spec)
    assert found == examples


def test_ids_beyond_16_bits_are_kept(tmp_path, pretrained):
    from moe_jax.data import write_prepared

    tokeniser = Tokeniser.load(pretrained)
    example = Packable([69_999, 0, 65_536], [1, 2, 2], 1)
    write_prepared(tmp_path / "p", [example], length=4, tokeniser=tokeniser, families=FAMILIES)
    prepared = Prepared.open(tmp_path / "p")
    assert prepared.columns["tokens"].tolist() == [[69_999, 0, 65_536, 0]]
    assert prepared.columns["segments"].tolist() == [[1, 1, 1, 0]]
    assert prepared.batch(0, seed=0, batch_size=1).targets_BxL.tolist() == [[0, 65_536, 0, 0]]
