"""Prompts in plain text, for pretrained models: what a template writes around hypotheses and sources.

    instruct   an instruction, numbered hypotheses, numbered sources, "Correction:"
    chatml     the same as a user's turn of ChatML, between the special tokens of SmolLM2, Qwen2 and others
    alpaca     the same in the fields of Alpaca, in which GenTranslate (arXiv 2402.06894) asks for translations
    h2t        HyPoradise's fields (Hypo2Trans, arXiv 2309.15701): the best hypothesis, then the others

The fields of h2t are those of the paper's code; its sentence is in our own words, as all other sentences here are, but
for Alpaca's preamble. Other hypotheses stand one a line (there, they are one string), sources in a field of ours.

A layout is the name of a template and switches, such as "chatml+task":

    +task   the instruction of the family, where the task is known; else, and by default, a neutral one, so that a model
            that was trained without the switch sees at inference what it saw in training
    +pad    hypotheses are repeated, in turn, up to `max_hypotheses` (HyPoradise repeats random ones)

Texts cannot leave their field. A line break in one, of any kind, becomes a space, so that it is one line; no marker
stands inside a line but "###", and three number signs in a text become "# ##". The markers of ChatML are special
tokens, which no text can spell (`Tokeniser.encode`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

from moe_jax.text.tokeniser import Tokeniser

NEUTRAL = "The hypotheses below are attempts at one text, the best first. Write the text as it should be."
INSTRUCTIONS = {
    "asr": "The hypotheses below are what a speech recogniser heard, the best first. Write what was said.",
    "ocr": "The hypotheses below are what a program read in a picture of a text, the best first. Write that text.",
    "mt": "The hypotheses below are machine translations of one text, the best first. Write the right translation.",
    "st": "The hypotheses below are translations of what a speaker said, the best first. Write the right translation.",
    "gec": "The hypothesis below is what somebody wrote. Write it without mistakes in spelling and grammar.",
    "tn": "The hypothesis below is a written text. Write it in words, as it is spoken.",
    "itn": "The hypothesis below is a spoken text. Write it with figures and signs, as it is written.",
}
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
H2T = (
    "Here is the best hypothesis of a recogniser, and the others that it considered. Correct the best one, with words "
    "of the others where they fit, and answer with the true text."
)
SWITCHES = ("task", "pad")


class Control(str):
    """A control token of the tokeniser, by its spelling."""


def instruct(instruction: str, hypotheses: Sequence[str], sources: Sequence[str]) -> list[str]:
    return [f"{instruction}\n\n{_lists(hypotheses, sources)}\n\nCorrection:\n"]


def chatml(instruction: str, hypotheses: Sequence[str], sources: Sequence[str]) -> list[str]:
    start, end = Control("<|im_start|>"), Control("<|im_end|>")
    asked = f"user\n{instruction}\n\n{_lists(hypotheses, sources)}"
    return [start, asked, end, "\n", start, "assistant\n"]


def alpaca(instruction: str, hypotheses: Sequence[str], sources: Sequence[str]) -> list[str]:
    given = _lists(hypotheses, sources)
    return [f"{ALPACA}\n\n### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"]


def h2t(instruction: str, hypotheses: Sequence[str], sources: Sequence[str]) -> list[str]:
    fields = {"Best-hypothesis": hypotheses[:1], "Other-hypothesis": hypotheses[1:], "Source": sources}
    shown = [f"### {name}:\n" + "\n".join(texts) for name, texts in fields.items() if texts]
    sentence = H2T if instruction == NEUTRAL else instruction
    return ["\n\n".join([sentence, *shown, "### Response:\n"])]


# (instruction, hypotheses, sources) -> texts and control tokens. Hypotheses are one at least.
TEMPLATES: dict[str, Callable[[str, Sequence[str], Sequence[str]], list[str]]] = {
    template.__name__: template for template in (instruct, chatml, alpaca, h2t)
}


def check(tokeniser: Tokeniser, layout: str) -> None:
    """Raises ValueError, in one line, where `layout` is no template and switches, or not for this tokeniser."""
    name, *switches = layout.split("+")
    if name not in TEMPLATES or not {*switches} <= {*SWITCHES}:
        raise ValueError(
            f"unknown prompt layout {layout!r}; known: aligned, list (both with +task if wanted), tagged, "
            f"tagged+source, untagged, and the templates {', '.join(TEMPLATES)}, each with "
            f"{' and '.join('+' + switch for switch in SWITCHES)} if wanted"
        )
    for part in TEMPLATES[name](NEUTRAL, [""], []):
        if isinstance(part, Control) and tokeniser.control(part) is None:
            others = [other for other in TEMPLATES if other != name]
            raise ValueError(f"layout {layout!r}: the tokeniser has no token {part}; choose {', '.join(others)}")


def fill(layout: str, hypotheses: Sequence[str], count: int) -> list[str]:
    """At most `count` hypotheses: the distinct ones, in order; with +pad, these again and again, `count` in all."""
    distinct = list(dict.fromkeys(hypotheses))[:count]
    return list(itertools.islice(itertools.cycle(distinct), count)) if "pad" in layout.split("+") else distinct


def encode(
    tokeniser: Tokeniser, layout: str, hypotheses: Sequence[str], sources: Sequence[str], family: str | None = None
) -> list[int]:
    """The ids of a prompt.

    Args:
      layout: checked.
      family: the task where it is known; one without an instruction gets the neutral one.
    """
    if not hypotheses:
        raise ValueError("no hypotheses: a prompt needs at least one")
    name, *switches = layout.split("+")
    instruction = INSTRUCTIONS.get((family or "").split("/")[0], NEUTRAL) if "task" in switches else NEUTRAL
    parts = TEMPLATES[name](instruction, [one_line(text) for text in hypotheses], [one_line(text) for text in sources])
    ids = [] if tokeniser.bos is None else [tokeniser.bos]
    for part in parts:
        control = tokeniser.control(part) if isinstance(part, Control) else None
        ids += tokeniser.encode(part) if control is None else [control]
    return ids


def one_line(text: str) -> str:
    """`text` without what could end its field: see above."""
    return re.sub("#(?=##)", "# ", " ".join(text.splitlines()))


def _lists(hypotheses: Sequence[str], sources: Sequence[str]) -> str:
    lists = {"Hypotheses": hypotheses, "Sources": sources}
    return "\n\n".join(
        f"{name}:\n" + "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
        for name, texts in lists.items()
        if texts
    )
