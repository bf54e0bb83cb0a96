"""Audio -> features: Kaldi's numbers, and one line for every file that is not as it should be."""

import io
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from moe_jax import main
from moe_jax.formats import audio, manifest
from moe_jax.speech import features

sf = pytest.importorskip("soundfile", reason="reading audio needs soundfile (pip install '.[speech]')")


def noise(seconds: float, rate: int = 16_000, seed: int = 0) -> np.ndarray:
    """A tone that sweeps, and noise, as loud as speech."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    return (3000 * np.sin(2 * np.pi * (200 + 300 * t) * t) + 300 * rng.normal(size=len(t))).astype(np.float32)


def kaldis(samples: np.ndarray, rate: int, mels: int) -> np.ndarray:
    knf = pytest.importorskip("kaldi_native_fbank", reason="the reference, kaldi-native-fbank, is not installed")
    options = knf.FbankOptions()
    options.frame_opts.samp_freq = rate
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = mels
    theirs = knf.OnlineFbank(options)
    theirs.accept_waveform(rate, samples.tolist())
    theirs.input_finished()
    return np.stack([theirs.get_frame(i) for i in range(theirs.num_frames_ready)])


@pytest.mark.parametrize(("rate", "mels"), [(16_000, 80), (8_000, 80), (16_000, 23), (11_025, 40)])
def test_features_are_those_of_kaldi(rate, mels):
    samples = noise(1.3, rate)
    expected = kaldis(samples, rate, mels)
    found = features.fbank(samples, rate, mels)
    assert found.shape == expected.shape == (features.num_frames(len(samples), rate), mels)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_features_of_speech_are_those_of_kaldi():
    """All recordings of the shipped test split: at most 5.3e-4 from it, on average 5e-6."""
    errors = []
    for one in manifest.read(main.prompts(), "test"):
        samples = one.samples(16_000)
        errors.append(np.abs(features.fbank(samples, 16_000) - kaldis(samples, 16_000, features.MELS)).ravel())
    errors = np.concatenate(errors)
    assert len(errors) > 200_000 and errors.max() < 1e-3 and errors.mean() < 1e-5


def test_silence_is_finite_and_a_snip_gives_nothing():
    assert np.isfinite(features.fbank(np.zeros(1600), 16_000)).all()
    assert features.fbank(np.zeros(399), 16_000).shape == (0, 80)
    assert features.fbank(np.zeros(400), 16_000).shape == (1, 80)


def test_frames_are_the_same_in_blocks_and_piece_by_piece(monkeypatch):
    samples = noise(1.0)
    whole = features.fbank(samples, 16_000)
    monkeypatch.setattr(features, "BLOCK", 7)
    np.testing.assert_array_equal(features.fbank(samples, 16_000), whole)
    later = features.fbank(samples[20 * 160 :], 16_000)
    np.testing.assert_array_equal(later, whole[20:])


def test_speed_changes_length_and_pitch():
    rate = 16_000
    tone = np.sin(2 * np.pi * 1000 * np.arange(rate) / rate).astype(np.float32)
    for factor in (0.9, 1.0, 1.1):
        fast = features.speed(tone, factor)
        assert abs(len(fast) - rate / factor) <= 1
        hertz = np.abs(np.fft.rfft(fast)).argmax() * rate / len(fast)
        assert abs(hertz - 1000 * factor) < 2


def test_global_mean_and_variance():
    rng = np.random.default_rng(0)
    parts = [rng.normal(3, 2, size=(n, 5)).astype(np.float32) for n in (4, 100, 31)]
    for part in parts:
        part[:, 4] = 7
    moments = features.Moments()
    for part in parts:
        moments.add(part)
    mean, scale = moments.mean_and_scale()
    x = (np.concatenate(parts) - mean) * scale
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(x.std(0), [1, 1, 1, 1, 0], atol=1e-6)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
def test_reading_a_file_or_a_part_of_it(tmp_path, name):
    samples = noise(0.5)
    sf.write(tmp_path / name, samples / audio.SCALE, 16_000)
    found = audio.read(tmp_path / name, 16_000)
    assert len(found) == len(samples) and found.dtype == np.float32
    assert np.corrcoef(found, samples)[0, 1] > 0.99
    part = audio.read(tmp_path / name, 16_000, start=1000, length=2000)
    np.testing.assert_allclose(part, found[1000:3000], atol=1)


@pytest.mark.parametrize("rate", [16_000, 8_000, 11_025, 44_100])
@pytest.mark.parametrize("seconds", [0.03, 0.004, 9.0])
def test_blocks_are_the_file_whatever_their_size_and_rate(tmp_path, rate, seconds):
    sf.write(tmp_path / "a.wav", noise(0.5) / audio.SCALE, 16_000)
    whole = audio.read(tmp_path / "a.wav", rate)
    pieces = list(audio.blocks(tmp_path / "a.wav", rate, seconds))
    assert {len(p) for p in pieces[:-1]} <= {round(seconds * rate)}
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=0 if rate == 16_000 else 0.05)


def test_standard_input_is_a_file_without_a_header(capsys):
    samples = noise(0.2).astype(np.int16)
    for rate in (16_000, 8_000):
        pieces = list(audio.pcm(io.BytesIO(samples.tobytes()), 16_000, rate, 0.05))
        expected = audio.resampled(samples.astype(np.float32), 16_000, rate)
        np.testing.assert_allclose(np.concatenate(pieces), expected, atol=0.05)
    audio.say_once.cache_clear()
    pieces = list(audio.pcm(io.BytesIO(samples.tobytes()[:-1]), 16_000, 16_000, 0.05))
    assert "standard input: half a sample of 16 bits at its end is left out\n" in capsys.readouterr().err
    np.testing.assert_array_equal(np.concatenate(pieces), samples[:-1])
    with pytest.raises(audio.AudioError, match="standard input: no samples"):
        list(audio.pcm(io.BytesIO(), 16_000, 16_000, 0.05))


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg"])
def test_a_file_on_standard_input_is_not_heard_as_samples(kind):
    file = io.BytesIO()
    sf.write(file, noise(0.2) / audio.SCALE, 16_000, format=kind)
    with pytest.raises(audio.AudioError, match=f"standard input: a {kind} file, not samples of 16 bits"):
        list(audio.pcm(io.BytesIO(file.getvalue()), 16_000, 16_000, 0.05))


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_ogg_files_are_read_whole_or_not_at_all(tmp_path, codec):
    """libsndfile takes what is there of a torn one for all of it."""
    path = tmp_path / "a.ogg"
    t = np.arange(16_000 * 3) / 16_000
    sf.write(path, 0.3 * np.sin(2 * np.pi * 440 * t), 16_000, format="OGG", subtype=codec)
    found = audio.read(path, 16_000)
    assert len(found) == len(t) and abs(np.fft.rfft(found[16_000:32_000])).argmax() == 440
    np.testing.assert_array_equal(np.concatenate(list(audio.blocks(path, 16_000, 0.1))), found)
    assert audio.seconds(path) == 3.0
    data = path.read_bytes()
    last = data.rindex(b"OggS")
    for size in (last, last + 10, len(data) - 1, len(data) // 2):
        path.write_bytes(data[:size])
        for reading in (lambda: audio.read(path, 16_000), lambda: list(audio.blocks(path, 16_000, 0.1))):
            with pytest.raises(audio.AudioError, match=r"a\.ogg: "):
                reading()


def test_an_mp3_is_the_same_whole_in_blocks_and_in_part(tmp_path, capfd):
    """Its frames need those before them, which a decoder that seeks has not read."""
    path, rng = tmp_path / "a.mp3", np.random.default_rng(0)
    loud = np.repeat(rng.uniform(0, 0.5, 60), 3_200)  # so that frames are of many sizes
    sf.write(path, loud * rng.normal(size=len(loud)), 16_000, format="MP3", bitrate_mode="VARIABLE")
    whole = audio.read(path, 16_000)
    np.testing.assert_allclose(np.concatenate(list(audio.blocks(path, 16_000, 0.16))), whole, atol=0.1)
    assert not capfd.readouterr().err
    for start in (3_000, 50_001, 100_000, 170_000):
        np.testing.assert_allclose(
            audio.read(path, 16_000, start=start, length=8_000), whole[start : start + 8_000], atol=0.1
        )


def test_headers_that_slip_and_those_that_lie(tmp_path, capsys):
    path = tmp_path / "a.wav"
    sf.write(path, noise(0.5) / audio.SCALE, 16_000)
    data, whole = path.read_bytes(), audio.read(path, 16_000)
    size = data.index(b"data") + 4

    def with_number(at: int, number: int) -> None:
        path.write_bytes(data[:at] + number.to_bytes(4, "little") + data[at + 4 :])

    for at, number in ((28, 1), (4, 16_037)):  # bytes a second, and of the whole file
        with_number(at, number)
        np.testing.assert_array_equal(audio.read(path, 16_000), whole)
    audio.say_once.cache_clear()
    with_number(size, 0xFFFFFFFF)
    np.testing.assert_array_equal(audio.read(path, 16_000), whole)
    assert "a.wav: its header says no length, as of what was written to a pipe" in capsys.readouterr().err
    with_number(size, 20_000)
    with pytest.raises(audio.AudioError, match="torn: shorter than its header says"):
        audio.read(path, 16_000)
    for rate in (1, 2_147_483_647):
        with_number(24, rate)
        with pytest.raises(audio.AudioError, match=f"{rate} samples a second, not from 1000 to 384000"):
            audio.read(path, 16_000)


@pytest.mark.skipif(os.name != "posix", reason="names are bytes there")
def test_a_name_need_not_be_utf_8(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.wav"))
    sf.write(tmp_path / "a.wav", noise(0.5) / audio.SCALE, 16_000)
    (tmp_path / "a.wav").rename(path)
    assert len(audio.read(path, 16_000)) == len(np.concatenate(list(audio.blocks(path, 16_000, 0.1)))) == 8_000


def test_blocks_have_as_many_samples_as_the_file_says(tmp_path, monkeypatch):
    sf.write(tmp_path / "a.wav", noise(0.5) / audio.SCALE, 16_000)
    whole = audio._samples
    monkeypatch.setattr(audio, "_samples", lambda file, path, count: whole(file, path, count)[:700])
    with pytest.raises(audio.AudioError, match="torn: 700 of 8000 samples can be read"):
        list(audio.blocks(tmp_path / "a.wav", 16_000, 0.1))


def test_channels_are_mixed_and_rates_brought_together_with_one_word(tmp_path, capsys):
    one = noise(0.5, 44_100)
    sf.write(tmp_path / "two.wav", np.stack([one, -one, one], 1) / audio.SCALE, 44_100)
    sf.write(tmp_path / "one.wav", one / 3 / audio.SCALE, 44_100)
    audio.say_once.cache_clear()
    two = audio.read(tmp_path / "two.wav", 16_000)
    single = audio.read(tmp_path / "one.wav", 16_000)
    assert capsys.readouterr().err == "warning: audio of 44100 Hz is resampled to 16000 Hz\n"
    assert len(two) == 8_000
    np.testing.assert_allclose(two, single, atol=2)


def test_eight_channels_are_one(tmp_path):
    one = noise(0.5)
    sf.write(tmp_path / "8.wav", np.stack([one, *[np.zeros_like(one)] * 7], 1) / audio.SCALE, 16_000)
    found = audio.read(tmp_path / "8.wav", 16_000)
    np.testing.assert_allclose(found, one / 8, atol=2)
    np.testing.assert_array_equal(np.concatenate(list(audio.blocks(tmp_path / "8.wav", 16_000, 0.1))), found)


def damaged(tmp_path) -> dict:
    sf.write(tmp_path / "whole.wav", noise(0.5) / audio.SCALE, 16_000)
    sf.write(tmp_path / "whole.flac", noise(0.5) / audio.SCALE, 16_000)
    for name in ("torn.wav", "torn.flac"):
        data = (tmp_path / name.replace("torn", "whole")).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    sf.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    (tmp_path / "nothing.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "raw.raw").write_bytes(bytes(100))
    sf.write(tmp_path / "nan.wav", np.array([0.0, np.nan] * 400), 16_000, subtype="FLOAT")
    sf.write(tmp_path / "loud.wav", np.full(800, 1e33), 16_000, subtype="FLOAT")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")
    return {
        "torn.wav": "torn",
        "torn.flac": "torn",
        "empty.wav": "no samples",
        "nothing.wav": "not audio that can be read",
        "text.wav": "not audio that can be read",
        "raw.raw": "not audio that can be read",
        "nan.wav": "not finite",
        "loud.wav": "beyond any scale",
        "folder.wav": "is a folder",
        "loop.wav": "cannot be read",
        "absent.wav": "no such file",
        "long" * 75 + ".wav": "cannot be read",
    }


def test_what_cannot_be_read_is_one_line(tmp_path):
    for name, said in damaged(tmp_path).items():
        with pytest.raises(audio.AudioError, match=said) as error:
            audio.read(tmp_path / name, 16_000)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(audio.AudioError, match="8000 samples, not 7000 to 9000"):
        audio.read(tmp_path / "whole.wav", 16_000, start=7000, length=2000)


def test_a_part_in_seconds_ends_only_a_little_behind_its_file(tmp_path):
    sf.write(tmp_path / "a.wav", noise(0.5) / audio.SCALE, 16_000)
    whole = audio.read(tmp_path / "a.wav", 16_000)
    np.testing.assert_array_equal(audio.read(tmp_path / "a.wav", 16_000, start=0.2, length=0.4), whole[3200:])
    assert audio.seconds(tmp_path / "a.wav", start=0.2, length=0.4) == pytest.approx(0.3)
    for reading in (partial(audio.read, rate=16_000), audio.seconds):
        with pytest.raises(audio.AudioError, match=r"0\.50 s, not 0\.2 to 0\.601"):
            reading(tmp_path / "a.wav", start=0.2, length=0.401)
