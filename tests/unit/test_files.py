"""Files are written whole or not at all, and read with one clear sentence when they are broken."""

import gzip
import json
import lzma
import os
import signal
import subprocess
import sys

import pytest

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
            assert temporary.parent == path.parent  # so that the last step is one rename
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


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    program = (
        "import sys\nfrom greencode.files import atomic\n"
        "with atomic(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n    print('written', flush=True)\n    sys.stdin.read()\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_text(path, "new")  # what the killed writer left is in no one's way
    assert path.read_text() == "new"


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
