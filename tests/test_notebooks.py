"""The notebooks run from the first cell to the last, with few steps, in a folder of their own; and they are clean."""

import ast
import json
import re
from pathlib import Path

import pytest
import tiny

from benchmarks import notebooks

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# What the cell of settings is followed by here.
SMALL = {
    "1_correct": "LINES = 6",
    "2_routing": "STEPS, BATCH, MORE = 2, 2, ['--gin.EXAMPLES=60']",
    # One program, which 2_routing and the small quickstart compile too.
    "3_ablation": "STEPS, GRID, MORE = 2, 'TASK_MAP=0.05', ['--gin.EXAMPLES=60', '--gin.BATCH=2']",
    "4_merge": "STEPS, MORE = 1, ['--gin.EXAMPLES=60', '--gin.BATCH=2']",
    "5_speech": "STEPS, MORE = 1, ['--gin.D=32', '--gin.LAYERS=1', '--gin.BATCH=4', '--gin.MANIFEST=few.jsonl']",
}


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text("utf-8"))["cells"]


def test_every_notebook_is_known_here():
    assert [p.stem for p in NOTEBOOKS] == list(SMALL) == list(notebooks.PROMISED)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_is_clean_and_defines_nothing_that_belongs_in_the_package(path):
    found = cells(path)
    first = "".join(found[0]["source"])
    assert f"/blob/main/notebooks/{path.name})" in first and first.startswith("# ")
    for cell in found:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None
            if "install" not in cell["metadata"].get("tags", []):
                body = ast.parse("".join(cell["source"]))
                assert not [n for n in ast.walk(body) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in found) >= 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_in_colab_a_reader_can_set_what_forms_hide_and_follow_links(path):
    for cell in cells(path):
        source = "".join(cell["source"])
        assert "](../" not in source and "](./" not in source  # Colab has this file alone
        if cell["metadata"].get("cellView") == "form" and "install" not in cell["metadata"]["tags"]:
            lines = [line for line in source.splitlines() if not line.startswith("#")]
            assert lines and all(" = " in line and "# @param" in line for line in lines), source


def test_models_and_merges_of_other_settings_are_not_taken_for_these():
    source = "".join("".join(c["source"]) for c in cells(NOTEBOOKS[3]))
    assert all("{STEPS}" in name for name in re.findall(r'\{FOLDER\}/([^"]+)"', source))
    assert "'+'.join(FAMILIES)" in source


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs(path, corpus, tmp_path):
    for module in ("matplotlib", "IPython", "seqio", *(["soundfile"] if "speech" in path.stem else [])):
        pytest.importorskip(module, reason="notebooks need pip install '.[data,speech,notebooks]'")
    if "speech" in path.stem:  # a few of the recordings
        prompts = path.parents[1] / "tasks" / "data" / "prompts"
        rows = [json.loads(line) for line in (prompts / "prompts.jsonl").read_text().splitlines()]
        few = [
            row for split in ("train", "valid", "test") for row in rows if row["split"] == split and row["seconds"] < 2
        ]
        few = few[:12] + few[-3:] + [row for row in few if row["split"] == "valid"][:4]
        lines = (json.dumps(row | {"audio": str(prompts / row["audio"])}) + "\n" for row in few)
        (tmp_path / "few.jsonl").write_text("".join(lines))
    environment = {"JAX_NUM_CPU_DEVICES": "1", "MOE_JAX_DATA": str(corpus)}
    done = notebooks.executed(path, tmp_path, SMALL[path.stem], timeout=900, **environment)
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    pictures = list(tmp_path.glob("picture*"))
    shows = ("plt.show()", "display(SVG(")
    assert len(pictures) == sum("".join(c["source"]).count(show) for c in cells(path) for show in shows)
    assert all(p.stat().st_size > 5000 for p in pictures)
