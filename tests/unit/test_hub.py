"""The hub's libraries against a stand-in: what is downloaded, and what goes wrong in one sentence."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from greencode.errors import UserError
from greencode.hub import conversion, snapshot
from tests.hub import TOKEN

ROOT = Path(__file__).resolve().parents[2]
WANTED = ["*.json", "*.safetensors"]


@pytest.fixture
def files(tmp_path):
    """A repository with a file in git, a large one, and one that nobody wants."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_snapshot_has_the_files_asked_for_and_is_named_after_its_commit(stand_in_hub, files):
    commit = stand_in_hub.add("one/model", files)
    folder = snapshot("one/model", "main", "model", WANTED)
    assert folder.name == commit
    assert names(folder) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == (files / "model.safetensors").read_bytes()
    assert sorted(stand_in_hub.downloads()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("revision", [None, "main", "commit"])
def test_what_is_cached_is_not_downloaded_again_and_is_there_offline(
    stand_in_hub, files, monkeypatch, revision
):
    commit = stand_in_hub.add("one/model", files)
    revision = commit if revision == "commit" else revision
    folder = snapshot("one/model", revision, "model", WANTED)
    stand_in_hub.asked.clear()
    assert snapshot("one/model", revision, "model", WANTED) == folder
    assert stand_in_hub.downloads() == []
    stand_in_hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert snapshot("one/model", revision, "model", WANTED) == folder
    assert stand_in_hub.asked == []


def test_a_dropped_connection_is_survived(stand_in_hub, files):
    stand_in_hub.add("one/model", files)
    stand_in_hub.drops["model.safetensors"] = 1
    folder = snapshot("one/model", "main", "model", WANTED)
    assert (folder / "model.safetensors").read_bytes() == (files / "model.safetensors").read_bytes()
    sent = [status for method, path, status in stand_in_hub.asked if method == "GET" and "model.s" in path]
    assert sent[0] == 0
    assert len(sent) == 2


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_a_gated_repository_says_what_to_do(stand_in_hub, files, monkeypatch, token):
    stand_in_hub.add("one/gated", files, gated=True)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError) as caught:
        snapshot("one/gated", "main", "model", WANTED)
    assert str(caught.value) == (
        "The model one/gated is gated: accept its licence on the hub and "
        "log in with `hf auth login` or set HF_TOKEN."
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert names(snapshot("one/gated", "main", "model", WANTED)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_repository_that_does_not_exist(stand_in_hub, monkeypatch, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        UserError, match=r"^The hub has no dataset one/none, or it is private: check its name"
    ):
        snapshot("one/none", "main", "dataset", WANTED)


@pytest.mark.parametrize("revision", ["v2", "refs/pr/3", "0" * 40])
def test_a_revision_that_does_not_exist(stand_in_hub, files, revision):
    stand_in_hub.add("one/model", files)
    with pytest.raises(UserError, match=f"^The model one/model has no revision {revision}; take one"):
        snapshot("one/model", revision, "model", WANTED)


def test_a_hub_out_of_reach(stand_in_hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    with pytest.raises(
        UserError, match=r"^The model one/model at main is not .* out of reach \(.*refused\); run"
    ):
        snapshot("one/model", "main", "model", WANTED)


def test_offline_without_a_cache(stand_in_hub, files, monkeypatch):
    stand_in_hub.add("one/model", files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="with the same HF_HOME"):
        snapshot("one/model", "main", "model", WANTED)
    assert stand_in_hub.asked == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_is_found_and_fetched_again(stand_in_hub, files, name):
    stand_in_hub.add("one/model", files)
    blob = (snapshot("one/model", "main", "model", WANTED) / name).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(UserError, match=f"^{name} of one/model was damaged in the hub's cache and has been"):
        snapshot("one/model", "main", "model", WANTED)
    folder = snapshot("one/model", "main", "model", WANTED)
    assert (folder / name).read_bytes() == (files / name).read_bytes()


def test_the_pull_request_that_adds_safetensors_is_found(stand_in_hub, files):
    stand_in_hub.add("one/model", files)
    requests = stand_in_hub.repositories["models", "one/model"].requests
    assert conversion("one/model") is None
    common = {"status": "open", "isPullRequest": True, "createdAt": "2023-01-01T00:00:00.000Z"}
    common |= {"author": {"name": "someone"}, "repo": {"name": "one/model", "type": "model"}}
    requests.append(common | {"num": 3, "title": "Fix the card"})
    requests.append(common | {"num": 7, "title": "Adding `safetensors` variant of this model"})
    assert conversion("one/model") == "refs/pr/7"
    assert conversion("one/none") is None


SCRIPT = """
import sys
from types import SimpleNamespace
import datasets, huggingface_hub  # as scripts do, by way of others, before they come to job.run
from greencode import job
from greencode.errors import UserError
from greencode.hub import snapshot

def main(_):
    for kind in ("model", "dataset"):
        try:
            snapshot("one/repository", None, kind, ["*.json"])
        except UserError as error:
            print(error)
    try:
        datasets.load_dataset("one/repository")
    except Exception as error:
        print(type(error).__name__)

stub = SimpleNamespace(log=["log.txt"], rule="test", output=[], resources={})
job.run(main, stub, online="online" in sys.argv)
"""


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_only_a_job_that_fetches_asks_the_hub(stand_in_hub, files, tmp_path, mode):
    for kind in ("models", "datasets"):
        stand_in_hub.add("one/repository", files, kind)
    where = {"HF_ENDPOINT": stand_in_hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", SCRIPT, mode], env=os.environ | where, cwd=tmp_path, check=True)
    asked = {path for _, path, _ in stand_in_hub.asked}
    if mode == "offline":
        assert asked == set()
        assert (tmp_path / "log.txt").read_text().count("is not in the hub's cache") == 2
    else:
        assert "/api/models/one/repository/revision/main" in asked
        assert "/api/datasets/one/repository/revision/main" in asked
