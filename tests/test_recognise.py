"""Decoding: CTC's sums by brute force, two passes, and streams that say what the whole says."""

import dataclasses
import io
import itertools
import json
import os
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import cli, describe, formats, main, pipeline, tree
from moe_jax.checkpoint import CheckpointError, write_safetensors
from moe_jax.decode import Decoded
from moe_jax.formats.audio import SCALE, say_once
from moe_jax.layers.ffn import PlainFfn
from moe_jax.layers.param import Rngs
from moe_jax.layers.subsample import length
from moe_jax.metrics import errors
from moe_jax.metrics.normalisers import family_normaliser
from moe_jax.models.conformer import Conformer
from moe_jax.moe.experts import Plain
from moe_jax.moe.layer import MoeFfn
from moe_jax.speech import decode, evaluate, features, transcribe
from moe_jax.speech.decode import Hypothesis, PrefixBeam, greedy, rescored
from moe_jax.speech.recognise import WAYS, Recogniser, Text
from moe_jax.text.symbols import Symbols

RATE, MELS = 8000, 20
SYMBOLS = Symbols.of(["abcdef"], "characters")


def logp(L: int, V: int, seed: int = 0) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(2 * np.random.default_rng(seed).normal(size=(L, V))))


def by_brute_force(logp_LxV) -> dict[tuple[int, ...], tuple[float, float]]:
    """tokens -> (sum over all paths, best path)."""
    found: dict = {}
    L, V = logp_LxV.shape
    for path in itertools.product(range(V), repeat=L):
        tokens = tuple(k for k, _ in itertools.groupby(path) if k)
        p = sum(logp_LxV[l, k] for l, k in enumerate(path))
        total, best = found.get(tokens, (-np.inf, -np.inf))
        found[tokens] = (np.logaddexp(total, p), max(best, p))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_prefix_beam_search_sums_all_paths(seed):
    scores = logp(5, 4, seed)
    expected = by_brute_force(scores)
    search = PrefixBeam(10_000)
    search.advance(scores)
    found = {h.tokens: h.score for h in search.nbest()}
    assert set(found) == set(expected)
    for tokens, score in found.items():
        np.testing.assert_allclose(score, expected[tokens][0], atol=1e-6)
        np.testing.assert_allclose(search.paths[tokens].best[0], expected[tokens][1], atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(2, 7), st.integers(1, 6))
def test_an_n_best_is_sorted_and_without_doubles(seed, L, V, beam):
    scores = logp(L, V, seed)
    search = PrefixBeam(beam)
    for part in np.array_split(scores, [L // 3, L // 2]):  # in portions
        search.advance(part)
    found = search.nbest()
    once = PrefixBeam(beam)
    once.advance(scores)
    assert found == once.nbest()
    assert 1 <= len(found) <= beam and len({h.tokens for h in found}) == len(found)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    for h in found:
        assert len(h.frames) == len(h.tokens) and list(h.frames) == sorted(set(h.frames))
        assert all(0 <= frame < L for frame in h.frames)


def test_tokens_are_where_they_are_likeliest():
    scores = np.full((8, 3), -9.0)
    likely = [(0, -0.1), (1, -0.5), (1, -0.1), (1, -0.7), (0, -0.1), (1, -0.2), (2, -0.3), (2, -0.1)]
    for l, (k, p) in enumerate(likely):
        scores[l, k] = p
    search = PrefixBeam(5)
    search.advance(scores)
    for h in (greedy(scores), search.nbest()[0]):
        assert h.tokens == (1, 1, 2) and h.frames == (2, 5, 7)


def test_rescoring_is_a_weighted_sum():
    first = [Hypothesis((3,), -1.0, (0,)), Hypothesis((4,), -2.0, (0,))]
    found = rescored(first, [-5.0, -1.0], [-2.0, -2.0], ctc_weight=0.3, reverse_weight=0.5)
    assert [h.tokens for h in found] == [(4,), (3,)]
    np.testing.assert_allclose([h.score for h in found], [-0.5 - 1.0 - 0.6, -2.5 - 1.0 - 0.3])


# --- a model at work ----------------------------------------------------------------------------------------


def model(**more) -> Conformer:
    frontend = {"rate": RATE, "mels": MELS, "mean": [12.0] * MELS, "scale": [0.5] * MELS}
    args = {"d": 16, "layers": 2, "decoder_layers": 1, "heads": 2, "width": 4, "ffn": partial(PlainFfn, hidden=24)}
    made = Conformer(**args | more, frontend=frontend, vocab=SYMBOLS.vocab_size, rngs=Rngs(params=0))
    table = tree.flatten(made)
    table["ctc"] = 4 * table["ctc"]
    table["ctc_bias"] = table["ctc_bias"].at[:3].set(jnp.array([1.5, -30, -30]))
    table["left/output_bias"] = table["left/output_bias"].at[:3].set(jnp.array([-30, 0, -30]))
    return tree.unflatten(made, table)


@pytest.fixture(scope="module")
def made():
    return model()


@pytest.fixture(scope="module")
def mixture():
    return model(ffn=partial(MoeFfn, num_experts=4, hidden=24, experts=Plain))


def audio(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE))
    loud = np.repeat(rng.uniform(100, 4000, len(t) // 400 + 1), 400)[: len(t)]
    return (loud * rng.normal(size=len(t))).astype(np.float32)


def portions(samples: np.ndarray, size: int):
    return (samples[i : i + size] for i in range(0, len(samples), size))


@pytest.mark.parametrize(
    ("of", "chunk", "left", "size"),
    [
        ("made", 4, -1, 1000),
        ("made", 4, 2, 333),
        ("made", 7, -1, 10**6),
        ("mixture", 4, 2, 333),
        ("mixture", 16, -1, 1000),
    ],
)
def test_a_stream_ends_with_what_the_whole_says(of, chunk, left, size, request):
    by = Recogniser(request.getfixturevalue(of), SYMBOLS, chunk=chunk, left=left, pause=100.0, beam=4)
    samples = audio(2.1)
    whole = by(samples)
    updates = list(by.stream(portions(samples, size)))
    assert [u.final for u in updates] == [False] * (len(updates) - 1) + [True]
    assert updates[-1].end == pytest.approx(2.1) and len(updates) == -(-len(samples) // size) + 1
    assert [t.text for t in updates[-1].texts] == [t.text for t in whole] and len(whole) > 1
    np.testing.assert_allclose([t.score for t in updates[-1].texts], [t.score for t in whole], atol=1e-3)
    assert updates[-1].texts[0].times == whole[0].times and len(whole[0].text) > 1
    if len(updates) > 2:
        assert {u.texts[0].text for u in updates} != {updates[-1].texts[0].text}, "partial results come and change"


@pytest.mark.parametrize("of", ["made", "mixture"])
def test_two_passes_are_those_of_the_formula(of, request):
    made = request.getfixturevalue(of)
    by, samples = Recogniser(made, SYMBOLS, beam=4), audio(1.0)
    first, second = dataclasses.replace(by, way="ctc")(samples), by(samples)
    assert {t.text for t in first} == {t.text for t in second}
    x, _ = by.heard(samples)
    score = jax.jit(lambda tokens: made.score(tokens, x[None], jnp.ones((1, len(x)), bool)))
    for text in second:
        ids = SYMBOLS.encode(text.text)
        left, right = score(jnp.asarray([ids + [0] * (9 - len(ids))]))
        ctc = next(t.score for t in first if t.text == text.text)
        np.testing.assert_allclose(text.score, 0.5 * left[0] + 0.5 * right[0] + 0.3 * ctc, rtol=1e-4)


def test_a_decoder_that_never_learnt_has_no_say(made):
    untaught = model(reverse_weight=0.0)
    x = np.random.default_rng(0).normal(size=(9, 16)).astype(np.float32)
    (left,), (right,) = untaught.score(jnp.array([[3, 4]]), x[None], jnp.ones((1, len(x)), bool))
    for weights, reverse in ({}, 0.0), ({"reverse_weight": 0.2}, 0.2):
        by = Recogniser(untaught, SYMBOLS, beam=4, **weights)
        (found,) = by.rescored([Hypothesis((3, 4), -1.0, (0, 1))], x)
        assert found.score == pytest.approx(float((1 - reverse) * left + reverse * right) - 0.3, abs=1e-4)
    for weights in ({"ctc_weight": -1.0}, {"ctc_weight": np.nan}, {"reverse_weight": 1.5}):
        with pytest.raises(ValueError, match=r"must be 0 or more, and .* from 0 to 1"):
            Recogniser(made, SYMBOLS, **weights)


def test_the_decoder_searches_for_what_it_scores_highest(made):
    """Attention alone: scores are the decoder's own, and no text of CTC's has a better one."""
    by, samples = Recogniser(made, SYMBOLS, way="attention", beam=6), audio(0.5)
    found = by(samples)
    assert found and [t.score for t in found] == sorted((t.score for t in found), reverse=True)
    x, _ = by.heard(samples)
    others = [t.text for t in Recogniser(made, SYMBOLS, beam=6)(samples)]
    texts = [t.text for t in found if len(t.text) < len(x)] + others
    ids = np.zeros((len(texts), 16), np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = SYMBOLS.encode(text)
    many = jnp.broadcast_to(x[None], (len(texts), *x.shape))
    left, _ = made.score(jnp.asarray(ids), many, jnp.ones(many.shape[:2], bool))
    scores = dict(zip(texts, left.tolist(), strict=True))
    for one in found:
        if len(one.text) < len(x):
            assert one.score == pytest.approx(scores[one.text], abs=1e-3)
    assert max(scores[text] for text in others) <= found[0].score + 1e-3


def test_ways_to_decode(made):
    samples = audio(1.0)
    by = {way: Recogniser(made, SYMBOLS, way=way, beam=4) for way in WAYS}
    _, logp = by["ctc"].heard(samples)
    assert by["greedy"](samples)[0].text == SYMBOLS.decode(decode.greedy(logp).tokens)
    assert {t.text for t in by["ctc"](samples)} == {t.text for t in by["rescored"](samples)}
    with pytest.raises(ValueError, match="unknown way to decode 'best'; known: greedy, ctc, attention, rescored"):
        Recogniser(made, SYMBOLS, way="best")
    streamed = [list(by[way].stream([samples]))[-1].texts for way in ("ctc", "rescored")]
    assert {t.text for t in streamed[0]} == {t.text for t in streamed[1]} and streamed[0] != streamed[1]
    greedy = dataclasses.replace(by["greedy"], chunk=4)
    (whole,), *_, (streamed,) = greedy(samples), *(u.texts for u in greedy.stream(portions(samples, 800)))
    assert streamed.text == whole.text and streamed.times == whole.times
    assert streamed.score == pytest.approx(whole.score, abs=1e-3)


def test_a_long_stream_is_cut_and_holds_no_more(made):
    by = Recogniser(made, SYMBOLS, chunk=4, pause=100.0, longest=1.6, beam=2)
    samples = audio(4.0)
    updates = list(by.stream(portions(samples, 800)))
    finals = [u for u in updates if u.final]
    assert len(finals) == 3  # twice 40 frames of 40 ms, and what is left
    times = [t for u in finals for t in u.texts[0].times]
    assert times == sorted(times) and times[-1] > 3.0
    one = Recogniser(made, SYMBOLS, chunk=4, beam=2)(samples[: 40 * 320 + 3 * 80 + 120])
    assert finals[0].texts[0].text == one[0].text


def test_a_pause_ends_a_text(made):
    table = tree.flatten(made)
    quiet = tree.unflatten(made, table | {"ctc_bias": table["ctc_bias"].at[0].set(-2.0)})
    by = Recogniser(quiet, SYMBOLS, chunk=2, pause=0.0, beam=2)
    finals = [u for u in by.stream(portions(audio(1.0), 400)) if u.final]
    assert len(finals) > 3 and all(u.texts for u in finals[:-1])


@pytest.mark.parametrize(("way", "other"), [("ctc", 5), ("rescored", 6)])
def test_nobody_waits_for_a_compiler_while_it_streams(made, way, other):
    by = Recogniser(made, SYMBOLS, way=way, chunk=4, pause=9.0, longest=1.6, beam=3)
    by.compile()
    compiled: list[str] = []

    def note(event: str, duration: float, **_: object) -> None:
        compiled.extend([event] if event.endswith("backend_compile_duration") else [])

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        assert sum(u.final for u in by.stream(portions(audio(4.0), 800))) == 3
        rng = np.random.default_rng(0)
        for frames in (1, 15, 33, 40):
            x = rng.normal(size=(frames, 16)).astype(np.float32)
            for tokens in (0, frames // 2, frames):
                by._second([Hypothesis((3,) * tokens, 0.0, ())], x)
        assert not compiled
        list(dataclasses.replace(by, chunk=other).stream([audio(1.0)]))
        assert compiled, "what was not compiled before shows here"
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize("samples", [0, 100, 679])
def test_too_little_audio_says_nothing(made, samples):
    by = Recogniser(made, SYMBOLS, chunk=4)
    assert length(features.num_frames(samples, RATE)) == 0
    assert by(np.zeros(samples, np.float32)) == []
    assert [u.texts for u in by.stream([np.zeros(samples, np.float32)])][-1] == []


def test_texts_that_pieces_spell_twice_come_once(made):
    class Lower(Symbols):
        def decode(self, ids):
            return super().decode(ids).replace("b", "a")

    by = Recogniser(made, Lower(SYMBOLS.model), beam=8)
    texts = by(audio(1.0))
    assert len({t.text for t in texts}) == len(texts) >= 1


def test_texts_that_differ_in_spaces_that_part_no_words_come_once(made):
    by = Recogniser(made, spaced := Symbols.of([" ab"], "characters"))
    a, space = spaced.encode("a")[0], spaced.encode(" ")[0]
    h = lambda score, *tokens: Hypothesis(tokens, score, tuple(range(len(tokens))))  # noqa: E731
    given = [h(-1, space, a, space, space, a, space), h(-2, a, space, a), h(-3, space), h(-4), h(-5, a, a)]
    assert [(t.text, t.score) for t in by._texts(given)] == [("a a", -1), ("", -3), ("aa", -5)]
    np.testing.assert_allclose(by._texts(given)[0].times, [0.04, 0.08, 0.16])
    assert by._texts([Hypothesis((a, space), -1, ())])[0] == Text("a", -1, ())


def test_texts_of_attention_that_never_end_come_where_there_are_no_others(made, monkeypatch):
    by, samples = Recogniser(made, SYMBOLS, way="attention", beam=2), audio(0.5)
    of = lambda token, score, ended: Decoded([token, 1] if ended else [token], [score], ended)  # noqa: E731
    for found, texts in (
        ([of(3, -1.0, False), of(4, -2.0, True)], ["b"]),
        ([of(3, -1.0, False), of(4, -np.inf, True)], ["a"]),
    ):
        monkeypatch.setattr("moe_jax.decode.nbest", lambda *a, found=found, **k: [found])
        assert [t.text for t in by(samples)] == texts


def test_a_checkpoint_says_how_to_hear(made, tmp_path):
    meta = {"model": describe.describe(made), **SYMBOLS.meta(), "families": {"asr": 1}, "step": 1}
    meta |= {"layout": "aligned", "length": 9}
    pipeline.export(tmp_path / "model.safetensors", tree.flatten(made), json.loads(json.dumps(meta)))
    by = Recogniser.load(tmp_path, beam=4)
    assert (by.rate, by.mels, by.beam) == (RATE, MELS, 4)
    samples = audio(1.0)
    assert by(samples) == Recogniser(made, SYMBOLS, beam=4)(samples)
    with pytest.raises(CheckpointError, match="no such file"):
        Recogniser.load(tmp_path / "none")
    other = tmp_path / "other.safetensors"
    for change, said in (
        ({"model": {"class": "Corrector", "args": {}}}, "it is a Corrector"),
        ({"model": {"class": "Conformer", "args": {"d": 16}}}, "cannot recognise"),
        ({"model": meta["model"] | {"args": meta["model"]["args"] | {"width": 5}}}, "arrays are not those"),
    ):
        write_safetensors(other, tree.flatten(made), meta | change)
        with pytest.raises(CheckpointError, match=said):
            Recogniser.load(other)


# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    """A run folder, and beside it recordings and a list of them."""
    sf = pytest.importorskip("soundfile", reason="reading audio needs soundfile (pip install '.[speech]')")
    folder = tmp_path_factory.mktemp("run")
    meta = {"model": describe.describe(made), **SYMBOLS.meta(), "families": {"asr": 1}, "layout": "aligned"}
    pipeline.export(folder / "model.safetensors", tree.flatten(made), {**meta, "length": 9, "step": 1})
    for i in range(3):
        sf.write(folder / f"{i}.wav", audio(1.0, i) / SCALE, RATE, subtype="FLOAT")
    lines = [{"audio": f"{i}.wav", "text": "abc", "split": "test"} for i in (0, 1, 7)]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def brief(monkeypatch):
    """A recogniser whose texts end after 1.28 s: a stream needs few programs."""
    load = Recogniser.load
    monkeypatch.setattr(Recogniser, "load", lambda *a, **k: dataclasses.replace(load(*a, **k), longest=1.28))


@pytest.mark.parametrize("how", [[], ["--stream", "--chunk=16"]])
def test_transcripts_are_what_correct_reads(run, brief, tmp_path, capsys, how):
    output = tmp_path / "hyps.json"
    files = [str(run / f"{i}.wav") for i in range(2)]
    assert cli.entry(["transcribe", *files, f"--checkpoint={run}", "--nbest=3", f"--output={output}", *how]) == 0
    records = list(formats.read(output))
    said = json.loads(output.read_text())
    assert [r["audio"] for r in said] == files and len(records) == 2
    for record, one in zip(records, said, strict=True):
        assert list(record.hypotheses) == one["input"] and 1 <= len(set(one["input"])) == len(one["input"]) <= 3
        assert one["scores"] == sorted(one["scores"], reverse=True) and len(one["times"]) == len(one["input"][0])
    out = capsys.readouterr()
    assert out.out.splitlines() == [f"{one['audio']}: {one['input'][0]}" for one in said]
    times = re.findall(r"real-time factor \d\.\d+, a portion's p50 (\S+) s, p95 (\S+) s, max (\S+) s\n", out.err)
    assert len(times) == (2 if how else 0)
    for found in times:
        assert 0 < float(found[0]) <= float(found[1]) <= float(found[2])


def test_a_correction_is_of_what_was_heard(run, tmp_path):
    """From audio to corrected text by the commands alone; also where nothing was heard."""
    import soundfile as sf

    sf.write(tmp_path / "short.wav", audio(0.02) / SCALE, RATE)
    files, heard = [str(run / "0.wav"), str(tmp_path / "short.wav"), str(run / "1.wav")], str(tmp_path / "hyps.json")
    assert cli.entry(["transcribe", *files, f"--checkpoint={run}", "--nbest=3", f"--output={heard}"]) == 0
    given = [f"--checkpoint={tiny.exported(tmp_path)}", f"--input={heard}", f"--output={tmp_path}/out.json"]
    assert cli.entry(["correct", *given]) == 0
    said, out = (json.loads(Path(path).read_text()) for path in (heard, tmp_path / "out.json"))
    assert [{k: v for k, v in row.items() if k != "corrected"} for row in out] == said
    assert [row["audio"] for row in out] == files and all(isinstance(row["corrected"], str) for row in out)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_partial_texts_show_wherever_they_are_asked_for(run, brief, tmp_path, monkeypatch):
    given = ["transcribe", str(run / "0.wav"), f"--checkpoint={run}", "--stream", "--chunk=4"]
    said = []
    for stderr in (io.StringIO(), Terminal()):
        monkeypatch.setattr("sys.stderr", stderr)
        assert cli.entry(given) == 0
        said.append(stderr.getvalue())
    piped = [line.split(" s  ")[1] for line in said[0].splitlines()[1:-1]]
    assert len(piped) > 2 and all(a != b for a, b in itertools.pairwise(piped[:-1])) and "\r" not in said[0]
    shown = said[1].split("\r\033[K")[1:]
    assert [line.split(" s  ")[1].split("\n")[0] for line in shown] == piped
    assert [line.count("\n") for line in shown] == [0] * (len(shown) - 1) + [2]


def test_what_cannot_be_read_is_one_line_and_the_rest_is_written(run, tmp_path, capsys):
    output = tmp_path / "hyps.json"
    files = [str(run / name) for name in ("0.wav", "list.jsonl", "1.wav")]
    assert cli.entry(["transcribe", *files, f"--checkpoint={run}", f"--output={output}"]) == 1
    said = capsys.readouterr()
    assert "list.jsonl: not audio that can be read" in said.err and "1 of 3 could not be read" in said.err
    assert [r["audio"] for r in json.loads(output.read_text())] == [files[0], files[2]]
    assert len(said.out.splitlines()) == 2
    assert cli.entry(["transcribe", files[1], f"--checkpoint={run}", f"--output={tmp_path}/none.json"]) == 1
    assert not (tmp_path / "none.json").exists()


def test_no_recording_is_replaced_by_what_was_heard_in_it(run, tmp_path, capsys):
    mine = tmp_path / "mine.wav"
    shutil.copy(run / "0.wav", mine)
    (tmp_path / "link.json").symlink_to(mine)
    for output in (mine, tmp_path / "link.json"):
        assert cli.entry(["transcribe", str(mine), "--checkpoint=none", f"--output={output}", "--overwrite"]) == 2
        assert "would overwrite the input" in capsys.readouterr().err
    assert mine.read_bytes() == (run / "0.wav").read_bytes()


def test_what_is_too_short_to_be_heard_is_said(run, tmp_path, capsys):
    import soundfile as sf

    sf.write(tmp_path / "short.wav", audio(0.02) / SCALE, RATE)
    for how in [], ["--stream", "--decode=ctc", "--chunk=4"]:
        assert cli.entry(["transcribe", str(tmp_path / "short.wav"), f"--checkpoint={run}", *how]) == 0
        said = capsys.readouterr()
        assert said.out == "\n" and "short.wav: too short for one frame of text: 160 samples" in said.err


def test_a_closed_standard_input_is_one_line(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert cli.entry(["transcribe", "-", f"--checkpoint={run}"]) == 1
    assert capsys.readouterr().err.splitlines() == ["standard input: is closed", "1 of 1 could not be read"]


def test_what_cannot_be_written_shows_before_anything_is_read(run, tmp_path, capsys):
    given = ["transcribe", str(run / "0.wav"), "--checkpoint=none", "--output"]
    (tmp_path / "there.json").write_text("mine")
    for output, said in (
        (tmp_path / "no/hyps.json", "no: no such folder; create it first"),
        (tmp_path, "is not a file"),
        (tmp_path / ("long" * 63 + ".js"), "cannot be written (File name too long)"),
        (tmp_path / "there.json", "is there already; pass --overwrite"),
    ):
        assert cli.entry([*given, str(output)]) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "there.json").read_text() == "mine"
    given[2] = f"--checkpoint={run}"
    assert cli.entry([*given, str(tmp_path / "there.json"), "--overwrite"]) == 0
    assert json.loads((tmp_path / "there.json").read_text())
    for more, said in (
        (["--nbest=20"], "--nbest 20 must be from 1 to --beam 10"),
        (["--chunk=0"], "--chunk 0 must be from 1 to 1500 frames, which are 60 s"),
        (["--chunk=1501"], "--chunk 1501 must be from 1 to 1500"),
        (["--left=2"], "--left 2 is of chunks: give --chunk too, or --stream"),
        (["--decode=ctc", "--ctc-weight=1"], "--ctc-weight and --reverse-weight are of --decode rescored, not of ctc"),
        (["--reverse-weight=2"], "from 0 to 1"),
        (["--pcm-rate=0"], "--pcm-rate 0 must be from 1000 to 384000"),
    ):
        assert cli.entry([*given[:3], *more]) == 2
        assert said in capsys.readouterr().err


def test_weights_of_rescoring_can_be_chosen(run, made, tmp_path):
    given = ["transcribe", str(run / "0.wav"), f"--checkpoint={run}", "--beam=5", "--ctc-weight=1"]
    assert cli.entry([*given, "--reverse-weight=0", f"--output={tmp_path}/hyps.json"]) == 0
    (one,) = json.loads((tmp_path / "hyps.json").read_text())
    expected = Recogniser(made, SYMBOLS, beam=5, ctc_weight=1.0, reverse_weight=0.0)(audio(1.0))
    assert one["input"] == [t.text for t in expected]
    np.testing.assert_allclose(one["scores"], [t.score for t in expected], atol=0.01)


class Stdin(io.BytesIO):
    """Standard input of samples: at its end it ends, or Ctrl-C comes while it waits for more."""

    def __init__(self, seconds: float, interrupt: bool = False):
        super().__init__(audio(seconds).astype("<i2").tobytes())
        self.buffer, self.interrupt = self, interrupt

    def read1(self, size=-1):
        data = super().read1(size)
        if not data and self.interrupt:
            signal.raise_signal(signal.SIGINT)
            time.sleep(60)
        return data


@pytest.mark.parametrize("how", [[], ["--stream"]])
def test_ctrl_c_ends_what_is_heard(run, brief, tmp_path, monkeypatch, how):
    texts = []
    for interrupt in (False, True):
        monkeypatch.setattr("sys.stdin", Stdin(1.0, interrupt))
        output, before = tmp_path / f"{interrupt}.json", signal.getsignal(signal.SIGINT)
        assert cli.entry(["transcribe", "-", f"--checkpoint={run}", f"--output={output}", *how]) == 0
        assert signal.getsignal(signal.SIGINT) is before
        texts.append(json.loads(output.read_text()))
    assert texts[0] == texts[1] and texts[0][0]["input"][0]
    assert texts[0][-1].get("end", 1.0) == 1.0


def test_nothing_on_standard_input_is_one_line(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Stdin(0.0))
    assert cli.entry(["transcribe", "-", f"--checkpoint={run}"]) == 1
    assert "standard input: no samples\n" in capsys.readouterr().err


@pytest.fixture
def hasty(monkeypatch):
    """A recogniser whose texts end after 0.64 s, and recordings that are long from 2 s on."""
    load = Recogniser.load
    monkeypatch.setattr(Recogniser, "load", lambda *a, **k: dataclasses.replace(load(*a, **k), longest=0.64, pause=9.0))
    monkeypatch.setattr(transcribe, "LONGEST", 2)
    monkeypatch.setattr(evaluate, "LONGEST", 2)
    say_once.cache_clear()


def test_a_stream_has_a_record_a_text(run, hasty, tmp_path, capsys):
    import soundfile as sf

    for name in ("long", "longer"):
        sf.write(tmp_path / f"{name}.wav", audio(2.5) / SCALE, RATE, subtype="FLOAT")
    files, found = [str(tmp_path / f"{name}.wav") for name in ("long", "longer")], []
    for how in (["--stream"], []):
        output = tmp_path / f"{len(how)}.json"
        assert cli.entry(["transcribe", *files, f"--checkpoint={run}", f"--output={output}", *how]) == 0
        said = capsys.readouterr()
        assert said.err.count("longer than 2 s is read as with --stream") == (not how)
        found.append(json.loads(output.read_text()))
        assert said.out.splitlines() == [f"{one['audio']}: {one['input'][0]}" for one in found[-1]]
    assert found[0] == found[1]
    mine = [one for one in found[0] if one["audio"] == files[0]]
    assert len(mine) > 2 and mine[0]["start"] == 0 and mine[-1]["end"] == 2.5
    for one, after in itertools.pairwise(mine):
        assert one["start"] <= one["times"][0] <= one["times"][-1] <= one["end"] <= after["start"]


def test_long_standard_input_is_read_as_it_comes(run, hasty, monkeypatch, tmp_path):
    """Of what nobody ends, no more is held than of a recording that is not long."""
    held = []
    monkeypatch.setattr(transcribe, "_ahead", lambda *a, do=transcribe._ahead: held.append(do(*a)) or held[0])
    monkeypatch.setattr("sys.stdin", Stdin(4.5))
    output = tmp_path / "hyps.json"
    assert cli.entry(["transcribe", "-", f"--checkpoint={run}", f"--output={output}"]) == 0
    found = json.loads(output.read_text())
    assert len(found) > 2 and found[0]["start"] == 0 and found[-1]["end"] == 4.5
    assert 2 < sum(map(len, held[0])) / RATE < 2.2


def test_ways_that_read_no_stream_refuse_long_recordings(run, hasty, tmp_path, monkeypatch, capsys):
    """Their memory would grow with the square of its length; the other files go on."""
    import soundfile as sf

    sf.write(tmp_path / "long.wav", audio(2.5) / SCALE, RATE, subtype="FLOAT")
    files, output = [str(tmp_path / "long.wav"), str(run / "0.wav")], tmp_path / "hyps.json"
    given = [f"--checkpoint={run}", f"--output={output}", "--overwrite"]
    assert cli.entry(["transcribe", *files, *given, "--decode=attention"]) == 1
    said = f"{files[0]}: 2.5 s, and attention reads no more than 2 s at once: choose another --decode, or cut it\n"
    assert said in capsys.readouterr().err
    assert [one["audio"] for one in json.loads(output.read_text())] == files[1:]
    monkeypatch.setattr("sys.stdin", Stdin(2.5))
    assert cli.entry(["transcribe", "-", *given, "--decode=attention"]) == 1
    assert "standard input: more than 2 s, and attention reads no more" in capsys.readouterr().err
    assert cli.entry(["transcribe", *files, *given, "--decode=greedy"]) == 0
    found = json.loads(output.read_text())
    assert len(found) > 3 and found[-1]["audio"] == files[1] and found[-2]["end"] == 2.5


@pytest.mark.parametrize(("error", "code"), [(ValueError("broken"), 2), (KeyboardInterrupt(), 130), (None, 143)])
def test_what_came_before_a_failure_is_written(run, tmp_path, monkeypatch, capsys, error, code):
    whole, heard = Recogniser.__call__, []

    def fails(by, samples):
        heard.append(samples)
        if len(heard) > 1 and error is None:
            signal.raise_signal(signal.SIGTERM)
        elif len(heard) > 1:
            raise error
        return whole(by, samples)

    monkeypatch.setattr(Recogniser, "__call__", fails)
    output, files = tmp_path / "hyps.json", [str(run / f"{i}.wav") for i in range(3)]
    assert cli.entry(["transcribe", *files, f"--checkpoint={run}", f"--output={output}"]) == code
    assert len(heard) == 2 and [one["audio"] for one in json.loads(output.read_text())] == files[:1]
    said = capsys.readouterr().err
    assert "nothing was written" not in said and ("interrupted after 1 of 3; " in said) == (code > 100)


def test_a_reader_that_goes_away_does_not_cost_the_output(run, tmp_path, monkeypatch):
    for output in (tmp_path / "hyps.json", None):
        read, write = os.pipe()
        os.close(read)
        monkeypatch.setattr("sys.stdout", os.fdopen(write, "w"))
        files, given = [str(run / f"{i}.wav") for i in range(2)], [f"--output={output}"] if output else []
        assert cli.entry(["transcribe", *files, f"--checkpoint={run}", *given]) == (0 if output else 1)
    assert len(json.loads((tmp_path / "hyps.json").read_text())) == 2


def test_a_run_is_scored(run):
    evaluate.error_rates(str(run), manifest=str(run / "list.jsonl"), split="test", beam=3)
    table = (run / "wer.md").read_text()
    assert table.count("\n| ") == 16 and "2 utterances (1 could not be read)" in table and "7.wav" in table
    rows = {(r["decoding"], r["metric"]): r for r in json.loads((run / "scores.json").read_text())["rows"]}
    said = [json.loads(line) for line in (run / "transcripts.jsonl").read_text().splitlines()]
    by_hand = errors.cer(["abc"] * 2, [s["texts"]["whole, attention"] for s in said], family_normaliser("asr"))
    assert rows["whole, attention", "cer"]["value"] == pytest.approx(by_hand.rate)
    for name in ("whole", "chunks of 16", "chunks of 4"):
        oracle = rows[f"{name}, oracle", "cer"]["value"]
        assert oracle <= min(rows[f"{name}, {way}", "cer"]["value"] for way in ("ctc", "rescored"))
    records = list(formats.read(run / "nbest.json"))
    assert [r.reference for r in records] == ["abc", "abc"]
    with pytest.raises(ValueError, match="no utterance of the split 'valid'"):
        evaluate.error_rates(str(run), manifest=str(run / "list.jsonl"), split="valid")


def test_that_nothing_can_be_scored_is_said_before_training(run, tmp_path):
    evaluate.listed(manifest=str(run / "list.jsonl"), split="test")
    main.load(["experiments/u2pp/dense.gin"], [f"MANIFEST='{run}/list.jsonl'"])
    assert gin.config._CONFIG[("", "moe_jax.main.run")]["jobs"][0].scoped_selector == "evaluate.listed"
    with pytest.raises(ValueError, match=r"list.jsonl: lists no utterance of the split 'valid', on which"):
        evaluate.listed(manifest=str(run / "list.jsonl"), split="valid")


def test_a_run_is_scored_without_what_is_too_long(run, hasty, tmp_path):
    import soundfile as sf

    sf.write(tmp_path / "long.wav", audio(2.5) / SCALE, RATE, subtype="FLOAT")
    lines = [{"audio": str(path), "text": "abc"} for path in (tmp_path / "long.wav", run / "0.wav")]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    long, (samples, short) = evaluate.read(str(tmp_path / "list.jsonl"), None, RATE)
    assert long.where == f"{tmp_path}/list.jsonl:1" and long.reason == "longer than 2 s: 2.5 s"
    assert short.where == f"{tmp_path}/list.jsonl:2" and len(samples) == RATE
