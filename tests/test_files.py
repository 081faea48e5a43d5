"""Paths that users write, and the claim on a folder that two processes want."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from conftest import says

from sedd_jax.host import files

HOLD = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from sedd_jax.host import files
    with files.claimed(Path(sys.argv[1]), "trains in 'run'"):
        print("held", flush=True)
        time.sleep(60)
    """
)


def hold(file):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def refusal(file, work):
    with pytest.raises(ValueError) as error, files.claimed(file, work):
        pass
    return str(error.value)


@pytest.mark.parametrize(
    "address", ["gs://bucket/run", "s3://b", "hdfs://n/x", "https://h/x", "file:///x", "gs:/bucket"]
)
def test_an_address_is_no_local_path(address):
    with pytest.raises(ValueError, match="is an address.*mount"):
        files.local_path(address)
    with pytest.raises(ValueError, match="is an address"):
        files.local_path(Path(address))


@pytest.mark.parametrize("text", ["", "  ", "a\0b"])
def test_no_path_at_all(text):
    with pytest.raises(ValueError, match="is not a path"):
        files.local_path(text)


def test_the_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert files.local_path("~/runs") == Path("/home/somebody/runs")
    assert files.local_path(Path("~/runs")) == Path("/home/somebody/runs")
    assert files.local_path("a:b/~c") == Path("a:b/~c")
    with pytest.raises(ValueError, match="home"):
        files.local_path("~nobody-of-this-name/x")


def test_a_path_that_no_file_system_takes_is_refused(tmp_path):
    for good in ("x" * 255, "é" * 127, "a/" * 2000):
        files.local_path(good)
    for bad in ("x" * 256, f"a/{'é' * 128}/b", "a/" * 2100):
        with says("...' is too long for a path: a name may have 255 bytes", "give a shorter one"):
            files.local_path(bad)


def test_a_living_process_keeps_its_claim_and_a_killed_one_does_not(tmp_path):
    file = tmp_path / "in_use"
    process = hold(file)
    try:
        assert refusal(file, "trains in 'run'").startswith(f"process {process.pid} on ")
        assert "trains in 'run' already" in refusal(file, "trains in 'run'")
        assert json.loads(file.read_text())["pid"] == process.pid
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    began = time.monotonic()
    with files.claimed(file, "trains in 'run'"):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < files.PATIENCE / 2  # looked up, not waited for
    assert list(tmp_path.iterdir()) == []


def test_one_that_waits_comes_next(tmp_path):
    file, order = tmp_path / "in_use", []

    def second():
        with files.claimed(file, "prepares", wait=True):
            order.append("second")

    thread = threading.Thread(target=second)
    with files.claimed(file, "prepares"):
        thread.start()
        time.sleep(0.5)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def write_elsewhere(file):
    facts = {"host": "node17", "boot": "b", "processes": "p", "pid": 7, "started": "1", "work": ""}
    file.write_text(json.dumps(facts))


def test_a_claim_of_another_machine_lives_by_its_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 1.5)
    file = tmp_path / "in_use"
    write_elsewhere(file)
    done = threading.Event()

    def beat():
        while not done.wait(0.3):
            os.utime(file)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert "process 7 on node17 trains already" in refusal(file, "trains")
    finally:
        done.set()
        thread.join()
    with files.claimed(file, "trains"):  # no beat any more
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_the_claim_beats_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HEARTBEAT", 0.1)
    file = tmp_path / "in_use"
    with files.claimed(file, "trains"):
        before = file.stat().st_mtime_ns
        time.sleep(0.6)
        assert file.stat().st_mtime_ns > before


def test_a_number_that_is_now_another_process_is_no_claim(tmp_path):
    file = tmp_path / "in_use"
    mine = {**files._machine(), "pid": os.getpid(), "started": "1", "work": ""}
    file.write_text(json.dumps(mine))
    with files.claimed(file, "trains"):
        pass


def test_a_claim_cut_off_while_written_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.5)
    file = tmp_path / "in_use"
    file.write_text('{"host": ')
    with files.claimed(file, "trains"):
        pass


def test_of_many_that_see_a_dead_holder_one_enters_at_a_time(tmp_path):
    file, inside, seen = tmp_path / "in_use", [], []
    mine = {**files._machine(), "pid": 2**22 - 1, "started": "1", "work": ""}
    file.write_text(json.dumps(mine))

    def enter():
        with files.claimed(file, "trains", wait=True):
            inside.append(1)
            seen.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == [1] * 8


def test_who_was_killed_while_it_removed_a_dead_claim_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOMENT", 0.2)
    file = tmp_path / "in_use"
    mine = {**files._machine(), "pid": 2**22 - 1, "started": "1", "work": ""}
    file.write_text(json.dumps(mine))
    (tmp_path / "in_use.removing").touch()
    with files.claimed(file, "trains"):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_folder_on_a_read_only_mount_is_said(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    where = f"cannot write in {str(tmp_path)!r}: Read-only"
    with says(where, "name another folder"), files.appearing(tmp_path / "out"):
        raise AssertionError


def test_what_a_process_of_the_same_number_left_is_no_hindrance(tmp_path):
    """In a container every program has the number 1."""
    (tmp_path / f".a.json.{os.getpid()}.part").write_text("half")
    files.write_text(tmp_path / "a.json", "whole")
    assert (tmp_path / "a.json").read_text() == "whole"
