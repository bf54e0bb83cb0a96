"""Pages of the site that are made of other files: the front page, results, and the reference of configurations."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SITE = {"RESULTS.md": "results.md", "docs/merging.md": "merging.md", "docs/profiling.md": "profiling.md"}
SITE |= {"docs/architecture.md": "architecture.md"}
PICTURES = {path.relative_to(ROOT).as_posix(): f"{path.parent.name}.svg" for path in ROOT.glob("results/*/routing.svg")}
SITE |= PICTURES


def on_files(files: Files, config) -> Files:
    pages = {"index.md": linked("README.md", config.repo_url), "results.md": linked("RESULTS.md", config.repo_url)}
    pages["gin.md"] = configurations()
    pages |= {name: (ROOT / path).read_text("utf-8") for path, name in PICTURES.items()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Pages of docs/ link to files of the root as a reader of the repository follows them."""
    return markdown.replace("(../RESULTS.md", "(results.md")


def linked(name: str, repository: str) -> str:
    """A file of the root, its links to other files of ours leading to their pages or to the repository."""

    def link(found: re.Match) -> str:
        path, _, anchor = found[2].partition("#")
        page = SITE.get(path, f"{repository}/blob/main/{path}")
        return f"{found[1]}({page}{'#' + anchor if anchor else ''})"

    return re.sub(r"(\[[^\]\n]*\])\((?!https?:|#)([^)\s]+)\)", link, (ROOT / name).read_text("utf-8"))


def configurations() -> str:
    """Every gin file: what its first lines say, and the macros that it binds with their values."""
    out = [
        "# Configurations\n",
        "Each macro is a flag, `--gin.NAME=VALUE`. A file may include others, and rebind theirs.\n",
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
