"""From what CTC says of each frame to texts: the best path, and prefix beam search frame after frame (NumPy alone)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

BLANK = 0


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """Attributes:
    tokens: ids.
    score: log probability, in nats: CTC's, or after rescoring the weighted sum of all scores.
    frames: of each token the frame where it is likeliest, on the best path.
    """

    tokens: tuple[int, ...]
    score: float
    frames: tuple[int, ...]


def greedy(logp_LxV: np.ndarray) -> Hypothesis:
    """The tokens of the likeliest path."""
    path = logp_LxV.argmax(1)
    best = logp_LxV.max(1)
    tokens, frames = [], []
    for l, token in enumerate(path):
        if token == BLANK:
            continue
        if not l or token != path[l - 1]:
            tokens.append(int(token))
            frames.append(l)
        elif best[l] > best[frames[-1]]:
            frames[-1] = l
    return Hypothesis(tuple(tokens), float(best.sum()), tuple(frames))


class BestPath:
    """`greedy` as a search like `PrefixBeam`: frames may come in any portions."""

    def __init__(self) -> None:
        self.logp: list[np.ndarray] = []

    def advance(self, logp_LxV: np.ndarray) -> None:
        self.logp.append(logp_LxV)

    def nbest(self, number: int | None = None) -> list[Hypothesis]:
        """One, whatever the number."""
        return [greedy(np.concatenate(self.logp)) if self.logp else Hypothesis((), 0.0, ())]


@dataclasses.dataclass(slots=True)
class _Paths:
    """All paths of one prefix: the sums of those that end with a blank and of those that do not, and the best of each
    with the frames of its tokens."""

    blank: float = -math.inf
    token: float = -math.inf
    best_blank: float = -math.inf
    best_token: float = -math.inf
    frames_blank: tuple[int, ...] = ()
    frames_token: tuple[int, ...] = ()
    peak: float = -math.inf  # of the last token, on the best path

    @property
    def total(self) -> float:
        return _add(self.blank, self.token)

    @property
    def best(self) -> tuple[float, tuple[int, ...]]:
        if self.best_blank > self.best_token:
            return self.best_blank, self.frames_blank
        return self.best_token, self.frames_token


class PrefixBeam:
    """CTC prefix beam search (Hannun et al. 2014) as WeNet has it: each frame offers its `beam` best symbols to the
    `beam` best prefixes. Frames may come in any portions."""

    def __init__(self, beam: int = 10):
        self.beam, self.frame = beam, 0
        self.paths: dict[tuple[int, ...], _Paths] = {(): _Paths(blank=0.0, best_blank=0.0)}

    def advance(self, logp_LxV: np.ndarray) -> None:
        """Takes the next frames."""
        for logp_V in logp_LxV:
            offered = np.argpartition(-logp_V, min(self.beam, len(logp_V)) - 1)[: self.beam]
            self._step([(int(symbol), float(logp_V[symbol])) for symbol in offered])
            self.frame += 1

    def _step(self, offered: Sequence[tuple[int, float]]) -> None:
        following: dict[tuple[int, ...], _Paths] = {}
        for prefix, paths in self.paths.items():
            total, (best, frames) = paths.total, paths.best
            last = prefix[-1] if prefix else None
            for symbol, logp in offered:
                if symbol == BLANK:
                    same = following.setdefault(prefix, _Paths())
                    same.blank = _add(same.blank, total + logp)
                    same.best_blank, same.frames_blank = best + logp, frames
                    continue
                longer = following.setdefault((*prefix, symbol), _Paths())
                if symbol != last:
                    self._extend(longer, total + logp, best + logp, logp, frames)
                    continue
                # A token that goes on is the same one, unless after a blank.
                same = following.setdefault(prefix, _Paths())
                same.token = _add(same.token, paths.token + logp)
                if paths.best_token + logp > same.best_token:
                    same.best_token = paths.best_token + logp
                    moved = logp > paths.peak
                    same.peak = logp if moved else paths.peak
                    same.frames_token = (*paths.frames_token[:-1], self.frame) if moved else paths.frames_token
                self._extend(longer, paths.blank + logp, paths.best_blank + logp, logp, paths.frames_blank)
        kept = sorted(following.items(), key=lambda one: -one[1].total)[: self.beam]
        self.paths = dict(kept)

    def _extend(self, paths: _Paths, total: float, best: float, logp: float, frames: tuple[int, ...]) -> None:
        paths.token = _add(paths.token, total)
        if best > paths.best_token:
            paths.best_token, paths.peak, paths.frames_token = best, logp, (*frames, self.frame)

    def nbest(self, number: int | None = None) -> list[Hypothesis]:
        """The best prefixes, the best first."""
        found = [Hypothesis(prefix, paths.total, paths.best[1]) for prefix, paths in self.paths.items()]
        return sorted((h for h in found if h.score > -math.inf), key=lambda h: -h.score)[:number]


def _add(a: float, b: float) -> float:
    """log(exp a + exp b)."""
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))


def rescored(
    hypotheses: Sequence[Hypothesis],
    left: Sequence[float],
    right: Sequence[float],
    *,
    ctc_weight: float,
    reverse_weight: float,
) -> list[Hypothesis]:
    """Attention rescoring (U2++): (1 - reverse) left + reverse right + ctc_weight CTC, the best first."""
    scores = [
        (1 - reverse_weight) * l + reverse_weight * r + ctc_weight * h.score
        for h, l, r in zip(hypotheses, left, right, strict=True)
    ]
    found = [dataclasses.replace(h, score=float(score)) for h, score in zip(hypotheses, scores, strict=True)]
    return sorted(found, key=lambda h: -h.score)
