"""Search and scoring: the compiled loop equals the obvious one, whatever shares the batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import decode, lanes
from moe_jax.layers.param import Rngs
from moe_jax.models.corrector import Corrector
from moe_jax.moe import task_routers
from moe_jax.moe.layer import MoeFfn
from moe_jax.sampling import Sampling, draw, keys
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


def greedy(model: Corrector, prompt: list[int], limit: int, eos: tuple[int, ...] = (decode.EOS,)) -> list[int]:
    """Argmax, the whole prefix again at every step; the last token may only be an end."""
    written: list[int] = []
    while len(written) < limit and not set(eos) & set(written):
        row = logprobs(model, prompt + written)[-1]
        written.append(max(eos, key=lambda e: row[e]) if len(written) + 1 == limit else int(row.argmax()))
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


def test_any_tokens_can_end_a_text_and_token_0_can_be_written():
    """Ends of another tokeniser: 1 ends nothing, and 0 is a token like any other."""
    model, limits, eos = corrector(1), [4, 12, 12, 9], (7, 20)
    read = decode.prefill(model, PROMPTS)
    found = decode.search(model, read, max_new=limits, eos=eos)
    assert [d.tokens for d in found] == [greedy(model, p, n, eos) for p, n in zip(PROMPTS, limits, strict=True)]
    assert all(d.ended and d.tokens[-1] in eos and not set(eos) & set(d.tokens[:-1]) for d in found)
    assert not decode.score(model, read, [0], [[3, 4]], eos)[0].ended
    assert any(0 in d.tokens for d in found)


def test_a_beam_as_wide_as_the_tree_finds_the_best_text_and_each_text_counts_once():
    """Two tokens, of which the first may be one of two ends: with 23 beams every prefix of one token survives, so that
    search is exhaustive; finished beams stay what they are while others go on."""
    model, prompt, eos = corrector(2), [5, 6, 7], (0, 9)
    first = logprobs(model, prompt)[-1]
    scores = {(e,): first[e] for e in eos}
    for a in set(range(VOCAB)) - set(eos):
        row = logprobs(model, [*prompt, a])[-1]
        scores |= {(a, e): first[a] + row[e] for e in eos}
    (found,) = decode.search(model, decode.prefill(model, [prompt]), max_new=2, beams=VOCAB, alpha=0.0, eos=eos)
    assert tuple(found.tokens) == max(scores, key=scores.get)
    assert found.total == pytest.approx(max(scores.values()), abs=1e-4)


def textbook(logp: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probabilities that `sampling` asks for, token by token."""
    p = np.exp(logp / sampling.temperature)
    ranked = np.argsort(-p, kind="stable")[: sampling.top_k or len(p)]
    kept, mass = [], 0.0
    for token in ranked:
        if mass < sampling.top_p * p[ranked].sum():
            kept.append(token)
            mass += p[token]
    return np.where(np.isin(np.arange(len(p)), kept), p, 0) / mass


SAMPLINGS = [Sampling(), Sampling(0.6), Sampling(1.4, top_k=5), Sampling(top_p=0.7), Sampling(0.8, top_k=9, top_p=0.9)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_draws_have_the_probabilities_of_the_textbook(sampling):
    """Pearson's chi-square of 20,000 draws, below the 1 - 1e-4 quantile."""
    logp, draws = jax.nn.log_softmax(2 * jax.random.normal(jax.random.key(3), (VOCAB,))), 20_000
    key_R = keys(0, jnp.arange(draws), 1)
    token = jax.jit(draw, static_argnums=3)(jnp.tile(logp, (draws, 1)), key_R, jnp.zeros(draws, jnp.int32), sampling)
    expected = draws * textbook(np.asarray(logp, np.float64), sampling)
    counts = np.bincount(token, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
    free = often.sum() - 1
    assert chi2 < free + 3.72 * np.sqrt(2 * free) + 9  # Wilson-Hilferty's is a little below


def test_sampled_texts_have_the_probability_that_they_say():
    """Two tokens and then an end: how often each text is drawn, against its own log-probability."""
    model = corrector(2, sharp=8.0)
    read = decode.prefill(model, [[5, 6, 7]] * 32)
    run = partial(decode.sample, model, read, Sampling(), samples=4, record=range(32), max_new=2)
    texts = [d for seed in range(4) for row in run(seed=seed) for d in row]
    assert len(texts) == 512
    share: dict[tuple, list] = {}
    for d in texts:
        share.setdefault(tuple(d.tokens), []).append(d)
    for tokens, drawn in share.items():
        rows = logprobs(model, [5, 6, 7, *tokens])
        own = [rows[2 + i, t] for i, t in enumerate(tokens)]
        np.testing.assert_allclose(drawn[0].logprobs, own, atol=1e-4)
        p = np.exp(own[0])  # the last token can only be an end
        assert abs(len(drawn) / 512 - p) < 4.5 * np.sqrt(p * (1 - p) / 512) + 1e-3


def test_a_sample_depends_on_its_seed_and_record_alone():
    model, sampling = corrector(3), Sampling(1.5, top_k=20)
    draw_of = lambda which, seed=5: decode.sample(  # noqa: E731
        model,
        decode.prefill(model, [PROMPTS[i] for i in which]),
        sampling,
        samples=3,
        seed=seed,
        record=[100 + i for i in which],
        max_new=9,
    )
    together, again = draw_of([0, 1, 2, 3]), draw_of([2, 0, 0, 2])
    tokens = lambda texts: [d.tokens for d in texts]  # noqa: E731
    assert tokens(together[2]) == tokens(again[0]) == tokens(again[3])
    assert tokens(together[0]) == tokens(again[1])
    assert tokens(together[2]) != tokens(draw_of([2] * 4, seed=6)[0])
    assert len({tuple(d.tokens) for d in together[2]}) == 3
    totals = [d.total for d in together[2]]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1e-5), Sampling(top_k=1), Sampling(top_p=1e-6)], ids=str)
def test_the_limits_of_sampling_are_greedy(sampling):
    logp = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (50, VOCAB)))
    token = draw(logp, keys(0, jnp.arange(50), 1), jnp.zeros(50, jnp.int32), sampling)
    np.testing.assert_array_equal(token, logp.argmax(-1))


def test_sampling_at_temperature_0_is_greedy_search():
    read = decode.prefill(model := corrector(), PROMPTS)
    drawn = decode.sample(model, read, Sampling(0.0), record=range(4), max_new=12)
    assert [d.tokens for (d,) in drawn] == [d.tokens for d in decode.search(model, read, max_new=12)]


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
def test_what_is_no_way_of_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match="must not be negative"):
        Sampling(**wrong)


def test_prompts_after_a_shared_prefix_are_as_without_it():
    """Values of search and of scores; with a prefix that ends within a bucket, and prompts of many lengths."""
    model = corrector(4)
    common = [3 + i % 17 for i in range(19)]
    prompts = [[*common, *p] for p in PROMPTS]
    plain, after = (decode.prefill(model, prompts, [2] * 4, p) for p in (None, decode.read_prefix(model, common, 2)))
    np.testing.assert_allclose(after.logp_BxV, plain.logp_BxV, atol=1e-5)
    np.testing.assert_array_equal(after.length_B, plain.length_B)
    texts = [[4, 5, 6, 7, 8, decode.EOS], [9, decode.EOS]] * 2
    of_plain, of_after = (decode.search(model, r, max_new=12, beams=2) for r in (plain, after))
    assert [d.tokens for d in of_plain] == [d.tokens for d in of_after]
    for a, b in zip(*(decode.score(model, r, [3, 1, 0, 2], texts) for r in (plain, after)), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_a_prompt_that_does_not_go_on_after_the_prefix_is_refused():
    model = corrector(4)
    prefix = decode.read_prefix(model, [3, 4, 5, 6], task=1)
    for prompt, task in [([3, 4, 5, 6], 1), ([3, 4, 5, 7, 8], 1), ([3, 4, 5, 6, 7], 2)]:
        with pytest.raises(ValueError, match="after the prefix"):
            decode.prefill(model, [prompt], [task], prefix)


@pytest.mark.parametrize("sampling", [lanes.GREEDY, Sampling(1.2, top_k=15)], ids=["greedy", "sampled"])
def test_lanes_write_what_batches_write(sampling):
    """Three lanes for 13 prompts of three batches, longer together than the ring of slots goes round."""
    model = corrector(6)
    prompts = [[2 + i % 20, 5, 9 + i % 7, *range(2, 2 + i % 9)] for i in range(13)]
    limits = [1 + 5 * i % 17 if i % 4 else 47 for i in range(13)]
    batches, expected = [], []
    for start in range(0, 13, 5):
        chosen = slice(start, min(start + 5, 13))
        padded = (prompts[chosen] + [[4]] * 5)[:5]
        read = decode.prefill(model, padded)
        batches.append(lanes.Waiting(read, limits[chosen], range(start, start + 5)))
        room = (limits[chosen] + [1] * 5)[:5]
        drawn = decode.sample(model, read, sampling, seed=3, record=range(start, start + 5), max_new=room)
        expected.append([d for (d,) in drawn][: len(limits[chosen])])
    found = [texts for _, texts in lanes.run(model, iter(batches), lanes=3, room=48, sampling=sampling, seed=3)]
    assert [[d.tokens for d in batch] for batch in found] == [[d.tokens for d in batch] for batch in expected]
    assert sum(len(d.tokens) for batch in found for d in batch) > 3 * 48
    for a, b in zip((d for batch in found for d in batch), (d for batch in expected for d in batch), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


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
