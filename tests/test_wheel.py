"""What is installed from a wheel works where there is no checkout: gin files and embedded data are inside."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the wheel holds."""
    for name in ("setuptools", "wheel"):  # Python 3.12 no longer brings them, and CI fetches nothing to build with
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    source = folder / "source"  # building leaves files beside what it builds
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if name.split("/")[0] in ("moe_jax", "gin", "tasks", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to(ROOT / name)
    subprocess.run([*build, str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, cwd: Path, *args: str) -> str:
    env = os.environ | {"PYTHONPATH": str(installed), "GLIBC_TUNABLES": ""}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_file_that_runs_need_is_inside(installed):
    for folder, inside in (("gin", "_gin"), ("tasks", "tasks"), ("moe_jax", ".")):
        mine = {p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob("*") if p.is_file()}
        mine = {p for p in mine if "__pycache__" not in p.parts}
        assert not [p for p in mine if not (installed / "moe_jax" / inside / p).exists()]


def test_a_run_is_configured_from_the_wheels_gin_files_and_data(installed, tmp_path):
    where = "import moe_jax.main as m, moe_jax.tasks as t; print(m.__file__, t.__file__)"
    assert run(installed, tmp_path, "-c", where).count(str(installed)) == 2
    shown = run(installed, tmp_path, "-m", "moe_jax.cli", "run", "--gin_file=runs/quickstart.gin", "--show_config")
    assert "main.run.jobs" in shown
    counted = "from moe_jax import main; import json; print(json.dumps([main.corpus('test'), main.prompts()]))"
    corpus, prompts = json.loads(run(installed, tmp_path, "-c", counted))
    assert all(str(installed) in path and Path(path).exists() for path in [*corpus, prompts])
