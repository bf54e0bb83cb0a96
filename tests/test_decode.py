"""Search and scoring: the compiled loop equals the obvious one, whatever shares the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import decode
from moe_jax.layers.param import Rngs
from moe_jax.models.corrector import Corrector
from moe_jax.moe import task_routers
from moe_jax.moe.layer import MoeFfn
from moe_jax.types import TokenInfo

VOCAB = 23


def corrector(seed: int = 0, sharp: float = 4.0) -> Corrector:
    """A random MoE corrector whose distributions are sharp enough that rounding decides nothing."""

    def ffn(d, *, rngs):
        return MoeFfn(d, num_experts=3, hidden=16, router=task_routers.TaskMapped, rngs=rngs)

    model = Corrector(d=24, layers=2, vocab=VOCAB, ffn=ffn, rngs=Rngs(params=seed))
    return jax.tree.map(lambda x: x + sharp * 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), model)


LENGTH = 24  # all sequences are padded on the right to one shape: nothing before padding can see it


@jax.jit
def whole_pass(model: Corrector, tokens_1xL: np.ndarray, valid_1xL: np.ndarray) -> jax.Array:
    ones = valid_1xL.astype(jnp.int32)
    x, _, _ = model(tokens_1xL, TokenInfo(0 * ones, valid_1xL, ones, jnp.arange(LENGTH)[None]))
    return jax.nn.log_softmax(model.logits(x)[0].astype(jnp.float32))


def logprobs(model: Corrector, tokens: list[int]) -> np.ndarray:
    """LxV log-probabilities after each token, by one whole pass without caches."""
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(whole_pass(model, padded, np.arange(LENGTH)[None] < len(tokens)))[: len(tokens)]


def greedy(model: Corrector, prompt: list[int], limit: int) -> list[int]:
    """Argmax, the whole prefix again at every step; the last token may only be end-of-text."""
    written: list[int] = []
    while len(written) < limit and decode.EOS not in written:
        row = logprobs(model, prompt + written)[-1].copy()
        row[decode.PAD] = -np.inf
        written.append(decode.EOS if len(written) + 1 == limit else int(row.argmax()))
    return written


PROMPTS = [[5, 9, 4, 8], [7, 3, 3, 12, 20, 6, 11], [2, 2], [13, 14, 15, 16, 17]]


def test_greedy_equals_the_loop_that_recomputes_everything():
    model = corrector()
    found = decode.search(model, decode.prefill(model, PROMPTS), max_new=12)
    for prompt, result in zip(PROMPTS, found, strict=True):
        assert result.tokens == greedy(model, prompt, 12)
        rows = logprobs(model, prompt + result.tokens)
        own = [rows[len(prompt) - 1 + i, t] for i, t in enumerate(result.tokens)]
        np.testing.assert_allclose(result.logprobs, own, atol=1e-4)


def test_a_row_does_not_depend_on_its_batch():
    model = corrector(1)
    together = decode.search(model, decode.prefill(model, PROMPTS), max_new=[3, 9, 12, 6], beams=3)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = decode.search(model, decode.prefill(model, [prompt]), max_new=[3, 9, 12, 6][i], beams=3)
        assert alone.tokens == together[i].tokens
        np.testing.assert_allclose(alone.logprobs, together[i].logprobs, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_more_rows_than_are_computed_at_once(beams):
    """Experts have several turns then, and every row is what it is alone."""
    model, prompts = corrector(6), [[2 + i % 20, 5, 9 + i % 7] for i in range(24)]
    together = decode.search(model, decode.prefill(model, prompts), max_new=8, beams=beams)
    alone = [decode.search(model, decode.prefill(model, [p]), max_new=8, beams=beams)[0] for p in prompts]
    assert [t.tokens for t in together] == [a.tokens for a in alone]
    assert len({tuple(t.tokens) for t in together}) > 5


def test_a_beam_as_wide_as_the_tree_finds_the_best_text():
    """Two tokens and then end-of-text: with 23 beams every prefix of one token survives, so search is exhaustive."""
    model, prompt = corrector(2), [5, 6, 7]
    first = logprobs(model, prompt)[-1]
    scores = {(decode.EOS,): first[decode.EOS]}
    for a in range(2, VOCAB):
        scores[(a, decode.EOS)] = first[a] + logprobs(model, [*prompt, a])[-1][decode.EOS]
    best = max(scores, key=scores.get)
    (found,) = decode.search(model, decode.prefill(model, [prompt]), max_new=2, beams=VOCAB, alpha=0.0)
    assert tuple(found.tokens) == best
    assert found.total == pytest.approx(scores[best], abs=1e-4)


def test_a_wider_beam_is_never_worse_here_and_limits_hold():
    model = corrector(3)
    narrow = decode.search(model, decode.prefill(model, PROMPTS), max_new=10, beams=1, alpha=0.0)
    wide = decode.search(model, decode.prefill(model, PROMPTS), max_new=10, beams=8, alpha=0.0)
    for n, w in zip(narrow, wide, strict=True):
        assert w.total >= n.total - 1e-4
        assert len(w.tokens) <= 10
        assert w.ended


def test_score_is_the_probability_of_a_given_text():
    model = corrector(4)
    rows = [0, 3, 1, 1, 2]  # in any order, some prompts more than once
    texts = [[4, 5, decode.EOS], [6, decode.EOS], [7, 8, 9, 10, decode.EOS], [decode.EOS], [9, 9]]
    for row, text, result in zip(
        rows, texts, decode.score(model, decode.prefill(model, PROMPTS), rows, texts), strict=True
    ):
        prompt = PROMPTS[row]
        after = logprobs(model, prompt + text)
        own = [after[len(prompt) - 1 + i, t] for i, t in enumerate(text)]
        np.testing.assert_allclose(result.logprobs, own, atol=1e-4)


def test_lengths_beyond_the_last_bucket_are_refused():
    with pytest.raises(ValueError, match="longest bucket"):
        decode.bucket(decode.BUCKETS[-1] + 1)


def test_one_program_for_each_bucket_and_no_more():
    """Searches share a program where caches, room and beams agree, whatever the lengths and limits are."""
    model = corrector(5)
    before = decode._search()._cache_size(), decode._prefill()._cache_size()
    read, searched = set(), set()
    for length, limit, beams in [(4, 7, 2), (9, 9, 2), (9, 9, 1), (31, 48, 2), (40, 3, 2), (70, 9, 2), (5, 60, 2)]:
        prompts = [[4] * length, [5, 6], [7] * (length - 1)]
        decode.search(model, decode.prefill(model, prompts), max_new=[limit, 2, 1], beams=beams)
        read.add(decode.bucket(length))
        searched.add((decode.bucket(decode.bucket(length), decode.SLOTS), decode.bucket(limit, decode.ROOMS), beams))
    after = decode._search()._cache_size(), decode._prefill()._cache_size()
    assert (after[0] - before[0], after[1] - before[1]) == (len(searched), len(read)) == (4, 3)
