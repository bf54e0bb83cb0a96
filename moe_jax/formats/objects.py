"""A JSON object as a record: which keys hold what, and how a key is added without touching the rest."""

from __future__ import annotations

import json
import re

from moe_jax.formats.record import Bad, FormatError, Place, Record, check_utf8

# Integers become floats: nothing here needs them, and `int` refuses literals of more than 4300 digits.
DECODER = json.JSONDecoder(parse_int=float)

# The first of these that a record has holds its hypotheses. A NeMo manifest keeps the reference under "text",
# hence "beams" and "pred_text" before it.
HYPOTHESES = ("hypotheses", "nbest", "beams", "input", "pred_text", "hypothesis", "text")
REFERENCES = ("reference", "output")
SPACE = " \t\r\n"  # JSON's own white space; `str.strip` takes more


def parse(value: object, raw: str, place: Place, field: str | None) -> Record | Bad:
    """The record that `raw`, decoded to `value`, stands for.

    Raises FormatError only if it has `field` already: that is the choice of an option, not one bad record.
    """
    if field is not None and isinstance(value, dict) and field in value:
        raise place.error(f"the key {quoted(field)} is there already", "choose another with --field")
    try:
        check_utf8(raw, place)
        if not isinstance(value, dict):
            raise place.error(f"expected a JSON object, found {kind(value)}", 'write {"hypotheses": [...]}')
        return _record(value, raw, place)
    except FormatError as error:
        return Bad(error, raw)


def add_key(raw: str, key: str, value: str) -> str:
    """Object `raw` with one more key, laid out as its first one; every other character stays."""
    body = raw[:-1].rstrip(SPACE)
    lead = re.match(rf"\{{([{SPACE}]*)", raw)
    indent = lead[1] if lead else ""
    comma = "" if body == "{" else "," + (indent or " ")
    return f"{body}{comma}{quoted(key)}: {quoted(value)}{raw[len(body) :]}"


def corrected(record: Record, text: str, field: str) -> str:
    return add_key(record.raw, field, text)


def failed(bad: Bad) -> str:
    """The record with its error under "correction_error", if it is an object that has no such key yet."""
    if not bad.raw.startswith("{") or '"correction_error"' in bad.raw:
        return bad.raw
    try:
        DECODER.decode(bad.raw)
    except (ValueError, RecursionError):
        return bad.raw
    return add_key(bad.raw, "correction_error", f"{bad.error.what}; {bad.error.fix}")


def split_input2(best: str, rest: str) -> list[str]:
    """The n-best list of HyPoradise's other shape: `input1` is the best, `input2` the others in one string.

    The published files end every hypothesis with a full stop that is not part of it, `"a b."` and `"a d.
    a c. "` (records that carry both shapes confirm this). A string of several lines holds one a line.

    Raises ValueError where full stops inside hypotheses make the split a guess.
    """
    if "\n" in rest.strip():
        return [best.strip(), *(line.strip() for line in rest.splitlines() if line.strip())]
    best = best.strip().removesuffix(".")
    if ". " in best:
        raise ValueError('"input2" cannot be split: ". " also stands inside "input1"')
    return [best, *(h.removesuffix(".") for h in rest.strip().split(". ") if h)]


def kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", float: "a number"}
    return names.get(type(value), "null")


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _record(value: dict, raw: str, place: Place) -> Record:
    key = next((k for k in HYPOTHESES if k in value), None)
    if key is None and isinstance(value.get("input1"), str) and isinstance(value.get("input2"), str):
        try:
            hypotheses = split_input2(value["input1"], value["input2"])
        except ValueError as e:
            raise place.error(str(e), 'give the hypotheses as a list under "input"') from None
    else:
        hypotheses = _hypotheses(value.get(key), key or "hypotheses", place)
    references = REFERENCES + (("text",) if key in ("beams", "pred_text") else ())
    reference = next((value[k] for k in references if isinstance(value.get(k), str)), None)
    task = value.get("task")
    if not isinstance(task, str | None):
        raise place.error(f'"task" is {kind(task)}', "give the name of a task family, or leave it out")
    sources = _sources(value.get("sources"), place)
    for text in (*hypotheses, *sources, reference or ""):
        if not encodable(text):
            raise place.error("a lone surrogate escape such as \\ud800 is not text", "write the character itself")
    return Record(place.line, tuple(hypotheses), sources, task, reference, raw, place.number or place.line)


def _hypotheses(given: object, key: str, place: Place) -> list[str]:
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        what = f"no hypotheses: expected a non-empty list under {quoted(key)}"
        raise place.error(what, "add one or remove the record")
    texts = []
    for n, text in enumerate(map(_text, given), 1):
        if not isinstance(text, str):
            raise place.error(f"hypothesis {n} under {quoted(key)} is {kind(text)}", "give each as a string")
        texts.append(text)
    return texts


def _text(hypothesis: object) -> object:
    """Recognisers also write `["text", score]` and `{"text": ..., "score": ...}`."""
    if isinstance(hypothesis, list) and hypothesis:
        return hypothesis[0]
    if isinstance(hypothesis, dict):
        return hypothesis.get("text", hypothesis.get("hypothesis", hypothesis))
    return hypothesis


def _sources(given: object, place: Place) -> tuple[str, ...]:
    """Texts, from a list, a mapping language -> text, one string, or nothing."""
    texts = list(given.values()) if isinstance(given, dict) else [given] if isinstance(given, str) else given or []
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise place.error('"sources" is not a list of strings', "give a list, or an object of language: text")
    return tuple(texts)


def encodable(text: str) -> bool:
    """Whether it can be written: JSON's escapes may say half of a character, a lone surrogate."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)
