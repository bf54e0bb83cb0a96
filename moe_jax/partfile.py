"""An output that is written aside and survives Ctrl-C, a kill and a full disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

try:
    import fcntl
except ImportError:  # no such lock on Windows
    fcntl = None


def lock(file: IO) -> bool:
    """Whether it is this process's now, until the file is closed; True where a system knows no such lock.

    Raises OSError of a file system without locks.
    """
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            return False
    return True


def unfit(output: Path, overwrite: bool, inputs: Sequence[str | os.PathLike] = ()) -> str | None:
    """Why a file cannot be written there, in one line; None where it can. Else it would show when all is done.

    Args:
      inputs: what is read meanwhile, which nothing may take the place of.
    """
    try:
        if not output.parent.is_dir():
            return f"{output.parent}: no such folder; create it first"
        if output.exists() and not output.is_file():
            return f"{output}: is not a file; give the name of a file"
        ours = [path for path in (output, *part_paths(output)) if path.exists()]
        if any(path.samefile(one) for path in ours for one in inputs if os.path.exists(one)):
            return f"{output}: would overwrite the input; give another --output"
        if output.exists() and not overwrite:
            return f"{output}: is there already; pass --overwrite to replace it, or give another --output"
        aside = part_paths(output)[0]
        begun = aside.exists()
        aside.open("ab").close()
        if not begun:
            aside.unlink()
    except OSError as error:
        return f"{output}: cannot be written ({error.strerror}); give another --output"
    return None


def nobody_reads() -> None:
    """After a BrokenPipeError: standard output goes nowhere, or Python would fail once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Refused(Exception):
    """The work cannot start, or go on, as asked. `str(error)` is one line: what, where and how to mend it."""


class Stopped(Exception):
    """A signal ended the run after a batch or step, and all is saved.

    `code` is the exit code; `str(error)` says how to go on.
    """

    def __init__(self, signum: int, what: str) -> None:
        super().__init__(what)
        self.code = 128 + signum


class PartFile:
    """`OUTPUT.part`, and how far it got in `OUTPUT.part.json`; a context manager that holds a lock on it.

    Attributes:
      done: what `append` was last told, by this process or by an earlier one with the same settings; else {}.
    """

    def __init__(self, output: Path, settings: dict[str, Any], overwrite: bool) -> None:
        """Raises Refused if another process writes it, or if it cannot go on from what is there."""
        self.output, self.settings = output, settings
        self.path, self.state = part_paths(output)
        self.again = again(overwrite)
        self._may_replace = overwrite
        self.done: dict[str, Any] = {}
        self._offset = 0
        with self._clear_errors():
            fresh = not self.path.exists()
            self.path.touch()
            self._file = open(self.path, "r+b")  # noqa: SIM115 closed by __exit__
        try:
            self._lock()
            if not fresh and not overwrite:
                self._resume()
            if output.exists() and not self._may_replace:
                raise Refused(f"{output}: is there already; pass --overwrite to replace it")
            with self._clear_errors():
                self._file.truncate(self._offset)
                self._file.seek(self._offset)
                self._save()
        except BaseException:
            self._file.close()
            raise

    def append(self, data: bytes, done: dict[str, Any]) -> None:
        """Adds `data`; once this returns, a new PartFile finds both. Raises Refused if the disk is full."""
        with self._clear_errors():
            self._write(data)
            self._offset += len(data)
            self.done = done
            self._save()

    def finish(self, data: bytes) -> None:
        """Adds the last `data` and puts the whole in OUTPUT's place. Raises Refused if the disk is full."""
        with self._clear_errors():
            self._write(data)
            if fcntl is None:
                self._file.close()  # Windows renames no open file; elsewhere closing it would end the lock
            os.replace(self.path, self.output)
            self.state.unlink()

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what could not be written before is not counted as done
            self._file.close()

    def _lock(self) -> None:
        if not lock(self._file):
            raise Refused(f"{self.path}: another process is writing it; wait for it or stop it")

    def _resume(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if not size and not self.state.exists():
            return
        anew = "pass --overwrite to start anew"
        try:
            state = json.loads(self.state.read_text("utf-8"))
            settings, done, offset = state["settings"], state["done"], state["offset"]
            if not (isinstance(settings, dict) and isinstance(done, dict) and isinstance(offset, int) and offset >= 0):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise Refused(f"{self.path}: {self.state.name} does not say how far it got; {anew}") from None
        changed = [k for k in sorted(self.settings.keys() | settings) if self.settings.get(k) != settings.get(k)]
        if changed:
            was = ", ".join(f"{k}={settings.get(k)}" for k in changed)
            now = ", ".join(f"{k}={self.settings.get(k)}" for k in changed)
            raise Refused(f"{self.path}: was started with {was}, not {now}; give the same, or {anew}")
        if offset > size:
            raise Refused(f"{self.path}: holds {size} bytes where {offset} were written; {anew}")
        self.done, self._offset, self._may_replace = done, offset, state.get("may_replace") is True

    @contextlib.contextmanager
    def _clear_errors(self) -> Generator[None]:
        try:
            yield
        except OSError as e:
            raise Refused(f"{self.path}: cannot be written: {e.strerror}; mend that and {self.again}") from None

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _save(self) -> None:
        state = {
            "settings": self.settings,
            "may_replace": self._may_replace,
            "offset": self._offset,
            "done": self.done,
        }
        aside = self.state.with_name(self.state.name + ".new")
        with open(aside, "w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.state)


class Signals:
    """Within it, the first SIGINT or SIGTERM is only noted in `caught`; Ctrl-C after that stops at once.

    A repeated SIGTERM does nothing: schedulers send it to a process and to its group. `doing` tells the user what
    is being finished.
    """

    def __init__(self, doing: str = "finishing the batch") -> None:
        self.doing, self.caught = doing, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._catch) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _catch(self, signum: int, frame: FrameType | None) -> None:
        if self.caught:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.caught = signum
        os.write(2, f"\n{self.doing}; Ctrl-C again to stop at once\n".encode())


def write_text(path: Path, text: str) -> None:
    """All of `text` or nothing: written aside, then renamed."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """All of `data` or nothing: written aside, then renamed."""
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        if isinstance(error, OSError):  # of a full disk it names no file
            error.filename = str(path)
        raise


def again(overwrite: bool) -> str:
    """How to go on with what is unfinished."""
    return "run the same command again" + (" without --overwrite" if overwrite else "") + " to go on"


def part_paths(output: Path) -> tuple[Path, Path]:
    """Where an unfinished `output` and its state lie."""
    return output.with_name(output.name + ".part"), output.with_name(output.name + ".part.json")
