"""One owner of a folder at a time, on one machine and on a shared disk.

A hidden file in the folder names the owner. It is created in one step, as a hard link to a complete file, which also
works over NFS. A thread touches it every BEAT seconds. The lock of a process that has ended on this machine is ignored;
the lock of another machine is ignored when it was last touched more than STALE seconds ago.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import tempfile
import threading
import weakref
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from ebm_prior.errors import OutputError
from ebm_prior.plain import parse_json, printable
from ebm_prior.storage.atomic import advice_for, advise, remove_leftovers, temporary_affixes
from ebm_prior.storage.owner import Owner, this_process
from ebm_prior.storage.records import InvalidError, fields, text, whole

LOCK = ".ebm-prior.lock"
BEAT, STALE = 30.0, 600.0  # seconds
_ONE_RUN = "expected one run in a folder at a time; wait until it has ended, or choose another --out"
_RECORD = fields(
    {"machine": text(), "pid": whole(1), "start": whole(), "host": text(), "since": text(), "token": text()}
)


class _Found(NamedTuple):
    """A lock that already exists in the folder."""

    token: str | None  # None: the file is not a lock of ebm-prior
    age: float  # seconds since it was touched, by the clock of its disk
    record: dict[str, Any]

    @property
    def held(self) -> bool:
        """Whether its process may still be at work."""
        if self.token is not None:
            owner = Owner(self.record["machine"], self.record["pid"], self.record["start"])
            if owner.local:
                return owner.alive
        return self.age < STALE


class _Lock:
    """A lock of this thread on one folder. It may be taken several times, and is removed when all have left."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.pid = folder, folder / LOCK, os.getpid()
        self.thread, self.since = threading.current_thread(), _now()
        self.token, self.count = secrets.token_hex(8), 1
        self._ended = threading.Event()
        self.made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise OutputError(
                f"cannot write {folder}: {error.strerror or error}; {advice_for(folder / LOCK, error)}"
            ) from error

    def keep_touched(self) -> None:
        """Start the thread that touches the lock every BEAT seconds."""
        threading.Thread(target=self._beat, daemon=True).start()

    def _take(self) -> None:
        owner = this_process()
        record = {"host": socket.gethostname(), "since": self.since, "token": self.token, **owner._asdict()}
        prefix, suffix = temporary_affixes("lock")
        descriptor, whole_file = tempfile.mkstemp(dir=self.folder, prefix=prefix, suffix=suffix)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(json.dumps(record, sort_keys=True) + "\n")
            os.chmod(whole_file, 0o644)  # other users of the folder are told whose lock it is
            for _ in range(100):  # each time another process was quicker to take or to leave it
                if _link(whole_file, self.path):
                    return
                found = _read(self.path, now=os.stat(whole_file).st_mtime)
                if found is None:
                    continue
                if found.held:
                    raise OutputError(_in_use(self.folder, found))
                self._remove(found, whole_file + "-old")
        finally:
            os.unlink(whole_file)
        raise OutputError(f"{self.folder}: other processes take and leave it all the time; choose another --out")

    def _remove(self, found: _Found, aside: str) -> None:
        """Remove the lock that was found, unless another process has replaced it in the meantime."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)
            moved = _read(Path(aside), now=0.0)
            if moved is not None and moved.token != found.token:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            os.unlink(aside)

    def require(self) -> None:
        """Touch the lock. Raises OutputError where another process has taken the folder, taking this one for dead."""
        try:
            found = _read(self.path, now=0.0)
        except OSError as error:
            raise OutputError(f"the lock of {self.folder} cannot be read: {error.strerror or error}") from error
        if found is None or found.token != self.token:
            held = "somebody has removed its lock" if found is None else _in_use(self.folder, found)
            raise OutputError(f"{self.folder} is no longer locked by this process, which therefore stops: {held}")
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def leave(self) -> None:
        """Remove the lock, and also the folder if it was made for the lock and is empty."""
        self._ended.set()
        if self.pid != os.getpid():  # a child of the owner
            return
        with contextlib.suppress(OSError):
            found = _read(self.path, now=0.0)
            if found is not None and found.token == self.token:
                os.unlink(self.path)
            if self.made:
                os.rmdir(self.folder)


_HELD: dict[str, _Lock] = {}
_GUARD = threading.RLock()


class Hold:
    """This thread's lock of a folder, until `leave`, or until this object is garbage-collected.

    The thread may hold it several times over; to another one it is in use, as it is to another process.
    `advice`: advice for errors in writing into the folder, e.g. "go on with --resume".
    """

    def __init__(self, folder: Path, *, advice: str | None = None) -> None:
        self._key = os.path.realpath(folder)
        with _GUARD:
            self._lock, fresh = _locked(self._key, Path(folder))
        self.leave = weakref.finalize(self, _leave, self._key, self._lock)
        try:
            # Whoever holds the guard must not wait for a thread to start: the garbage collector may run in the new
            # thread, and let go of a Hold that nobody has any more, for which the guard is needed.
            if fresh:
                self._lock.keep_touched()
            if advice is not None:
                advise(Path(folder), advice)
        except BaseException:
            self.leave()
            raise

    def require(self) -> None:
        """Renew the lock. Raises OutputError where another process has taken over the folder."""
        self._lock.require()


def _locked(key: str, folder: Path) -> tuple[_Lock, bool]:
    """The lock of a folder, held once more by this thread, and whether it is a new one. Raises OutputError."""
    lock = _HELD.get(key)
    if lock is not None and lock.pid == os.getpid():
        lock.count += 1  # now the garbage collector, which may let go of an abandoned Hold at any line, leaves it
        if _HELD.get(key) is lock:  # it did not happen on the line before
            if lock.thread is not threading.current_thread():
                if lock.thread.is_alive():
                    _leave(key, lock)
                    raise OutputError(
                        f"{folder} is in use by another thread of this process ({lock.pid}, {lock.thread.name}) since "
                        f"{lock.since}: {_ONE_RUN}"
                    )
                lock.thread, lock.since = threading.current_thread(), _now()
            return lock, False
    lock = _HELD[key] = _Lock(folder)
    try:
        remove_leftovers(folder)
    except BaseException:
        _leave(key, lock)
        raise
    return lock, True


def _leave(key: str, lock: _Lock) -> None:
    with _GUARD:
        lock.count -= 1
        if lock.count == 0:
            if _HELD.get(key) is lock:
                del _HELD[key]
            advise(Path(key), None)
            lock.leave()


@contextlib.contextmanager
def owned(folder: Path, *, advice: str | None = None) -> Iterator[None]:
    """Lock `folder` inside the block; the folder is created if it does not exist.

    Raises OutputError, with process, host and time, where another process or thread holds the lock.
    """
    hold = Hold(folder, advice=advice)
    try:
        yield
    finally:
        hold.leave()


def _link(whole_file: str, lock: Path) -> bool:
    """Create the lock in one step. Returns False if a lock exists already."""
    try:
        os.link(whole_file, lock)
    except FileExistsError:
        return os.stat(whole_file).st_nlink == 2  # NFS may lose the answer and ask again
    except OSError:  # a disk without hard links
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(Path(whole_file).read_bytes())
    return True


def _read(path: Path, *, now: float) -> _Found | None:
    """The content of a lock; None where there is no lock."""
    try:
        age = now - os.stat(path).st_mtime
        with open(path, "rb") as file:
            content = file.read(10_000)
    except FileNotFoundError:
        return None
    try:
        record = _RECORD(parse_json(content.decode()), "")
    except (ValueError, InvalidError):
        return _Found(None, age, {})
    return _Found(record["token"], age, record)


def _in_use(folder: Path, found: _Found) -> str:
    if found.token is None:
        return f"{folder} holds a file {LOCK} that is no lock of ebm-prior: remove it, or choose another --out"
    record = {key: printable(str(value)) for key, value in found.record.items()}
    owner = Owner(found.record["machine"], found.record["pid"], found.record["start"])
    elsewhere = "" if owner.local else f" (last sign of life {max(0.0, found.age) / 60:.0f} minutes ago)"
    sure = "" if owner.local else f"; if it has ended, wait {STALE / 60:.0f} minutes or remove {folder / LOCK}"
    return (
        f"{folder} is in use by process {record['pid']} on {record['host']} since {record['since']}{elsewhere}: "
        f"{_ONE_RUN}{sure}"
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
