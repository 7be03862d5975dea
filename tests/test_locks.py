from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trady.errors import FileError, LockedError, ResourceError, StateError
from trady.records import lock
from trady.records.files import append_line, remove_temporaries, remove_tree, temporary_name, write_json
from trady.records.lock import LOCK, Holder, locked, refuse_locked
from trady.records.processes import is_running

HOLD = """
import sys, time
from pathlib import Path
from trady.records import lock
if sys.argv[2] == "record":
    lock.fcntl = None
with lock.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["flock", "record"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "record":
        monkeypatch.setattr(lock, "fcntl", None)
    return str(request.param)


@pytest.fixture
def other(tmp_path: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(tmp_path), kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_who_holds_a_folder_is_named(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    expected = rf"in use by process {other.pid} on {platform.node()}, since 20\d\d-"
    with pytest.raises(LockedError, match=expected) as caught, locked(tmp_path):
        pass
    assert isinstance(caught.value, StateError)
    with pytest.raises(LockedError, match=expected):
        refuse_locked(tmp_path)
    assert (tmp_path / LOCK).exists()


def test_the_lock_of_a_killed_process_does_not_count(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.kill()
    other.wait()
    assert (tmp_path / LOCK).exists()
    refuse_locked(tmp_path)
    with locked(tmp_path):
        holder = Holder.read(tmp_path / LOCK)
        assert holder is not None
        assert (holder.pid, holder.host) == (os.getpid(), platform.node())
    assert list(tmp_path.iterdir()) == []


def test_one_who_waits_gets_it_when_the_other_leaves(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    threading.Timer(0.3, other.kill).start()
    reaper = threading.Thread(target=other.wait)
    reaper.start()
    with locked(tmp_path, patience_seconds=30):
        pass
    reaper.join()


def test_a_thread_of_the_same_process_is_refused_too(tmp_path: Path, kind: str) -> None:
    with locked(tmp_path), pytest.raises(LockedError, match=f"process {os.getpid()} "), locked(tmp_path):
        pass


def test_only_one_of_many_is_in_at_a_time(tmp_path: Path, kind: str) -> None:
    inside, most, entered = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, entered
        for _ in range(5):
            with locked(tmp_path, patience_seconds=60):
                with guard:
                    inside, entered = inside + 1, entered + 1
                    most = max(most, inside)
                time.sleep(0.001)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, entered) == (1, 20)


def test_a_lock_of_another_machine_is_removed_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "2026-01-01T00:00:00"}))
    with pytest.raises(LockedError, match=rf"process 1 on elsewhere, since 2026.*remove {tmp_path / LOCK}"):
        refuse_locked(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Readers of data outlive a killed run for some seconds."""
    program = """
import os, sys, time
from pathlib import Path
from trady.records.lock import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:
        print("forked", flush=True)  # what the library does in a child is done by now
        time.sleep(20)
        os._exit(0)
    print("held", flush=True)
    os._exit(9)
"""
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert {process.stdout.readline() for _ in range(2)} == {"held\n", "forked\n"}
    process.wait()
    with locked(tmp_path):
        pass
    process.stdout.close()


def test_a_folder_that_nothing_was_written_into_is_gone_again(tmp_path: Path) -> None:
    with locked(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with locked(tmp_path / "new"):
        (tmp_path / "new" / "file").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_whether_a_process_runs() -> None:
    assert is_running(os.getpid())
    assert not is_running(dead_pid())
    assert not is_running(0)


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    here, dead = platform.node(), dead_pid()
    mine = temporary_name(tmp_path / "a.json")
    others = [f".b.json.tmp-elsewhere-{dead}", f"report.tmp-{here}-{dead}", "notes.tmp-final"]
    stale = [f".a.json.tmp-{here}-{dead}", f".c.tmp-{here}-{dead}"]
    for name in (mine.name, *others, stale[0]):
        (tmp_path / name).touch()
    (tmp_path / stale[1]).mkdir()
    remove_temporaries(tmp_path, alone=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.name, *others])
    remove_temporaries(tmp_path, alone=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others[1:])


def test_the_next_writing_of_a_file_removes_what_a_killed_process_has_left_of_it(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / f".{name}.tmp-{platform.node()}-{dead_pid()}").touch()
    write_json(tmp_path / "a.json", {})
    assert {path.name.partition(".tmp-")[0] for path in tmp_path.iterdir()} == {"a.json", ".b.json"}


def test_a_folder_is_removed_whole_or_left_for_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"
    (folder / "inside").mkdir(parents=True)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_tree(folder)
    assert not folder.exists()
    assert len(list(tmp_path.iterdir())) == 1
    remove_temporaries(tmp_path, alone=True)
    assert list(tmp_path.iterdir()) == []
    remove_tree(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"pid": "1", "host": "a", "since": "b"}', b'{"pid": 1, "host": 2, "since": "b"}', b"\xff",
     b"[" * 100_000],
)  # fmt: skip
def test_a_lock_that_says_nothing_is_nobodys(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    assert Holder.read(tmp_path / LOCK) is None
    with locked(tmp_path):
        holder = Holder.read(tmp_path / LOCK)
        assert holder is not None
        assert (holder.pid, holder.host) == (os.getpid(), platform.node())


def test_a_folder_that_cannot_be_made_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = "file/run: Not a directory.*give a file or folder"
    with pytest.raises(FileError, match=message), locked(tmp_path / "file" / "run"):
        pass


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "metrics.jsonl", os.write
    append_line(path, "first")
    room = 3

    def nearly_full(descriptor: int, content: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(28, "No space left on device")
        written = write(descriptor, content[:room])
        room -= written
        return written

    monkeypatch.setattr(os, "write", nearly_full)
    with pytest.raises(ResourceError, match=r"metrics.jsonl: the disk is full \(No space left"):
        append_line(path, "second")
    room = 100
    append_line(path, "third")
    assert path.read_text() == "first\nthird\n"


@pytest.mark.skipif(lock.fcntl is None, reason="there is no flock")
def test_one_who_has_just_taken_a_folder_is_named_once_they_have_written_who_they_are(tmp_path: Path) -> None:
    place = tmp_path / LOCK
    with place.open("w+") as taken:
        assert lock.fcntl is not None
        lock.fcntl.flock(taken, lock.fcntl.LOCK_EX)
        record = json.dumps({"pid": 4711, "host": "elsewhere", "since": "2026-01-02T03:04:05+00:00"})
        writer = threading.Timer(0.05, lambda: place.write_text(record))
        writer.start()
        with pytest.raises(LockedError, match="in use by process 4711 on elsewhere"), locked(tmp_path):
            pass
        writer.join()
