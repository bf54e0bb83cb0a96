"""Flags -> gin -> jobs. The only importer of gin.

    python -m moe_jax.main --gin_file=runs/quickstart.gin --gin.STEPS=100 --gin.RUN_DIR=/tmp/try

A gin file binds `main.run.jobs`, a list of configured functions that run in order. Bindings that nothing would read
are errors. Configuration is the user's own code (a gin file can import modules); one found beside a checkpoint is
never parsed.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util  # noqa: F401  gin needs it loaded to look for files
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_jax import hosts, launch
from moe_jax.partfile import Stopped

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent
CORRECTED = (
    "asr",
    "ocr",
    "mt",
    "gec",
    "tn",
    "itn",
)  # the families of correctors, of which the last two are not shipped
GIN = CHECKOUT / "gin" if (CHECKOUT / "setup.cfg").exists() else PACKAGE / "_gin"


class ConfigError(ValueError):
    """One line: which binding, and how to mend it."""


def run(jobs: Sequence[Callable[[], Any]] = ()) -> None:
    """Runs the configured jobs in order."""
    if not jobs:
        raise ConfigError("no jobs: a gin file binds `main.run.jobs`, such as runs/quickstart.gin")
    for job in jobs:
        job()


def config() -> dict[str, Any]:
    """What the gin files and flags bind, as plain JSON: for `train.train.config`."""
    import gin

    bound = {}
    for (scope, selector), values in sorted(gin.config._CONFIG.items()):
        name = f"{scope}/{selector}" if scope else selector
        bound[name] = {
            k: v if isinstance(v, (int, float, str, bool, type(None))) else str(v) for k, v in values.items()
        }
    return json.loads(json.dumps(bound))


def shipped(name: str = "base.safetensors") -> str:
    """The path of a file shipped with the package, such as `tokeniser.model`."""
    import moe_jax.tasks

    return str(Path(str(moe_jax.tasks.__file__)).parent / "data" / name)


def prompts() -> str:
    """The list of the recordings that are shipped."""
    return shipped("prompts/prompts.jsonl")


def corpus(split: str, families: Sequence[str] | None = None) -> list[str]:
    """The corpus files of a split, one a family. MOE_JAX_DATA names a folder other than the embedded one.

    Args:
      families: default: those of CORRECTED that have a file.
    """
    given = os.environ.get("MOE_JAX_DATA")
    folder = Path(given) if given else Path(shipped()).parent
    paths = [folder / f"{family}.{split}.jsonl.gz" for family in families or CORRECTED]
    there = [path for path in paths if path.exists()]
    return [str(path) for path in (paths if families or not there else there)]


def parallel(split: str, directions: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """direction -> sentences and their references, of the embedded parallel text (drafts to edit: of the family `mt`);
    MOE_JAX_DATA as in `corpus`."""
    from moe_jax.tasks import translation

    def pairs(direction: str) -> list[tuple[str, str]]:
        if translation.edits(direction):
            found = translation.drafts(Path(corpus(split, ["mt"])[0]), direction)
            return [(draft, text) for _, draft, text in found]
        a, b = translation.languages(direction)
        return [(row[a], row[b]) for row in multiparallel(split) if a in row and b in row]

    return {direction: pairs(direction) for direction in directions}


def multiparallel(split: str) -> list[dict[str, str]]:
    """What `parallel` is made of: the texts of each row by language."""
    from moe_jax.tasks import translation

    folder = os.environ.get("MOE_JAX_DATA")
    name = f"translate.{split}.jsonl.gz"
    return [row for _, row in translation.read(Path(folder) / name if folder else Path(shipped(name)))]


def own_corpus(folder: str, split: str) -> list[str]:
    """The file of a split in a user's folder. Raises ValueError where there is none."""
    from moe_jax import formats

    return [str(formats.split_file(folder, split))]


# --- gin --------------------------------------------------------------------------------------------------------------


def load(files: Sequence[str], bindings: Sequence[str]) -> None:
    """Parses gin files (looked for here, then among the shipped ones) and bindings. Raises ConfigError in one line."""
    import gin

    gin.config._FILE_READERS[:] = gin.config._FILE_READERS[:1]  # the others only add noise to "file not found"
    gin.add_config_file_search_path(str(GIN))
    try:
        gin.parse_config_files_and_bindings(list(files), [], finalize_config=False)
        quoted = [_quoted(b) for b in bindings]
        gin.parse_config(quoted)
        gin.finalize()
        said = _bound_in("\n".join(quoted)).union(*(_bound_in(_text(file)) for file in files))
    except (OSError, SyntaxError, ValueError, TypeError, ImportError, AttributeError, NameError, KeyError) as error:
        raise ConfigError(_explain(error)) from error
    _check_all_used(said)


def _text(file: str) -> str:
    return next(path.read_text("utf-8") for path in (Path(file), GIN / file) if path.is_file())


def _bound_in(text: str) -> set[tuple[str, str]]:
    """(scope, selector as written; `gin.macro` of a macro) of each binding in a gin file, without what it includes."""
    from gin import config, config_parser

    parser = config_parser.ConfigParser(text, config.ParserDelegate(skip_unknown=True))
    bindings = [s for s in parser if isinstance(s, config_parser.BindingStatement)]
    return {(b.scope, b.selector) if b.arg_name else ("/".join(filter(None, b[:2])), "gin.macro") for b in bindings}


def _quoted(binding: str) -> str:
    """`NAME=value` with a value that is not a literal, a reference or a macro taken as a string: shells eat quotes."""
    name, sep, value = binding.partition("=")
    if not sep:
        raise ConfigError(f"--gin.{binding}: give it a value, as in --gin.STEPS=100")
    value = value.strip()
    literal = re.fullmatch(r"(?s)[@%'\"\[({].*|[-+]?[\d.].*|True|False|None", value)
    number = re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", value)
    if not literal or (value[0] in "+-.0123456789" and not number):
        value = json.dumps(value)
    return f"{name.strip()} = {value}"


def _explain(error: BaseException) -> str:
    text = " ".join(str(error).split())
    missing = re.search(r"No configurable matching '([^']+)'|doesn't have a parameter named '([^']+)'", text)
    if missing:
        wrong = missing.group(1) or missing.group(2)
        close = difflib.get_close_matches(wrong.split(".")[-1], _names(), n=2, cutoff=0.6)
        text += f" Did you mean {' or '.join(close)}?" if close else ""
    return f"configuration: {text[:600]}"


def _names() -> list[str]:
    import inspect

    import gin

    names = set()
    for selector, configurable in gin.config._REGISTRY.items():
        names.add(selector.split(".")[-1])
        try:
            names |= set(inspect.signature(configurable.wrapped).parameters)
        except (TypeError, ValueError):
            continue
    return sorted(names | {scope for scope, selector in gin.config._CONFIG if selector == "gin.macro"})


def _check_all_used(said: Collection[tuple[str, str]]) -> None:
    """What flags and the named files bind must be reachable from the jobs: a binding that nobody reads is a mistake,
    said at once. Included files may bind for jobs that the file including them has replaced."""
    import gin

    bound = dict(gin.config._CONFIG)  # (scope, full selector) -> {parameter: value}
    used = {key for key in bound if key[1].endswith("main.run")}
    todo = [(key, "") for key in used]
    seen = set(todo)
    while todo:
        binding, within = todo.pop()
        for named, short in _references(list(bound[binding].values())):
            scope = named or within  # a reference that names no scope stays in the one around it
            for key in bound:
                own_scope, selector = key
                same = selector == short or selector.endswith("." + short)
                outer = own_scope in ("", scope) or scope.startswith(f"{own_scope}/")
                inside = within if selector == "gin.macro" else scope
                if same and outer and (key, inside) not in seen:
                    used.add(key)
                    seen.add((key, inside))
                    todo.append((key, inside))
    macros = sorted(scope for scope, selector in used if selector == "gin.macro")
    for scope, selector in bound.keys() - used:
        if not any(scope == s and f".{selector}".endswith(f".{short}") for s, short in said):
            continue
        if selector == "gin.macro":
            close = difflib.get_close_matches(scope, macros, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else f"; macros in use: {', '.join(macros)}"
            raise ConfigError(f"configuration: nothing reads the macro {scope}{hint}")
        name = f"{scope}/{selector}" if scope else selector
        raise ConfigError(
            f"configuration: {name} is bound ({', '.join(bound[scope, selector])}), "
            "but nothing in main.run.jobs uses it: "
            "remove it, or include the file that uses it"
        )


def _references(value: Any) -> list[tuple[str, str]]:
    """(scope, selector as written) of every @reference and %macro inside a bound value."""
    import gin

    if isinstance(value, gin.config.ConfigurableReference):
        return [(value.scoped_selector.rpartition("/")[0], value.selector)]
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return [r for v in value for r in _references(v)] if isinstance(value, (list, tuple)) else []


def planned(files: Sequence[str], bindings: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What gin files bind of the first of their jobs that trains, and of the one that prepares its data (None where
    there is none), with nothing run. Raises ConfigError where no job trains."""
    import gin

    gin.clear_config()
    load(files, bindings)
    jobs: dict[str, dict[str, Any]] = {}
    for name, bound in _jobs():
        jobs.setdefault(name, bound)
    if "train.train" not in jobs:
        raise ConfigError(f"{', '.join(files)}: no job trains; its jobs are {', '.join(jobs) or 'none'}")
    return jobs["train.train"], jobs.get("prepare.prepare") or jobs.get("data.prepare")


def _jobs(resolved: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each job its name and what is bound for it, looked at in its scope; references as they are unless `resolved`.
    Raises ValueError where no jobs are bound."""
    import gin

    for job in gin.query_parameter("main.run.jobs"):
        scope, _, name = job.scoped_selector.rpartition("/")
        with gin.config_scope(scope or None):
            yield name, gin.get_bindings(job.selector, resolve_references=resolved)


def buildable() -> None:
    """What is wrong with a model or its adapters, such as a task map or a pattern that matches no leaf, and files,
    sentences and packages to score with that are not there, are said before the first job runs: preparing data takes
    longer. Raises ValueError as the jobs would. Holds no array, and leaves it to them to start JAX's backend. A
    recogniser is left out: it has numbers of its data in it."""
    import copy

    import gin

    bound_for = gin.config._CONFIG.keys()
    if not any(name.endswith("main.run") for _, name in bound_for):  # no jobs: `run` says so
        return
    if any(name.endswith("data.frontend") for _, name in bound_for):
        return
    wanted = {"train.train": ("model", "adapters"), "evaluate.evaluate": ("valid", "test")}
    wanted["translate.evaluate"] = ("test",)
    for name, bound in _jobs(resolved=False):
        # A copy of a reference is what it refers to; what else is bound may not be there yet.
        given = {key: copy.deepcopy(bound[key]) for key in wanted.get(name, ()) if bound.get(key) is not None}
        if "model" in given:
            from moe_jax import train

            train.check(**given)
        if name == "translate.evaluate" and "test" in given:
            from moe_jax import translate

            translate.check(given.pop("test"))
        for path in [*given.get("valid", ()), *given.get("test", ())]:
            if not Path(path).exists():
                raise ConfigError(f"{path}: no such file, which is to be scored; is MOE_JAX_DATA right?")


# --- command line -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gin_file", action="append", default=[], help="a gin file; may be repeated")
    parser.add_argument("--gin_bindings", action="append", default=[], metavar="NAME=VALUE", help="or --gin.NAME=VALUE")
    parser.add_argument(
        "--profile", type=int, metavar="STEPS", help="trace so many steps of training; --gin.PROFILE=STEPS"
    )
    several = parser.add_argument_group("several hosts", "the same command on each; their devices are one")
    several.add_argument("--distributed", action="store_true", help="join the others: TPU slices and Slurm say where")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="elsewhere: of the first, the same everywhere")
    several.add_argument("--processes", type=int, help="elsewhere: how many there are")
    several.add_argument("--process", type=int, help="elsewhere: which of them this is, from 0")
    what = "seconds after which a host that is silent is lost, and all end (default: 30)"
    several.add_argument("--heartbeat", type=int, default=30, help=what)
    what = "seconds in which all hosts must have come (default: 300)"
    several.add_argument("--join_timeout", type=int, default=300, help=what)
    parser.add_argument("--show_config", action="store_true", help="print what is bound, and stop")


def start(args: argparse.Namespace) -> int:
    """Returns the exit code; every expected failure is one line on stderr. A host that fails ends all others."""
    try:
        _start(args)
    except Stopped as stopped:  # at a step that all hosts agree on: each of them ends by itself
        return report(stopped)
    except (Exception, KeyboardInterrupt) as error:
        return hosts.failed(error, report)
    return 0


def _start(args: argparse.Namespace) -> None:
    if not args.gin_file:
        raise ConfigError("give --gin_file=..., such as runs/quickstart.gin")
    import gin

    gin.clear_config()  # of a run before it in this process
    load(args.gin_file, args.gin_bindings + ([f"PROFILE={args.profile}"] if args.profile else []))
    if args.show_config:
        print(gin.config_str())
        return
    if not args.coordinator and (args.processes is not None or args.process is not None):
        raise ConfigError("--process and --processes are read with --coordinator=HOST:PORT: give it")
    if args.distributed or args.coordinator:
        hosts.join(args.coordinator, args.processes, args.process, args.heartbeat, args.join_timeout)
    buildable()
    gin.get_configurable(run)()


def report(error: BaseException) -> int:
    """One line for what a user can mend (exit code 2) or what may pass by itself (75: the same command again); a
    traceback for what is a bug of ours."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if isinstance(error, Stopped):
        print(hosts.in_one_line(error), file=sys.stderr)
        return error.code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        print(f"{where}{error.strerror or error}", file=sys.stderr)
        return hosts.TRY_AGAIN if error.errno in hosts.TRANSIENT else 2
    an_extra = isinstance(error, ModuleNotFoundError) and "pip install" in str(error)
    if an_extra or isinstance(error, (ValueError, FloatingPointError)):
        print(f"error: {hosts.in_one_line(error)}", file=sys.stderr)
        if os.environ.get("MOE_JAX_TRACEBACK"):
            raise error
        return 2
    raise error


def main(argv: Sequence[str] | None = None) -> int:
    if argv is None:
        launch.command()
    parser = argparse.ArgumentParser(prog="python -m moe_jax.main", description=__doc__.split("\n")[0])
    add_arguments(parser)
    return start(parser.parse_args(launch.rewritten(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    # gin files say `from moe_jax import main`: this must be that module, not a second copy called __main__.
    from moe_jax import main as _main

    sys.exit(_main.main())
