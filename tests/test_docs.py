"""The site of the documentation builds without a warning, and its examples are those of the code."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="the site needs mkdocs (pip install '.[docs]')")
    out = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_every_page_is_there_and_links_to_pages_of_the_site(site):
    pages = {p.relative_to(site).as_posix() for p in site.rglob("*.html")}
    assert {"index.html", "results.html", "gin.html", "merging.html", "howto/router.html"} <= pages
    front = (site / "index.html").read_text("utf-8")
    assert 'href="results.html' in front and 'href="RESULTS.md' not in front
    assert "blob/main/tasks/data/LICENSES.md" in front


def test_every_configuration_is_listed_with_its_macros(site):
    page = (site / "gin.html").read_text("utf-8")
    for path in (ROOT / "gin").rglob("*.gin"):
        assert str(path.relative_to(ROOT / "gin")) in page
    assert "TASK_MAP" in page and "@task_routers.TaskMapped" in page


def test_every_setting_of_what_gin_files_name_is_listed(site):
    page = html.unescape(re.sub("<[^>]+>", "", (site / "settings.html").read_text("utf-8")))
    for name in ("steps", "spike", "patience", "hang_after", "profile_steps"):
        assert re.search(rf"\b{name}: \w+ = ", page), f"train.train takes {name}"
    assert "seconds without a step after which the stacks" in page
    assert "Grouped(" in page and "make_mesh(" in page and "class Adapters(" in page


def test_speech_translation_experiments_scripts_notebooks_and_changes_have_their_pages(site):
    front = (site / "index.html").read_text("utf-8")
    for name in ("speech", "translation", "experiments", "launch", "notebooks", "changelog", "settings"):
        assert f'href="{name}.html"' in front, name
    assert 'href="index.html#recognise-speech"' in (site / "speech.html").read_text("utf-8")
    assert "blob/main/notebooks/1_correct.ipynb" in (site / "notebooks.html").read_text("utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.stem)
def test_files_that_the_documents_name_are_there(path):
    text = path.read_text("utf-8")
    for name in re.findall(r"`((?:moe_jax|gin|tasks|tests|benchmarks|tpu_scripts)/[\w./*]+?)`", text):
        found = list(ROOT.glob(name.rstrip("/")))
        assert found, f"{path.name} names {name}"
    for name in re.findall(r"--gin_file=(\S+\.gin)", text):
        assert (ROOT / "gin" / name).exists(), f"{path.name} names {name}"


def test_the_router_of_the_how_to_works():
    """The code of the page, as it stands there."""
    import jax.numpy as jnp
    import tiny

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "howto" / "router.md").read_text("utf-8"), re.DOTALL)
    space: dict = {}
    exec(code, space)
    router = space["Coldest"](tiny.D, tiny.E, k=2, rngs=tiny.Rngs(params=0))
    info = tiny.batch().info
    decision = router(jnp.ones((*info.valid_BxL.shape, tiny.D)), info)
    coldest = decision.logits_BxLxE.argmin(-1)
    assert ((decision.expert_BxLxK[..., 0] == coldest) | ~info.valid_BxL).all()


def test_what_interprets_a_paper_says_so_everywhere():
    said = "interpretation of Task-Based MoE"
    code = [
        ROOT / path
        for path in ("moe_jax/moe/task_routers.py", "moe_jax/models/translator.py", "benchmarks/task_moe.py")
    ]
    for path in [*code, *(ROOT / "gin" / "experiments" / "task_moe").glob("*.gin")]:
        assert said in " ".join(path.read_text("utf-8").split()), path
    assert "an interpretation" in (ROOT / "README.md").read_text("utf-8").partition("## References")[2]
