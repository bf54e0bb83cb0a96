"""Multi-task post-recognition correction with mixtures of experts."""

import os as _os

__version__ = "0.1.0"

# `tasks/` sits beside the package in a checkout and inside it in a wheel; both are `moe_jax.tasks`.
_root = _os.path.dirname(__path__[0])
if not _os.path.isdir(_os.path.join(__path__[0], "tasks")) and _os.path.isdir(_os.path.join(_root, "tasks")):
    __path__.append(_root)
