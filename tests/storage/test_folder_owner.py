"""One owner of a folder at a time, and what killed owners leave behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from forked import Forked
from run_folders import content
from workshop import Workshop

from ebm_prior.errors import OutputError
from ebm_prior.runs.folder import Run
from ebm_prior.storage import atomic
from ebm_prior.storage.atomic import remove_leftovers, temporary_affixes, write_atomically
from ebm_prior.storage.lock import LOCK, STALE, Hold, owned
from ebm_prior.storage.owner import this_process

HOLD = (
    "import sys, time; from pathlib import Path; from ebm_prior.storage.lock import Hold; "
    "hold = Hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
)


def holder(workshop: Workshop, folder: Path) -> Forked:
    """Another process that owns the folder."""
    process = workshop.fork("-c", HOLD, folder)
    assert process.stdout.readline() == b"held\n"
    return process


def test_the_second_is_told_who_and_since_when(workshop: Workshop, fit_words: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with holder(workshop, run) as first:
        before = content(run)
        for more in ((), ("--resume",), ("--overwrite",)):
            message = workshop.error(*fit_words, "--out", run, *more)
            assert f"in use by process {first.pid} on " in message
            assert " since 20" in message
        assert content(run) == before
        first.kill()
    workshop.run(*fit_words, "--out", run)  # a dead process is no obstacle
    assert not (run / LOCK).exists()


@pytest.mark.parametrize("command", ["pretrain", "train", "demo", "sample", "ood"])
def test_every_command_that_owns_a_folder_asks(workshop: Workshop, prior: Path, tmp_path: Path, command: str) -> None:
    out, images = tmp_path / "out", ["--data", workshop.images]
    words: dict[str, list[object]] = {
        "pretrain": ["pretrain", "--ckpt", workshop.backbone, *images, "--out", out],
        "train": ["train", "--ckpt", workshop.backbone, *images, "--out", out],
        "demo": ["demo", "--out", out],
        "sample": ["sample", prior, "-n", 2, "--out", out, "--overwrite"],
        "ood": ["ood", prior, "--in", workshop.images, "--out", "noise", "--to", out, "--overwrite"],
    }
    with holder(workshop, out) as first:
        assert f"in use by process {first.pid}" in workshop.error(*words[command])
        first.kill()


def test_a_lock_lives_as_long_as_its_run(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {}, {})
    again = Run(tmp_path / "run", {}, {}, resume=True)  # one process may come twice
    del run
    assert (tmp_path / "run" / LOCK).exists()
    del again
    assert not (tmp_path / "run" / LOCK).exists()


def test_another_thread_is_refused_as_another_process_is(tmp_path: Path) -> None:
    """Of many that come at once one wins; the winner's own thread may come again, and others when it has ended."""
    start, finish = threading.Barrier(8), threading.Event()
    said: list[str] = []

    def work() -> None:
        start.wait()
        try:
            with owned(tmp_path), owned(tmp_path):
                finish.wait(20)
            said.append("done")
        except OutputError as error:
            said.append(str(error))
            if len(said) == 7:
                finish.set()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said[-1] == "done"
    assert len(said) == 8
    assert all(f"in use by another thread of this process ({os.getpid()}, Thread-" in each for each in said[:7])
    assert all("since 20" in each for each in said[:7])
    with owned(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_thread_that_has_ended_is_no_obstacle(tmp_path: Path) -> None:
    holds: list[Hold] = []
    thread = threading.Thread(target=lambda: holds.append(Hold(tmp_path)))
    thread.start()
    thread.join()
    holds.append(Hold(tmp_path))
    refused: list[OutputError] = []

    def another() -> None:
        try:
            holds.append(Hold(tmp_path))
        except OutputError as error:
            refused.append(error)

    late = threading.Thread(target=another)
    late.start()
    late.join()
    assert len(refused) == 1
    for hold in holds:
        hold.leave()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_the_garbage_collector_gives_back_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandoned, getpid = [Hold(tmp_path)], os.getpid

    def collecting() -> int:
        if abandoned:
            abandoned.pop().leave()
        return getpid()

    monkeypatch.setattr("ebm_prior.storage.lock.os.getpid", collecting)
    hold = Hold(tmp_path)
    hold.require()
    hold.leave()
    assert not list(tmp_path.iterdir())


def test_nothing_is_held_where_the_thread_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", full)
        with pytest.raises(RuntimeError):
            Hold(tmp_path)
    assert not list(tmp_path.iterdir())
    with owned(tmp_path):
        assert (tmp_path / LOCK).stat().st_mode & 0o777 == 0o644
    assert not list(tmp_path.iterdir())


def test_a_folder_made_for_nothing_goes(tmp_path: Path) -> None:
    with owned(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()


def as_of(folder: Path, **changes: Any) -> Path:
    """A lock as another process would have left it."""
    with owned(folder):
        record = json.loads((folder / LOCK).read_text())
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(record | changes))
    return folder / LOCK


@pytest.mark.parametrize("changes", [{"pid": 2**22 - 1}, {"start": 12345}, {"pid": 2**40}])
def test_a_dead_process_is_no_obstacle(tmp_path: Path, changes: dict[str, Any]) -> None:
    """One whose number is gone, and one whose number another process has now."""
    as_of(tmp_path, **changes)
    with owned(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_another_machine_is_believed_until_it_is_silent(tmp_path: Path) -> None:
    lock = as_of(tmp_path, machine="00000000", host="cluster-7", pid=17)
    with pytest.raises(OutputError, match=r"in use by process 17 on cluster-7 since .*last sign of life 0 minutes ago"):
        Hold(tmp_path)
    os.utime(lock, (time.time() - STALE - 60,) * 2)
    with owned(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "[" * 9000, "\udcff"])
def test_a_lock_that_says_nothing_is_believed_until_it_is_old(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(OutputError, match="no lock of ebm-prior"):
        Hold(tmp_path)
    os.utime(tmp_path / LOCK, (time.time() - STALE - 60,) * 2)
    with owned(tmp_path):
        pass


def test_of_many_at_once_one_wins(workshop: Workshop, tmp_path: Path) -> None:
    """Over the lock of a dead process, where a careless one would remove the lock of the first that came."""
    program = (
        "import sys; from pathlib import Path; from ebm_prior.storage.lock import Hold\n"
        "from ebm_prior.errors import OutputError\nfolder, start, end = map(Path, sys.argv[1:])\n"
        "while not start.exists(): pass\n"
        "try: hold = Hold(folder); print('won', flush=True)\n"
        "except OutputError: print('lost', flush=True)\n"
        "while not end.exists(): pass"
    )
    folder, start, end = (tmp_path / name for name in ("folder", "start", "end"))
    as_of(folder, pid=2**22 - 1)
    several = [workshop.fork("-c", program, folder, start, end) for _ in range(4)]
    start.touch()
    said = [each.stdout.readline() for each in several]
    end.touch()
    for each in several:
        each.communicate()
    assert sorted(said) == [b"lost\n"] * 3 + [b"won\n"]


def test_one_that_was_thought_dead_stops(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {}, {})
    lock = tmp_path / "run" / LOCK
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"token": "other", "machine": "00000000"}))
    with pytest.raises(OutputError, match="no longer locked by this process"):
        run.save_state({"iteration": 1})
    assert not (tmp_path / "run" / "state.pt").exists()


# What kills leave.


def left(folder: Path, name: str, **changes: Any) -> Path:
    owner = this_process()._replace(**changes)
    path = folder / f".{name}.{owner.machine}-{owner.pid}-{owner.start}-abcdefgh.part"
    path.write_text("x")
    return path


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    names = ("prior.safetensors", "before-after.png", "samples-000100.png", "backbone.safetensors", "state.pt")
    dead = [left(tmp_path, name, pid=2**22 - 1) for name in names]
    reused = left(tmp_path, "state.pt", start=12345)
    old, young = (left(tmp_path, name, machine="00000000") for name in ("old", "young"))
    os.utime(old, (0, 0))
    living = left(tmp_path, "prior.safetensors")
    foreign = tmp_path / ".prior.safetensors.swp"
    foreign.write_text("an editor's")
    with owned(tmp_path):
        pass
    assert not any(path.exists() for path in (*dead, reused, old))
    assert all(path.exists() for path in (young, living, foreign))
    remove_leftovers(tmp_path, of="other")
    assert living.exists()


def test_a_kill_in_a_write_leaves_what_the_next_owner_removes(workshop: Workshop, tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from ebm_prior.storage.atomic import write_atomically\n"
        f"os.fsync = lambda _: os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "write_atomically(Path(sys.argv[1]) / 'prior.safetensors', b'half')"
    )
    with workshop.fork("-c", program, tmp_path) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.name.startswith(".prior.safetensors.") for path in tmp_path.iterdir()] == [True]
    with owned(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_long_names_can_be_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / ("ä" * 120), b"x")
    assert len(os.fsencode(temporary_affixes("ä" * 120)[0])) < 200


@pytest.mark.parametrize(
    ("code", "advice"),
    [(errno.ENOSPC, "free some space and go on with --resume"), (errno.EACCES, "writable and go on with --resume")],
)
def test_a_full_disk_does_not_advise_to_lose_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str
) -> None:
    run = Run(tmp_path / "run", {}, {})

    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OutputError, match=advice) as caught:
        run.save_state({"iteration": 1})
    assert "--out" not in str(caught.value)
    with pytest.raises(OutputError, match=advice):  # pictures, too
        write_atomically(tmp_path / "run" / "samples-000100.png", b"x")
    with pytest.raises(OutputError, match="choose another --out"):
        write_atomically(tmp_path / "elsewhere.png", b"x")


def test_a_folder_can_be_given_back_while_another_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may give one back in the thread of another Hold, before that thread counts as started."""
    first, start, collectors = Hold(tmp_path / "first"), threading.Thread.start, list[threading.Thread]()

    def started(thread: threading.Thread) -> None:
        if not collectors:
            collectors.append(threading.Thread(target=first.leave, daemon=True))
            start(collectors[0])
            collectors[0].join(timeout=20)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", started)
    Hold(tmp_path / "second").leave()
    assert not collectors[0].is_alive()
