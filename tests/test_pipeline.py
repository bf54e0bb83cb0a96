"""From hypotheses to text: the guard, the n-best, what cannot be corrected, and the commands around them."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny

from moe_jax import checkpoint, cli, decode, describe, evaluate, formats, sharding, tree
from moe_jax.data import write_prepared
from moe_jax.formats import Record
from moe_jax.layers.ffn import DenseFfn
from moe_jax.layers.param import Rngs
from moe_jax.models.corrector import Corrector
from moe_jax.moe import task_routers
from moe_jax.moe.layer import MoeFfn
from moe_jax.packing import Packable
from moe_jax.pipeline import Guard, Pipeline, Proposal, export, local_edits, repeats
from moe_jax.sampling import Sampling
from moe_jax.tasks.families import FAMILIES
from moe_jax.text import templates
from moe_jax.text.tokeniser import Tokeniser

ROOT = Path(__file__).parents[1]


def record(*hypotheses: str, task: str | None = None) -> Record:
    return Record(line=1, hypotheses=hypotheses, sources=(), task=task, reference=None, raw="", number=1)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    return tiny.exported(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def pipeline(shipped) -> Pipeline:
    return Pipeline.load(shipped, batch_size=4)


def test_what_was_exported_is_loaded(shipped, pipeline):
    table, _ = checkpoint.read_safetensors(shipped / "model.safetensors")
    for path, leaf in tree.flatten(pipeline.model).items():
        np.testing.assert_array_equal(leaf, table[path])
    assert pipeline.guard == Guard(single=2.5, several=2.5)
    assert pipeline.model.ffn.router.experts[:5] == ((), (0,), (1,), (0,), (1,))


@pytest.mark.parametrize("inference", ["free", "forced"])
def test_the_atlas_says_how_often_free_routing_finds_a_mapped_expert(pipeline, tmp_path, inference):
    rng = np.random.default_rng(0)
    examples = [Packable(rng.integers(1, 4096, 9), [1] * 5 + [2] * 4, int(rng.integers(1, 4))) for _ in range(64)]
    write_prepared(tmp_path / "valid", examples, length=32, tokeniser=pipeline.tokeniser, families=FAMILIES)
    mapped = {1: 0, 2: (1, 2), 3: (0, 1, 2, 3)}
    router = partial(task_routers.TaskMapped, k=1, experts=mapped, inference=inference)
    ffn = partial(MoeFfn, num_experts=4, hidden=8, router=router)
    model = Corrector(d=16, layers=2, vocab=4096, ffn=ffn, rngs=Rngs(params=0))
    routing = evaluate.atlas(dataclasses.replace(pipeline, model=model), str(tmp_path / "valid"), batch_size=4)
    assert routing["tasks"] == ["asr", "ocr", "mt"]
    assert routing["mapped"] == {"asr": [0], "ocr": [1, 2], "mt": [0, 1, 2, 3]}
    load = np.array(routing["load"]).mean(0)  # with one choice a token the share of tokens
    found = [load[i, list(experts)].sum() for i, experts in enumerate(routing["mapped"].values())]
    np.testing.assert_allclose(list(routing["agreement"].values()), found, rtol=1e-5)
    assert found[0] < 1 and found[2] == pytest.approx(1)
    assert model.ffn.router.inference == inference  # what is looked at is a copy


def test_order_is_kept_and_a_record_does_not_depend_on_its_neighbours(pipeline):
    records = [
        record("the cat sat on a mat"),
        record("he she", "see he"),
        record("a b c d e f g h i"),
        record("x"),
        record("y z"),
    ]
    together = pipeline.propose(records)
    for r, proposal in zip(records, together, strict=True):
        (alone,) = pipeline.propose([r])
        assert (alone.first, alone.text) == (proposal.first, proposal.text) == (r.hypotheses[0], proposal.text)
        assert alone.margin == pytest.approx(proposal.margin, abs=1e-3)


def test_texts_are_as_likely_as_the_search_says_and_a_text_too_long_is_not_scored(pipeline):
    records = [record("he she", "see he"), record("a b c d e f g h i"), record("the cat sat"), record(" "), record("x")]
    proposals = pipeline.propose(records)
    found = pipeline.score(records, [*(p.text for p in proposals[:4]), "word " * 100])
    assert found[3] is None and found[4] is None
    for proposal, scored in zip(proposals[:3], found[:3], strict=True):
        assert scored.total == pytest.approx(proposal.score, abs=1e-3)
        assert scored.tokens[-1] == pipeline.tokeniser.eos[0]


def test_of_long_sets_evaluation_takes_the_lines_that_a_hash_picks(tmp_path):
    rows = [{"hypotheses": [f"h {i}"], "reference": str(i), "task": "asr", "source_set": "ab"[i % 2]} for i in range(9)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "y.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    records, all_rows = evaluate.read_rows([str(tmp_path / "x.jsonl")])
    assert [r.reference for r in records] == [row["reference"] for row in all_rows] == [str(i) for i in range(9)]
    _, some = evaluate.read_rows([str(tmp_path / "x.jsonl")], lines=2)
    _, again = evaluate.read_rows([str(tmp_path / "y.jsonl")], lines=2)
    assert sorted(row["source_set"] for row in some) == ["a", "a", "b", "b"]
    assert some == again[::-1] and [row["reference"] for row in some] == sorted(row["reference"] for row in some)


def test_the_guard_is_tuned_on_lists_of_ones_own(shipped, tmp_path, capsys):
    lists = tmp_path / "mine.json"
    lists.write_text(json.dumps([{"input": [f"take {i}", f"tack {i}"], "output": f"take {i}"} for i in range(24)]))
    command = ["tune", f"--checkpoint={shipped}", f"--input={lists}", f"--output={tmp_path}/tuned.safetensors"]
    assert cli.entry(command) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "first pass: 0 word errors, 0 lines fixed, 0 broken"
    assert said[3].startswith("tuned (on the other lines, 5 folds): 0 word errors")  # what is right is left alone
    tuned = Pipeline.load(tmp_path / "tuned.safetensors")
    assert tuned.guard.several == evaluate.THRESHOLDS[-1]
    for path, leaf in tree.flatten(tuned.model).items():
        np.testing.assert_array_equal(leaf, tree.flatten(Pipeline.load(shipped).model)[path])
    assert cli.entry(command) == 2 and "is there already" in capsys.readouterr().err
    lists.write_text(json.dumps([{"input": ["a"], "output": "b"}]))
    assert cli.entry(command[:-1]) == 2 and "too few to tune on" in capsys.readouterr().err


SENTENCES = [record(f"the cat sat on {n} mats of {' '.join('abcdefg'[: n % 7])}".strip()) for n in range(11)]


def told(proposals):
    return [(p.first, p.text, round(p.margin, 2)) for p in proposals]


@pytest.fixture
def unguarded(monkeypatch):
    """What a random model writes is left as it is."""
    monkeypatch.setattr("moe_jax.pipeline.local_edits", lambda text, hypotheses: text)


@pytest.mark.usefixtures("unguarded")
def test_lanes_and_batches_propose_the_same(pipeline):
    lanes = dataclasses.replace(pipeline, continuous=True)
    assert told(lanes.propose(SENTENCES)) == told(pipeline.propose(SENTENCES))


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        ({"data": 8}, {"sampling": Sampling(temperature=0.5)}),
        ({"data": 1, "fsdp": 2, "expert": 2, "model": 2}, {"beams": 2}),
        ({"data": 1, "expert": 2, "model": 4}, {"weights": "int8"}),
    ],
)
def test_a_mesh_writes_what_one_device_does(shipped, axes, options):
    records = [record("a cat", "a hat"), record("two words more"), record("x"), record("the mat", "that mat")]
    one = Pipeline.load(shipped, batch_size=4, **options)
    several = Pipeline.load(shipped, batch_size=3, mesh=sharding.make_mesh(**axes), **options)
    assert several.batch_size in (4, 8), "as many rows as divide"
    up = tree.flatten(several.model)["blocks/ffn/experts/up" + "/values" * ("weights" in options)]
    assert up.addressable_shards[0].data.size * several.mesh.shape["expert"] <= up.size
    for mine, theirs in zip(one.propose(records), several.propose(records), strict=True):
        assert (mine.text, mine.note) == (theirs.text, theirs.note)
        np.testing.assert_allclose((mine.score, mine.margin), (theirs.score, theirs.margin), rtol=1e-4, atol=1e-4)
    texts = ["the cat"] * 4
    for mine, theirs in zip(one.score(records, texts), several.score(records, texts), strict=True):
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, rtol=1e-4)


def test_lanes_have_one_beam(pipeline):
    with pytest.raises(ValueError, match="one beam"):
        dataclasses.replace(pipeline, continuous=True, beams=2)


@pytest.mark.usefixtures("unguarded")
def test_what_all_prompts_begin_with_is_read_once(pipeline, monkeypatch):
    """The same proposals; a later, smaller call goes on with the prefix, and one that it does not fit without."""
    monkeypatch.setattr("moe_jax.pipeline.LEAST_SHARED", 2)
    monkeypatch.setattr("moe_jax.pipeline.SHARED", 2)
    read, own = [], dataclasses.replace(pipeline)
    monkeypatch.setattr(decode, "read_prefix", lambda *a, f=decode.read_prefix: read.append(a[1]) or f(*a))
    assert told(own.propose(SENTENCES)) == told(own.propose(SENTENCES[:3])) + told(pipeline.propose(SENTENCES[3:]))
    assert len(read) == 2  # one of each pipeline
    assert told(own.propose([record("a b c d")])) == told(pipeline.propose([record("a b c d")]))
    assert len(read) == 2
    expected = pipeline.encode(SENTENCES[0]).tokens[: len(read[0])]
    assert read[0] == expected
    assert len(read[0]) >= 2


@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("options", [{"beams": 2}, {"continuous": True}], ids=str)
def test_samples_depend_on_the_record_and_not_on_the_batch(pipeline, options, tmp_path):
    drawing = dataclasses.replace(pipeline, sampling=Sampling(1.3), seed=4, rescore=False, **options)
    lines = [{"hypotheses": [r.hypotheses[0]]} for r in (*SENTENCES[:5], SENTENCES[4])]
    (tmp_path / "x.json").write_text(json.dumps(lines))  # all in one line
    records = list(formats.read(tmp_path / "x.json"))
    together = drawing.propose(records)
    assert told(together[4:]) == told(drawing.propose(records[4:]))
    assert told(together[4:5]) != told(together[5:])  # one text, two records
    assert told(together) != told(dataclasses.replace(drawing, seed=5).propose(records))


def test_the_chosen_text_beats_every_given_hypothesis_by_the_models_own_score(pipeline):
    given = ["the cat sat", "the hat sat", "a cat sat"]
    (proposal,) = pipeline.propose([record(*given)])
    read = decode.prefill(pipeline.model, [pipeline.encode(record(*given)).tokens])
    texts = [[*pipeline.tokeniser.encode(t), decode.EOS] for t in [proposal.text, *given]]
    penalised = [
        d.total / decode.length_penalty(len(d.tokens), pipeline.alpha)
        for d in decode.score(pipeline.model, read, [0] * 4, texts)
    ]
    assert penalised[0] >= max(penalised) - 1e-4


def test_blank_and_too_long_records_keep_their_first_pass_and_say_so(pipeline):
    long = " ".join(["word"] * 200)
    results = pipeline([record(""), record("  "), record(long), record("fine")])
    assert [r.text for r in results[:3]] == ["", "  ", long]
    assert [r.note for r in results[:3]] == ["empty", "empty", "too long"]
    assert all(r.kept for r in results[:3])


def test_a_later_hypothesis_that_is_too_long_does_not_compete(pipeline):
    (loud,) = pipeline([record("a fine day", "ha " * 2000)])
    (alone,) = pipeline([record("a fine day")])
    assert loud.text == alone.text


def test_edits_that_lose_or_add_much_are_undone_and_those_beside_them_stay():
    first = "Mattathias and his sens tore theiz cletkes, pet on sackeloth, and mourned"
    text = "Mattathias and his sons tore their cletkes, and mourned"
    assert local_edits(text, [first]) == "Mattathias and his sons tore their cletkes, pet on sackeloth, and mourned"
    # what another hypothesis says may come and go
    assert local_edits("a cat", ["a cat sat down there", "a cat"]) == "a cat sat down there"
    assert local_edits("one cat sat down there", ["a cat", "a cat sat down there"]) == "one cat sat down there"
    assert local_edits("same words", ["same words"]) == "same words"
    assert local_edits("", ["x"]) == ""  # a single letter is within the slack


def test_going_in_circles_is_noticed_unless_the_hypotheses_do_so_too():
    assert repeats("so that the page so that the page", ["so the page"])
    assert not repeats("la la la la la", ["la la la la la la"])
    assert not repeats("the cat and the cat", ["the cat and a cat"])  # two words again, not three


def test_the_guard_keeps_the_first_pass_below_its_threshold():
    proposal = Proposal(first="a", text="b", margin=1.0, score=-3.0)
    assert proposal.guarded(0.5).text == "b"
    kept = proposal.guarded(1.5)
    assert (kept.text, kept.kept, kept.note, kept.score) == ("a", True, "not confident", -4.0)
    assert Proposal("a", "a", 0.0, -1.0).guarded(1e9).kept is False


def test_the_guard_is_tuned_where_corrections_help_and_closes_where_none_does():
    rows = [{"task": t, "reference": "a b", "hypotheses": ["a c"], "source_set": "s"} for t in ("asr", "ocr")]
    good = [Proposal("a c", "a b", 4.5, 0.0), Proposal("a c", "x y", 1.2, 0.0)]
    # at a threshold in (1.2, 4.5] the first line is mended and the second left alone
    guard = evaluate.tune_guard(rows, good)
    assert 1.2 < guard.single <= 4.5
    assert [guard(p).text for p in good] == ["a b", "a c"]
    assert guard.several == max(evaluate.THRESHOLDS)  # no such rows: nothing says that corrections help
    bad = [Proposal("a c", "x y", 4.5, 0.0), Proposal("a c", "x y", 1.2, 0.0)]
    assert evaluate.tune_guard(rows, bad).single == max(evaluate.THRESHOLDS)


def test_lists_have_a_threshold_of_their_own():
    rows = [{"task": "asr", "reference": "a b", "hypotheses": ["a c"], "source_set": "s"}] * 4
    proposals = [
        Proposal("a c", "a b", 1.2, 0.0),
        Proposal("a c", "a b", 3.5, 0.0, several=True),
        Proposal("a c", "x y", 1.2, 0.0, several=True),
        Proposal("a b", "a b", 0.0, 0.0),
    ]
    guard = evaluate.tune_guard(rows, proposals)
    assert guard.single <= 1.2 < guard.several <= 3.5
    assert Guard.of(json.loads(json.dumps(dataclasses.asdict(guard)))) == guard


def test_known_tasks_reach_the_router_and_unknown_ones_are_zero(shipped):
    seen = []
    pipeline = Pipeline.load(shipped, batch_size=2, task="ocr")
    prefill = decode.prefill
    try:
        decode.prefill = lambda model, prompts, tasks, *more: (
            seen.append(tasks) or prefill(model, prompts, tasks, *more)
        )
        pipeline.propose([record("a cat", task="asr"), record("a hat")])
        Pipeline.load(shipped, batch_size=2).propose([record("a cat", task="asr")])
    finally:
        decode.prefill = prefill
    assert seen == [[2, 2], [0, 0]]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda meta: meta.pop("tokeniser_model"), "description is incomplete"),
        (lambda meta: meta["model"]["args"].update(d=24), "its description needs"),
        (lambda meta: meta["model"].update({"class": "os.system"}), "os.system"),
        (lambda meta: meta["model"]["args"].update(vocab=100), "its description needs"),
    ],
)
def test_a_checkpoint_that_lies_is_refused_in_one_line(shipped, tmp_path, damage, said):
    params, meta = checkpoint.read_safetensors(shipped / "model.safetensors")
    damage(meta)
    checkpoint.write_safetensors(tmp_path / "bad.safetensors", params, meta)
    with pytest.raises(checkpoint.CheckpointError) as error:
        Pipeline.load(tmp_path / "bad.safetensors")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


SAMPLED = ["--temperature=0.8", "--top_k=9", "--top_p=0.9", "--seed=3", "--continuous", "--weights=int8"]


@pytest.mark.parametrize("flags", [[], SAMPLED, ["--mesh=fsdp=-1"]], ids=["greedy", "sampled", "divided"])
def test_the_correct_command_end_to_end(shipped, tmp_path, capsys, flags):
    data = [{"input": ["the cat sat", "the hat sat"], "output": "the cat sat", "id": i} for i in range(5)]
    (tmp_path / "in.json").write_text(json.dumps(data))
    argv = ["correct", f"--checkpoint={shipped}", f"--input={tmp_path}/in.json", f"--output={tmp_path}/out.json"]
    assert cli.entry([*argv, *flags]) == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert [{k: v for k, v in row.items() if k != "corrected"} for row in out] == data
    assert all(isinstance(row["corrected"], str) for row in out)
    assert "5 records" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["correct", "--checkpoint=/nowhere", "--input={in}", "--output={out}"],
        ["correct", "--checkpoint={run}", "--input={in}", "--output=/no/such/folder/out.json"],
        ["correct", "--checkpoint={run}", "--input={in}", "--output={out}", "--task=astrology"],
        ["correct", "--checkpoint={run}", "--input={in}", "--output={out}", "--top_p=2"],
        ["correct", "--checkpoint={run}", "--input={in}", "--output={out}", "--continuous", "--beam=2"],
        ["correct", "--checkpoint={run}", "--input={in}", "--output={out}", "--mesh=rows=2"],
        ["correct", "--checkpoint={run}", "--input={in}", "--output={out}", "--mesh=fsdp=3"],
        ["correct", "--checkpoint={run}", "--input={in}", "--output={out}", "--mesh=fsdp=8", "--continuous"],
        ["export", "--checkpoint=/nowhere/x.safetensors", "--output={out}"],
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(shipped, tmp_path, capsys, argv):
    (tmp_path / "in.json").write_text('[{"input": ["a"], "output": "a"}]')
    names = {"run": shipped, "in": tmp_path / "in.json", "out": tmp_path / "out.json"}
    assert cli.entry([a.format(**names) for a in argv]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Traceback" not in said


def test_export_halves_a_checkpoint(shipped, tmp_path):
    assert (
        cli.entry(["export", f"--checkpoint={shipped}", f"--output={tmp_path}/half.safetensors", "--dtype=bfloat16"])
        == 0
    )
    table, meta = checkpoint.read_safetensors(tmp_path / "half.safetensors")
    assert meta["guard"] == 2.5
    whole, _ = checkpoint.read_safetensors(shipped / "model.safetensors")
    for path, leaf in table.items():
        np.testing.assert_allclose(leaf, whole[path], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", ["quickstart"])
def test_the_quickstart_small(name, tmp_path):
    """The README's main job from the shipped files, on a handful of lines and two steps, in a process of its own."""
    tiny.corpus(tmp_path)
    run = tmp_path / "run"
    flags = {"RUN_DIR": run, "DATA": tmp_path / "train", "VALID_DATA": tmp_path / "valid", "STEPS": 2, "EVERY": 1}
    flags |= {"BATCH": 2, "EXAMPLES": 60}
    command = [
        sys.executable,
        "-m",
        "moe_jax.main",
        f"--gin_file=runs/{name}.gin",
        *(f"--gin.{k}={v}" for k, v in flags.items()),
    ]
    env = {"PATH": "/usr/bin:/bin", "MOE_JAX_DATA": str(tmp_path), "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    # It compiles much and computes little, and notebooks compile the same.
    env |= {
        k: v
        for k in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
        if (v := os.environ.get(k))
    }
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((run / "scores.json").read_text())["rows"]
    keys = "task set lines metric first_pass corrected oracle_nb oracle_cp"
    keys += " relative_change ci95 p_value fixed broken untouched"
    assert all(set(keys.split()) <= set(row) for row in rows)
    assert {row["task"] for row in rows if row["set"] == "all"} == {"asr", "ocr", "mt", "gec"}
    assert (run / "report.html").stat().st_size > 10_000
    assert len((run / "examples.jsonl").read_text().splitlines()) == 24
    routing = json.loads((run / "routing.json").read_text())
    assert np.array(routing["load"]).shape == (4, 4, 4)
    assert set(routing["agreement"]) <= {"asr", "ocr", "mt", "gec"}


@pytest.mark.parametrize("layout", ["chatml+task", "instruct"])
def test_a_pretrained_tokeniser_goes_all_the_way(tmp_path, layout):
    pytest.importorskip("tokenizers")
    import hugging_face

    tokeniser = Tokeniser.load(hugging_face.write(tmp_path / "hf"))
    model = Corrector(d=16, layers=1, vocab=tokeniser.vocab_size, ffn=partial(DenseFfn, hidden=16), rngs=Rngs(params=0))
    table = tree.flatten(model)
    meta = {
        "model": describe.describe(model),
        "families": FAMILIES,
        "layout": layout,
        "length": 256,
        "max_sources": 1,
        **tokeniser.meta(),
    }
    export(tmp_path / "model.safetensors", table, meta)
    pipeline = Pipeline.load(tmp_path, batch_size=2)
    assert pipeline.tokeniser.eos == tokeniser.eos and pipeline.max_sources == 1
    of_its_own = dataclasses.replace(record("a b", task="mt"), sources=("x",))
    example = pipeline.encode(of_its_own)
    assert example is not None
    prompt = templates.encode(tokeniser, layout, ["a b"], ["x"], "mt")
    assert example.tokens == prompt
    (proposal,) = pipeline.propose([of_its_own])
    assert proposal.first == "a b" and hugging_face.STOP not in proposal.text
    meta["layout"] = "aligned"
    export(tmp_path / "model.safetensors", table, meta)
    with pytest.raises(checkpoint.CheckpointError, match="choose a template") as error:
        Pipeline.load(tmp_path)
    assert "\n" not in str(error.value)
