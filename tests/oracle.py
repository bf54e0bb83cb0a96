"""The mixture of experts as it is written in a textbook: one position, one choice at a time. Slow, and obviously right."""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def silu(x):
    return x / (1 + np.exp(-x))


def top_k(x, gate, k):
    """(experts, weights) of one position: softmax over its k best logits."""
    logits = x @ gate
    chosen = np.argsort(-logits, kind="stable")[:k]
    return chosen, softmax(logits[chosen])


def expert(x, gate, up, down):
    return (silu(x @ gate) * (x @ up)) @ down


def moe(x_BxLxD, valid_BxL, choose, experts, capacity=None):
    """`choose(b, l)` says (experts, weights); with a capacity an expert takes so many of a row, first come first served."""
    y, dropped = np.zeros_like(x_BxLxD), 0
    for b, row in enumerate(x_BxLxD):
        taken = np.zeros(len(experts), int)
        for l, x in enumerate(row):
            for e, weight in zip(*choose(b, l), strict=True) if valid_BxL[b, l] else ():
                taken[e] += 1
                if capacity is not None and taken[e] > capacity:
                    dropped += 1
                else:
                    y[b, l] += weight * expert(x, *experts[e])
    return y, dropped
