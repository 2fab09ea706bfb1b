"""Snapshots of the Hugging Face hub in its local cache (HF_HOME), checked; else one sentence why not."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from greencode.errors import UserError
from greencode.files import sha256

LOGIN = "log in with `hf auth login` or set HF_TOKEN"


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep the hub's libraries from asking the hub, whether they are imported by now or will be."""
    variables = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {name: os.environ.get(name) for name in variables}
    flags = {module: module.HF_HUB_OFFLINE for module in _libraries()}
    os.environ.update(dict.fromkeys(variables, "1"))
    for module in flags:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        # For those who do several things in one process, as tests do.
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        for module in _libraries():
            module.HF_HUB_OFFLINE = flags.get(module, before["HF_HUB_OFFLINE"] == "1")


def _libraries() -> list[Any]:
    """Modules, imported by now, that keep what the variables said when they were."""
    names = ("huggingface_hub.constants", "datasets.config")
    return [sys.modules[name] for name in names if name in sys.modules]


def snapshot(
    name: str,
    revision: str | None,
    kind: str,
    wanted: Sequence[str],
    unwanted: Sequence[str] = (),
) -> Path:
    """The folder of a repository's files at a revision; its name is the commit.

    Files that the cache lacks are downloaded, unless HF_HUB_OFFLINE is set.

    Args:
        name: such as `facebook/opt-125m`.
        revision: commit, tag, branch or `refs/pr/N`; None is `main`.
        kind: `model` or `dataset`.
        wanted: patterns of the files to have; `*` also matches slashes.
        unwanted: patterns of files to leave out.

    Raises:
        UserError: no such repository or revision, no access, no connection, or a damaged file, which is
            then taken out of the cache.
    """
    from huggingface_hub import errors, snapshot_download

    revision = revision or "main"
    try:
        folder = snapshot_download(
            name,
            repo_type=kind,
            revision=revision,
            allow_patterns=list(wanted),
            ignore_patterns=list(unwanted),
        )
    except errors.GatedRepoError:
        raise UserError(f"The {kind} {name} is gated: accept its licence on the hub and {LOGIN}.") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"The hub has no {kind} {name}, or it is private: check its name, or {LOGIN}."
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"The {kind} {name} has no revision {revision}; take one from its page on the hub."
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"The {kind} {name} at {revision} is not in the hub's cache and the hub is out of reach "
            f"({_reason(error)}); run its download once where there is a network, with the same HF_HOME."
        ) from None
    # Below the hub's own errors are those of an HTTP client that is not ours to name.
    except Exception as error:
        raise UserError(f"The {kind} {name} at {revision} cannot be fetched ({_reason(error)}).") from None
    _check(Path(folder), name)
    return Path(folder)


def _reason(error: BaseException) -> str:
    """The first line of what lies at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")


def _check(folder: Path, name: str) -> None:
    """Compare every file with its hash, which is the name of the blob that the cache's link leads to.

    The download itself only compares lengths, and a cached file is never looked at again.
    """
    for path in sorted(folder.rglob("*")):
        blob = path.resolve()
        if path.is_symlink() and blob.is_file() and not _is_intact(blob):
            blob.unlink()
            path.unlink()
            raise UserError(
                f"{path.relative_to(folder)} of {name} was damaged in the hub's cache and has been removed; "
                "run again to fetch it anew."
            )


def _is_intact(blob: Path) -> bool:
    if re.fullmatch("[0-9a-f]{64}", blob.name):  # a large file
        return sha256(blob) == blob.name
    if re.fullmatch("[0-9a-f]{40}", blob.name):  # a file in git itself
        content = blob.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == blob.name
    return True


def conversion(name: str) -> str | None:
    """`refs/pr/N` of a model's open pull request that adds safetensors; None if none is found."""
    from huggingface_hub import HfApi

    try:
        for request in HfApi().get_repo_discussions(
            name, discussion_type="pull_request", discussion_status="open"
        ):
            if "safetensors" in request.title.lower():
                return f"refs/pr/{request.num}"
    except Exception:  # a hint less; whoever asks has an error to report anyway
        return None
    return None
