"""What the corrector reads: the hypotheses of a recogniser (and source texts, if any) as one token sequence.

    list:     <hyp> mitch cal wrestles <hyp> mitch cal rascals <src> ... <fix>
    aligned:  <hyp> mitch cal <alt> wrestles <or> rascals </alt> <src> ... <fix>

The aligned layout is a confusion network over the words of the first hypothesis, after Mangu, Brill and
Stolcke, "Finding consensus in speech recognition" (2000), but with whole differing spans as alternatives, so
that every hypothesis is still a path through it. One that has little in common with the first follows whole.
The corrected text is written after `<fix>` and ends with end-of-text. Prompts in plain text, which pretrained models
read, are in `templates.py`; `encode_example` takes the names of either, and one more for translation, whose one
hypothesis is the source sentence, and whose tag says the language to write, after Johnson et al. (arXiv 1611.04558):

    tagged:          <2de> where is the cat <fix>
    tagged+source:   <2en> <2de> where is the cat <fix>
    untagged:        where is the cat <fix>      (for a model whose routers or adapters are told the direction)

A prompt says nothing of its task, unless the layout is "aligned+task" or "list+task": then the family's name, where it
is known, stands in front, as instructions do in templates of that switch. Routers do not see it but through the text.

    aligned+task:  asr <hyp> mitch cal <alt> wrestles <or> rascals </alt> <fix>
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rapidfuzz.distance import Levenshtein

from moe_jax.text import templates
from moe_jax.text.tokeniser import ALT, CONTROLS, END_ALT, FIX, HYP, OR, SRC, Tokeniser, Unigram

READ, WRITE = 1, 2  # roles of tokens; 0 is padding
LAYOUTS = ("aligned", "list")
SAYING = {f"{layout}+task": layout for layout in LAYOUTS}
TAGGED = {"untagged": (), "tagged": (1,), "tagged+source": (0, 1)}  # sides of a direction that have a tag
MIN_SIMILARITY = 0.5  # share of words in common, under which alternatives cost more tokens than they save

# The grammar of prompts: which control token may be the last one before each.
_MAY_FOLLOW: dict[int, set[int | None]] = {
    HYP: {None, HYP, END_ALT},
    ALT: {HYP, END_ALT},
    OR: {ALT, OR},
    END_ALT: {OR},
    SRC: {HYP, END_ALT, SRC},
    FIX: {HYP, END_ALT, SRC},
}

Words = tuple[str, ...]
Span = tuple[Words, ...]  # alternatives, distinct; the first hypothesis' own words (or none) come first
Strand = tuple[Span, ...]  # a hypothesis with its alternatives: plain words are a span of one alternative


class Example(NamedTuple):
    """Token ids and, for each, its role: `READ` (the prompt) or `WRITE` (the text to produce)."""

    tokens: list[int]
    roles: list[int]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Strands of words and source texts; `build` makes one, `encode` and `decode` are inverse."""

    strands: tuple[Strand, ...]
    sources: tuple[str, ...] = ()

    @classmethod
    def build(
        cls,
        hypotheses: Sequence[str],
        sources: Sequence[str] = (),
        layout: str = "aligned",
        min_similarity: float = MIN_SIMILARITY,
    ) -> Prompt:
        """Raises ValueError without hypotheses, or for an unknown layout."""
        if layout not in LAYOUTS:
            raise ValueError(f"unknown prompt layout {layout!r}; known: {', '.join(LAYOUTS)}")
        texts = [_words(text) for text in dict.fromkeys(hypotheses)]
        if not texts:
            raise ValueError("no hypotheses: a prompt needs at least one")
        first, *others = texts
        threshold = min_similarity if layout == "aligned" else float("inf")
        near = [words for words in others if Levenshtein.normalized_similarity(first, words) >= threshold]
        far = [words for words in others if words not in near]
        strands = (align(first, near), *(align(words, ()) for words in far))
        return cls(strands, tuple(dict.fromkeys(sources)))

    def encode(self, tokeniser: Unigram) -> list[int]:
        ids: list[int] = []
        for strand in self.strands:
            ids.append(HYP)
            for span in strand:
                ids += _encode_span(tokeniser, span)
        for source in self.sources:
            ids += [SRC, *tokeniser.encode(source)]
        return [*ids, FIX]

    @classmethod
    def decode(cls, tokeniser: Unigram, ids: Iterable[int]) -> Prompt:
        """The prompt of ids up to `<fix>`. Raises ValueError if control tokens stand where they cannot."""
        strands: list[list[list[Words]]] = []
        sources: list[str] = []
        for control, text in _pieces(ids):
            words = tuple(tokeniser.decode_words(text))
            if control == SRC:
                sources.append(tokeniser.decode(text))
            elif control == HYP:
                strands.append([[words]] if words else [])
            elif control == ALT:
                strands[-1].append([words])
            elif control == OR:
                strands[-1][-1].append(words)
            else:
                strands[-1] += [[words]] if words else []
        return cls(tuple(tuple(tuple(span) for span in strand) for strand in strands), tuple(sources))

    @property
    def first(self) -> str:
        """The best hypothesis: the first alternative of each span of the first strand."""
        return " ".join(word for span in self.strands[0] for word in span[0])


def align(first: Words, others: Sequence[Words]) -> Strand:
    """The network of `first` with the words of `others` inline wherever they differ.

    Differing spans of several hypotheses that overlap or touch are one span, so that each hypothesis takes
    one alternative of each span.
    """
    edits = [[op for op in Levenshtein.opcodes(first, other) if op.tag != "equal"] for other in others]
    strand: list[Span] = []
    done = 0
    for start, end in _merge((op.src_start, op.src_end) for ops in edits for op in ops):
        alternatives = [first[start:end]]
        for other, ops in zip(others, edits, strict=True):
            # How far `other` is ahead of `first` before and after the span: no edit touches it from outside.
            before = sum(_growth(op) for op in ops if op.src_end < start)
            after = before + sum(_growth(op) for op in ops if start <= op.src_start and op.src_end <= end)
            alternatives.append(other[start + before : end + after])
        strand += [(first[done:start],)] if done < start else []
        strand.append(tuple(dict.fromkeys(alternatives)))
        done = end
    return (*strand, (first[done:],)) if done < len(first) else tuple(strand)


def check_layout(tokeniser: Tokeniser, layout: str) -> None:
    """Raises ValueError, in one line, for a layout that there is not, or that this tokeniser cannot write."""
    if layout not in (*LAYOUTS, *SAYING, *TAGGED):
        templates.check(tokeniser, layout)
    elif not isinstance(tokeniser, Unigram):
        raise ValueError(
            f"layout {layout!r} is written in control tokens of moe_jax's own tokeniser; "
            f"for a pretrained one choose a template: {', '.join(templates.TEMPLATES)}"
        )
    elif TAGGED.get(layout) and not _tags(tokeniser):
        raise ValueError(
            f"layout {layout!r}: the tokeniser has no tags such as <2de>; "
            "take translate.model, or train one with them (tasks/builders/translation_tokeniser.py)"
        )


def encode_example(
    tokeniser: Tokeniser,
    hypotheses: Sequence[str],
    sources: Sequence[str] = (),
    reference: str | None = None,
    *,
    max_length: int,
    layout: str = "aligned",
    max_hypotheses: int = 5,
    max_sources: int = 0,
    family: str | None = None,
) -> Example | None:
    """The ids that train (with `reference`) or prompt (without) the corrector.

    What does not fit `max_length` loses its last hypotheses, then its last sources; None if the first
    hypothesis alone does not fit, for the caller to count. Without a reference, room for writing the
    correction is kept: 1.3 x the tokens of the first hypothesis + 16.

    Args:
      layout: one of `LAYOUTS`, with "+task" if wanted, one of `TAGGED`, or a template (`templates.py`).
      family: the task where it is known: layouts that say it ask, and those of tags for a direction,
        "translate/en-de".

    Raises ValueError, in one line, for a layout that cannot be written, or a direction without a tag.
    """
    check_layout(tokeniser, layout)
    first, hypotheses = hypotheses[:1], templates.fill(layout, hypotheses, max_hypotheses)
    sources = sources[:max_sources]
    if reference is None:
        target = []
        room = max_length - room_to_write(tokeniser, first[0]) if first else 0
    else:
        target = [*tokeniser.encode(reference), tokeniser.eos[0]]
        room = max_length - len(target)
    fewer_hypotheses = [(n, len(sources)) for n in range(len(hypotheses), 1, -1)]
    fewer_sources = [(1, n) for n in range(len(sources), -1, -1)]
    for kept, kept_sources in fewer_hypotheses + fewer_sources:
        prompt = _prompt(tokeniser, hypotheses[:kept], sources[:kept_sources], layout, family)
        if len(prompt) <= room:
            return Example(prompt + target, [READ] * len(prompt) + [WRITE] * len(target))
    return None


def _prompt(
    tokeniser: Tokeniser, hypotheses: Sequence[str], sources: Sequence[str], layout: str, family: str | None
) -> list[int]:
    if isinstance(tokeniser, Unigram) and layout in TAGGED:
        tags = [_tag(tokeniser, family, side, layout) for side in TAGGED[layout]]
        return [*tags, *tokeniser.encode(hypotheses[0]), FIX]
    if isinstance(tokeniser, Unigram) and layout in SAYING:
        said = tokeniser.encode(family.split("/")[0]) if family else []
        return [*said, *_prompt(tokeniser, hypotheses, sources, SAYING[layout], family)]
    if isinstance(tokeniser, Unigram) and layout in LAYOUTS:
        return Prompt.build(hypotheses, sources, layout).encode(tokeniser)
    return templates.encode(tokeniser, layout, hypotheses, sources, family)


def _tags(tokeniser: Unigram) -> list[str]:
    return [symbol for symbol in tokeniser.symbols if symbol.startswith("<2")]


def _tag(tokeniser: Unigram, family: str | None, side: int, layout: str) -> int:
    """The token of the language that a direction begins (0) or ends in (1)."""
    direction = (family or "").partition("/")[2]
    tag = tokeniser.control(f"<2{direction.partition('-')[::2][side]}>")
    if tag is None:
        raise ValueError(
            f"layout {layout!r}: no tag for task {family!r}; name a direction, such as translate/en-de, "
            f"of languages that the tokeniser has: {', '.join(_tags(tokeniser))}"
        )
    return tag


def room_to_write(tokeniser: Tokeniser, first: str) -> int:
    """Tokens that the correction of `first` may take: 1.3 x its own + 16."""
    return int(1.3 * len(tokeniser.encode(first))) + 16


def _words(text: str) -> Words:
    return tuple(text.split(" ")) if text else ()


def _growth(op) -> int:
    return (op.dest_end - op.dest_start) - (op.src_end - op.src_start)


def _merge(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Unions of spans that overlap or touch, in order."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _encode_span(tokeniser: Unigram, span: Span) -> list[int]:
    if len(span) == 1:
        return tokeniser.encode_words(span[0])
    ids = [ALT, *tokeniser.encode_words(span[0])]
    for words in span[1:]:
        ids += [OR, *tokeniser.encode_words(words)]
    return [*ids, END_ALT]


def _pieces(ids: Iterable[int]) -> list[tuple[int, list[int]]]:
    """Splits ids up to `<fix>` into (control token, ids of text up to the next one)."""
    pieces: list[tuple[int, list[int]]] = []
    last = None
    for i in map(int, ids):
        if i not in _MAY_FOLLOW:
            if not pieces:
                raise ValueError(f"not a prompt: it begins with token {i}, not with <hyp>")
            pieces[-1][1].append(i)
        elif last not in _MAY_FOLLOW[i]:
            raise ValueError(f"not a prompt: misplaced {CONTROLS[i - HYP]}")
        elif i == FIX:
            return pieces
        else:
            pieces.append((i, []))
            last = i
    raise ValueError("not a prompt: no <fix>")
