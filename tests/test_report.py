"""The report: what a stranger sees is what the files say, and nothing in the files becomes markup."""

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.report import diff, write_report
from moe_jax.report.atlas import told_apart
from moe_jax.report.diff import BROKEN, FIXED, MISSED, PLAIN, marked
from moe_jax.report.results import verdict
from moe_jax.report.svg import log_ticks, ticks
from moe_jax.report.write import json_for_html

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028'\"&amp;"

ROW = {
    "task": "asr",
    "set": "all",
    "lines": 1200,
    "metric": "wer",
    "first_pass": 0.2,
    "corrected": 0.15,
    "oracle_nb": 0.12,
    "oracle_cp": 0.08,
    "relative_change": -0.25,
    "ci95": [-0.31, -0.18],
    "p_value": 0.002,
    "fixed": 300,
    "broken": 40,
    "untouched": 860,
    "normaliser": "lower case",
    "substitutions": 7,
    "deletions": 8,
    "insertions": 9,
}
ROUTING = {
    "experts": ["0", "1"],
    "tasks": ["asr", "ocr"],
    "load": [[[0.9, 0.1], [0.25, 0.75]], [[0.5, 0.5], [0, 0]]],
    "mapped": {"asr": 0, "ocr": [1]},
    "entropy": [0.4, 0.69],
    "agreement": {"asr": 0.93},
}
EXAMPLE = {
    "task": "asr",
    "set": "calls",
    "hypotheses": ["press start now", "press star now"],
    "correction": "press star now",
    "reference": "press star now",
    "kept": False,
    "errors_before": 1,
    "errors_after": 0,
}


class Page(HTMLParser):
    """Tags, attributes, visible text and the content of scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.raw = "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.cdata_elem:
            self.raw.append((self.cdata_elem, dict(self.tags[-1][1]), data))
        else:
            self.text += data

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def with_class(self, name):
        return [a for _, a in self.tags if name in (a.get("class") or "").split()]

    def ids(self):
        return {a["id"] for _, a in self.tags if "id" in a}

    def examples(self):
        return json.loads(next(data for _, a, data in self.raw if a.get("id") == "data"))


@pytest.fixture
def run(tmp_path):
    """Write a run folder from keyword arguments and return the page of its report."""

    def write(rows=(ROW,), meta=None, routing=None, log=None, examples=None, title="A run") -> Page:
        scores = {"rows": list(rows), "meta": meta or {}}
        (tmp_path / "scores.json").write_text(json.dumps(scores))
        if routing is not None:
            (tmp_path / "routing.json").write_text(json.dumps(routing))
        for name, lines in (("metrics.jsonl", log), ("examples.jsonl", examples)):
            if lines is not None:
                (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        path = write_report(tmp_path, title=title)
        assert path == tmp_path / "report.html"
        assert not list(tmp_path.glob(".report*"))
        return Page(path.read_text("utf-8"))

    return write


def loss_log(steps=400):
    log = [
        {"step": s, "loss": 1 + 6 / s, "loss/asr": 1 + 5 / s, "dropped": 0.0, "lr": 1e-3, "host": "a"}
        for s in range(1, steps + 1)
    ]
    return [*log, {"step": steps, "valid/loss": 1.25, "valid/loss/asr": 1.5}]


def test_a_stranger_reads_the_numbers(run):
    page = run(meta={"checkpoint step": "3000", "command": "x " * 40})
    for said in (
        "helps with speech recognition",
        "Of 1,200 lines it left 300 with fewer errors and 40 with more",
        "20.00\u202f% → 15.00\u202f%",
        "−25.0",
        "−31.0 … −18.0\u202f%",
        "= 0.002",
        "12.00\u202f%",
        "7 / 8 / 9",
        "lower case",
        "3000",
    ):
        assert said in page.text, said
    assert [a["class"] for a in page.named("article")] == ["card helps"]


@pytest.mark.parametrize(
    ("metric", "first", "last", "p", "expected"),
    [
        ("wer", 0.2, 0.1, 0.01, "helps"),
        ("wer", 0.1, 0.2, 0.01, "hurts"),
        ("chrf", 0.40, 0.50, 0.01, "helps"),
        ("f0.5", 0.4, 0.3, 0.049, "hurts"),
        ("cer", 0.2, 0.1, 0.05, "flat"),
        ("bleu", 0.30, 0.30, 0.01, "flat"),
        ("bleu", 0.30, 0.31, None, "untested"),
    ],
)
def test_verdicts_know_which_way_is_better(metric, first, last, p, expected):
    assert verdict({"metric": metric, "first_pass": first, "corrected": last, "p_value": p}) == expected


def test_better_is_to_the_right_for_every_measure(run):
    rows = [
        ROW,
        {**ROW, "task": "mt", "metric": "chrf", "relative_change": 0.25, "ci95": [0.18, 0.31]},
    ]
    page = run(rows)
    dots = [a["cx"] for a in page.named("circle")]
    zeros = [a["x1"] for a in page.with_class("zero")]
    assert len(dots) == 4 and len(set(dots)) == 1, "the same gain lies at the same place"
    assert float(dots[0].rstrip("%")) > float(zeros[0].rstrip("%"))


def test_rows_with_nothing_optional(run):
    bare = {key: ROW[key] for key in ("task", "set", "lines", "metric", "first_pass", "corrected")}
    page = run([bare, {**bare, "task": "gec", "metric": "f0.5", "first_pass": 0.0, "relative_change": math.inf}])
    assert "not tested" in page.text and "−5.0" in page.text and "+15.0" in page.text
    assert not page.with_class("whisker") and "cost" not in page.ids()


def test_sections_of_absent_files_are_left_out(run):
    optional = {"experts", "training", "examples"}
    assert not optional & run().ids()
    full = run(routing=ROUTING, log=loss_log(), examples=[EXAMPLE])
    assert optional <= full.ids()
    links = {a["href"][1:] for a in full.named("a") if "=" not in a["href"]}
    assert links <= full.ids(), "every link of the page leads somewhere"


def test_empty_files_are_as_absent(run):
    assert not {"training", "examples"} & run(log=[], examples=[]).ids()


def test_routing_grids_show_shares_and_mapped_experts(run):
    page = run(routing=ROUTING)
    assert len(page.with_class("heat")) == 2
    titles = [a["title"] for _, a in page.tags if "mapped" in (a.get("class") or "").split()]
    shares = {"asr, expert 0": ["90.0 %", "50.0 %"], "ocr, expert 1": ["75.0 %", "0.0 %"]}
    assert titles == [f"{cell}: {shares[cell][layer]}" for layer in (0, 1) for cell in shares]
    assert "0.40 of 0.69 nats" in page.text and "93.0" in page.text
    assert "h20" in page.with_class("mapped")[0]["class"], "the greatest share has the deepest shade"


def test_a_task_may_be_mapped_to_several_experts(run):
    page = run(routing={**ROUTING, "mapped": {"ocr": [0, 1]}, "agreement": {"ocr": 0.5}})
    assert [a["title"][:13] for _, a in page.tags if "mapped" in (a.get("class") or "").split()][:2] == [
        "ocr, expert 0",
        "ocr, expert 1",
    ]
    assert "(expert 0 or 1)" in page.text


def test_tasks_told_apart():
    assert told_apart([[1.0, 0.0], [0.0, 1.0]]) == pytest.approx(1)
    assert told_apart([[0.3, 0.7], [0.3, 0.7]]) == pytest.approx(0)
    assert told_apart([[1.0, 0.0], [0.0, 0.0]]) == 0


def test_learning_curves(run):
    page = run(log=loss_log())
    assert len(page.with_class("chart")) == 4  # all tasks, asr, dropped, lr
    names = [a["data-name"] for a in page.named("polyline")]
    assert names.count("training") == 2 and names.count("validation") == 2
    assert "training 1.015, validation 1.25" in page.text and "400 steps" in page.text
    coordinates = re.findall(r"[-\d.]+|nan|inf", " ".join(a["points"] for a in page.named("polyline")))
    assert len(coordinates) < 2 * 4 * 170, "long lines are thinned"
    assert all(0 <= float(v) <= 360 for v in coordinates)


def test_a_loss_that_is_not_finite_is_a_gap_and_is_said(run):
    log = [{"step": s, "loss": math.nan if s in (3, 6) else 2.0} for s in range(1, 7)]
    page = run(log=log)
    assert "loss is not a finite number at step 3 and 1 later steps" in page.text
    assert len(page.named("polyline")) == 2 and "nan" not in str(page.named("polyline"))


def test_a_resumed_run_replaces_its_steps(run):
    page = run(log=[{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}, {"step": 2, "loss": 4.0}])
    assert "training 4" in page.text and "training 8" not in page.text


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.93, 0.97), (-3.0, 12000.0), (5.0, 5.0)])
def test_ticks_lie_within(low, high):
    found = ticks(low, high)
    assert 1 <= len(found) <= 9 and all(low - 1e-9 <= t <= high + 1e-9 for t in found)


def test_log_ticks():
    assert log_ticks(0.9, 6) == pytest.approx([1, 2, 5])
    assert log_ticks(0.0009, 11) == pytest.approx([0.001, 0.01, 0.1, 1, 10])


def test_nothing_from_the_files_becomes_markup(run):
    example = {
        **EXAMPLE,
        "task": NASTY,
        "set": NASTY,
        "hypotheses": [NASTY, NASTY],
        "correction": NASTY + " x",
        "reference": NASTY,
    }
    page = run(
        [{**ROW, "task": NASTY, "normaliser": NASTY}, {**ROW, "set": NASTY, "signature": NASTY}],
        {NASTY: NASTY},
        {**ROUTING, "experts": [NASTY, "1"], "tasks": [NASTY, "ocr"], "mapped": {NASTY: 0}},
        [{"step": 1, NASTY: 1.0, f"loss/{NASTY}": 2.0}],
        [example],
        title=NASTY,
    )
    assert not page.named("img")
    assert [a.get("type") for a in page.named("script")] == ["application/json", None]
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on") or key == "style"]
    assert NASTY in page.text
    shown = page.examples()[0]
    assert shown["others"] == [NASTY] and shown["task"] == NASTY
    data = next(data for _, a, data in page.raw if a.get("id") == "data")
    assert not set("<>&\u2028\u2029") & set(data)


def test_the_page_asks_nothing_of_the_network_and_runs_only_its_own_code(run):
    page = run(routing=ROUTING, log=loss_log(), examples=[EXAMPLE])
    policy = next(a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    code = [(tag, data) for tag, a, data in page.raw if a.get("id") != "data"]
    assert sorted(tag for tag, _ in code) == ["script", "style"]
    for tag, data in code:
        digest = base64.b64encode(hashlib.sha256(data.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|url\((?!#)|@import", data)
    for tag, a in page.tags:
        assert "src" not in a and a.get("href", "#")[:1] in "#d", (tag, a)


def test_lone_surrogates_and_all_scripts_survive(run):
    texts = ["السلام عليكم", "точка с запятой", "你好世界", "half a \ud83d pair"]
    page = run(examples=[{**EXAMPLE, "hypotheses": [t], "correction": t, "reference": t} for t in texts])
    assert [e["lines"][0] for e in page.examples()] == [[t] for t in texts[:3]] + [["half a ? pair"]]


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_embedded_json_is_the_same_json(text):
    written = json_for_html({"x": text})
    assert json.loads(written) == {"x": text} and "<" not in written


@pytest.mark.parametrize(
    ("first", "corrected", "reference", "expected"),
    [
        ("a b c", "a x c", "a x c", (["a ", ("b", FIXED), " c"], ["a ", ("x", FIXED), " c"], ["a x c"])),
        (
            "a b c",
            "a x c",
            "a b c",
            (["a ", ("b", BROKEN), " c"], ["a ", ("x", BROKEN), " c"], ["a ", ("b", BROKEN), " c"]),
        ),
        ("a b", "a b", "a c", (["a ", ("b", MISSED)], ["a ", ("b", MISSED)], ["a ", ("c", MISSED)])),
        ("a b b", "a b", "a b", (["a b ", ("b", FIXED)], ["a b"], ["a b"])),
        ("a b", "a", "a b", (["a ", ("b", BROKEN)], ["a"], ["a ", ("b", BROKEN)])),
        ("a u", "a v", "a w", (["a ", ("u", MISSED)], ["a ", ("v", BROKEN)], ["a ", ("w", MISSED)])),
        ("a u", "a", "a w", (["a ", ("u", MISSED)], ["a"], ["a ", ("w", MISSED)])),
        (
            "你号世界",
            "你好世界",
            "你好世界",
            (["你", ("号", FIXED), "世界"], ["你", ("好", FIXED), "世界"], ["你好世界"]),
        ),
        ("", "x y", "", ([], [("x y", BROKEN)], [])),
    ],
)
def test_word_differences(first, corrected, reference, expected):
    assert marked(first, corrected, reference) == expected


WORDS = st.text(alphabet="ab \u00a0\n你", max_size=12)


@settings(max_examples=200, deadline=None)
@given(WORDS, WORDS, WORDS)
def test_marked_pieces_join_to_their_texts(first, corrected, reference):
    def kinds(pieces):
        return {PLAIN if isinstance(p, str) else p[1] for p in pieces}

    lines = marked(first, corrected, reference)
    joined = ["".join(p if isinstance(p, str) else p[0] for p in pieces) for pieces in lines]
    assert joined == [first, corrected, reference]
    same_c, same_r = marked(first, first, reference), marked(first, reference, reference)
    assert not {FIXED, BROKEN} & kinds(same_c[1]), "no change, nothing fixed or broken"
    assert not {MISSED, BROKEN} & (kinds(same_r[1]) | kinds(same_r[0])), "a perfect correction has no fault"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("scores.json", b'{"rows": [{"ta', "not whole JSON"),
        ("scores.json", b'{"rows": []}', '"rows" must be a list with at least one score'),
        ("scores.json", b'{"rows": [7]}', "row 1: must be an object, is int"),
        ("scores.json", b"[" * 100_000, "not whole JSON"),
        ("scores.json", b"\xff\xfe", "not UTF-8"),
        ("scores.json", {"rows": [{**ROW, "metric": "ter"}]}, "row 1: unknown metric 'ter'; known: wer, cer"),
        (
            "scores.json",
            {"rows": [ROW, {**ROW, "lines": "9"}]},
            'row 2: "lines" must be a whole number, is "9"',
        ),
        ("scores.json", {"rows": [{**ROW, "corrected": math.nan}]}, '"corrected" must be a number, is NaN'),
        ("scores.json", {"rows": [{**ROW, "fixed": 1100}]}, "is more than the 1200 lines"),
        ("scores.json", {"rows": [{**ROW, "fixed": -1}]}, '"fixed" must be from 0 to 2^63, is -1'),
        ("scores.json", {"rows": [{**ROW, "ci95": 0.1}]}, '"ci95" must be a list'),
        ("scores.json", {"rows": [{**ROW, "ci95": [1]}]}, '"ci95" must be [low, high], is [1]'),
        ("metrics.jsonl", b'{"step": 1%s}' % (b"0" * 400), "must be from 0 to 2^63, is 1000"),
        (
            "routing.json",
            {**ROUTING, "load": [[[0.9, 0.1]]]},
            "layer 0: must hold one list for each of the 2 tasks",
        ),
        ("routing.json", {**ROUTING, "load": [[[0.9, 0.1], [1]]]}, "task ocr: must hold 2 numbers"),
        ("routing.json", {**ROUTING, "load": [[[0.9, 0.1], [1, 1]]]}, "add up to 2, not 1"),
        ("routing.json", {**ROUTING, "entropy": [1]}, "one number for each of the 2 layers"),
        ("routing.json", {**ROUTING, "mapped": {"asr": 2}}, "there are only experts 0 to 1"),
        ("routing.json", {**ROUTING, "mapped": {"asr": [0, "1"]}}, "there are only experts 0 to 1"),
        ("routing.json", {**ROUTING, "mapped": {"asr": "0"}}, '"asr" must be a list'),
        ("routing.json", {**ROUTING, "agreement": {"asr": "x"}}, '"asr" must be a number'),
        ("metrics.jsonl", b'{"step": 1, "loss": 2}\n{"step": 2, "lo', "metrics.jsonl:2: not whole JSON"),
        ("metrics.jsonl", b'{"loss": 2}\n', 'metrics.jsonl:1: "step" must be a whole number, is null'),
        ("examples.jsonl", b'\n{"task": "asr"}\n', 'examples.jsonl:2: "set" must be text'),
        ("examples.jsonl", {**EXAMPLE, "hypotheses": []}, "examples.jsonl:1: hypotheses must be"),
        ("examples.jsonl", b"[1]\n", "examples.jsonl:1: must be a JSON object, is list"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, name, content, complaint):
    (tmp_path / "scores.json").write_text(json.dumps({"rows": [ROW]}))
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError) as caught:
        write_report(tmp_path, title="t")
    message = str(caught.value)
    assert complaint in message and name in message and "\n" not in message
    assert not (tmp_path / "report.html").exists()


def test_without_scores_there_is_no_report(tmp_path):
    with pytest.raises(ValueError, match=r"scores\.json: not found; evaluate the run first"):
        write_report(tmp_path, title="t")


def test_a_failed_report_leaves_the_old_one(run, tmp_path):
    run()
    before = (tmp_path / "report.html").read_bytes()
    (tmp_path / "examples.jsonl").write_text("{")
    with pytest.raises(ValueError):
        write_report(tmp_path, title="t")
    assert (tmp_path / "report.html").read_bytes() == before


def test_two_thousand_examples_stay_small_and_quick(run, tmp_path):
    page = run(examples=[{**EXAMPLE, "set": f"s{n % 7}"} for n in range(2000)])
    assert len(page.examples()) == 2000
    assert (tmp_path / "report.html").stat().st_size < 600_000
    assert not page.with_class("example"), "examples are drawn in the browser, a page at a time"


def test_the_report_needs_no_jax():
    code = "import sys, moe_jax.report; sys.exit('jax' in sys.modules or 'tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_a_difference_for_a_notebook_is_markup_of_ours_alone():
    shown = diff.html("teh <b> cat", "the <b> dog", "the <b> cat")
    assert "&lt;b&gt;" in shown and "<b>" not in shown.replace("<b style", "")
    assert f'<b style="color:{diff.COLOURS[diff.FIXED]}">the</b>' in shown
    assert f'<b style="color:{diff.COLOURS[diff.BROKEN]}">dog</b>' in shown
