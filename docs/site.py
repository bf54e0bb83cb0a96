"""Pages of the site that are made of other files: the front page, results, launch scripts, notebooks, changelog, and
references of configurations and of what they can bind. The code is read, not imported: that would want JAX and more."""

from __future__ import annotations

import ast
import functools
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SITE = {"RESULTS.md": "results.md", "docs/merging.md": "merging.md", "docs/profiling.md": "profiling.md"}
SITE |= {"docs/architecture.md": "architecture.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
SITE |= {"tpu_scripts/README.md": "launch.md", "notebooks/README.md": "notebooks.md"}
COPIED = [path for path, page in SITE.items() if not path.startswith("docs/")]
PICTURES = {path.relative_to(ROOT).as_posix(): f"{path.parent.name}.svg" for path in ROOT.glob("results/*/routing.svg")}
SITE |= PICTURES


def on_files(files: Files, config) -> Files:
    pages = {SITE[path]: linked(path, config.repo_url) for path in COPIED}
    pages |= {"gin.md": configurations(), "settings.md": settings()}
    pages |= {name: (ROOT / path).read_text("utf-8") for path, name in PICTURES.items()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Pages of docs/ link to files of the root as a reader of the repository follows them."""
    return re.sub(r"\(\.\./([\w/]+\.md)", lambda found: f"({SITE.get(found[1], found[0][1:])}", markdown)


def linked(name: str, repository: str) -> str:
    """A file, its links to other files of ours leading to their pages or to the repository."""

    def link(found: re.Match) -> str:
        path, _, anchor = found[2].partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
        page = SITE.get(path, f"{repository}/blob/main/{path}")
        return f"{found[1]}({page}{'#' + anchor if anchor else ''})"

    return re.sub(r"(\[[^\]\n]*\])\((?!https?:|#)([^)\s]+)\)", link, (ROOT / name).read_text("utf-8"))


def configurations() -> str:
    """Every gin file: what its first lines say, and the macros that it binds with their values."""
    out = [
        "# Configurations\n",
        "Each macro is a flag, `--gin.NAME=VALUE`. A file may include others, and rebind theirs. Whatever else a",
        "function takes can be bound too, as in `--gin.train.train.spike=5.0`: [settings](settings.md).\n",
    ]
    folder = ROOT / "gin"
    for kind in sorted({path.parent.relative_to(folder) for path in folder.rglob("*.gin")}):
        out.append(f"## {kind}\n")
        for path in sorted((folder / kind).glob("*.gin")):
            text = path.read_text("utf-8")
            said = [line[1:].strip() for line in text.splitlines()[: _head(text)]]
            commands = [line for line in said if line.startswith("python -m ")]
            prose = " ".join(line for line in said if line not in commands)
            out += [f"### `{path.relative_to(folder)}`\n", prose.replace("<", "&lt;") + "\n"]
            out += [f"```sh\n{command}\n```\n" for command in commands]
            included = [f"`{name}`" for name in re.findall(r'^include "(.+)"$', text, re.MULTILINE)]
            out += [f"Includes {', '.join(included)}.\n"] if included else []
            macros = re.findall(r"^([A-Z][A-Z0-9_]*) = (.+)$", text, re.MULTILINE)
            rows = ["| `{}` | `{}` |".format(name, value.replace("|", r"\|")) for name, value in macros]
            out += ["| macro | value |\n| --- | --- |\n" + "\n".join(rows) + "\n"] if rows else []
    return "\n".join(out)


def _head(text: str) -> int:
    """How many comment lines a file begins with."""
    lines = text.splitlines()
    return next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))


# --- what can be bound ------------------------------------------------------------------------------------------------


def settings() -> str:
    """Everything that gin files name: its signature, and what its docstring says of its arguments."""
    out = [
        "# Settings\n",
        "What gin files name, with everything that can be bound of it, and its default. A gin file imports the module;",
        "a flag does as well where a file of the run does: `--gin.train.train.spike=5.0`.\n",
    ]
    module = ""
    for of, name in sorted(named()):
        if of != module:
            module = of
            out.append(f"## {module}\n")
        node, init, said = described(module, name)
        kind = "class " if isinstance(node, ast.ClassDef) else ""
        out += [f"### {module.rpartition('.')[2]}.{name}\n", f"```python\n{kind}{name}{init}\n```\n"]
        out += [said.replace("<", "&lt;") + "\n"] if said else []
    return "\n".join(out)


def named() -> set[tuple[str, str]]:
    """(module, function or class) of each that a gin file binds or refers to."""
    out = set()
    for path in (ROOT / "gin").rglob("*.gin"):
        text = re.sub(r"(?m)^\s*#.*$", "", path.read_text("utf-8"))
        modules = {name: f"{of}.{name}" for of, name in re.findall(r"(?m)^from (moe_jax[\w.]*) import (\w+)$", text)}
        found = re.findall(r"@(?:\w+/)*(\w+)\.(\w+)", text)
        found += re.findall(r"(?m)^(?:\w+/)*(\w+)\.(\w+)\.\w+ *=", text)
        out |= {(modules[alias], name) for alias, name in found if alias in modules}
    return out


@functools.cache
def parsed(module: str) -> ast.Module:
    path = ROOT / Path(*module.replace("moe_jax.tasks", "tasks").split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text("utf-8"))


def described(module: str, name: str) -> tuple[ast.AST, str, str]:
    """(its definition, its signature, what its docstring begins with and says of its arguments)."""
    node = defined(module, name)
    of, init = constructor(module, node) if isinstance(node, ast.ClassDef) else (node, node)
    docstrings = [ast.get_docstring(one) or "" for one in (node, init, of)]
    prose = " ".join(docstrings[0].partition("\n\n")[0].split())
    arguments = next(filter(None, map(_arguments, docstrings)), [])
    bullets = [f"- `{names.replace(', ', '`, `')}`: {text}" for names, text in arguments]
    return node, _signature(init), "\n\n".join(filter(None, (prose, "\n".join(bullets))))


def defined(module: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    """Raises LookupError, with both names, for what is not there: a gin file that names it is wrong."""
    for node in parsed(module).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return node
    raise LookupError(f"{module}.{name}: a gin file names it, but it is not defined there")


def constructor(module: str, node: ast.ClassDef) -> tuple[ast.ClassDef, ast.FunctionDef | ast.ClassDef]:
    """(the class, its `__init__`), of the class or of the first base that has one; a dataclass is its own."""
    for one in node.body:
        if isinstance(one, ast.FunctionDef) and one.name == "__init__":
            return node, one
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return node, node
    for base in map(ast.unparse, node.bases):
        alias, _, name = base.rpartition(".")
        for one in parsed(module).body:
            if isinstance(one, ast.ClassDef) and base == one.name:
                return constructor(module, one)
            if isinstance(one, ast.ImportFrom) and str(one.module).startswith("moe_jax"):
                given = {a.asname or a.name: a.name for a in one.names}
                where = (f"{one.module}.{given[alias]}", name) if alias in given else (str(one.module), given.get(base))
                if where[1]:
                    return constructor(where[0], defined(where[0], where[1]))  # ty: ignore[invalid-argument-type]
    return node, node


def _signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):  # a dataclass, or one that takes nothing
        fields = [ast.unparse(one) for one in node.body if isinstance(one, ast.AnnAssign)]
    else:
        given = node.args
        before = [None] * (len(given.args) - len(given.defaults))
        ordered = list(zip(given.args, [*before, *given.defaults], strict=True))
        fields = [_field(arg, default) for arg, default in ordered if arg.arg != "self"]
        fields += [f"*{given.vararg.arg}"] if given.vararg else ["*"] if given.kwonlyargs else []
        fields += [_field(arg, default) for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
        fields += [f"**{given.kwarg.arg}"] if given.kwarg else []
    short = f"({', '.join(fields)})"
    return short if len(short) < 80 else "(\n" + "".join(f"    {field},\n" for field in fields) + ")"


def _field(arg: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(arg) + (f" = {ast.unparse(default)}" if default is not None else "")


def _arguments(docstring: str) -> list[tuple[str, str]]:
    """(names of arguments, what a docstring says of them)."""
    found = re.search(r"(?ms)^(?:Args|Attributes):\n(.*?)(?=^\S|\Z)", docstring)
    items = re.findall(r"(?ms)^  ([\w*, ]+): (.*?)(?=^  \S|\Z)", found[1] if found else "")
    return [(names, " ".join(text.split())) for names, text in items]
