"""Files are written whole or not at all, and read with one clear sentence when they are broken."""

import contextlib
import errno
import gzip
import json
import lzma
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from greencode.errors import UserError
from greencode.files import atomic, open_text, read_json, sha256, write_json, write_text


def fail_while_writing(path):
    with atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def test_atomic_puts_the_new_file_in_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    for text in ("old", "new"):
        with atomic(path) as temporary:
            assert temporary.parent.parent == path.parent  # so that the last step is one rename
            assert temporary.name == path.name  # so that writers can go by the suffix
            temporary.write_text(text)
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["a.txt"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        fail_while_writing(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_error_leaves_no_file_where_there_was_none(tmp_path):
    with pytest.raises(RuntimeError):
        fail_while_writing(tmp_path / "a.txt")
    assert os.listdir(tmp_path) == []


WRITER = """
import sys
from pathlib import Path
from greencode.files import atomic
with atomic(sys.argv[1]) as temporary:
    temporary.write_text("half")
    (temporary.parent / ".tmp0815").write_text("what a library has beside it")
    print("written", flush=True)
    sys.stdin.read()
    temporary.write_text(sys.argv[2])
"""


@contextlib.contextmanager
def writer(path, text):
    """A process that has written half of a file and goes on when its stdin is closed."""
    command = [sys.executable, "-c", WRITER, str(path), text]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "written\n"
        yield process


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_clears_up(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with writer(path, "never") as killed:
        killed.kill()
    assert path.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == [".a.txt.partial", "a.txt"]
    with atomic(path) as temporary:
        assert os.listdir(temporary.parent) == []
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_two_writers_at_once_do_not_touch_each_others_half(tmp_path):
    path = tmp_path / "a.txt"
    with writer(path, "slow") as slow:
        with atomic(path) as temporary:
            assert not temporary.exists()
            temporary.write_text("quick")
        assert path.read_text() == "quick"
        slow.communicate()
    assert slow.returncode == 0
    assert path.read_text() == "slow"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_many_writers_of_one_file_leave_one_of_theirs_whole(tmp_path):
    """Writers that begin while others end, with a library that puts files of its own in place."""
    path = tmp_path / "a.safetensors"

    def write(number):
        for _ in range(20):
            with atomic(path) as temporary:
                save_file({"a": np.full(5000, number)}, temporary)
            (values,) = load_file(path).values()
            assert len(values) == 5000
            assert (values == values[0]).all()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_writer_that_comes_as_another_ends_has_a_folder_of_its_own(tmp_path, monkeypatch):
    def taken_as_it_goes(handle, how):
        (tmp_path / ".a.txt.partial").rmdir()

    monkeypatch.setattr("fcntl.flock", taken_as_it_goes)
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_others_may_read_what_was_written(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {})
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_text_is_compressed_by_suffix_and_read_back(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    text = "ü\nзевс\r\n" * 100
    write_text(path, text)
    opened = {"": open, ".gz": gzip.open, ".xz": lzma.open}[suffix]
    with opened(path, "rb") as stream:
        assert stream.read().decode() == text
    with open_text(path) as stream:
        assert len(stream.readlines()) == 200


def test_the_same_text_gives_the_same_gz_bytes_whatever_its_name_and_time(tmp_path):
    for name in ("a.gz", "b.gz"):
        write_text(tmp_path / name, "same\n" * 50)
    first = (tmp_path / "a.gz").read_bytes()
    assert (tmp_path / "b.gz").read_bytes() == first
    assert first[3] == 0  # flags: no name
    assert first[4:8] == bytes(4)  # time stamp


def test_json_is_readable_sorted_and_free_of_nan(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, None], "a": 0.5})
    assert path.read_text() == '{\n "a": 0.5,\n "b": [\n  1,\n  null\n ]\n}\n'
    assert read_json(path) == {"a": 0.5, "b": [1, None]}
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 0.5, "b": [1, None]}


def test_a_missing_json_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json does not exist\."):
        read_json(tmp_path / "gone.json")


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_a_truncated_json_file_is_named(tmp_path, suffix, share):
    path = tmp_path / f"a.json{suffix}"
    write_json(path, {str(key): os.urandom(8).hex() for key in range(200)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=rf"a\.json{suffix} cannot be read as JSON"):
        read_json(path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_a_damaged_json_file_is_named(tmp_path, suffix):
    path = tmp_path / f"a.json{suffix}"
    write_json(path, {str(key): os.urandom(8).hex() for key in range(200)})
    damaged = bytearray(path.read_bytes())
    damaged[40:80] = bytes(255 - byte for byte in damaged[40:80])
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_json(path)


def test_sha256_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_json_file_is_plain_json(tmp_path):
    write_json(tmp_path / "a.json.gz", [1, "ü"])
    assert json.loads(gzip.decompress((tmp_path / "a.json.gz").read_bytes())) == [1, "ü"]
