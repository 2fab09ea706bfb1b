"""A stand-in for the Hugging Face hub on loopback: what its libraries ask for when they download.

It answers a repository's information, file tree, pull requests and files, with the headers by which the
libraries know commits and hashes, and refuses as the hub does.
"""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "x" * 34  # no secret: what the stand-in takes for a login


@dataclass
class Repository:
    """One repository: files by commit, commits by branch, and who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    requests: list[dict] = field(default_factory=list)

    def files(self, revision):
        """Commit and files of a revision; None if there is none."""
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


def is_large(path):
    """Whether the hub keeps a file outside of git."""
    return path.endswith((".safetensors", ".parquet", ".bin"))


def git_hash(content):
    """What git calls a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class StandIn(ThreadingHTTPServer):
    """The server: `add` repositories; `asked` holds (method, path, status) of all requests.

    Attributes:
        drops: how many times the transfer of a file breaks off half-way, by name; its status counts as 0.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.asked: list[tuple[str, str, int]] = []
        self.drops: dict[str, int] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def add(self, name, folder, kind="models", branch="main", gated=False):
        """Publish the files of a folder; returns the commit."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repository = self.repositories.setdefault((kind, name), Repository())
        repository.commits[commit] = files
        repository.branches[branch] = commit
        repository.gated |= gated
        return commit

    def downloads(self):
        """Names of the files that were sent whole."""
        return [
            unquote(path.rpartition("/")[2])
            for method, path, status in self.asked
            if (method, status) == ("GET", 200) and "/resolve/" in path
        ]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Say nothing: the server keeps its own list."""

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    # As a proxy, it is asked for what lies elsewhere, and notes that too.
    do_CONNECT = do_POST = do_GET

    def _answer(self):
        path = urlsplit(self.path).path
        if api := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|discussions)(?:/(.+))?)?", path
        ):
            self._api(*api.groups())
        elif file := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, path = file.groups()
            self._file("datasets" if kind else "models", name, unquote(revision), unquote(path))
        else:
            self._send(404)

    def _api(self, kind, name, what, revision):
        repository = self.server.repositories.get((kind, name))
        if repository is None:
            # The hub does not tell strangers what does not exist.
            self._refuse(404 if self._token() else 401, "RepoNotFound", "Repository not found")
        elif what == "discussions":
            found = repository.requests
            self._json({"discussions": found, "count": len(found), "start": 0})
        elif (found := repository.files(unquote(revision or "main"))) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif what == "tree":
            self._json([self._entry(path, content) for path, content in found[1].items()])
        else:
            files = [{"rfilename": path} for path in found[1]]
            self._json({"id": name, "sha": found[0], "private": False, "tags": [], "siblings": files})

    @staticmethod
    def _entry(path, content):
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if is_large(path):
            lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entry |= {"oid": git_hash(json.dumps(lfs).encode()), "lfs": lfs}
        return entry

    def _file(self, kind, name, revision, path):
        repository = self.server.repositories.get((kind, name))
        if repository is None:
            self._refuse(404 if self._token() else 401, "RepoNotFound", "Repository not found")
        elif (found := repository.files(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif repository.gated and self._token() != TOKEN:
            self._refuse(
                403 if self._token() else 401, "GatedRepo", f"Access to {kind} {name} is restricted."
            )
        elif path not in found[1]:
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            self._content(path, *found)

    def _content(self, path, commit, files):
        content = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_hash(content)}"', "Accept-Ranges": "bytes"}
        if is_large(path):
            hash = hashlib.sha256(content).hexdigest()
            headers |= {"ETag": f'"{hash}"', "X-Linked-Etag": f'"{hash}"', "X-Linked-Size": str(len(content))}
        start, status = 0, 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, status = int(asked[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = self.command == "GET" and self.server.drops.get(path, 0) > 0
        if cut:
            self.server.drops[path] -= 1
        self._send(status, content[start:], headers, cut)

    def _token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status, code, message):
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status, body=b"", headers=None, cut=False):
        self.server.asked.append((self.command, self.path, 0 if cut else status))
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)


@contextmanager
def stand_in():
    """A running stand-in."""
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def libraries_at(url, cache, monkeypatch):
    """Lead the hub's libraries, which read HF_ENDPOINT and HF_HOME when they are imported, to a stand-in."""
    from huggingface_hub import constants

    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN", raising=False)
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        yield
