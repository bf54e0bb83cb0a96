"""Configuration: every shipped file parses and builds, and a mistake is one line."""

import copy
import errno
import functools
import gzip
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import gin
import hf_models
import jax
import numpy as np
import pytest

from moe_jax import branches, checkpoint, launch, main, sharding, train, tree
from moe_jax.interop import bring
from moe_jax.layers.param import Rngs
from moe_jax.metrics import language
from moe_jax.partfile import Stopped
from moe_jax.tasks import families, translation

GIN = Path(main.GIN)
RUNS = sorted(str(p.relative_to(GIN)) for folder in ("runs", "experiments") for p in (GIN / folder).rglob("*.gin"))
PRETRAINED = [r for r in RUNS if r.startswith("experiments/pretrained/")]
# Which others include.
PARTS = ("finetune", "branches", "digits", "speech", "translate", "from_noise", "from_shipped", "mix", "told", "wide")
PARTS = tuple(f"runs/{part}.gin" for part in PARTS)
COMPLETE = [r for r in RUNS if r not in (*PARTS, *PRETRAINED)]
GIVEN = {"runs/own.gin": ["FOLDER=/data/mine", "FAMILY=asr"], "runs/base_again.gin": ["BASE=runs/base"]}
GIVEN |= {f"experiments/task_moe/new_{kind}.gin": ["BASE=runs/x"] for kind in ("static", "dynamic", "full")}
ROUTERS = sorted(p.stem for p in (GIN / "routers").glob("*.gin") if p.stem not in ("moe", "shared"))
SPEECH = re.compile("u2pp|recogniser")
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def clean():
    gin.clear_config()
    yield
    gin.clear_config()


def configured_model():
    """What gin hands to `train` as its model: a copy of a reference is the configured class."""
    return copy.deepcopy(gin.config._CONFIG[("", "moe_jax.train.train")]["model"])


def shapes(files: list[str], bindings: Sequence[str] = ()) -> str:
    """The parameter table of the configured model, a line a path; nothing is computed."""
    main.load(files, bindings)
    model = configured_model()
    built = jax.eval_shape(lambda: tree.flatten(model(vocab=4096, rngs=Rngs(params=0))))
    return "".join(f"{path} {'x'.join(map(str, leaf.shape))}\n" for path, leaf in sorted(built.items()))


def speech(folder: Path, name: str) -> list[str]:
    """What runs of a folder need that says what prepared speech says to a model."""
    frontend = {"rate": 8000, "mels": 80, "mean": [0.0] * 80, "scale": [1.0] * 80}
    meta = {"format": 2, "rows": 1, "frames": 9, "max_targets": 1, "tokeniser": "x"}
    meta |= {"lengths": [9], "targets": [1], "speeds": [1.0], "frontend": frontend, "sha256": {"index": "x"}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return ["MANIFEST=list.jsonl", f"{'FRONTEND' if name.endswith('recogniser.gin') else 'DATA'}={folder}"]


@pytest.mark.parametrize("name", COMPLETE)
def test_every_run_parses_and_builds_the_parameters_of_its_golden_file(name, tmp_path):
    golden = GOLDEN / (name.replace("/", "-").removesuffix(".gin") + ".txt")
    table = shapes([name], GIVEN.get(name, ()) if not SPEECH.search(name) else speech(tmp_path, name))
    replaces = (
        name.startswith(("experiments/merging/", "experiments/neko/single.gin", "runs/shape.gin")) or "pod" in name
    )
    if name not in GIVEN and not replaces:
        main._check_all_used(gin.config._CONFIG)
    if name not in GIVEN and "wide" not in name:
        main.buildable()
    if os.environ.get("UPDATE_GOLDEN"):  # UPDATE_GOLDEN=1 pytest tests/test_main.py, then read the diff
        golden.write_text(table)
    assert table == golden.read_text()


@pytest.mark.parametrize("name", PRETRAINED)
def test_every_run_from_a_pretrained_base_fills_its_model_with_it(name, tmp_path):
    mixture = name.endswith(("mixture.gin", "pod.gin"))
    hf_models.write(tmp_path / "model", "mixtral" if mixture else "llama")
    base = str(tmp_path / "base.safetensors")
    checkpoint.write_safetensors(base, *bring.bring(tmp_path / "model"))
    main.load([name], [f"BASE={base}", *(["EXPERTS=4"] if mixture else [])])
    main.buildable()
    bound = gin.config._CONFIG[("", "moe_jax.train.train")]
    rules = copy.deepcopy(bound.get("init_rules", ()))
    make = functools.partial(train.build, configured_model(), vocab=40, seed=0)
    model = train.initial(make, base, rules, checkpoint.Source(base).meta["tokeniser"], sharding.make_mesh())
    experts = () if name.endswith("dense.gin") else (4,)
    table, source = tree.flatten(model), checkpoint.Source(base)
    gate = table["blocks/ffn/experts/gate" if experts else "blocks/ffn/gate"]
    assert gate.shape == (3, *experts, 16, 24)
    if mixture:
        assert type(model.ffn.router).__name__ == "TaskMapped"
        for path in ("experts/gate", "router/gate"):
            np.testing.assert_array_equal(table[f"blocks/ffn/{path}"], source[f"blocks/ffn/{path}"])
    else:
        np.testing.assert_array_equal(gate[:, 1] if experts else gate, source["blocks/ffn/gate"])
    np.testing.assert_array_equal(table["embedding"], source["embedding"])


@pytest.mark.parametrize(
    ("kind", "bindings", "says"),
    [
        ("mixtral", ["K=1", "EXPERTS=4"], "routes with k=2, the new router with 1"),
        ("qwen2_moe", ["EXPERTS=4"], "routes with weights='full', the new router with 'chosen'"),
        ("llama", [], "has no router to take the place of"),
    ],
)
def test_a_router_that_is_not_the_mixtures_own_kind_is_refused(kind, bindings, says, tmp_path):
    hf_models.write(tmp_path / "model", kind)
    base = str(tmp_path / "base.safetensors")
    checkpoint.write_safetensors(base, *bring.bring(tmp_path / "model"))
    main.load(["experiments/pretrained/mixture.gin"], [f"BASE={base}", *bindings])
    with pytest.raises(ValueError, match=says):
        train.build(configured_model(), vocab=40, seed=0)


@pytest.mark.parametrize("name", [r for r in COMPLETE if r.startswith("experiments/task_moe/")])
def test_no_arm_of_translation_hides_the_task_from_its_routers(name):
    main.load([name], GIVEN.get(name, ()))
    model = configured_model()
    built = jax.eval_shape(lambda: model(vocab=64, rngs=Rngs(params=0)))
    for layer in (built.ffn, built.encoder_ffn, built.adapter):
        router = getattr(layer, "router", None)
        assert getattr(getattr(router, "router", router), "unknown_rate", 0.0) == 0.0


@pytest.mark.parametrize(
    ("name", "part"), [("task_gated", "ffn"), ("dynamic_adapters", "adapter"), ("task_level", "ffn")]
)
def test_what_gates_see_of_a_direction_is_a_choice(name, part):
    main.load([f"experiments/task_moe/{name}.gin"], ["BY=target+type"])
    model = configured_model()
    built = jax.eval_shape(lambda: model(vocab=64, rngs=Rngs(params=0)))
    assert dict(getattr(built, part).router.groups) == translation.grouped("target+type")


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_new_language_moves_leaves_that_there_are(kind):
    main.load([f"experiments/task_moe/new_{kind}.gin"], ["BASE=runs/x"])
    bound = copy.deepcopy(gin.config._CONFIG[("", "moe_jax.train.train")])
    train.check(bound["model"], bound["adapters"])


def test_directions_that_cannot_be_scored_are_said_before_training(tmp_path, monkeypatch):
    (tmp_path / "translate.test.jsonl.gz").write_bytes(gzip.compress(b'{"en": "a", "de": "b"}\n'))
    monkeypatch.setenv("MOE_JAX_DATA", str(tmp_path))
    main.load(["experiments/task_moe/dense.gin"], [])
    with pytest.raises(ValueError, match="no test sentences for en-es"):
        main.buildable()
    monkeypatch.delenv("MOE_JAX_DATA")
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    language._detector.cache_clear()
    with pytest.raises(ValueError, match="needs py3langid"):
        main.buildable()


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_file_makes_an_moe_of_the_tiny_corrector(router):
    text = (GIN / "runs" / "base.gin").read_text().replace("models/dense.gin", f"routers/{router}.gin")
    gin.add_config_file_search_path(str(GIN))
    gin.parse_config(text)
    main._check_all_used(gin.config._CONFIG)
    model = configured_model()

    def build():
        return jax.eval_shape(lambda: tree.flatten(model(vocab=64, rngs=Rngs(params=0))))

    if router in ("expert_choice", "sentence_level"):
        with pytest.raises(ValueError, match="use it in an encoder"):
            build()
    else:
        assert build()["blocks/ffn/experts/gate"].shape == (4, 4, 192, 512)


def test_a_shared_expert_stands_beside_those_of_any_router():
    lines = shapes(["runs/quickstart.gin", "routers/shared.gin"]).splitlines()
    table = dict(line.split() for line in lines)
    assert table["blocks/ffn/shared/down"] == "4x512x192" and table["blocks/ffn/experts/down"] == "4x4x512x192"


def test_mixed_branches_are_the_experts_that_their_families_are_mapped_to():
    found = task_map(["experiments/neko/btx_mapped.gin"], [])  # of tasks 1, 2, ...
    mapped = [found[families.FAMILIES[family] - 1] for family in branches.FAMILIES]
    assert mapped == [(0,), (1,), (2,), (3,)]


def task_map(files: list[str], bindings: Sequence[str]) -> list[tuple[int, ...]]:
    """The experts of tasks 1 to 5 of the configured model."""
    gin.clear_config()
    main.load(files, bindings)
    model = jax.eval_shape(lambda: configured_model()(vocab=64, rngs=Rngs(params=0)))
    return list(model.ffn.router.experts[1:6])


def test_a_task_map_may_come_from_the_command_line():
    by_name = task_map(["runs/quickstart.gin"], ['MAP={"asr": 3, "ocr": [0, 1]}', "WEIGHTS=full", "INFERENCE=forced"])
    assert by_name == [(3,), (0, 1), (2,), (3,), (0,)]
    wrong = {
        '{"asrr": 3}': "unknown task family 'asrr'; known: asr, ocr",
        '{"asr": 9}': "'asr' -> expert 9, but there are experts 0..3",
        '{"asr": True}': "'asr' -> expert True, but there are experts 0..3",
        "{3.5: 1}": "task id 3.5 is outside 1..63",
    }
    for given, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            task_map(["runs/quickstart.gin"], [f"MAP={given}"])


def test_a_task_map_may_name_data_sets():
    files = ["runs/quickstart.gin", "data/by_set.gin"]
    task_map(files, ['MAP={"asr/web-whisper": 3, "ocr": 1}'])
    model = jax.eval_shape(lambda: configured_model()(vocab=64, rngs=Rngs(params=0)))
    assert [model.ffn.router.experts[i] for i in (2, 19)] == [(1,), (3,)]
    with pytest.raises(ValueError, match="unknown task family 'asr/web-whisper'"):
        task_map(files[:1], ['MAP={"asr/web-whisper": 3}'])


def test_a_task_map_may_be_random():
    files = ["runs/quickstart.gin", "routers/task_mapped_random.gin"]
    drawn = [families.random_map(seed, num_experts=4) for seed in (1, 2)]
    found = [task_map(files, [f"MAP_SEED={seed}"]) for seed in (1, 2)]
    assert found == [[(one[name],) for name in ("asr", "ocr", "mt", "gec", "denoise")] for one in drawn]
    assert found[0] != found[1]


def refused(files, bindings) -> str:
    with pytest.raises(main.ConfigError) as error:
        main.load(files, bindings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("bindings", "says"),
    [
        (["MAP={'asr': 9}"], "task map: 'asr' -> expert 9, but there are experts 0..3"),
        (["MAP={'poetry': 1}"], "unknown task family 'poetry'"),
        (["TARGETS=['/nothing/']"], "no path of this model matches '/nothing/'"),
    ],
)
def test_what_does_not_fit_the_model_is_said_before_data_are_prepared(bindings, says, tmp_path, capsys):
    files = ["runs/quickstart.gin", *(["adapters/lora.gin"] if "TARGETS" in bindings[0] else [])]
    bindings = [*bindings, f"DATA={tmp_path / 'data'}", f"RUN_DIR={tmp_path / 'run'}"]
    argv = [*(f"--gin_file={file}" for file in files), *(f"--gin_bindings={b}" for b in bindings)]
    assert main.main(argv) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_corpus_without_what_is_to_be_scored_is_said_before_data_are_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_JAX_DATA", str(tmp_path))
    main.load(["experiments/neko_wide/neko.gin"], [])
    with pytest.raises(main.ConfigError, match=r"asr.valid.jsonl.gz: no such file, which is to be scored"):
        main.buildable()


def test_a_misspelt_macro_names_the_right_one():
    assert "did you mean STEPS?" in refused(["runs/quickstart.gin"], ["STPES=3"])


def test_a_misspelt_parameter_names_the_right_one():
    assert "Did you mean steps" in refused(["runs/quickstart.gin"], ["train.train.stepz=4"])


def test_an_unknown_configurable_a_missing_file_and_a_missing_value_are_said():
    assert "optim.adamww" in refused(["runs/quickstart.gin"], ["optim.adamww.b1=0.3"])
    assert "nope.gin" in refused(["nope.gin"], [])
    assert "give it a value" in refused(["runs/quickstart.gin"], ["STEPS"])


def test_a_binding_that_nothing_reads_is_an_error(tmp_path):
    extra = tmp_path / "extra.gin"
    extra.write_text(
        'include "runs/quickstart.gin"\nfrom __gin__ import dynamic_registration\n'
        "from moe_jax import optim\noptim.adamw.b1 = 0.5\n"
    )
    assert "nothing in main.run.jobs uses it" in refused([str(extra)], [])


def test_what_an_included_file_binds_for_a_job_that_was_replaced_is_no_error():
    main.load(["runs/own.gin"], GIVEN["runs/own.gin"])


def test_what_a_run_requires_is_named():
    assert "FOLDER" in refused(["runs/own.gin"], [])


def test_values_from_the_shell_need_no_quotes():
    assert main._quoted("RUN_DIR=/tmp/x") == 'RUN_DIR = "/tmp/x"'
    assert main._quoted("STEPS=100") == "STEPS = 100"
    assert main._quoted("RATE=1e-3") == "RATE = 1e-3"
    assert main._quoted("DATA=2024-run") == 'DATA = "2024-run"'
    assert main._quoted("A=@optim.adamw") == "A = @optim.adamw"
    assert launch.rewritten(["--gin.A=1", "--gin_file=x"]) == ["--gin_bindings=A=1", "--gin_file=x"]


def test_the_command_line_says_one_line_and_exits_with_2(capsys):
    assert main.main(["--gin_file=runs/quickstart.gin", "--gin.STPES=3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main.main([]) == 2


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EIO, 75), (errno.ESTALE, 75), (errno.ETIMEDOUT, 75), (errno.ENOSPC, 2), (errno.ENOENT, 2), (None, 2)],
)
def test_what_may_pass_by_itself_has_an_exit_code_of_its_own(number, code, capsys):
    error = OSError(number, "it was so", "/nfs/x") if number else OSError("it was so")
    assert main.report(error) == code
    assert capsys.readouterr().err == ("/nfs/x: " if number else "") + "it was so\n"


def test_a_run_that_was_stopped_says_so_in_one_line(capsys):
    @gin.configurable(module="tests")
    def stops():
        raise Stopped(15, "stopped at step 5 of 12; the same command goes on from there")

    with pytest.raises(Stopped) as caught:
        stops()
    assert "In call to configurable" in str(caught.value)  # gin's
    assert main.report(caught.value) == 143
    assert capsys.readouterr().err == "stopped at step 5 of 12; the same command goes on from there\n"


@pytest.mark.parametrize("flags", [["--process=1"], ["--processes=2"], ["--distributed", "--processes=2"]])
def test_a_number_of_hosts_needs_the_address_of_the_first(flags, capsys):
    assert main.main(["--gin_file=runs/quickstart.gin", *flags]) == 2
    assert (
        capsys.readouterr().err == "error: --process and --processes are read with --coordinator=HOST:PORT: give it\n"
    )


def test_show_config_prints_what_is_bound(capsys):
    assert main.main(["--gin_file=runs/quickstart.gin", "--gin.STEPS=7", "--show_config"]) == 0
    assert "STEPS = 7" in capsys.readouterr().out


def test_jobs_run_in_order():
    seen: list[int] = []
    main.run([functools.partial(seen.append, 1), functools.partial(seen.append, 2)])
    assert seen == [1, 2]
    with pytest.raises(main.ConfigError):
        main.run([])


def test_no_python_file_lives_under_gin():
    """An __init__.py there would shadow the gin package."""
    assert not list(GIN.rglob("*.py"))
    assert train.__name__ == "moe_jax.train"


def test_files_of_speech_and_text_load_in_one_process():
    for name in ("experiments/u2pp/dense.gin", "experiments/neko/btm.gin", "experiments/task_moe/dense.gin"):
        gin.clear_config()  # what gin has registered stays, and is looked for by the end of its name
        main.load([name], ["MANIFEST=list.jsonl"] if "u2pp" in name else [])


def test_a_process_may_run_one_configuration_after_another(tmp_path, capsys):
    """As a notebook does: nothing is left of the first."""
    for name in ("FIRST", "SECOND"):
        lines = ["from __gin__ import dynamic_registration", "from moe_jax import main", f"{name} = 'x'"]
        lines += ["main.run.jobs = [@main.shipped]", f"main.shipped.name = %{name}"]
        (tmp_path / "x.gin").write_text("\n".join(lines))
        assert main.main([f"--gin_file={tmp_path}/x.gin"]) == 0
        assert main.main([f"--gin_file={tmp_path}/x.gin", "--show_config"]) == 0
        out = capsys.readouterr().out
        assert f"{name} = 'x'" in out and ("FIRST" in out) == (name == "FIRST")


def test_a_corpus_is_of_the_families_that_it_has(tmp_path, monkeypatch):
    monkeypatch.delenv("MOE_JAX_DATA", raising=False)
    assert [Path(p).name[:3] for p in main.corpus("test")] == ["asr", "ocr", "mt.", "gec"]
    monkeypatch.setenv("MOE_JAX_DATA", str(tmp_path))
    for name in ("tn.test", "asr.test", "itn.valid", "denoise.test"):
        (tmp_path / f"{name}.jsonl.gz").touch()
    assert main.corpus("test") == [str(tmp_path / f"{name}.test.jsonl.gz") for name in ("asr", "tn")]
    assert main.corpus("test", ["itn"]) == [
        str(tmp_path / "itn.test.jsonl.gz")
    ]  # asked for, so that its reader says it
