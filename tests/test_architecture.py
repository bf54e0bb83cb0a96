"""Who may import whom, read from the source (docs/architecture.md), and what the library never does."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import moe_jax

ROOT = Path(moe_jax.__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("moe_jax", "tasks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}

# A room imports itself and rooms of the lines above; a room is a file or a folder of moe_jax, and `tasks`.
LINES = """
types text metrics formats partfile report logs xla launch
sharding losses tree packing correct score tasks goodput health hosts
layers optim checkpoint data
moe adapters
models
programs sampling quantise
describe decode profile
lanes
pipeline interop subnetwork speech
train evaluate merging seqio_data translate
branches check_mesh
prepare main tune
sweep
compare
cli
"""
LINE: dict[str, int] = {room: number for number, line in enumerate(LINES.strip().splitlines()) for room in line.split()}

# Rooms that keep to these others besides.
ONLY = {
    "tasks": {"formats", "metrics", "text"},
    "correct": {"formats", "partfile"},
    "score": {"formats", "metrics"},
    "tree": {"types"},
    "checkpoint": {"hosts"},  # which errors may pass by themselves
    "optim": set(),
    "adapters": {"types", "tree", "checkpoint"},
    "models": {"types", "losses", "sharding", "layers", "moe"},
    "moe": {"types", "sharding", "layers"},
    "layers": {"types", "sharding"},
    "xla": set(),
    "launch": set(),
    "data": {"types", "text", "packing", "hosts"},  # the first of which checks what all read
    "merging": {
        "types",
        "tree",
        "sharding",
        "checkpoint",
        "partfile",
        "describe",
        "data",
        "interop",
        "layers",
        "moe",
        "speech",
        "xla",
    },
}
OPENS_TASKS = {"seqio_data", "main"}  # `main` for the files that are shipped there

WITHOUT_JAX = ("text", "metrics", "formats", "partfile", "report", "logs", "correct", "score", "tasks", "launch")
JAX = ("jax", "jaxlib", "flax", "optax", "orbax")
TENSORFLOW = ("seqio", "tensorflow", "tensorflow_datasets", "tf_keras", "t5")
UNSAFE = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch")


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text("utf-8"))


@cache
def imports(name: str) -> frozenset[str]:
    """All that a file imports, also within functions; `from a import b` is both a and a.b."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{name}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(name.replace("moe_jax.tasks", "tasks") for name in found)


def ours(name: str) -> set[str]:
    return {found for found in imports(name) if found in FILES} - {name, "moe_jax"}


def room(name: str) -> str:
    return name.removeprefix("moe_jax.").split(".")[0]


def brings(name: str, packages: tuple[str, ...]) -> list[str]:
    return sorted(found for found in imports(name) if found.split(".")[0] in packages)


MODULES = [name for name in FILES if name != "moe_jax"]


def test_every_file_has_its_room():
    assert {room(name) for name in MODULES} == set(LINE)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    mine = room(name)
    for other in map(room, ours(name)):
        assert other == mine or LINE[other] < LINE[mine], f"{name} imports {other}"
        assert other == mine or mine not in ONLY or other in ONLY[mine], f"{name} imports {other}"
        assert other != "tasks" or mine == "tasks" or mine in OPENS_TASKS, f"{name} imports tasks"


@pytest.mark.parametrize("name", MODULES)
def test_who_knows_jax_tensorflow_gin_and_meshes(name):
    if room(name) in WITHOUT_JAX:
        assert not brings(name, JAX)
    if room(name) not in ("tasks", "seqio_data"):
        assert not brings(name, TENSORFLOW)
    if room(name) != "main":
        assert not brings(name, ("gin",))
    if room(name) != "sharding":
        assert not {found for found in imports(name) if found.startswith("jax.sharding")}
        words = {n.attr for n in ast.walk(tree(name)) if isinstance(n, ast.Attribute) if ast.unparse(n.value) == "jax"}
        assert not words & {"sharding", "make_mesh", "set_mesh", "Mesh", "NamedSharding", "P"}


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_unpickled_or_evaluated(name):
    assert not brings(name, UNSAFE)
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__"), f"{name}:{node.lineno}"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "yaml":
            assert node.attr in ("safe_load", "YAMLError"), f"{name}:{node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{name}:{node.value.lineno}"


def test_no_code_lies_among_the_configurations():
    """An __init__.py there would hide the package `gin`."""
    assert not list((ROOT / "gin").rglob("*.py"))


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("moe_jax.train, moe_jax.evaluate, moe_jax.pipeline, moe_jax.cli", (*TENSORFLOW, "gin", "torch")),
        ("moe_jax.correct, moe_jax.formats, moe_jax.metrics, moe_jax.report, moe_jax.text.prompt", (*JAX, *TENSORFLOW)),
    ],
)
def test_what_importing_leaves_out(modules, absent):
    code = f"import sys, {modules}; print(*sorted({set(absent)!r} & set(sys.modules)))"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
