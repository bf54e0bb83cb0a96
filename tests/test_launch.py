"""What commands set before they start."""

import json
import os
import subprocess
import sys

import pytest

from moe_jax import cli, launch

SHOW = """
import json, os, sys
from moe_jax import launch
launch.command()
print(json.dumps([os.environ.get("GLIBC_TUNABLES"), os.environ[launch.CACHE], sys.argv, sys.stdin.read()]))
"""


def shown(**env: str) -> list:
    keep = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", launch.CACHE)}
    args = [sys.executable, "-c", SHOW, "a b", "--c"]
    return json.loads(
        subprocess.run(args, env=keep | env, input="in", capture_output=True, text=True, check=True).stdout
    )


def test_a_command_starts_anew_with_its_arguments_and_its_input():
    memory, _, argv, given = shown(XDG_CACHE_HOME="/c")
    assert memory == (launch.KEEP_MEMORY if sys.platform == "linux" else None)  # elsewhere malloc is another
    assert (argv, given) == (["-c", "a b", "--c"], "in")


def test_what_streams_is_not_started_anew(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moe-jax", "merge", "--list"])
    monkeypatch.setattr(os, "execv", lambda *args: pytest.fail("started anew"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv(launch.CACHE, "mine")
    assert cli.entry() == 0


def test_what_the_user_set_stays():
    assert shown(GLIBC_TUNABLES="", **{launch.CACHE: "mine"})[:2] == ["", "mine"]


def test_programs_are_kept_by_machine_and_compiler(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    folder = launch.compiled_programs()
    assert folder == launch.compiled_programs() and str(folder).startswith("/c/moe_jax/xla/")
    monkeypatch.setattr(launch, "version", lambda package: "another")
    assert launch.compiled_programs() != folder
