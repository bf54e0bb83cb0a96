"""What a command does before JAX is imported: settings of its process that measured faster, and flags made plain.

Either is the user's where its variable is set already (to nothing: switched off).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

# glibc gives big blocks back to the kernel after each use, and a training step faults them in anew, page by page: with
# these, memory stays with the process and comes in huge pages, and a step on CPU takes a fifth less time.
KEEP_MEMORY = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"
CACHE = "JAX_COMPILATION_CACHE_DIR"


def command(keep_memory: bool = True) -> None:
    """Of the process that a shell has started: it is started anew, as glibc reads its settings at the beginning.
    Without `keep_memory` it is not: for what has each array once, and is to hold few of them."""
    os.environ.setdefault(CACHE, str(compiled_programs()))
    if keep_memory and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = KEEP_MEMORY
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def rewritten(argv: Sequence[str]) -> list[str]:
    """`--gin.NAME=VALUE` (T5X's form) -> `--gin_bindings=NAME=VALUE`."""
    return [re.sub(r"^--gin\.(?=[A-Za-z_])", "--gin_bindings=", a) for a in argv]


def compiled_programs() -> Path:
    """The folder in which JAX keeps compiled programs: one for each kind of processor (they are its machine code) and
    version of the compiler.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "moe_jax" / "xla" / hashlib.sha256(_machine().encode()).hexdigest()[:16]


def _machine() -> str:
    try:
        about = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        about = [f"flags {platform.processor()}"]
    features = sorted({line for line in about if line.startswith(("flags", "Features", "model name"))})
    return "\n".join([platform.machine(), version("jaxlib"), *features])
