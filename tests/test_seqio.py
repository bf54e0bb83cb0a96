"""The seqio tasks and the step that prepares data from them: nothing lost, nothing mixed, clear refusals."""

import gzip
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from moe_jax import seqio_data
from moe_jax.data import Prepared
from moe_jax.packing import COLUMNS
from moe_jax.tasks import correction
from moe_jax.tasks.families import FAMILIES
from moe_jax.tasks.quiet import seqio, tf
from moe_jax.text.prompt import READ, WRITE, Prompt, encode_example
from moe_jax.text.tokeniser import EOS, Tokeniser, train

SIZES = {"asr": 64, "ocr": 16, "mt": 36, "gec": 4}
LENGTHS = dict.fromkeys(seqio_data.FEATURES, 64)


def make_rows(family: str, count: int, split: str) -> list[dict]:
    return [
        {
            "task": family,
            "source_set": "made",
            "hypotheses": [f"{family} {split} sentense {i}", f"{family} {split} sentence {i + 1}"],
            "reference": f"{family} {split} sentence {i}",
            "lang": "en",
            "sources": {"es": f"frase {i}"},
        }
        for i in range(count)
    ]


def write(path, rows) -> None:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture(scope="module", autouse=True)
def corpus(tmp_path_factory):
    """A corpus of `SIZES`, with denoise rows beside it."""
    folder = tmp_path_factory.mktemp("corpus")
    for family, size in SIZES.items():
        for split in correction.SPLITS:
            write(folder / f"{family}.{split}.jsonl.gz", make_rows(family, size, split))
    write(folder / "denoise.train.jsonl.gz", make_rows("denoise", 50, "train"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_JAX_DATA", str(folder))
        patch.delenv("MOE_JAX_DENOISE", raising=False)
        yield folder


def tokeniser() -> Tokeniser:
    return correction.settings().loaded


def text_of(example) -> tuple[int, str]:
    """(task, reference) of an example."""
    written = [token for token, role in zip(example.tokens, example.roles, strict=True) if role == WRITE]
    assert written[-1] == EOS
    return example.task, tokeniser().decode(written)


def expected(split: str, passes: int = 1) -> Counter:
    return Counter(
        {
            (FAMILIES[family], row["reference"]): passes
            for family, size in SIZES.items()
            for row in make_rows(family, size, split)
        }
    )


def test_a_task_gives_equal_zero_free_features():
    rows = list(seqio.get_mixture_or_task("correct_mt").get_dataset(LENGTHS, "train", shuffle=False))
    assert len(rows) == SIZES["mt"]
    for row, source in zip(rows, make_rows("mt", SIZES["mt"], "train"), strict=True):
        example = encode_example(tokeniser(), source["hypotheses"], (), source["reference"], max_length=64)
        assert example is not None
        assert row["tokens"].numpy().tolist() == example.tokens
        assert row["roles"].numpy().tolist() == example.roles
        assert row["tasks"].numpy().tolist() == [FAMILIES["mt"]] * len(example.tokens)
        assert all(row[name].dtype == tf.int32 and (row[name] > 0).numpy().all() for name in LENGTHS)


def test_passes_draw_every_example_of_every_task_so_often():
    drawn = seqio_data.draw("correct_all", length=64, seed=0, split="valid", passes=3)
    assert Counter(map(text_of, drawn)) == expected("valid", passes=3)


def test_draws_depend_on_the_seed_and_are_shuffled():
    def drawn(seed: int) -> list:
        return [text_of(e) for e in seqio_data.draw("correct_asr", length=64, seed=seed, examples=128)]

    first = drawn(1)
    assert first == drawn(1) != drawn(2)
    in_order = [(FAMILIES["asr"], row["reference"]) for row in make_rows("asr", SIZES["asr"], "train")]
    assert first[:64] != in_order and Counter(first) == Counter(in_order * 2)
    assert first[:64] != first[64:]  # another order in the second epoch


def test_mixtures_keep_their_rates():
    drawn = Counter(e.task for e in seqio_data.draw("correct_all", length=64, seed=0, examples=800))
    roots = {FAMILIES[f]: math.sqrt(size) * (1 if f == "mt" else 1.5) for f, size in SIZES.items()}  # with "right"
    for task, root in roots.items():
        assert drawn[task] / 800 == pytest.approx(root / sum(roots.values()), abs=0.05)


@pytest.mark.parametrize("family", ["asr", "ocr", "gec"])
def test_a_first_pass_may_be_right(family):
    name, real = f"correct_{family}_right", f"correct_{family}"
    drawn = list(seqio_data.draw(name, length=64, seed=0, passes=1))
    for example in drawn:
        task, reference = text_of(example)
        assert task == FAMILIES[family] and Prompt.decode(tokeniser(), example.tokens).first == reference
    wrong = [Prompt.decode(tokeniser(), e.tokens).first for e in seqio_data.draw(real, length=64, seed=0, passes=1)]
    assert len(drawn) == len(wrong) == SIZES[family]
    assert sorted(wrong) != sorted(text_of(e)[1] for e in drawn)
    assert set(seqio.get_mixture_or_task(name).splits) == {"train"}


def test_the_base_mixture_is_mostly_noise():
    drawn = Counter(e.task for e in seqio_data.draw("correct_base", length=64, seed=0, examples=400))
    assert drawn[FAMILIES["denoise"]] / 400 == pytest.approx(110 / 170, abs=0.07)
    assert set(drawn) == {FAMILIES[family] for family in ("denoise", *SIZES)}


def test_sources_and_layout_are_settings_of_the_draw():
    settings: dict[str, Any] = {"layout": "list", "max_sources": 1, "max_hypotheses": 1}
    (example, *_) = seqio_data.draw("correct_mt", length=64, seed=0, examples=1, **settings)
    prompt = Prompt.decode(tokeniser(), example.tokens)
    assert len(prompt.strands) == 1 and prompt.sources[0].startswith("frase")
    (example, *_) = seqio_data.draw("correct_mt", length=64, seed=0, examples=1)
    assert Prompt.decode(tokeniser(), example.tokens).sources == ()


def test_prepare_writes_what_was_drawn(tmp_path, capsys):
    model = correction.settings().tokeniser
    meta = seqio_data.prepare("correct_all", model, tmp_path / "p", length=64, seed=0, split="valid", passes=1)
    prepared = Prepared.open(tmp_path / "p")
    assert prepared.meta == json.loads(json.dumps(meta))
    assert meta["mixture"] == "correct_all" and meta["layout"] == "aligned" and meta["split"] == "valid"
    assert {family: tally["examples"] for family, tally in meta["tasks"].items()} == SIZES
    rows = [{name: column[i] for name, column in prepared.columns.items()} for i in range(prepared.rows)]
    found = Counter()
    for row in rows:
        for segment in range(1, row["segments"].max() + 1):
            at = (row["segments"] == segment) & (row["roles"] == WRITE)
            found[int(row["tasks"][at][0]), tokeniser().decode(row["tokens"][at])] += 1
    assert found == expected("valid")
    table = capsys.readouterr().err
    assert "asr               64  53.3%    1.00" in table and "rows of 64 tokens" in table


def test_prepared_data_are_the_same_for_a_seed(tmp_path):
    first, second = (
        seqio_data.prepare("correct_all", tokeniser(), tmp_path / name, length=64, seed=1, examples=40)
        for name in ("first", "second")
    )
    assert first == second


def test_what_does_not_fit_is_counted(tmp_path):
    rows = make_rows("asr", 10, "train")
    rows[3]["reference"] = "word " * 100
    write(tmp_path / "train.jsonl", rows)
    correction.register_jsonl_task("test_too_long", "asr", tmp_path)
    meta = seqio_data.prepare("test_too_long", tokeniser(), tmp_path / "p", length=64, seed=0, passes=1)
    assert meta["tasks"]["asr"]["examples"] == 9 and meta["tasks"]["asr"]["skipped"] == 1


def test_a_length_that_nothing_fits_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(seqio_data, "GIVE_UP", 20)
    with pytest.raises(ValueError, match="none of the first 20 examples fits"):
        next(seqio_data.seqio_batches("correct_all", length=4, batch_size=1, seed=0))


def test_batches_come_straight_from_seqio():
    stream = seqio_data.seqio_batches("correct_all", length=64, batch_size=4, seed=0)
    tasks = set()
    for batch in itertools.islice(stream, 8):
        valid = np.asarray(batch.info.valid_BxL)
        assert batch.tokens_BxL.shape == (4, 64) and batch.tokens_BxL.dtype == np.int32
        assert batch.weights_BxL.sum() > 0 and valid.mean() > 0.8
        tasks |= set(np.asarray(batch.info.task_BxL)[valid].tolist())
    assert tasks == {FAMILIES[family] for family in SIZES}


@pytest.mark.parametrize("pack", [True, False])
def test_the_converter_keeps_features_aligned(pack):
    ds = seqio.get_dataset(
        "correct_all",
        LENGTHS,
        dataset_split="valid",
        shuffle=False,
        num_epochs=1,
        feature_converter=seqio_data.CorrectionConverter(pack=pack),
    )
    segments = 0
    for row in ds.take(20).as_numpy_iterator():
        assert set(row) == set(COLUMNS)
        for segment in range(1, row["segments"].max() + 1):
            at = row["segments"] == segment
            prompt = Prompt.decode(tokeniser(), row["tokens"][at])
            (task,) = set(row["tasks"][at].tolist())
            assert prompt.first.split()[0] == {v: k for k, v in FAMILIES.items()}[task]
            assert set(row["roles"][at].tolist()) == {READ, WRITE} and row["tokens"][at][-1] == EOS
            segments += 1
        assert not row["tokens"][row["segments"] == 0].any()
        assert pack or row["segments"].max() == 1
    assert segments >= 20


def test_iterators_can_be_saved_and_resumed(tmp_path):
    ds = seqio.get_mixture_or_task("correct_all").get_dataset(LENGTHS, "train", seed=3, num_epochs=None)
    iterator = iter(ds)
    for _ in range(10):
        next(iterator)
    path = tf.train.Checkpoint(iterator=iterator).write(str(tmp_path / "iterator"))
    onwards = [next(iterator)["tokens"].numpy().tolist() for _ in range(5)]
    again = iter(ds)
    tf.train.Checkpoint(iterator=again).read(path).assert_consumed()
    assert [next(again)["tokens"].numpy().tolist() for _ in range(5)] == onwards


def test_seqio_evaluates_a_task():
    evaluator = seqio.Evaluator(
        "correct_gec",
        feature_converter=seqio_data.CorrectionConverter(pack=False, apply_length_check=False),
        eval_split="valid",
        sequence_length=LENGTHS,
        target_field_name="tokens",
        async_compute_metrics=False,
    )

    def predict(dataset, model_feature_shapes=None):  # what a model would write that copies the first hypothesis
        rows = [(index, row["tokens"]) for index, row in dataset.as_numpy_iterator()]
        return [(index, tokeniser().encode(Prompt.decode(tokeniser(), ids).first)) for index, ids in rows]

    metrics, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict)
    scores = metrics.result()["correct_gec"]
    assert scores["wer"] == pytest.approx(0.25) and scores["f0.5"] == 0.0


def test_users_files_may_be_those_of_other_tools(tmp_path):
    write(tmp_path / "train.jsonl.gz", [{"input": ["a b", "a c"], "output": "a c"}])
    task = correction.register_jsonl_task("test_other_tool", "ocr", tmp_path)
    assert list(task.splits) == ["train"]
    (example,) = seqio_data.draw("test_other_tool", length=64, seed=0, passes=1)
    assert text_of(example) == (FAMILIES["ocr"], "a c")


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "train.jsonl:3: not JSON"),
        ("[1]", "train.jsonl:3: expected a JSON object"),
        ('{"hypotheses": []}', "train.jsonl:3: no hypotheses"),
        ('{"hypotheses": ["a", 1], "reference": "a"}', "train.jsonl:3: hypothesis 2"),
        ('{"hypotheses": ["a"]}', "train.jsonl:3: no reference"),
        ('{"hypotheses": ["a"], "reference": "\\ud800"}', "train.jsonl:3: a lone surrogate"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    good = json.dumps({"hypotheses": ["a"], "reference": "a"})
    (tmp_path / "train.jsonl").write_text(f"{good}\n\n{line}\n", "utf-8")
    name = f"test_bad_{abs(hash(line))}"
    correction.register_jsonl_task(name, "gec", tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        seqio_data.prepare(name, tokeniser(), tmp_path / "p", length=64, seed=0, passes=1)
    assert "\n" not in str(error.value) and not (tmp_path / "p").exists()


def refused(message: str, call, *args, **kwargs) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_bad_requests_are_refused_in_one_line(tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", make_rows("asr", 1, "train"))
    prepare: dict[str, Any] = {"length": 64, "seed": 0}
    refused("unknown task family 'asl'", correction.register_jsonl_task, "test_family", "asl", tmp_path)
    refused("did you mean correct_all", seqio_data.find, "correct_al")
    refused("unknown task or mixture 'zzz'; known:", seqio_data.find, "zzz")
    refused(
        "no split 'dev'; it has test, train, valid",
        list,
        seqio_data.draw("correct_all", split="dev", **prepare),
    )
    refused("not both", list, seqio_data.draw("correct_all", examples=1, passes=1, **prepare))
    refused("give examples or passes", seqio_data.prepare, "correct_all", tokeniser(), tmp_path / "p", **prepare)
    refused("registered already", correction.register_jsonl_task, "correct_asr", "asr", tmp_path)
    refused("train.jsonl.gz: no such file", correction.register_jsonl_task, "test_none", "asr", tmp_path / "no")
    monkeypatch.setenv("MOE_JAX_DATA", str(tmp_path))
    refused("asr.train.jsonl.gz: no such file", list, seqio_data.draw("correct_asr", **prepare))
    refused("make it with python -m", list, seqio_data.draw("correct_denoise", **prepare))
    whole = gzip.compress(b'{"hypotheses": ["a"], "reference": "a"}' * 9)
    for damaged in (b"not gzip", whole[:-12], whole[:14] + b"\xff\xff\xff" + whole[17:]):
        (tmp_path / "asr.train.jsonl.gz").write_bytes(damaged)
        refused("asr.train.jsonl.gz: cannot read", list, seqio_data.draw("correct_asr", **prepare))


def test_a_dataset_keeps_the_tokeniser_that_it_was_built_with():
    small = train([row["reference"] for row in make_rows("asr", 9, "train")], 284)
    before = correction.settings()
    stream = seqio_data.draw("correct_asr", length=256, seed=0, tokeniser=small)
    drawn = [next(stream)]
    assert correction.settings() == before
    drawn += itertools.islice(stream, 600)
    assert max(max(example.tokens) for example in drawn) < small.vocab_size


def test_the_tokeniser_can_be_set_and_a_bad_one_changes_nothing(tmp_path):
    before = correction.settings()
    small = train([row["reference"] for row in make_rows("asr", 9, "train")], 284)
    correction.set_tokeniser(small)
    try:
        refused("cannot read the tokeniser", correction.set_tokeniser, tmp_path / "no.model")
        assert correction.settings().loaded is small
        (example,) = seqio_data.draw("correct_asr", length=256, seed=0, examples=1)
        assert max(example.tokens) < small.vocab_size
    finally:
        correction.set_tokeniser(before.tokeniser)
    assert correction.settings() == before


def test_tensorflow_sees_no_accelerator():
    assert tf.config.get_visible_devices("GPU") == []


def test_tensorflow_loads_without_a_word():
    code = "import moe_jax.seqio_data, sys; print('end', file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "end\n")
