"""Formats give back what they read, name what they cannot read, and never raise anything but FormatError."""

import contextlib
import gzip
import io
import json
import lzma
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moe_jax import formats
from moe_jax.formats import Bad, FormatError, Record, json_list, objects

# Anything that a file of the format can hold in a line or a cell; "\r" ends a line only before "\n".
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\n\r\t\ufeff"), max_size=12)
WORDS = TEXTS.filter(lambda text: text and not text.isspace())
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
EXTRAS = st.dictionaries(st.sampled_from(["id", "score", "Meta", "weiß"]), SCALARS | st.lists(SCALARS, max_size=2))
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def corrected(path: Path, fmt: str | None = None, field: str = "corrected") -> str:
    """The file with every best hypothesis in brackets as its correction."""
    format = formats.FORMATS[formats.detect(path, fmt)]
    out = []
    for part in formats.parts(path, fmt, field):
        if isinstance(part, Record):
            part = format.corrected(part, f"[{part.hypotheses[0]}]", field)
        out.append(format.failed(part) if isinstance(part, Bad) else part)
    return "".join(out)


def bad_lines(path: Path, fmt: str | None = None) -> list[str]:
    return [str(part.error) for part in formats.parts(path, fmt) if isinstance(part, Bad)]


@QUICK
@given(
    rows=st.lists(st.tuples(st.lists(TEXTS, min_size=1, max_size=4), EXTRAS), max_size=6),
    indent=st.sampled_from([None, 2, "\t"]),
    ascii=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_json_list_round_trip(tmp_path, rows, indent, ascii, chunk):
    values = [{"input": hypotheses, **extra} for hypotheses, extra in rows]
    path = write(tmp_path, "x.json", json.dumps(values, indent=indent, ensure_ascii=ascii))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "CHUNK", chunk)
        assert [list(r.hypotheses) for r in formats.read(path)] == [hypotheses for hypotheses, _ in rows]
        out = corrected(path)
    want = [{**value, "corrected": f"[{value['input'][0]}]"} for value in values]
    assert json.loads(out) == want


@QUICK
@given(
    rows=st.lists(st.tuples(st.lists(TEXTS, min_size=1, max_size=4), EXTRAS), min_size=1, max_size=6),
    ending=st.sampled_from(["\n", "\r\n", "\n\n", " \n\t"]),
    mark=st.sampled_from(["", "\ufeff"]),
)
def test_jsonl_round_trip(tmp_path, rows, ending, mark):
    values = [{"hypotheses": hypotheses, **extra} for hypotheses, extra in rows]
    lines = [json.dumps(value, ensure_ascii=False) for value in values]
    path = write(tmp_path, "x.jsonl", mark + ending.join(lines))
    assert [list(r.hypotheses) for r in formats.read(path)] == [hypotheses for hypotheses, _ in rows]
    out = corrected(path)
    added = [objects.quoted(f"[{value['hypotheses'][0]}]") for value in values]
    assert out == mark + ending.join(
        f'{line[:-1]}, "corrected": {text}}}' for line, text in zip(lines, added, strict=True)
    )


@QUICK
@given(
    lines=st.lists(TEXTS, min_size=1).filter(any),
    ending=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
    mark=st.sampled_from(["", "\ufeff"]),
)
def test_text_round_trip(tmp_path, lines, ending, last, mark):
    path = write(tmp_path, "x.txt", mark + ending.join(lines) + ending * last)
    spoken = [line for line in lines if line and not line.isspace()]
    assert [r.hypotheses for r in formats.read(path)] == [(line,) for line in spoken]
    want = [f"[{line}]" if line and not line.isspace() else line for line in lines]
    assert corrected(path) == mark + ending.join(want) + ending * last


@QUICK
@given(
    rows=st.lists(st.tuples(WORDS, WORDS, TEXTS), min_size=1, max_size=5),
    header=st.booleans(),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_tsv_round_trip(tmp_path, rows, header, ending):
    names = ["id", "hyp1", "Hypothesis_2"] if header else None
    lines = ["\t".join(row) for row in ([names] if names else []) + rows]
    path = write(tmp_path, "x.tsv", ending.join(lines))
    hypotheses = [tuple(row[1:] if header else row) for row in rows]
    hypotheses = [h if h[-1] else h[:-1] for h in hypotheses]
    assert [r.hypotheses for r in formats.read(path)] == hypotheses
    added = (["corrected"] if header else []) + [f"[{h[0]}]" for h in hypotheses]
    assert corrected(path) == ending.join(f"{line}\t{text}" for line, text in zip(lines, added, strict=True))


SEEDS = (
    b'[{"input": ["a b", "a c"], "output": "a b", "n": 1.50e3}, {"input1": "a.", "input2": "b. c. "}]\n',
    b'{"hypotheses": ["\\u00e9", "x"], "id": 12345678901234567890}\r\n\n{"text": "t"}\n',
    b"\xef\xbb\xbfone line\r\n\r\nnext \xc3\xa9 line",
    b"id\thyp1\thyp2\n1\ta b\ta c\n2\td\n",
)


@st.composite
def damaged(draw) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3) | st.sampled_from([b'"', b"[", b"}"]))
    return bytes(data[: draw(st.integers(1, len(data) + 1))])


@settings(QUICK, max_examples=300)
@given(data=damaged() | st.binary(min_size=1, max_size=60), name=st.sampled_from(sorted(formats.FORMATS)))
@example(b"[" * 100_000, "json")
@example(b"[" * 100_000, "jsonl")
@example(b"[" + b"9" * 5000 + b"]", "json")
@example(b'["\xff"]', "json")
@example(b"[1.5, tru", "json")
def test_damage_is_a_format_error_or_passes_through(tmp_path, data, name):
    path = write(tmp_path, "x", data)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(FormatError):
        patch.setattr(json_list, "CHUNK", 7)
        parts = list(formats.parts(path, name))
        text = "".join(part if isinstance(part, str) else part.raw for part in parts)
        back = text.encode("utf-8", "surrogateescape")
        # a short row of a table is padded; nothing else ever changes
        assert (back.replace(b"\t", b"") == data.replace(b"\t", b"")) if name == "tsv" else back == data
        assert all("\n" not in str(part.error) for part in parts if isinstance(part, Bad))
        corrected(path, name, "new key")


def test_hyporadise_both_shapes(tmp_path):
    listed = {"instruction": "fix", "input": ["a b", "a d", "a c"], "output": "a b"}
    split = {"input1": "a b.", "input2": "a d. a c. ", "output": "a b"}
    lined = {"input1": "a b", "input2": "a d\na c\n", "output": "a b"}
    path = write(tmp_path, "h.json", json.dumps([listed, split, lined, {**listed, **split}]))
    records = list(formats.read(path))
    assert [r.hypotheses for r in records] == [("a b", "a d", "a c")] * 4
    assert {r.reference for r in records} == {"a b"}
    assert {r.line for r in records} == {1}
    unclear = write(tmp_path, "u.json", json.dumps([{"input1": "a. b.", "input2": "a. c. a. d. "}]))
    assert bad_lines(unclear) == [
        f'{unclear}:1: record 1: "input2" cannot be split: ". " also stands inside "input1"; '
        'give the hypotheses as a list under "input"'
    ]


@pytest.mark.parametrize(
    ("value", "hypotheses", "reference", "sources", "task"),
    [
        (
            {"hypotheses": ["a", "b"], "reference": "r", "task": "asr", "lang": "en"},
            ("a", "b"),
            "r",
            (),
            "asr",
        ),
        (
            {"hypotheses": ["a"], "sources": {"de": "x", "fr": "y"}, "task": "mt"},
            ("a",),
            None,
            ("x", "y"),
            "mt",
        ),
        ({"hypotheses": ["a"], "sources": ["x"]}, ("a",), None, ("x",), None),
        ({"text": "a"}, ("a",), None, (), None),
        ({"hypothesis": "a", "reference": None}, ("a",), None, (), None),
        ({"nbest": [{"text": "a", "score": -1.5}, {"hypothesis": "b"}]}, ("a", "b"), None, (), None),
        ({"input": "a", "output": "r"}, ("a",), "r", (), None),
        ({"text": "the reference", "pred_text": "a", "duration": 1.0}, ("a",), "the reference", (), None),
        ({"text": "the reference", "beams": [["a", -1.0], ["b", -2]]}, ("a", "b"), "the reference", (), None),
        ({"hypotheses": [""]}, ("",), None, (), None),
    ],
)
def test_keys(tmp_path, value, hypotheses, reference, sources, task):
    path = write(tmp_path, "x.jsonl", json.dumps(value) + "\n")
    (record,) = formats.read(path)
    assert (record.hypotheses, record.reference, record.sources, record.task) == (
        hypotheses,
        reference,
        sources,
        task,
    )


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        (
            "x.jsonl",
            '{"text": "a"}\n{"hypotheses": []}\n',
            'x.jsonl:2: no hypotheses: expected a non-empty list under "hypotheses"; add one or remove',
        ),
        (
            "x.jsonl",
            '{"input": ["a", 3]}',
            'x.jsonl:1: hypothesis 2 under "input" is a number; give each as a string',
        ),
        (
            "x.jsonl",
            '{"text": "a", "task": 3}',
            'x.jsonl:1: "task" is a number; give the name of a task family, or',
        ),
        (
            "x.jsonl",
            '{"text": "a", "sources": [1]}',
            'x.jsonl:1: "sources" is not a list of strings; give a list, or',
        ),
        (
            "x.jsonl",
            '{"text": "\\ud800"}',
            "x.jsonl:1: a lone surrogate escape such as \\ud800 is not text; write",
        ),
        (
            "x.json",
            '[{"input": ["a"], "output": "\\udfff"}]',
            "x.json:1: record 1: a lone surrogate escape such as \\ud800 is not text; write",
        ),
        ("x.jsonl", "[1]\n", 'x.jsonl:1: expected a JSON object, found a list; write {"hypotheses": [...]}'),
        (
            "x.jsonl",
            '{"text": "a"',
            "x.jsonl:1: not JSON: Expecting ',' delimiter at character 13; write one JSON",
        ),
        (
            "x.json",
            '[{"text": "a"},\n\n {}]',
            "x.json:3: record 2: no hypotheses: expected a non-empty list under",
        ),
        (
            "x.txt",
            b"abc\nd\xc3\xa9\xe9f\n",
            "x.txt:2: not UTF-8: byte 0xe9 at byte 3 of the record; convert the file",
        ),
        (
            "x.tsv",
            "a\tb\nc\td\te\n",
            "x.tsv:2: 3 columns where the first row has 2; give every row as many columns",
        ),
        (
            "x.tsv",
            "id\thyp\n1\n",
            "x.tsv:2: no hypotheses: the row ends before their column; add one or remove the row",
        ),
    ],
)
def test_bad_records_pass_through_and_are_named(tmp_path, name, data, line):
    path = write(tmp_path, name, data)
    (told,) = bad_lines(path)
    assert told.startswith(f"{tmp_path}/{line}")
    with pytest.raises(FormatError) as caught:
        list(formats.read(path))
    assert str(caught.value) == told
    assert "".join(p if isinstance(p, str) else p.raw for p in formats.parts(path)).encode(
        "utf-8", "surrogateescape"
    ) == (data if isinstance(data, bytes) else data.encode())


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("x.json", "", "x.json: the file is empty; check what wrote it"),
        (
            "x.json",
            '"text"',
            'x.json:1: expected a JSON list "[...]"; pass --format=jsonl if it holds an object a line',
        ),
        (
            "x.json",
            '[{"text": "a"},\n{"text": "b',
            "x.json:2: record 2: the file ends inside this record; write the",
        ),
        (
            "x.json",
            '[{"text": "a"}\n',
            "x.json:2: the file ends after record 1, before the closing ]; write the file",
        ),
        ("x.json", '[{"text": "a"} {"', 'x.json:1: expected , or ] after record 1, found "{"; mend the list'),
        (
            "x.json",
            '[{"text": "a"},]',
            "x.json:1: record 2: not JSON: Expecting value (line 1); mend the record",
        ),
        (
            "x.json",
            '[{"text":\n oops}, 1, 2, 3, 4, 5]',
            "x.json:1: record 1: not JSON: Expecting value (line 2); mend",
        ),
        (
            "x.json",
            '[{"text": "a"}]\n{}',
            'x.json:2: text after the closing "]"; remove it, or pass --format=jsonl',
        ),
        (
            "x.wav",
            "RIFF",
            "x.wav: cannot tell its format from its name; pass --format, one of: json jsonl text tsv",
        ),
        (
            "x.txt.gz",
            b"not gzip",
            "x.txt.gz: torn or not compressed: Not a gzipped file (b'no'); compress it again",
        ),
        (
            "x.txt.gz",
            gzip.compress(b"a\n" * 99, mtime=0)[:-9],
            "x.txt.gz: torn or not compressed: Compressed file ended before",
        ),
        (
            "x.txt.xz",
            lzma.compress(b"a\n" * 99)[:-9],
            "x.txt.xz: torn or not compressed: Compressed file ended before",
        ),
        (
            "x.jsonl",
            '{"text": "a", "corrected": "b"}',
            'x.jsonl:1: the key "corrected" is there already; choose',
        ),
        (
            "x.tsv",
            "hyp\tcorrected\n",
            'x.tsv:1: the column "corrected" is there already; choose another with --field',
        ),
    ],
)
def test_what_cannot_be_passed_by_stops(tmp_path, name, data, line):
    path = write(tmp_path, name, data)
    with pytest.raises(FormatError) as caught:
        list(formats.parts(path, None, "corrected"))
    assert str(caught.value).startswith(f"{tmp_path}/{line}")


def test_missing_files_and_unknown_formats(tmp_path):
    with pytest.raises(FormatError, match=r"none\.json: cannot be read: No such file or directory; check the path"):
        list(formats.read(tmp_path / "none.json"))
    with pytest.raises(FormatError, match="unknown format 'csv'; choose one of: json jsonl text tsv"):
        formats.detect(tmp_path / "x.csv", "csv")
    with pytest.raises(FormatError, match="not a regular file"):
        formats.detect("/dev/null", "text")


def test_numbers_layout_and_marks_stay_as_they_are(tmp_path):
    numbers = '"p": 1.50E+3, "n": 123456789012345678901, "x": NaN'
    text = f'\ufeff [\r\n  {{\r\n    "input": ["a"],\r\n    {numbers}\r\n  }}\r\n]\r\n'
    path = write(tmp_path, "x.json", text)
    assert corrected(path) == text.replace("NaN", 'NaN,\r\n    "corrected": "[a]"')


@pytest.mark.parametrize("chunk", range(1, 30))
def test_numbers_are_not_cut_by_the_window(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_list, "CHUNK", chunk)
    values = [
        "1.5e10",
        "-12",
        "true",
        "-Infinity",
        "12345678.25",
        '"\\ud83d\\ude00"',
        "null",
        '{"text": "a"}',
    ]
    path = write(tmp_path, "x.json", f"[{', '.join(values)}]")
    parts = [part for part in formats.parts(path) if not isinstance(part, str)]
    assert [part.raw for part in parts] == values
    assert [type(part) for part in parts] == [Bad] * 7 + [Record]


def test_json_file_of_lines_is_jsonl(tmp_path):
    assert formats.detect(write(tmp_path, "x.json", '\ufeff \n{"text": "a"}\n')) == "jsonl"
    assert formats.detect(write(tmp_path, "y.json", '\n [{"text": "a"}]')) == "json"
    assert formats.detect(write(tmp_path, "z.JSON.gz", gzip.compress(b'{"text": "a"}', mtime=0))) == "jsonl"


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_input(tmp_path, ending, pack):
    path = write(tmp_path, f"x.txt{ending}", pack(b"one\ntwo\n"))
    assert [r.hypotheses for r in formats.read(path)] == [("one",), ("two",)]


def test_a_failed_object_carries_its_error_once(tmp_path):
    path = write(tmp_path, "x.jsonl", '{"id": 7}\n{}\n3\n{"correction_error": "old"}\n{"torn\n')
    first, empty, *rest = corrected(path).splitlines()
    fix = 'no hypotheses: expected a non-empty list under "hypotheses"; add one or remove the record'
    assert json.loads(first) == {"id": 7, "correction_error": fix}
    assert json.loads(empty) == {"correction_error": fix}
    assert rest == ["3", '{"correction_error": "old"}', '{"torn']


def test_tsv_header_names_its_columns(tmp_path):
    rows = "id\ttask\tsource_de\thyp1\thyp2\treference\n1\tmt\tHaus\thome\thouse\thouse\n2\t\t\tx\n"
    path = write(tmp_path, "x.tsv", rows)
    first, second = formats.read(path)
    assert (first.hypotheses, first.sources, first.task, first.reference) == (
        ("home", "house"),
        ("Haus",),
        "mt",
        "house",
    )
    assert (second.hypotheses, second.task, second.reference) == (("x",), None, None)
    assert corrected(path).splitlines()[2] == "2\t\t\tx\t\t\t[x]"  # padded, so that the new column lines up


def test_corrections_never_break_a_line(tmp_path):
    (record,) = formats.read(write(tmp_path, "x.txt", "a"))
    assert formats.FORMATS["text"].corrected(record, "b\r\nc\td", "") == "b  c d"
    assert formats.FORMATS["tsv"].corrected(record, "b\nc", "") == "a\tb c"


class Endless(io.StringIO):
    """A JSON list of ever more records that tells how much of it was read."""

    def __init__(self) -> None:
        super().__init__()
        self.given = 0

    def read(self, size: int | None = -1, /) -> str:
        text = "[" * (not self.given) + '{"input": ["a b c"]}, ' * (max(size or 0, 1) // 22 + 1)
        self.given += len(text)
        return text


def test_a_large_list_streams():
    stream = Endless()
    parts = json_list.read(stream, "x.json", None)
    for _ in range(20_000):
        taken = next(parts)
    assert isinstance(taken, Record)
    assert stream.given < 10_000 * 23 + 2 * json_list.CHUNK


def test_a_record_of_texts_in_memory_is_that_of_a_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"hypotheses": ["ä b", "c"]}\n')
    (read,) = formats.read(tmp_path / "a.jsonl")
    assert formats.Record.of(["ä b", "c"]) == read
    for wrong in ([], "text"):
        with pytest.raises(ValueError, match="a list of hypotheses, one at least"):
            formats.Record.of(wrong)
