"""Translating files: order, long and empty lines, what is refused, and scores by direction."""

import dataclasses
import io
import json
import os
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny

from moe_jax import checkpoint, cli, describe, main, sharding, translate, tree
from moe_jax.data import write_prepared
from moe_jax.layers.param import Rngs
from moe_jax.models.translator import Translator
from moe_jax.moe import experts, task_routers
from moe_jax.moe.layer import MoeFfn
from moe_jax.packing import Packable
from moe_jax.report.heatmap import heat_maps
from moe_jax.tasks import translation
from moe_jax.text.tokeniser import Tokeniser
from moe_jax.translate import Translate

TASKS = {name: number for name, number in translation.direction_ids().items() if name[-5:] in ("en-de", "de-en")}


@pytest.fixture(scope="module")
def tokeniser() -> Tokeniser:
    return Tokeniser.load(main.shipped("translate.model"))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory, tokeniser) -> str:
    """A tiny random translator of two directions, in a run folder."""
    folder = tmp_path_factory.mktemp("run")
    sizes = {"d": 16, "vocab": tokeniser.vocab_size, "encoder_layers": 1, "decoder_layers": 1}
    model = Translator(**sizes, ffn=tiny.dense, rngs=Rngs(params=0))
    meta = {"model": describe.describe(model), "families": TASKS, "layout": "tagged", "length": 64, **tokeniser.meta()}
    checkpoint.write_safetensors(folder / "model.safetensors", tree.flatten(model), json.loads(json.dumps(meta)))
    return str(folder)


@pytest.fixture(scope="module")
def pipeline(shipped) -> Translate:
    return Translate.load(shipped, beams=2, batch_size=4)


def test_a_mesh_translates_as_one_device_does(shipped, pipeline):
    lines = ["Press any key.", "Yes.", "A longer line about windows.", "No."]
    mesh = sharding.make_mesh(data=1, fsdp=2, model=4)
    several = Translate.load(shipped, beams=2, batch_size=3, mesh=mesh)
    assert several.batch_size == 4
    assert several(lines, "en-de") == pipeline(lines, "en-de")


class Echo(Translate):
    """Writes what it reads, so that order and pieces can be seen."""

    def _written(self, prompts, task):
        return [self.tokeniser.decode(prompt[1:-1]) for prompt in prompts]


@pytest.fixture
def echo(pipeline) -> Echo:
    return Echo(pipeline.model, pipeline.tokeniser, pipeline.tasks, pipeline.layout, pipeline.longest, batch_size=2)


def test_one_line_in_one_line_out_in_order(echo):
    lines = ["Press any key to go on.", "", "Yes.", "  spaces  around ", "A longer line about windows and menus."]
    assert echo(lines, "en-de") == [lines[0], "", "Yes.", "spaces around", lines[4]]


def test_what_is_too_long_is_translated_in_pieces_and_nothing_is_lost(echo):
    long = " ".join(f"This is sentence number {i} of many." for i in range(20))
    word = "x" * 300
    found = echo([long, "Short.", word], "en-de")
    assert found[0] == long and found[1] == "Short." and found[2].replace(" ", "") == word
    with pytest.raises(ValueError, match="line 1 has more than 32 tokens, the longest"):
        echo([long], "en-de", split=False)


def test_what_the_encoder_can_read_is_read_whole(echo, tokeniser):
    """What is written lies on the decoder's side: no room for it is taken from the source."""
    pieces = lambda text: echo._prompts(text, "translate/en-de")  # noqa: E731
    words = " ".join(["key"] * 60).split()
    fits = max(n for n in range(1, 60) if len(tokeniser.encode(" ".join(words[:n]))) + 2 <= 32)
    assert [len(p) for p in pieces(" ".join(words[:fits]))] == [len(tokeniser.encode(" ".join(words[:fits]))) + 2]
    assert len(pieces(" ".join(words[: fits + 1]))) == 2
    assert max(map(len, pieces(" ".join(words)))) <= 32


def test_lines_come_in_order_as_soon_as_they_are_there(echo, monkeypatch):
    monkeypatch.setattr(translate, "WINDOW", 4)
    asked = []
    written = Echo._written
    monkeypatch.setattr(Echo, "_written", lambda self, p, task: asked.append(len(p)) or written(self, p, task))
    lines = ["Yes.", "A longer line about windows.", "", "No.", "Press any key.", ""]
    stream = echo.stream(lines, "en-de")
    assert next(stream) == lines[0] and asked == [2]  # the two short lines of the first window
    assert [next(stream) for _ in range(3)] == lines[1:4] and asked == [2, 1]
    assert [*stream] == lines[4:] and asked == [2, 1, 1]


def test_what_the_model_writes_is_one_line(pipeline):
    class Breaks(Translate):
        def _written(self, prompts, task):
            return ["one\ntwo\r"] * len(prompts)

    own = Breaks(pipeline.model, pipeline.tokeniser, pipeline.tasks, pipeline.layout, pipeline.longest)
    assert own(["Yes.", "", "No."], "en-de") == ["one two", "", "one two"]


def test_it_writes_text_the_same_in_any_batch(pipeline):
    lines = ["Press any key.", "Yes.", "The window closes when you leave it."]
    found = pipeline(lines, "en-de")
    assert len(found) == 3
    assert [pipeline([line], "en-de")[0] for line in lines] == found


def test_the_task_reaches_the_model(pipeline, monkeypatch):
    asked = []
    prefill = translate.decode.prefill
    monkeypatch.setattr(
        translate.decode, "prefill", lambda m, p, tasks: asked.append(tasks) or prefill(m, p, tasks=tasks)
    )
    pipeline(["Yes."], "de-en")
    assert set(asked[0]) == {TASKS["translate/de-en"]}


def test_the_command(shipped, tmp_path, capsys, monkeypatch):
    (tmp_path / "in.txt").write_text("Yes.\n\nNo.\n")
    (tmp_path / "ref.txt").write_text("Ja.\n\nNein.\n")
    where = ["--checkpoint", shipped, "--source-lang", "en", "--target-lang", "de", "--beam", "1"]
    files = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt")]
    assert cli.entry(["translate", *where, *files, "--reference", str(tmp_path / "ref.txt")]) == 0
    out = (tmp_path / "out.txt").read_text()
    assert out.count("\n") == 3 and out.split("\n")[1] == ""
    assert "bleu" in (said := capsys.readouterr().err) and "nrefs:1" in said
    assert cli.entry(["translate", *where, *files]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Yes.\n\nNo.\n")))
    assert cli.entry(["translate", *where]) == 0
    assert capsys.readouterr().out == out
    (tmp_path / "in.txt").write_bytes("\ufeffYes.\r\n\r\nNo.\r\n".encode())
    assert cli.entry(["translate", *where, "--input", str(tmp_path / "in.txt")]) == 0
    assert capsys.readouterr().out == out
    (tmp_path / "in.txt").write_bytes(b"")
    empty = ["--input", str(tmp_path / "in.txt"), "--reference", str(tmp_path / "in.txt")]
    assert cli.entry(["translate", *where, *empty]) == 0
    assert capsys.readouterr().out == ""


WHERE = ["--source-lang", "en", "--target-lang", "de", "--beam", "1"]


def test_what_is_written_is_utf8_whatever_the_locale(shipped, monkeypatch):
    monkeypatch.setattr(Translate, "_written", lambda self, prompts, task: ["für"] * len(prompts))
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"for\n")))
    monkeypatch.setattr("sys.stdout", out)
    assert cli.entry(["translate", "--checkpoint", shipped, *WHERE]) == 0
    assert out.buffer.getvalue() == "für\n".encode()


def test_a_reader_that_has_enough_ends_it_quietly(shipped, monkeypatch, capsys):
    reads, writes = os.pipe()
    os.close(reads)
    monkeypatch.setattr(Translate, "_written", lambda self, prompts, task: ["für"] * len(prompts))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"for\n")))
    with os.fdopen(writes, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        assert cli.entry(["translate", "--checkpoint", shipped, *WHERE]) == 141
        monkeypatch.undo()
    assert "rror" not in capsys.readouterr().err


def remembering(shipped: str, folder: Path, trained: list[str]) -> str:
    """The translator as one that knows all directions and was trained on some."""
    table, meta = checkpoint.read_safetensors(shipped)
    path = folder / "m.safetensors"
    names = [f"translate/{direction}" for direction in trained]
    about = {"families": translation.direction_ids(), "trained": names, "longest_read": 20}
    checkpoint.write_safetensors(path, table, {**meta, **about})
    return str(path)


@pytest.mark.parametrize(
    ("direction", "code", "said"),
    [
        ("fr-ca", 0, "warning: translate/fr-ca: no such pair was trained on"),
        ("fr-en", 0, ""),
        ("en-sv", 2, "never had sv to write; it was trained on translate/fr-en, translate/en-ca"),
        ("de-en", 2, "never had de to read"),
        ("en-sw", 2, "unknown direction en-sw"),
    ],
)
def test_directions_without_training_are_refused_or_said_before_anything_is_read(
    shipped, tmp_path, monkeypatch, capsys, direction, code, said
):
    path = remembering(shipped, tmp_path, ["fr-en", "en-ca"])
    assert Translate.load(path).longest == 20
    stdin = io.TextIOWrapper(io.BytesIO(b"Oui.\n")) if code == 0 else None  # what is not read need not be there
    monkeypatch.setattr("sys.stdin", stdin)
    source, target = direction.split("-")
    where = ["--checkpoint", path, "--source-lang", source, "--target-lang", target, "--beam", "1"]
    assert cli.entry(["translate", *where]) == code
    found = capsys.readouterr().err
    assert said in found and ("warning" in found) == ("warning" in said)


def test_a_part_of_a_direction_without_training_is_refused(shipped, tmp_path, capsys):
    path = remembering(shipped, tmp_path, ["fr-en", "en-ca"])
    command = ["subnetwork", "--checkpoint", path, "--output", str(tmp_path / "part"), "--task"]
    assert cli.entry([*command, "translate/en-sv"]) == 2
    assert "never had sv to write" in capsys.readouterr().err
    assert cli.entry([*command, "translate/fr-ca"]) == 2
    assert "warning: translate/fr-ca" in (said := capsys.readouterr().err) and "no router of this model" in said


@pytest.mark.parametrize(
    ("test", "said"),
    [({"en-de": [("a", "b")], "de-en": []}, "no test sentences for de-en"), ({"en-xx": [("a", "b")]}, "xx")],
)
def test_what_could_not_be_scored_is_said_first(tmp_path, test, said):
    with pytest.raises(ValueError, match=said):
        translate.evaluate(str(tmp_path / "no run yet"), test=test, valid_data="none")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--target-lang", "fr"], "unknown direction en-fr; this model has en-de, de-en"),
        (["--reference", "short.txt"], "has 1 lines, the input 2: they must be pairs"),
        (["--input", "latin.txt"], "line 2 is not UTF-8"),
        (["--input", "nowhere.txt"], "cannot read"),
        (["--checkpoint", "nowhere"], "cannot be read as safetensors"),
        (["--beam", "0"], "--beam is 0, it must be 1 or more"),
        (["--output", "nowhere/out.txt"], "nowhere: no such folder; create it first"),
    ],
)
def test_what_cannot_be_translated_is_one_line(shipped, tmp_path, monkeypatch, capsys, change, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("Yes.\nNo.\n")
    (tmp_path / "short.txt").write_text("Ja.\n")
    (tmp_path / "latin.txt").write_bytes("Yes.\nä\n".encode("latin-1"))
    given = {"--checkpoint": shipped, "--source-lang": "en", "--target-lang": "de", "--input": "in.txt"}
    given |= {"--output": "out.txt"} | dict(zip(change[::2], change[1::2], strict=True))
    monkeypatch.setattr(translate.decode, "prefill", lambda *_, **__: pytest.fail("nothing is to be translated"))
    assert cli.entry(["translate", *(x for pair in given.items() for x in pair)]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error.splitlines()[-1]
    assert not (tmp_path / "out.txt").exists()


def test_scores_and_usage_by_direction(shipped, tokeniser, tmp_path):
    pytest.importorskip("py3langid")
    rng = np.random.default_rng(0)
    examples = [Packable(rng.integers(9, 300, 10).tolist(), [1] * 5 + [2] * 5, 16 + 7 * (i % 2)) for i in range(40)]
    write_prepared(tmp_path / "valid", examples, length=32, tokeniser=tokeniser, families=TASKS)
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.safetensors").write_bytes(Path(shipped, "model.safetensors").read_bytes())
    test = main.parallel("test", ["en-de", "de-en"])
    rows = translate.evaluate(str(run), test=test, valid_data=str(tmp_path / "valid"), beams=1, lines=3, progress=False)
    assert {(r["task"], r["metric"]) for r in rows} >= {("en-de", "bleu"), ("de-en", "chrf"), ("en-de", "off-target")}
    assert all(r["lines"] == 3 for r in rows)
    kept = [json.loads(line) for line in (run / "translations.jsonl").read_text().splitlines()]
    assert [k[0] for k in kept] == ["en-de"] * 3 + ["de-en"] * 3
    third = len(test["en-de"]) / 3
    assert [k[1] for k in kept[:3]] == [test["en-de"][int(i * third)][0] for i in range(3)]  # not the first three
    assert json.loads((run / "routing.json").read_text()) == {}


def test_usage_has_a_map_of_the_experts_and_of_the_adapters(pipeline, tokeniser, tmp_path):
    rng = np.random.default_rng(0)
    examples = [Packable(rng.integers(9, 300, 10).tolist(), [1] * 5 + [2] * 5, 16 + 7 * (i % 2)) for i in range(40)]
    write_prepared(tmp_path / "valid", examples, length=32, tokeniser=tokeniser, families=TASKS)
    own = partial(task_routers.ByTask, experts={16: [0], 23: [2]})
    parts = {"ffn": partial(MoeFfn, num_experts=4, hidden=8)}
    parts["adapter"] = partial(MoeFfn, num_experts=3, hidden=4, router=own, experts=experts.Bottleneck)
    sizes = {"d": 16, "vocab": tokeniser.vocab_size, "encoder_layers": 2, "decoder_layers": 1}
    model = Translator(**sizes, **parts, rngs=Rngs(params=0))
    found = translate.usage(
        dataclasses.replace(pipeline, model=model), str(tmp_path / "valid"), batches=2, batch_size=4
    )
    assert [*found] == ["experts", "adapters"]
    for part, width in (("experts", 4), ("adapters", 3)):
        load = np.array(found[part]["load"])  # the layers of the encoder, then of the decoder
        assert load.shape == (3, 2, width) and found[part]["tasks"] == ["en-de", "de-en"]
        np.testing.assert_allclose(load.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(found["adapters"]["load"], [[[1, 0, 0], [0, 0, 1]]] * 3)
    np.testing.assert_allclose(found["adapters"]["told_apart"], 1)


def test_heat_maps_show_every_share_and_nothing_of_a_name_is_markup():
    load = [[[0.25, 0.75], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]]
    drawn = heat_maps({"experts": {"tasks": ["en-de", "<b>"], "load": load, "told_apart": [0.1, 0.9]}})
    root = ET.fromstring(drawn)
    titles = [t.text for t in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 8 and "en-de, 1: 75.0 %" in titles and "<b>, 0: 100.0 %" in titles
    assert "crimson" not in drawn


def test_a_heat_map_of_a_runs_routing_frames_the_experts_that_a_map_gives_a_task():
    """`routing.json` as it is: how far tasks are told apart is computed."""
    routing = {"tasks": ["asr", "ocr"], "load": [[[0.5, 0.5], [1.0, 0.0]]], "mapped": {"ocr": [0]}, "entropy": []}
    drawn = heat_maps({"experts": routing})
    cells = ET.fromstring(drawn).findall("{http://www.w3.org/2000/svg}rect")
    assert drawn.count("crimson") == 1 and "told apart 0." in drawn
    framed = [cell.findtext("{http://www.w3.org/2000/svg}title") for cell in cells if cell.get("stroke") == "crimson"]
    assert framed == ["ocr, 0: 100.0 %, mapped"]
