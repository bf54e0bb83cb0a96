"""Runs of gin files, each a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def launch(
    files: Sequence[str], bindings: Mapping[str, Any], extra: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> None:
    """`python -m moe_jax.main` with these gin files, bindings and further flags, from ROOT, where relative paths begin.
    What it fails with ends this process too."""
    command = [sys.executable, "-m", "moe_jax.main", *(f"--gin_file={file}" for file in files)]
    command += [f"--gin.{name}={value}" for name, value in bindings.items()]
    if code := subprocess.run([*command, *extra], cwd=ROOT, env=env).returncode:
        sys.exit(code)
