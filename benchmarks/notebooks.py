"""How long a reader waits for each notebook, run from the first cell to the last with the settings that it has.

    python -m benchmarks.notebooks --json notebooks.json       # 79 minutes on one core

Each in a new folder and a process of its own, so that it compiles, prepares and trains all it needs; what is installed
is not counted. The rival is what its reader is promised. Pictures that it draws go to runs/notebooks/NAME.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.launch import ROOT
from benchmarks.measure import main, row

PROMISED = {"1_correct": 5, "2_routing": 10, "3_ablation": 10, "4_merge": 10, "5_speech": 15}  # minutes
RUNNER = """
import json, sys
import IPython.display
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
shown = []
plt.show = lambda: (plt.savefig(f"picture{len(shown)}.png"), shown.append(1), plt.close())
def display(one):
    if isinstance(one, IPython.display.SVG):
        open(f"picture{len(shown)}.svg", "w", encoding="utf-8").write(one.data)
        shown.append(1)
    elif isinstance(one.data, str):
        print(one.data)
IPython.display.display = display
space = {"__name__": "__main__"}
for cell in json.loads(open(sys.argv[1], encoding="utf-8").read())["cells"]:
    tags = cell["metadata"].get("tags", [])
    if cell["cell_type"] == "code" and "install" not in tags:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), space)
        if "parameters" in tags:
            exec(sys.argv[2], space)
"""


def executed(
    path: Path, folder: Path, settings: str = "", timeout: float = 3600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the notebook in `folder`, where its pictures stay as picture0.png or .svg and so on; the cell of settings
    is followed by `settings`. Raises TimeoutExpired after `timeout` seconds."""
    found = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": found} | environment
    command = [sys.executable, "-c", RUNNER, str(path), settings]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


def timed(name: str) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        began = time.monotonic()
        done = executed(ROOT / "notebooks" / f"{name}.ipynb", folder, JAX_COMPILATION_CACHE_DIR=str(folder / "cache"))
        took = (time.monotonic() - began) / 60
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
        pictures = sorted(folder.glob("picture*"))
        kept = ROOT / "runs" / "notebooks" / name
        kept.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            shutil.copy(picture, kept)
        (kept / "said.txt").write_text(done.stdout, "utf-8")
    yield row("all cells", took, float(PROMISED[name]), 1.0, unit="minutes", pictures=len(pictures))


if __name__ == "__main__":
    main(str(__doc__), {name: partial(timed, name) for name in PROMISED})
