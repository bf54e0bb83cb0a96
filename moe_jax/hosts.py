"""Several hosts as one run: joining them, who does what alone, stopping at one step, and failing together.

Each host runs the same command; `jax.distributed` makes their devices one. Without it everything here is what a single
process does.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from moe_jax.partfile import Signals

# What may pass by itself: of file systems over a network, and of other hosts. Whoever repeats commands repeats these.
FILES = ("EIO", "ESTALE", "ENOTCONN", "ETIMEDOUT", "EAGAIN", "EINTR", "EREMOTEIO")
NETWORK = ("ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EHOSTUNREACH", "EHOSTDOWN", "ENETDOWN", "ENETUNREACH")
TRANSIENT = frozenset(getattr(errno, name) for name in (*FILES, *NETWORK) if hasattr(errno, name))
TRY_AGAIN = getattr(os, "EX_TEMPFAIL", 75)  # their exit code

PATIENCE = 7 * 24 * 3_600_000  # ms
_waits = itertools.count()  # hosts wait in one order, each time for another thing

FAILED, EVERY = "moe_jax/failed", 1.0  # what the coordinator is asked for, and after how many seconds again
_failing, _heard = threading.Event(), threading.Event()


def join(
    coordinator: str | None, processes: int | None, process: int | None, heartbeat: int, timeout: int = 300
) -> None:
    """Joins the others. On TPU, Slurm and Open MPI the first three may be None: JAX finds them.

    A host that is not heard of for `heartbeat` seconds ends the processes of all others. They are waited for `timeout`
    seconds; where JAX itself gives up waiting, it ends the process with 134.

    Raises, in one line, TimeoutError where the others are late, and ValueError where they cannot be joined.
    """
    import jax

    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            heartbeat_timeout_seconds=heartbeat,
            initialization_timeout=timeout,
        )
    except (ValueError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0]
        if re.match("DEADLINE_EXCEEDED|UNAVAILABLE|ABORTED", said):
            raise TimeoutError(errno.ETIMEDOUT, f"cannot join the other hosts ({said}): are all of them up?") from None
        raise ValueError(
            f"cannot join the other hosts ({said}): give --coordinator=HOST:PORT, --processes and --process, the same "
            "coordinator everywhere"
        ) from None
    if several():
        _listen()


def _listen() -> None:
    """Ends this process soon after another host says that it failed: what waits within a step cannot look itself."""
    over = threading.Event()

    def listen() -> None:
        while not over.wait(EVERY):
            try:
                said = _coordinator().key_value_try_get(FAILED)
            except Exception:  # no one did, or the coordinator is lost, which JAX looks for
                continue
            if _failing.wait(EVERY):  # as the other did: it says so itself
                return
            _heard.set()
            code, line = json.loads(said)
            print(line, file=sys.stderr, flush=True)
            _leave(code, 3 if first() else 0)

    listener = threading.Thread(target=listen, name="hosts", daemon=True)
    listener.start()

    @atexit.register  # so that it is over before JAX closes the connection to the coordinator
    def end() -> None:
        over.set()
        listener.join()


def failed(error: BaseException, report: Callable[[BaseException], int]) -> int:
    """What `report` says of the error: the exit code. Of several hosts the processes of all end with it, within
    seconds: others may wait for this one within a step."""
    if not several():
        return report(error)
    if _heard.is_set():  # of another that failed: what failed here is its loss
        threading.Event().wait()
    _failing.set()
    try:
        code = report(error)
    except Exception:
        traceback.print_exc()
        code = 1
    what = in_one_line(" ".join(traceback.format_exception_only(error)))
    said = f"host {sys.modules['jax'].process_index()} failed: {what}"
    with contextlib.suppress(Exception):  # another one did before, or the coordinator is lost
        _coordinator().key_value_set(FAILED, json.dumps((code, said)))
    _leave(code, 4 if first() else 3)


def in_one_line(what: object) -> str:
    """What an error says, without what gin adds: where it was configured."""
    return " ".join(str(what).split("In call to configurable")[0].split())


def _leave(code: int, turns: int) -> NoReturn:
    """Not by way of JAX, which would wait for all. A host that others wait for in a step stays until they have heard
    of it, which takes two turns; the first, which they ask, for longer than all."""
    time.sleep(turns * EVERY)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _coordinator() -> Any:
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()


class Whole:
    """An array of which each host may hold a part, made whole where NumPy looks at it, which all hosts must do at once;
    one that is stacked over layers a layer at a time: whole, it need not fit a device.

    Attributes: shape, dtype.
    """

    def __init__(self, x: Any):
        self.x, self.shape, self.dtype = x, x.shape, x.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy as np
        from jax.experimental.multihost_utils import process_allgather

        if not several():
            return np.asarray(self.x, dtype)
        if len(self.shape) < 3:
            return np.asarray(process_allgather(self.x, tiled=True), dtype)
        out = np.empty(self.shape, dtype or self.dtype)
        for i in range(len(out)):
            out[i] = process_allgather(self.x[i], tiled=True)
        return out


def several() -> bool:
    """Whether there are other hosts."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this host is the one that writes and speaks."""
    return not several() or sys.modules["jax"].process_index() == 0


def wait(name: str) -> None:
    """Until all hosts are here, however long one of them prepares data: it is the coordinator that is asked. (A sum
    over all devices, as JAX would have it, gives up on GPUs after minutes.) Where a host is lost the others end.
    """
    if several():
        _coordinator().wait_at_barrier(f"{next(_waits)} {name}", PATIENCE)


def in_turn(job: Callable[..., Any]) -> Callable[..., Any]:
    """The first host does it, then the others: of a file system that they share they find it done."""
    name = getattr(job, "__name__", "job")

    @functools.wraps(job)
    def turns(*args: Any, **options: Any) -> Any:
        if first():
            out = job(*args, **options)
            wait(f"{name} by the first")
        else:
            wait(f"{name} by the first")
            out = job(*args, **options)
        wait(name)
        return out

    return turns


def alone(job: Callable[..., Any]) -> Callable[..., Any]:
    """The first host does it, the others wait."""
    name = getattr(job, "__name__", "job")

    @functools.wraps(job)
    def once(*args: Any, **options: Any) -> Any:
        out = job(*args, **options) if first() else None
        wait(name)
        return out

    return once


class Stop:
    """Whether to stop: on one host as `partfile.Signals` says; on several, where any of them was sent a SIGTERM (a
    preemption) or its first SIGINT (Ctrl-C), at a step that all agree on. The second SIGINT ends its host at once."""

    def __init__(self, doing: str):
        self._signals = None if several() else Signals(doing)
        self._interrupted, self._before = False, None

    def __enter__(self) -> Stop:
        if self._signals:
            self._signals.__enter__()
        elif threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        if self._signals:
            self._signals.__exit__(*error)
        elif self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, *_: object) -> None:
        """JAX tells the other hosts of a SIGTERM."""
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        os.write(2, b"\nsaving on all hosts; Ctrl-C again to stop at once\n")
        os.kill(os.getpid(), signal.SIGTERM)

    def at(self, step: int) -> int:
        """The signal that came, or 0; asked once after each step."""
        if self._signals:
            return self._signals.caught
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        if not reached_preemption_sync_point(step):
            return 0
        return int(signal.SIGINT if self._interrupted else signal.SIGTERM)
