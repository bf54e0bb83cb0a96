"""One model a family: on what and for how long each is trained, and that jobs take their folders over gin's."""

import json
from pathlib import Path

import gin
import pytest

from moe_jax import branches, hosts
from moe_jax.data import Prepared
from moe_jax.tasks import mixtures
from moe_jax.tasks.quiet import seqio


def test_steps_are_shared_as_tokens_are():
    assert branches.shares(160, {"a": 300, "b": 100}) == {"a": 120, "b": 40}
    assert branches.shares(5, {"a": 1000, "b": 1, "c": 0}) == {"a": 3, "b": 1, "c": 1}
    with pytest.raises(ValueError, match=r"2 steps for 3 families \(a, b, c\); give each at least one"):
        branches.shares(2, {"a": 1, "b": 1, "c": 1})


@pytest.mark.parametrize("family", branches.FAMILIES)
def test_a_family_has_in_its_own_mixture_what_it_has_in_the_joint_one(family):
    joint, own = seqio.get_mixture_or_task("correct_all"), seqio.get_mixture_or_task(f"correct_all_{family}")
    shared = [task for task in joint.tasks if task.name.startswith(f"correct_{family}")]
    assert {task.name for task in own.tasks} == {task.name for task in shared}
    rates = [mixture.get_rate(task) for mixture in (joint, own) for task in shared]
    assert rates[: len(shared)] == rates[len(shared) :]
    assert mixtures.CORRECT_ALL is joint


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[tuple]:
    """What branches call, each job with its own folder bound in gin already, as in gin/runs/finetune.gin."""
    made: list[tuple] = []

    @hosts.alone
    def prepare(folder: str, *, mixture: str, **rest) -> None:
        made.append(("prepare", folder, mixture, rest))

    @hosts.in_turn
    def train(run_dir: str, *, steps: int, optimizer, data: str, init_from: str = "base", **rest) -> None:
        made.append(("train", run_dir, steps, optimizer(), data, init_from))

    @hosts.alone
    def evaluate(run_dir: str, *, test: list[str], **rest) -> None:
        made.append(("evaluate", run_dir, test))
        Path(run_dir).mkdir(parents=True)
        scores = {"rows": [{"task": test[0]}], "meta": {"split": f"{test[0]}.gz", "guard": "off", "date": "d"}}
        (Path(run_dir) / "scores.json").write_text(json.dumps(scores))
        (Path(run_dir) / "examples.jsonl").write_text(f"{test[0]}\n")

    tokens = {"asr": 30, "ocr": 20, "mt": 40, "gec": 10}
    meta = {"tasks": {family: {"tokens": n} for family, n in tokens.items()}}
    monkeypatch.setattr(Prepared, "open", lambda folder: Prepared(Path(folder), meta, None, {}))
    monkeypatch.setattr(branches.scoring, "to_markdown", str)
    configured = {}
    for job, bound in ((prepare, "folder"), (train, "run_dir"), (evaluate, "run_dir")):
        configured[job.__name__] = gin.external_configurable(job, f"fake.{job.__name__}.{tmp_path.name}")
        gin.bind_parameter(f"fake.{job.__name__}.{tmp_path.name}.{bound}", "the joint run's")
    common = {"joint": "j", "examples": 9, "steps": 10, "optimizer": lambda schedule: ("opt", schedule)}
    branches.train(
        str(tmp_path / "run"), **common, schedule=lambda *, steps: steps, **_of(configured, "prepare", "train")
    )
    branches.evaluate(str(tmp_path / "run"), corpus=lambda split, families: families, **_of(configured, "evaluate"))
    return made


def _of(configured: dict, *names: str) -> dict:
    return {name: configured[name] for name in names}


def test_each_branch_has_its_own_folder_mixture_steps_and_schedule(calls, tmp_path):
    trained = [call for call in calls if call[0] == "train"]
    for (_, folder, steps, optimizer, data, init), family in zip(trained, branches.FAMILIES, strict=True):
        assert folder == str(tmp_path / "run" / family) and init == "base"
        assert steps == {"asr": 3, "ocr": 2, "mt": 4, "gec": 1}[family] and optimizer == ("opt", steps)
        assert data == f"prepared/correct_all_{family}"
    prepared = [call[1:3] for call in calls if call[0] == "prepare"]
    assert prepared[:2] == [(f"prepared/correct_all_asr{held}", "correct_all_asr") for held in ("", ".valid")]


def test_scores_and_examples_of_the_branches_come_together(calls, tmp_path):
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert [row["task"] for row in scores["rows"]] == list(branches.FAMILIES)
    assert scores["meta"]["split"].startswith("asr: asr.gz, ocr: ocr.gz")
    assert (tmp_path / "run" / "examples.jsonl").read_text().split() == list(branches.FAMILIES)
