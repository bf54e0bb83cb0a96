"""Off-target rate: how often a translation is in another language than asked, which BLEU and chrF do not tell.

py3langid (the extra `translate`; its model is in the package, nothing is fetched) says the language of a line, of those
given. It is wrong on short lines, so lines of fewer than `SHORTEST` characters are left out, and its share of wrong
answers on the references stands beside the rate: below that, a rate says nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence

SHORTEST = 20  # characters


@dataclasses.dataclass(frozen=True)
class OffTarget:
    """Shares are None where no line is long enough.

    Attributes:
      rate: of outputs, those in another language than asked, of `lines` that are long enough.
      reference_rate: the same of references, which are in the language asked: the detector's own error.
    """

    rate: float | None
    lines: int
    reference_rate: float | None
    reference_lines: int


def off_target(
    outputs: Sequence[str], references: Sequence[str], asked: Sequence[str], languages: Collection[str]
) -> OffTarget:
    """Judges N outputs and their references.

    Args:
      asked: the language of each, ISO 639-1.
      languages: those that a line may be found to be in, the asked ones among them.

    Raises ValueError, in one line, for a language that the detector does not know, or where it is not installed.
    """
    if missing := sorted({*asked} - {*languages}):
        raise ValueError(f"off-target rate: asked for {', '.join(missing)}, not among {', '.join(languages)}")
    detect = _detector(tuple(sorted(languages)))

    def share(texts: Sequence[str]) -> tuple[float | None, int]:
        wrong = [detect(text) != code for text, code in zip(texts, asked, strict=True) if len(text) >= SHORTEST]
        return (sum(wrong) / len(wrong) if wrong else None), len(wrong)

    return OffTarget(*share(outputs), *share(references))


def check(languages: Collection[str]) -> None:
    """Raises ValueError as `off_target` would."""
    _detector(tuple(sorted(languages)))


@functools.lru_cache
def _detector(languages: tuple[str, ...]) -> Callable[[str], str]:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ValueError("the off-target rate needs py3langid: pip install moe_jax[translate]") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    try:
        identifier.set_languages(list(languages))
    except ValueError as error:
        raise ValueError(f"off-target rate: {' '.join(str(error).splitlines())}") from None
    return lambda text: identifier.classify(text)[0]
