"""Lists of utterances -> prepared folders -> batches: nothing silently dropped, and the same rows for the same step."""

import collections
import itertools
import json

import numpy as np
import pytest

from moe_jax.formats import audio, manifest
from moe_jax.speech import features
from moe_jax.speech.data import Speech, _lengths, frontend, prepare
from moe_jax.text.symbols import Symbols
from moe_jax.text.tokeniser import Tokeniser

sf = pytest.importorskip("soundfile", reason="reading audio needs soundfile (pip install '.[speech]')")
RATE = 8000
WORDS = ["one", "two", "three", "four", "five", "six"]


def write(folder, name: str, seconds: float, seed: int = 0) -> str:
    samples = np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE))
    sf.write(folder / name, samples, RATE)
    return name


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    lines = [
        {"audio": write(folder, f"{i}.wav", 0.4 + 0.02 * i, i), "text": WORDS[i % 6], "split": "train"}
        for i in range(24)
    ]
    lines.append({"audio": "0.wav", "text": "two", "split": "valid"})
    (folder / "all.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


@pytest.fixture(scope="module")
def prepared(corpus):
    prepare(
        str(corpus / "prepared"),
        manifest=str(corpus / "all.jsonl"),
        split="train",
        rate=RATE,
        mels=20,
        speeds=(0.9, 1.0, 1.1),
        lengths=3,
    )
    return Speech.open(corpus / "prepared")


def said(batch, tokeniser) -> list[str]:
    return [tokeniser.decode(row) for row in batch.tokens_BxU]


# --- lists --------------------------------------------------------------------------------------------------


def test_lines_of_ours_and_of_nemo(tmp_path):
    lines = [
        {"audio": "a.wav", "text": " one "},
        {"audio": "b/c.flac", "text": "two", "start": 80, "frames": 800},
        {"audio_filepath": "/d.wav", "text": "three", "offset": 1, "duration": 0.5},
        {"audio_filepath": "e.wav", "duration": 2.0, "text": "four"},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = list(manifest.read(tmp_path / "m.jsonl"))
    assert all(isinstance(u, manifest.Utterance) for u in found)
    assert [(u.audio, u.text, u.start, u.length) for u in found] == [
        (tmp_path / "a.wav", "one", 0.0, None),
        (tmp_path / "b/c.flac", "two", 80, 800),
        (tmp_path.joinpath("/d.wav"), "three", 1.0, 0.5),
        (tmp_path / "e.wav", "four", 0.0, 2.0),
    ]
    assert found[1].where == f"{tmp_path}/m.jsonl:2"


def test_kaldis_folders(tmp_path):
    (tmp_path / "wav.scp").write_text("r1 r1.wav\nr2 sox r2.wav -t wav - |\n")
    (tmp_path / "text").write_text("u1 one two\nu2 three\nu3 four\nu4 five\n")
    (tmp_path / "segments").write_text("u1 r1 0.5 1.25\nu2 r2 0 1\nu3 r1 zero one\nu4 r1 0 nan\n")
    found = list(manifest.read(tmp_path))
    assert found[0] == manifest.Utterance(f"{tmp_path}/text: u1", tmp_path / "r1.wav", "one two", 0.5, 0.75)
    bad = "no segment of a recording with two times in segments"
    assert [s.reason for s in found[1:]] == [manifest.PIPE, bad, bad]
    (tmp_path / "segments").unlink()
    without = [f"its recording is not in wav.scp: u{i}" for i in (1, 2, 3, 4)]
    assert [s.reason for s in manifest.read(tmp_path)] == without + ["a recording without a text"] * 2


def test_a_folder_has_a_list_for_each_split(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "wav.scp").write_text("u1 /a.wav\n")
    (tmp_path / "train" / "text").write_text("u1 one\n")
    (tmp_path / "valid.jsonl").write_text('{"audio": "b.wav", "text": "two"}\n')
    (tmp_path / "test.json").write_text('{"audio_filepath": "c.wav", "text": "three", "duration": 1.0}\n')
    texts = {split: [one.text for one in manifest.read(tmp_path, split)] for split in ("train", "valid", "test")}
    assert texts == {"train": ["one"], "valid": ["two"], "test": ["three"]}
    with pytest.raises(ValueError, match=r"lists no split 'dev'; a folder has one in dev.jsonl, dev.json or"):
        list(manifest.read(tmp_path, "dev"))


def test_a_list_without_splits_is_not_all_of_them(tmp_path):
    """Or a model would be scored on what it was trained on."""
    (tmp_path / "wav.scp").write_text("u1 /a.wav\n")
    (tmp_path / "text").write_text("u1 one\n")
    with pytest.raises(ValueError, match="lists no split 'test'"):
        list(manifest.read(tmp_path, "test"))
    (tmp_path / "m.json").write_text('{"audio_filepath": "c.wav", "text": "three"}\n{\n')
    with pytest.raises(ValueError, match=r'm\.json: no line says its "split"; or give a folder that has train.jsonl'):
        list(manifest.read(tmp_path / "m.json", "train"))
    (tmp_path / "m.json").write_text('{"audio": "c.wav", "text": "three", "split": "train"}\n')
    assert not list(manifest.read(tmp_path / "m.json", "test"))
    (tmp_path / "m.json").write_bytes(
        b"\xef\xbb\xbf" + (tmp_path / "m.json").read_bytes()
    )  # as editors on Windows write
    assert [one.text for one in manifest.read(tmp_path / "m.json", "train")] == ["three"]


def test_no_line_of_kaldis_folders_is_dropped_in_silence(tmp_path):
    (tmp_path / "wav.scp").write_bytes(b"u1\tr1.wav\r\nu2  r2.wav\nu1 r3.wav\nu4 \xff.wav\nu5 r5.wav\n")
    (tmp_path / "text").write_text("u1\tone\u2028two\x85three\nu1 two\n\nu2 two  three \n", "utf-8", newline="")
    found = {one.where: one for one in manifest.read(tmp_path)}
    heard = {where: (one.audio.name, one.text) for where, one in found.items() if isinstance(one, manifest.Utterance)}
    said = {where: one.reason for where, one in found.items() if isinstance(one, manifest.Skipped)}
    texts = {"u1": ("r1.wav", "one\u2028two\x85three"), "u2": ("r2.wav", "two  three")}
    assert heard == {f"{tmp_path}/text: {key}": value for key, value in texts.items()}
    assert said == {
        f"{tmp_path}/wav.scp:3": "an id that is there already: u1",
        f"{tmp_path}/wav.scp:4": "not UTF-8",
        f"{tmp_path}/text:2": "an id that is there already: u1",
        f"{tmp_path}/wav.scp: u5": "a recording without a text",
    }
    (tmp_path / "segments").write_text("u1 u1 0 1\nu2 u1 1 2\nu3\tu2\t0\t1\n")
    said = {one.where: one.reason for one in manifest.read(tmp_path) if isinstance(one, manifest.Skipped)}
    assert said[f"{tmp_path}/segments: u3"] == "a segment without a text"
    assert said[f"{tmp_path}/wav.scp: u5"] == "a recording without a segment" and f"{tmp_path}/wav.scp: u2" not in said


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"audio": "a.wav"}', "that are strings"),
        ('{"audio": 3, "text": "a"}', "that are strings"),
        ('{"audio": "a.wav", "text": "a", "start": "0", "frames": 3}', "are not numbers"),
        ('{"audio": "a.wav", "text": "a", "start": true}', "are not numbers"),
        ('{"audio": "a.wav", "text": "a", "duration": "long"}', "are not numbers"),
        ('{"audio": "a.wav", "text": "a", "offset": NaN}', "are not finite numbers of seconds"),
        ('{"audio": "a.wav", "text": "a", "offset": 1, "duration": -Infinity}', "are not finite"),
        ('{"audio": "a.wav", "text": "a", "offset": 1' + "0" * 400 + "}", "are not finite"),
        ("[" * 100_000, "not JSON"),
        ('{"audio": "a.wav", "text": "tw\xff"}', "not UTF-8"),
        ('{"audio": "a.wav", "text": "tw\\ud83d"}', "a lone surrogate escape"),
        ('{"audio": "\\ud83d.wav", "text": "a"}', "a lone surrogate escape"),
        ('{"audio": "a.wav", "text": "a", "lang": "\\ud83d"}', "a lone surrogate escape"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path, line, reason):
    good = b'{"audio": "a.wav", "text": "a"}'
    (tmp_path / "m.jsonl").write_bytes(b"\n".join([good, line.encode("latin-1"), good]))
    before, bad, after = manifest.read(tmp_path / "m.jsonl")
    assert isinstance(bad, manifest.Skipped) and reason in bad.reason and bad.where == f"{tmp_path}/m.jsonl:2"
    assert isinstance(before, manifest.Utterance) and isinstance(after, manifest.Utterance)


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: cannot read"):
        list(manifest.read(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"wav\.scp: cannot read"):
        list(manifest.read(tmp_path))


# --- vocabularies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", ["characters", "words"])
def test_symbols_travel_as_every_tokeniser_does(units):
    symbols = Symbols.of(["zwei", "eins ü"], units)
    assert symbols.symbols == ((*" einswzü",) if units == "characters" else ("eins", "zwei", "ü"))
    for again in (Tokeniser.load(symbols.model), Tokeniser.of_meta(symbols.meta())):
        assert isinstance(again, Symbols) and again.vocab_size == 3 + len(symbols.symbols)
        ids = again.encode("zwei ü")
        assert again.decode([1, 0, *ids, 2]) == "zwei ü" and min(ids) >= 3
    with pytest.raises(ValueError, match=f"is not among the {len(symbols.symbols)} {units}"):
        symbols.encode("zwei k")


@pytest.mark.parametrize(
    "said",
    ['["a b"]', '["a", "a"]', "3", "[" * 9999, "\xff"],
)
def test_damaged_symbols(said):
    with pytest.raises(ValueError, match="damaged vocabulary"):
        Tokeniser.load(b'moe_jax symbols\n{"units": "words", "symbols": ' + said.encode("latin-1") + b"}")


# --- folders ------------------------------------------------------------------------------------------------


def test_a_folder_has_the_features_of_its_audio(corpus, prepared):
    assert prepared.rows == 24 and prepared.meta["skipped"] == {}
    for row in (0, 7, 23):
        samples = audio.read(corpus / f"{row}.wav", RATE)
        for version, factor in enumerate((0.9, 1.0, 1.1)):
            start, frames = prepared.index_RxVx2[row, version]
            expected = features.fbank(features.speed(samples, factor), RATE, 20)
            np.testing.assert_allclose(prepared.features_FxC[start : start + frames], expected, atol=0.01)
        ids = prepared.tokens_RxU[row]
        assert prepared.tokeniser.decode(ids[ids > 0]) == WORDS[row % 6]
    about = frontend(str(corpus / "prepared"))
    assert about["rate"] == RATE and about["mels"] == 20
    normal = (prepared.features_FxC.astype(np.float64) - about["mean"]) * about["scale"]
    np.testing.assert_allclose((normal.mean(0), normal.std(0)), ([0] * 20, [1] * 20), atol=0.01)


def test_an_epoch_has_every_utterance_in_few_lengths(prepared):
    sizes = np.bincount(prepared.bucket_R)
    epoch = int(-(-sizes // 4).sum())
    assert len(sizes) == len(prepared.meta["lengths"]) == 3 and sizes.min() > 0
    for seed in (0, 1):
        batches = [prepared.batch(step, seed=seed, batch_size=4) for step in range(2 * epoch)]
        for half in (batches[:epoch], batches[epoch:]):
            assert {b.features_BxTxC.shape[1] for b in half} == set(prepared.meta["lengths"])
            counts = collections.Counter(t for b in half for t in said(b, prepared.tokeniser))
            assert min(counts[w] for w in WORDS) >= 4 and counts.total() == 4 * epoch < 24 + 3 * 4
        for b in batches:
            beyond = np.arange(b.features_BxTxC.shape[1]) >= np.asarray(b.frames_B)[:, None]
            assert not b.features_BxTxC[beyond].any() and b.features_BxTxC[~beyond].any(-1).all()
        assert [said(b, prepared.tokeniser) for b in batches[:epoch]] != [
            said(b, prepared.tokeniser) for b in batches[epoch:]
        ]


def test_lengths_leave_the_least_padding():
    frames = np.random.default_rng(0).integers(5, 30, 40)

    def padded(lengths):
        return sum(min(length for length in lengths if length >= n) for n in frames)

    found = _lengths(frames, 3)
    assert found == sorted(found) and found[-1] == frames.max()
    others = itertools.combinations(sorted(set(frames) - {frames.max()}), 2)
    assert padded(found) == min(padded([*two, frames.max()]) for two in others)
    assert _lengths(np.array([5, 5, 7]), 4) == [5, 7] and _lengths(frames, 1) == [frames.max()]


@pytest.mark.parametrize("batch", [4, 16])
def test_lengths_count_what_fills_the_last_batch(batch):
    frames = np.random.default_rng(0).integers(5, 30, 40)

    def cost(lengths):
        rows = np.bincount(np.searchsorted(lengths, frames), minlength=len(lengths))
        return int((-(-rows // batch) * batch * np.array(lengths)).sum())

    found = _lengths(frames, 4, batch)
    shorter = sorted(set(frames) - {frames.max()})
    others = [[*some, frames.max()] for n in range(4) for some in itertools.combinations(shorter, n)]
    assert cost(found) == min(map(cost, others)) < cost(_lengths(frames, 4)) and found[-1] == frames.max()
    assert _lengths(frames, 4, 64) == [frames.max()]  # all in one batch


def test_validation_has_the_shapes_of_training(corpus, prepared, tmp_path):
    lines = [{"audio": write(corpus, f"v{i}.wav", seconds, i), "text": "two"} for i, seconds in enumerate((0.4, 1.1))]
    (corpus / "valid.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    given = {"manifest": str(corpus / "valid.jsonl"), "rate": RATE, "mels": 20, "tokeniser": str(corpus / "prepared")}
    prepare(str(tmp_path / "valid"), **given)
    valid = Speech.open(tmp_path / "valid")
    own = [int(n) for n in valid.index_RxVx2[:, 0, 1]]
    assert valid.meta["lengths"] == [
        prepared.meta["lengths"][0],
        own[1],
    ]  # the longer one is longer than any in training
    assert valid.meta["targets"] == [prepared.meta["targets"][0], len("two")]
    widths = {b.features_BxTxC.shape[1]: b.tokens_BxU.shape[1] for b in valid.sample(2, 1)}
    assert widths == dict(zip(valid.meta["lengths"], valid.meta["targets"], strict=True))


def test_batches_are_as_wide_as_the_widest_text_of_their_length(corpus, tmp_path):
    """Where a long text is rare, the other batches do not pay for it."""
    lines = [{"audio": write(corpus, f"w{i}.wav", 0.4 + 0.001 * i, i), "text": WORDS[i % 3]} for i in range(6)]
    lines.append({"audio": write(corpus, "wide.wav", 2.0), "text": "three four five six"})
    (corpus / "wide.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    prepare(str(tmp_path / "p"), manifest=str(corpus / "wide.jsonl"), rate=RATE, mels=20, lengths=2)
    made = Speech.open(tmp_path / "p")
    assert made.meta["targets"] == [5, 19] and made.meta["max_targets"] == 19
    batches = [made.batch(step, seed=0, batch_size=2) for step in range(4)]
    assert sorted(b.tokens_BxU.shape[1] for b in batches) == [5, 5, 5, 19]
    assert collections.Counter(t for b in batches for t in said(b, made.tokeniser)) == collections.Counter(
        [*WORDS[:3] * 2, *["three four five six"] * 2]
    )


def test_batches_are_functions_of_seed_and_step(corpus, prepared):
    again = Speech.open(corpus / "prepared")
    for step in (0, 5, 17):
        one, two = (d.batch(step, seed=3, batch_size=4) for d in (prepared, again))
        np.testing.assert_array_equal(one.features_BxTxC, two.features_BxTxC)
        halves = [prepared.batch(step, seed=3, batch_size=4, process_index=i, process_count=2) for i in (0, 1)]
        np.testing.assert_array_equal(np.concatenate([h.features_BxTxC for h in halves]), one.features_BxTxC)
    frames = {int(n) for s in range(60) for n in prepared.batch(s, seed=0, batch_size=4).frames_B}
    assert len(frames) > 40  # most of the 24 utterances at three speeds


def test_few_rows_fill_a_large_batch(prepared):
    batch = prepared.batch(0, seed=0, batch_size=20)
    assert len(batch.frames_B) == 20 and len(set(map(tuple, batch.tokens_BxU))) <= 8


def test_validation_reads_every_utterance_once(prepared):
    """Those of all lengths, however few batches are asked for; what fills a batch does not count."""
    for size in (4, 20, 64):
        number = prepared.batches(1, size)
        batches = [prepared.batch(i, seed=0, batch_size=size) for i in range(number)]
        assert {b.features_BxTxC.shape[1] for b in batches} == set(prepared.meta["lengths"])
        counted = collections.Counter(
            text for b in batches for text, w in zip(said(b, prepared.tokeniser), b.weight_B, strict=True) if w
        )
        assert counted == dict.fromkeys(WORDS, 4) and sum(b.weight_B.sum() for b in batches) == prepared.rows
    assert len(prepared.sample(8, 4)) == 2


def test_what_cannot_be_used_is_counted_and_listed(corpus, prepared, tmp_path, capsys):
    (corpus / "torn.wav").write_bytes((corpus / "9.wav").read_bytes()[:600])
    write(corpus, "short.wav", 0.08)
    write(corpus, "enough.wav", 0.0851)
    lines = [
        {"audio": "1.wav", "text": "one"},
        {"audio": "enough.wav", "text": "o"},
        {"audio": "absent.wav", "text": "one"},
        {"audio": "torn.wav", "text": "one"},
        {"audio": "short.wav", "text": "one"},
        {"audio": "1.wav", "text": "one!"},
        {"audio": "1.wav", "text": " "},
        {"audio": "1.wav", "text": "one", "start": 0, "frames": 10**9},
        {"audio": f"{'a' * 300}.wav", "text": "one"},
        {"audio": "\ud83d.wav", "text": "one"},
    ]
    (corpus / "some.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + "{\n")
    args = {"manifest": str(corpus / "some.jsonl"), "tokeniser": str(corpus / "prepared/tokeniser.model")}
    prepare(str(tmp_path / "p"), **args, rate=RATE, mels=20)
    made = Speech.open(tmp_path / "p")
    assert made.rows == 2 and sum(made.meta["skipped"].values()) == 9
    assert made.meta["skipped"]["audio that cannot be read"] == 4
    listed = [json.loads(line) for line in (tmp_path / "p/skipped.jsonl").read_text().splitlines()]
    assert [s["where"].rpartition(":")[2] for s in listed] == list(map(str, range(3, 12)))
    assert "skipped 1: too short for one subsampled frame" in capsys.readouterr().out
    (corpus / "none.jsonl").write_text(json.dumps(lines[2]))
    with pytest.raises(ValueError, match=r"none of 1 utterances can be used: .*none.jsonl:1: .*no such file"):
        prepare(str(tmp_path / "none"), manifest=str(corpus / "none.jsonl"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p"]


def test_a_text_has_as_many_frames_as_ctc_needs(corpus, tmp_path):
    """A token a frame, and a blank between two that are the same: "three" needs 6 frames of 40 ms."""
    needs = 7 + 5 * 4  # frames of 10 ms; at speed 1.1 one of these is too few
    lines = [
        {"audio": write(corpus, f"n{frames}.wav", 0.0151 + 0.01 * frames, frames), "text": "three"}
        for frames in (needs - 1, needs, needs + 4)
    ]
    (corpus / "ctc.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    args = {"manifest": str(corpus / "ctc.jsonl"), "tokeniser": str(corpus / "prepared/tokeniser.model")}
    prepare(str(tmp_path / "p"), **args, rate=RATE, mels=20, speeds=(0.9, 1.0, 1.1))
    made = Speech.open(tmp_path / "p")
    (listed,) = [json.loads(line) for line in (tmp_path / "p/skipped.jsonl").read_text().splitlines()]
    assert listed["where"].endswith("ctc.jsonl:1")
    assert listed["reason"] == "more text than CTC can align: 6 tokens and repeats in 5 frames of 40 ms"
    slow, own, fast = made.index_RxVx2[0].tolist()
    assert own[1] == needs and fast == slow and slow[1] > needs
    assert len(set(map(tuple, made.index_RxVx2[1].tolist()))) == 3
    assert len(made.features_FxC) == slow[1] + own[1] + made.index_RxVx2[1, :, 1].sum()


def test_what_is_too_long_is_listed_and_not_read(corpus, tmp_path, monkeypatch):
    lines = [{"audio": write(corpus, f"l{s}.wav", s), "text": "one"} for s in (0.9, 1.0, 1.1)]
    (corpus / "long.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    read, whole = [], audio._samples

    def noted(file, path, *part):
        read.append(path.name)
        return whole(file, path, *part)

    monkeypatch.setattr(audio, "_samples", noted)
    prepare(str(tmp_path / "p"), manifest=str(corpus / "long.jsonl"), rate=RATE, mels=20, longest=1)
    assert read == ["l0.9.wav", "l1.0.wav"]
    made = Speech.open(tmp_path / "p")
    assert made.rows == 2 and made.meta["skipped"] == {"longer than 1 s": 1}
    assert '"reason": "longer than 1 s: 1.1 s"' in (tmp_path / "p/skipped.jsonl").read_text()


def test_preparing_again(corpus, prepared):
    folder, args = str(corpus / "prepared"), {"manifest": str(corpus / "all.jsonl"), "split": "train"}
    same = {"rate": RATE, "mels": 20, "speeds": (0.9, 1.0, 1.1), "lengths": 3}
    before = (corpus / "prepared/meta.json").stat().st_mtime_ns
    prepare(folder, **args, **same)
    assert (corpus / "prepared/meta.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="prepared with another asked: remove it"):
        prepare(folder, **args, **same | {"mels": 40})
    with pytest.raises(ValueError, match="prepared with another manifest"):
        prepare(folder, manifest=args["manifest"], split="valid", **same)


def test_pieces_of_words(corpus, tmp_path):
    prepare(str(tmp_path / "p"), manifest=str(corpus / "all.jsonl"), split="train", rate=RATE, mels=20, units=281)
    made = Speech.open(tmp_path / "p")
    assert made.tokeniser.vocab_size == 281
    assert all(t in WORDS for t in said(made.batch(0, seed=0, batch_size=8), made.tokeniser))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("meta.json", b"{", "not JSON"),
        ("meta.json", b"[]", "not format 2 of prepared speech"),
        ("meta.json", b'{"format": 1}', "not format 2 of prepared speech; prepare the folder again"),
        ("index.npy", b"", "damaged"),
        ("features.npy", b"\x93NUMPY", "features.npy"),
        ("tokeniser.model", b"", "not a SentencePiece model"),
    ],
)
def test_damaged_folders_are_one_line(corpus, prepared, tmp_path, name, data, message):
    for file in (corpus / "prepared").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        Speech.open(tmp_path)
    assert "\n" not in str(error.value)
