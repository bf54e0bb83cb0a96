"""Metrics: small sums by hand, properties over random lines, and agreement with jiwer and sacreBLEU."""

import json
import subprocess
import sys

import jiwer
import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.metrics import edits, errors, normalisers, oracles, significance, translation
from moe_jax.metrics.errors import ErrorCounts
from moe_jax.metrics.normalisers import NORMALISERS, RAW, SPEECH, WRITTEN
from moe_jax.metrics.scoring import score, to_markdown

line = st.lists(st.sampled_from(["a", "b", "c", "d", "ee"]), max_size=7).map(" ".join)
n_best = st.lists(line, min_size=1, max_size=4)


def example(reference, *hypotheses, task="asr", source_set="x"):
    return {"task": task, "source_set": source_set, "hypotheses": list(hypotheses), "reference": reference}


def find(rows, metric, name="all"):
    return next(row for row in rows if row["metric"] == metric and row["set"] == name)


# Normalisers


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Hello,  WORLD!", "hello world"),
        (
            "Don’t — the students' rock’n’roll",
            "don't the students rock'n'roll",
        ),  # only inner apostrophes stay
        ("don`t don´t donʼt", "don't don't don't"),
        ("Dit is ŉ hond", "dit is n hond"),
        ("twenty-one", "twenty one"),
        ("…", ""),
        ("col·lecció", "col·lecció"),
        ("ﬁne №5", "fine no5"),  # NFKC
        ("हिन्दी में।", "हिन्दी में"),  # vowel signs and virama are inside words
        ("میکن\u200cم", "میکنم"),  # joiners are not heard
        ("I ❤️ it", "i it"),  # a stranded variation selector is no word
        ("Cafe\u0301", "café"),
    ],
)
def test_speech_keeps_what_is_heard(text, expected):
    assert SPEECH(text) == expected


def test_written_keeps_case_and_punctuation():
    assert WRITTEN(" “Don’t”,\u00a0he  said. ") == '"Don\'t", he said.'
    assert WRITTEN("e\u0301") == "\u00e9"
    assert RAW(" “Don’t” \t x\n") == "“Don’t” x"


@given(st.sampled_from(sorted(NORMALISERS)), st.text(max_size=30))
def test_normalisers_are_idempotent(name, text):
    normaliser = NORMALISERS[name]
    assert normaliser(normaliser(text)) == normaliser(text)


def test_signatures_and_families():
    assert [n.signature for n in NORMALISERS.values()] == ["speech|v1", "written|v1", "raw|v1", "hypo2trans|v1"]
    families = ("asr", "ocr", "mt", "st", "gec", "tn", "itn", "another")
    names = [normalisers.family_normaliser(family).name for family in families]
    assert names == ["speech", *["written"] * 4, "raw", "raw", "written"]


# Error rates


def test_counts_by_hand():
    # b -> x, c dropped, g added: S = D = I = 1 of 6 words, 3 / 6
    counts = errors.wer(["a b c d e f"], ["a x d e f g"])
    assert counts == ErrorCounts(1, 1, 1, 6)
    assert counts.rate == 0.5
    # "abc" -> "adc": one of 3 characters
    assert errors.cer(["abc"], ["adc"]).rate == pytest.approx(1 / 3)


def test_corpus_rate_is_not_the_mean_of_lines():
    # line 1: 1 error of 1; line 2: 0 of 3. Corpus (1 + 0) / (1 + 3) = 1/4; mean (1 + 0) / 2 = 1/2
    lines = errors.line_errors(["a", "b c d"], ["x", "b c d"])
    assert errors.total(lines).rate == 0.25
    assert errors.mean_line_rate(lines) == 0.5


def test_empty_lines():
    assert errors.wer(["", "a b"], ["x", ""]) == ErrorCounts(0, 2, 1, 2)
    assert errors.wer([""], [""]).rate == 0.0
    assert errors.wer([""], ["x y"]).rate == 2.0  # an empty reference counts as one unit
    assert errors.wer([], []).rate == 0.0


def test_a_missing_line_is_an_error():
    with pytest.raises(ValueError, match="2 references but 1 hypotheses"):
        errors.wer(["a", "b"], ["a"])


@given(st.lists(st.tuples(line, line), min_size=1, max_size=5))
def test_counts_agree_with_jiwer_and_add_up(pairs):
    references, hypotheses = [r for r, _ in pairs], [h for _, h in pairs]
    by_words, by_characters = jiwer.process_words, jiwer.process_characters
    for ours, theirs, rate in ((errors.wer, by_words, jiwer.wer), (errors.cer, by_characters, jiwer.cer)):
        counts, output = ours(references, hypotheses), theirs(references, hypotheses)
        assert counts.substitutions == output.substitutions
        assert counts.deletions == output.deletions
        assert counts.insertions == output.insertions
        assert counts.rate == pytest.approx(rate(references, hypotheses))
        apart = [ours([r], [h]) for r, h in pairs]
        assert errors.total(apart) == counts


# Oracles


def test_oracles_by_hand():
    reference = ["the", "cat", "sat", "down"]
    heard = [h.split() for h in ("a cat sat", "the hat sat")]
    # best of (the -> a, down dropped) and (cat -> hat, down dropped): 2 errors of 4
    assert oracles.n_best(reference, heard).errors == 2
    # the, cat and sat stand somewhere in the list; down does not: 1 of 4
    assert oracles.compositional(reference, heard).rate == 0.25


@given(line, n_best)
def test_oracles_bound_each_other(reference, hypotheses):
    units, heard = reference.split(), [h.split() for h in hypotheses]
    best = oracles.n_best(units, heard).errors
    assert oracles.compositional(units, heard).errors <= best <= errors.count(units, heard[0]).errors
    assert best == min(errors.count(units, h).errors for h in heard)


# Edits


def test_tokens_split_words_from_punctuation():
    assert normalisers.tokens("Don't re-use हिन्दी, ok?!") == [
        "Don't",
        "re",
        "-",
        "use",
        "हिन्दी",
        ",",
        "ok",
        "?",
        "!",
    ]


def test_edits_join_only_mixed_runs():
    assert edits.edits(["a", "b", "c", "d"], ["a", "x", "y", "d"]) == {(1, 2, ("x",)), (2, 3, ("y",))}
    assert edits.edits(["alot", "of"], ["a", "lot", "of"]) == {(0, 1, ("a", "lot"))}
    assert edits.edits(["a", "b"], ["a", "x", "b"]) == {(1, 1, ("x",))}
    assert edits.edits(["a"], ["a"]) == set()


def test_f_half_by_hand():
    # wanted: go -> goes, . added; made: go -> goes, cat -> dog. TP 1, FP 1, FN 1: P = R = 1/2, F0.5 = 1/2
    counts = edits.edit_counts("he go to cat", "he goes to dog", "he goes to cat.")
    assert counts == edits.EditCounts(1, 1, 1)
    assert counts.f_half == 0.5
    # TP 1, FP 0, FN 3: P = 1, R = 1/4, F0.5 = 1.25 * 1/4 / (0.25 + 1/4) = 0.625
    assert edits.EditCounts(1, 0, 3).f_half == 0.625
    assert edits.EditCounts().f_half == 1.0  # nothing to do, nothing done
    assert edits.EditCounts(0, 2, 0).f_half == 0.0  # everything done was wrong


@given(line, line)
def test_perfect_and_idle_corrections(source, reference):
    perfect = edits.edit_counts(source, reference, reference)
    assert perfect.f_half == 1.0
    idle = edits.edit_counts(source, source, reference)
    assert (idle.true_positives, idle.false_positives) == (0, 0)
    assert idle.false_negatives == perfect.true_positives


@given(line, line)
def test_edits_rebuild_the_target(source, target):
    tokens = source.split()
    for start, end, replacement in sorted(edits.edits(tokens, target.split()), reverse=True):
        tokens[start:end] = replacement
    assert tokens == target.split()


# Significance


def synthetic(rng, lines, before, after):
    """Lines of 5 to 15 words, each wrong with chance `before`, then `after`: (errors, length) rows."""
    length = rng.integers(5, 16, lines)
    first, corrected = rng.binomial(length, before), rng.binomial(length, after)
    return np.stack([first, length], 1), np.stack([corrected, length], 1)


def test_interval_covers_the_true_change():
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(100):
        low, high = significance.compare(*synthetic(rng, 150, 0.2, 0.15), resamples=400).ci95
        covered += low <= -0.25 <= high  # (0.15 - 0.2) / 0.2
    assert 88 <= covered <= 100  # 95 expected; below 88 has a chance of 0.2 %


def test_p_value_is_uniform_when_nothing_changed_and_small_when_much_did():
    rng = np.random.default_rng(8)
    values = [significance.compare(*synthetic(rng, 60, 0.2, 0.2), resamples=400).p_value for _ in range(100)]
    assert sum(p < 0.05 for p in values) <= 12  # 5 expected; above 12 has a chance of 0.1 %
    assert 0.35 < np.mean(values) < 0.65
    assert significance.compare(*synthetic(rng, 300, 0.3, 0.1)).p_value == pytest.approx(1 / 2001)  # never 0


def test_few_lines_prove_little():
    first, corrected = np.array([[2, 4]] * 3), np.array([[1, 4]] * 3)
    # every line halves its errors, yet 2 of the 2^3 ways to swap are as extreme: p = 1/4
    three = significance.compare(first, corrected)
    assert three.relative_change == -0.5
    assert three.p_value == pytest.approx(0.25, abs=0.04)
    one = significance.compare(first[:1], corrected[:1])
    assert one.p_value == 1.0
    assert np.isnan(one.ci95).all()


def test_relative_change_from_nothing():
    zero, some = np.array([[0, 4], [0, 4]]), np.array([[1, 4], [1, 4]])
    assert significance.compare(zero, some).relative_change == np.inf
    assert significance.compare(zero, zero).relative_change == 0.0
    # a resample may draw only the line that was perfect: the upper end is then unbounded
    uneven = significance.compare(np.array([[0, 4], [1, 4]]), np.array([[1, 4], [1, 4]]))
    assert uneven.relative_change == 1.0
    assert uneven.ci95 == (0.0, np.inf)


def test_chunks_do_not_change_the_bootstrap_weights(monkeypatch):
    first, corrected = synthetic(np.random.default_rng(3), 40, 0.3, 0.2)
    whole = significance.compare(first, corrected, resamples=100, seed=5)
    monkeypatch.setattr(significance, "_CHUNK", 7 * 40)
    assert significance.compare(first, corrected, resamples=100, seed=5).ci95 == whole.ci95
    assert significance.compare(first, corrected, resamples=100, seed=6).ci95 != whole.ci95


def test_clusters_are_drawn_whole_and_groups_count_alike():
    lines = np.array([[1, 10], [2, 10], [4, 20], [0, 5]])
    clusters, groups = np.array([7, 3, 7, 3]), np.array([0, 0, 1, 1])
    found = significance.by_cluster(lines, clusters, groups, 2)
    np.testing.assert_array_equal(found, [[2, 10, 0, 5], [1, 10, 4, 20]])  # clusters in order, the groups side by side
    score = significance.mean_of_groups(significance.error_rate, 2)
    assert score(found.sum(0, keepdims=True)) == pytest.approx([(3 / 20 + 4 / 25) / 2])
    twice = significance.by_cluster(np.repeat(lines, 50, 0), np.repeat(clusters, 50), np.repeat(groups, 50), 2)
    assert significance.compare(twice, twice * [0.5, 1, 0.5, 1], score).p_value >= 0.4  # two clusters say little


def test_compare_refuses_unequal_arrays():
    with pytest.raises(ValueError, match="two equal, non-empty"):
        significance.compare(np.zeros((2, 2)), np.zeros((3, 2)))


# Translation


def test_line_statistics_sum_to_the_corpus_score():
    hypotheses = ["The cat sat on a mat.", "", "It rains today , again"]
    references = ["The cat sat on the mat.", "Nothing", "It is raining again today"]
    for metric, library in ((translation.bleu(), sacrebleu.BLEU()), (translation.chrf(), sacrebleu.CHRF())):
        expected = library.corpus_score(hypotheses, [references]).score / 100
        assert metric.corpus(hypotheses, references) == (expected, metric.signature)
        sums = metric.statistics(hypotheses, references).sum(0, keepdims=True)
        assert metric.score(sums)[0] == pytest.approx(expected, abs=1e-12)
        assert metric.signature == str(library.get_signature())
    assert translation.bleu().signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


# Rows


def test_rows_by_hand():
    examples = [
        example("a b c d", "a b x d", "a b c d", source_set="s"),  # 1 error of 4
        example("e f", "e f", source_set="s"),  # 0 of 2
        example("g h", "i j", "g j", source_set="t"),  # 2 of 2
    ]
    rows = score(examples, ["A, b c d.", "e", "i j"])  # 0 of 4; 1 of 2 (f dropped); 2 of 2
    assert [(row["set"], row["metric"]) for row in rows] == [
        (name, metric) for name in ("all", "s", "t") for metric in ("wer", "cer")
    ]
    row = find(rows, "wer")
    assert row["first_pass"] == 3 / 8  # (1 + 0 + 2) / (4 + 2 + 2)
    assert row["corrected"] == 3 / 8  # (0 + 1 + 2) / 8
    assert row["oracle_nb"] == 1 / 8  # (0 + 0 + 1) / 8: "g j" has one error
    assert row["oracle_cp"] == 1 / 8  # only h was never heard
    assert row["relative_change"] == 0.0
    assert (row["fixed"], row["broken"], row["untouched"]) == (1, 1, 1)
    assert (row["substitutions"], row["deletions"], row["insertions"]) == (2, 1, 0)
    assert (row["lines"], row["normaliser"], row["signature"]) == (3, "speech|v1", None)
    in_s = find(rows, "wer", "s")
    assert (in_s["lines"], in_s["first_pass"], in_s["corrected"]) == (2, 1 / 6, 1 / 6)
    assert in_s["oracle_nb"] == in_s["oracle_cp"] == 0.0  # the error of the third line stays in its own set
    in_t = find(rows, "cer", "t")
    assert in_t["ci95"] == [None, None]  # one line
    assert in_t["oracle_cp"] is None


def test_metrics_of_each_family():
    families = ("asr", "mt", "st", "gec", "itn")
    rows = score([example("A b.", "A c.", task=task) for task in families], ["A b."] * 5)
    found = {task: [row["metric"] for row in rows if (row["task"], row["set"]) == (task, "all")] for task in families}
    assert found == {
        "asr": ["wer", "cer"],
        "mt": ["wer", "cer", "bleu", "chrf"],
        "st": ["wer", "cer", "bleu", "chrf"],
        "gec": ["wer", "cer", "f0.5"],
        "itn": ["wer", "cer"],
    }


def test_gec_row_by_hand():
    examples = [
        example("He goes home.", "He go home.", task="gec"),  # fixed: TP 1
        example("It is fine.", "It is fine.", task="gec"),  # broken: FP 1
        example("We are here.", "We is hear.", task="gec"),  # half: TP 1, FN 1
    ]
    row = find(score(examples, ["He goes home.", "It was fine.", "We are hear."]), "f0.5")
    # TP 2, FP 1, FN 1: P = R = F = 2/3; the first pass does nothing: P = 1, R = 0, F = 0
    assert row["precision"] == row["recall"] == pytest.approx(2 / 3)
    assert row["corrected"] == pytest.approx(2 / 3)
    assert row["first_pass"] == row["oracle_nb"] == 0.0
    assert row["relative_change"] is None
    low, high = row["corrected_ci95"]
    assert 0 <= low < 2 / 3 < high <= 1
    assert (row["fixed"], row["broken"], row["untouched"]) == (2, 1, 0)


def test_translation_oracle_takes_the_better_hypothesis():
    examples = [example("The old man went home late.", "Old man go home.", "The old man went home.", task="mt")]
    rows = score(examples, ["The old man went home late."])
    for metric in ("bleu", "chrf"):
        row = find(rows, metric)
        assert row["first_pass"] < row["oracle_nb"] < row["corrected"]
        assert row["corrected"] == pytest.approx(1.0)
        assert row["relative_change"] > 0 if row["first_pass"] else row["relative_change"] is None
        assert (row["fixed"], row["broken"], row["untouched"]) == (1, 0, 0)
        assert row["normaliser"] is None and row["signature"].startswith("nrefs:1|")


many = st.lists(st.tuples(line, n_best, st.sampled_from(("asr", "mt", "gec"))), min_size=1, max_size=6)


def of_lists(lists):
    return [example(reference, *hypotheses, task=task) for reference, hypotheses, task in lists]


@settings(deadline=None)
@given(many)
def test_correcting_nothing_changes_nothing(lists):
    examples = of_lists(lists)
    for row in score(examples, [e["hypotheses"][0] for e in examples], resamples=20):
        assert row["relative_change"] == 0.0 and row["p_value"] == 1.0
        assert row["untouched"] == row["lines"] and row["first_pass"] == row["corrected"]
        if row["oracle_cp"] is not None:
            assert row["oracle_cp"] <= row["oracle_nb"] <= row["first_pass"]


@settings(deadline=None)
@given(many)
def test_perfect_corrections(lists):
    examples = of_lists(lists)
    rows = score(examples, [e["reference"] for e in examples], resamples=20)
    json.dumps(rows, allow_nan=False)
    for row in rows:
        assert row["broken"] == 0
        if row["metric"] in ("wer", "cer"):
            assert row["corrected"] == 0.0
            assert row["relative_change"] == (-1.0 if row["first_pass"] else 0.0)
        if row["metric"] == "f0.5":
            assert row["corrected"] == 1.0


def test_rows_depend_on_the_seed_alone():
    rng = np.random.default_rng(0)
    examples = [example("a b c d e", " ".join(rng.choice(list("abcde"), 5))) for _ in range(30)]
    corrections = ["a b c d " + rng.choice(list("de")) for _ in range(30)]
    assert score(examples, corrections, seed=1) == score(examples, corrections, seed=1)
    assert score(examples, corrections, seed=1) != score(examples, corrections, seed=2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reference": None}, r"example 1: 'reference' is not a string: None"),
        ({"hypotheses": []}, r"example 1: 'hypotheses' is empty"),
        ({"hypotheses": "a b"}, r"example 1: 'hypotheses' is not a list of strings: 'a b'"),
        ({"hypotheses": ["a", 3]}, r"example 1: 'hypotheses' is not a list of strings"),
        ({"source_set": "all"}, r"example 1: a source set cannot be called 'all'"),
    ],
)
def test_bad_examples_are_named(change, message):
    with pytest.raises(ValueError, match=message) as raised:
        score([example("a", "b"), example("a", "b") | change], ["a", "a"])
    assert "\n" not in str(raised.value)


def test_bad_input_is_refused():
    incomplete = {key: value for key, value in example("a", "b").items() if key != "task"}
    with pytest.raises(ValueError, match="example 0: key 'task' is missing"):
        score([incomplete], ["a"])
    with pytest.raises(ValueError, match="1 examples but 2 corrections"):
        score([example("a", "b")], ["a", "b"])
    with pytest.raises(ValueError, match="no examples to score"):
        score([], [])
    with pytest.raises(ValueError, match="correction 0 is not a string: None"):
        score([example("a", "b")], json.loads("[null]"))


def test_markdown_shows_the_families():
    examples = [
        example("a b c d", "a b x d", task="asr|1"),
        example("a b", "a b", task="gec", source_set="y"),
    ]
    table = to_markdown(score(examples, ["a b c d", "a x"])).splitlines()
    assert len(table) == 2 + 2 + 3  # header, wer and cer, wer and cer and f0.5; no source sets
    assert table[2].startswith(r"| asr\|1 | wer ↓ | 1 | 25.00 | 0.00 | 25.00 | 25.00 | -100.0 % (– to –) | 1.0000 |")
    assert table[2].endswith(r"| 1 / 0 / 0 | written\|v1 |")
    assert table[4].startswith("| gec | wer ↓ | 1 | 0.00 | 50.00 | 0.00 | 0.00 | – |")
    columns = {row.replace(r"\|", "").count("|") for row in table}
    assert columns == {12}


def test_metrics_need_no_jax():
    code = "import sys; from moe_jax.metrics import score; assert not {'jax', 'seqio'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
