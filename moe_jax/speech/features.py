"""Samples -> log-mel filterbanks as Kaldi defines them, in NumPy.

25 ms povey windows every 10 ms, without the snipped edges, without dither, DC removed, pre-emphasis 0.97, a power
spectrum over the next power of two, triangles that are even in mel from 20 Hz to half the rate, the natural logarithm.
Samples are floats in the range of 16-bit integers, as Kaldi and WeNet have them. Bins are those of `kaldi-native-fbank`
to 1e-3 (`tests/test_features.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from fractions import Fraction

import numpy as np

FRAME, SHIFT = 0.025, 0.010  # seconds
MELS = 80
LOWEST = 20.0  # Hz
BLOCK = 4096  # frames whose spectra are held at once
FLOOR = float(np.finfo(np.float32).eps)  # of a bin's energy, as in Kaldi


def sizes(rate: int) -> tuple[int, int]:
    """(samples in a frame, samples from one frame to the next)."""
    return int(rate * FRAME), int(rate * SHIFT)


def num_frames(samples: int, rate: int) -> int:
    """How many whole frames lie in so many samples."""
    frame, shift = sizes(rate)
    return max(0, 1 + (samples - frame) // shift)


def fbank(samples_S: np.ndarray, rate: int, mels: int = MELS) -> np.ndarray:
    """Log-mel features [num_frames, mels], float32, of samples in the range of 16-bit integers."""
    frame, shift = sizes(rate)
    total = num_frames(len(samples_S), rate)
    if not total:
        return np.zeros((0, mels), np.float32)
    frames_TxS = np.lib.stride_tricks.sliding_window_view(np.asarray(samples_S, np.float32), frame)[::shift]
    window, banks = _window(frame), _mel_banks(rate, mels)
    return np.concatenate([_log_mel(frames_TxS[i : i + BLOCK], window, banks) for i in range(0, total, BLOCK)])


def _log_mel(frames_TxS: np.ndarray, window_S: np.ndarray, banks_FxC: np.ndarray) -> np.ndarray:
    x = frames_TxS - frames_TxS.mean(axis=1, keepdims=True)
    x = x - 0.97 * np.concatenate([x[:, :1], x[:, :-1]], axis=1)
    spectrum = np.fft.rfft(x * window_S, n=2 * len(banks_FxC), axis=1)[:, :-1]  # no triangle reaches half the rate
    power = spectrum.real**2 + spectrum.imag**2
    return np.log(np.maximum(power @ banks_FxC, FLOOR)).astype(np.float32)


@functools.cache
def _window(frame: int) -> np.ndarray:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(frame) / (frame - 1))) ** 0.85


@functools.cache
def _mel_banks(rate: int, mels: int) -> np.ndarray:
    """[half the FFT, mels]: triangles in mel over the middles of the FFT's bins."""
    bins = (1 << (sizes(rate)[0] - 1).bit_length()) // 2
    mel = lambda hertz: 1127.0 * np.log(1.0 + np.asarray(hertz) / 700.0)  # noqa: E731
    edges = np.linspace(mel(LOWEST), mel(rate / 2), mels + 2)
    at = mel(np.arange(bins) * rate / 2 / bins)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    return np.maximum(np.minimum((at - left) / (centre - left), (right - at) / (right - centre)), 0)


def speed(samples_S: np.ndarray, factor: float) -> np.ndarray:
    """Spoken `factor` times as fast, and as high (Ko et al. 2015)."""
    by = Fraction(factor).limit_denominator(100)
    if by == 1:
        return samples_S
    from scipy.signal import resample_poly  # takes a second to import

    return resample_poly(samples_S, by.denominator, by.numerator).astype(np.float32)


# --- normalisation ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Moments:
    """Sums over frames, of which global mean and variance are made (CMVN)."""

    count: int = 0
    total_C: np.ndarray | float = 0.0
    square_C: np.ndarray | float = 0.0

    def add(self, features_TxC: np.ndarray) -> None:
        x = features_TxC.astype(np.float64)
        self.count, self.total_C, self.square_C = (
            self.count + len(x),
            self.total_C + x.sum(0),
            self.square_C + (x * x).sum(0),
        )

    def mean_and_scale(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean_C, 1 / standard deviation); a feature that never changes is only centred."""
        mean = np.asarray(self.total_C) / self.count
        variance = np.asarray(self.square_C) / self.count - mean * mean
        return mean, np.where(variance > 1e-8, 1 / np.sqrt(np.maximum(variance, 1e-8)), 1.0)
