"""`moe-jax merge`: merge models tuned from one base, by flags or by a recipe; with --search, choose options on
validation data first."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable
from typing import Any

from moe_jax.merging import recipe as recipes
from moe_jax.merging.models import MergeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="YAML", help="base, models and how; the flags below go before it")
    parser.add_argument("--base", help="the checkpoint from which the models were tuned")
    parser.add_argument("--models", nargs="+", metavar="PATH", help="what is merged")
    parser.add_argument("--method", help="see --list (default: lors)")
    parser.add_argument("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="of the method, such as rank=16")
    parser.add_argument("--seed", type=int, help="of methods that drop at random (default: 0)")
    parser.add_argument("--align", action="store_true", help="put experts in the order of the base's first")
    parser.add_argument(
        "--experts",
        nargs="+",
        metavar="FAMILY=PATH",
        help="instead of --models: dense models of a family each, which become the experts of one, to be told its task",
    )
    parser.add_argument("--output", help="a safetensors file (of Hugging Face folders a folder); a card goes beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT")
    parser.add_argument("--list", action="store_true", help="print the methods with their options, and stop")
    parser.add_argument("--score", metavar="FOLDER", help="print the loss of base, models and merge on prepared data")
    search = parser.add_argument_group("search", "choose options by the loss on prepared validation data")
    search.add_argument("--search", nargs="+", metavar="OPTION=V1,V2,...", help="values to try, or OPTION=LOW..HIGH")
    search.add_argument("--valid", metavar="FOLDER", help="prepared validation data (never test data)")
    search.add_argument("--trials", type=int, help="of a search over ranges (default: 20); of values the whole grid")


def main(args: argparse.Namespace) -> int:
    from moe_jax import checkpoint
    from moe_jax.merging import search
    from moe_jax.merging.merge import card_path, check_free, merge

    if args.list:
        print(listed())
        return 0
    if args.experts:
        return _experts(args)
    given = recipes.read(args.recipe) if args.recipe else {}
    named = {"base": args.base, "models": args.models, "method": args.method, "seed": args.seed}
    given |= {name: value for name, value in named.items() if value is not None}
    if args.method:  # another one's options are not its own
        given.pop("options", None)
    given |= {"align": True} if args.align else {}
    recipes.parse(given, args.recipe or "merge")
    options = dict(given.get("options") or {}) | _once("--set", map(_option, args.set))
    given |= {"options": options} if options else {}
    parsed = recipes.parse(given, args.recipe or "merge")
    if not args.output:
        raise MergeError("give --output, the file to write")
    inputs = [*parsed.inputs(), *([args.recipe] if args.recipe else [])]
    check_free(args.output, args.overwrite, inputs)  # before a search
    if args.score:  # what cannot be read, before the work
        loss = search.Loss(args.score)
        loss.opened(parsed.base, checkpoint.Source(parsed.base).meta)
    if args.search:
        if not args.valid:
            raise MergeError("--search needs --valid, a folder of prepared validation data")
        space = _once("--search", map(_values, args.search))
        found = search.search(f"{args.output}.search", recipe=given, space=space, valid=args.valid, trials=args.trials)
        print(f"best of {len(found.rows)} trials: {_said(found.options)}, loss {found.loss:.4f}")
        given["options"] = options | found.options
    elif args.valid or args.trials:
        raise MergeError("--valid and --trials are of a search; give --search OPTION=V1,V2,... too")
    card = merge(args.output, **given, overwrite=args.overwrite)
    stage = card["stages"][0]
    how = f"{len(stage['models'])} models merged by {', '.join(stage['methods'])}"
    print(f"{args.output}: {how}; {card_path(args.output)}")
    if args.score:
        paths = (parsed.base, *parsed.stage.paths(), args.output)
        print(_scores({path: loss.by_family(str(checkpoint.Source(path).path)) for path in paths}))
    return 0


def _scores(found: dict[str, dict[str, float]]) -> str:
    """checkpoint -> family -> loss a token, and the mean of families, as a table."""
    families = list(next(iter(found.values())))
    rows = [["", *families, "mean"], ["---", *["--:"] * (len(families) + 1)]]
    for path, losses in found.items():
        rows.append([path, *(f"{x:.4f}" for x in (*losses.values(), sum(losses.values()) / len(losses)))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _experts(args: argparse.Namespace) -> int:
    from moe_jax.merging.experts import to_experts
    from moe_jax.merging.merge import card_path

    others = ("recipe", "base", "models", "method", "set", "align", "search", "valid", "trials", "score")
    if odd := [name for name in others if getattr(args, name)]:
        raise MergeError(f"--experts keeps models apart: there is no --{odd[0]} to it")
    pairs = [text.partition("=") for text in args.experts]
    if odd := ["".join(pair) for pair in pairs if not all(pair)]:
        raise MergeError(f"--experts {odd[0]}: is written FAMILY=PATH, such as asr=runs/asr")
    models = {family: path for family, _, path in pairs}
    if len(models) < len(pairs):
        raise MergeError("--experts: a family has one model; it was given two")
    if not args.output:
        raise MergeError("give --output, the file to write")
    to_experts(args.output, models=models, overwrite=args.overwrite)
    said = f"{len(models)} models as the experts of one, {', '.join(models)}; correct with --task"
    print(f"{args.output}: {said}; {card_path(args.output)}")
    return 0


def listed() -> str:
    """The table of methods."""
    from moe_jax.merging.methods import METHODS

    rows = ["| method | options (* the paper's value, all others are our defaults) | paper |", "| --- | --- | --- |"]
    for name, method in METHODS.items():
        options = {k: "1 / models" if v is None else v for k, v in method.options().items()}
        said = [_said({k: v}) + "*" * (k in method.theirs) for k, v in options.items()]
        rows.append(f"| {name} | {', '.join(said)} | {method.paper} |")
    return "\n".join(rows)


def _said(options: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in options.items())


def _once(flag: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Raises MergeError for a name that is given twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise MergeError(f"{flag}: {name} is given twice; give it once")
        found[name] = value
    return found


def _option(text: str) -> tuple[str, Any]:
    name, sep, value = text.partition("=")
    if not sep or not name:
        raise MergeError(f"--set {text}: is written OPTION=VALUE, such as rank=16")
    return name, _number(value)


def _number(text: str) -> Any:
    """A number where it is one, else the text."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _values(text: str) -> tuple[str, Any]:
    name, sep, values = text.partition("=")
    ends, listed = tuple(map(_number, values.split(".."))), list(map(_number, values.split(",")))
    ranged = len(ends) == 2 and not any(isinstance(end, str) for end in ends)
    if not sep or not name or "" in listed or (".." in values and not ranged):
        raise MergeError(f"--search {text}: is written OPTION=V1,V2,... or OPTION=LOW..HIGH")
    return name, ends if ranged else listed
