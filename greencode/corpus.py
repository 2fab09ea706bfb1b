"""From a source named in the config to checked records, split, written, and read again.

A source is a tree of source files (`tree`: a folder, an archive, `python-stdlib` or `jdk`), files of
CodeXGLUE tokens (`jsonl`), a dataset in the layout of `google/code_x_glue_cc_code_completion_token`
(`hub`), or the files that this was made from (`codexglue`). Every file becomes a `Record` whose code runs
from `<s>` to `</s>`.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import itertools
import json
import lzma
import math
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from greencode.errors import UserError
from greencode.files import atomic, open_text, sha256, write_json
from greencode.hub import snapshot
from greencode.lexing import (
    END,
    EOL,
    MAX_TOKEN,
    START,
    SUFFIXES,
    VARIANTS,
    encode_tokens,
    literal_allow_lists,
    plain_tokens,
)

SPLITS = ("train", "validation", "test")
FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}
MIN_TOKENS = 35  # 20 of context and 15 to predict


@dataclass(frozen=True, slots=True)
class Record:
    """One source file of a split.

    Attributes:
        id: number within its split, from 0.
        path: where the file came from, as its source names it.
        code: CodeXGLUE tokens, from `<s>` to `</s>`.
    """

    id: int
    path: str
    code: list[str]


class Item(NamedTuple):
    """One file as a source yields it: `split` None where the source has none, `code` None if unlexable."""

    split: str | None
    path: str
    code: list[str] | None


class Source(Protocol):
    """What every kind of source offers.

    Attributes:
        encoded: items hold CodeXGLUE tokens already; if false, plain tokens still to be encoded.
    """

    encoded: bool

    def read(self, language: str, variant: str) -> Iterator[Item]:
        """Yield all files, checked; those of one split together, the test split first."""
        ...

    def describe(self) -> dict[str, Any]:
        """Source as given, its version, and the SHA-256 of what `read` read; complete after `read`."""
        ...


# --- the schema -------------------------------------------------------------------------------------

_INNER_BLANK_ALLOWED = re.compile(r"[A-Za-z]*['\"]")
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


def check_record(record: Record, language: str | None, where: str, variant: str = "raw") -> None:
    """Check a record against the invariants of CodeXGLUE's data.

    Args:
        record: what to check.
        language: `java` or `python`; None checks only what holds for both.
        where: file and row for the message, such as `train.jsonl, row 17`.
        variant: `raw` or `norm`; only raw limits the length of a token.

    Raises:
        UserError: the first fault found.
    """
    fault = _fault(record, language, variant)
    if fault:
        raise UserError(f"{where}: {fault}.")


def _fault(record: Record, language: str | None, variant: str) -> str | None:
    code = record.code
    if type(record.id) is not int:
        return f"id must be an integer, not {json.dumps(record.id)}"
    if not isinstance(record.path, str):
        return f"path must be a string, not {json.dumps(record.path)}"
    if not isinstance(code, list) or not all(isinstance(token, str) for token in code):
        return "code must be a list of strings"
    if len(code) < 2 or code[0] != START or code[-1] != END:
        return f'code must begin with "{START}" and end with "{END}"'
    inner = set(itertools.islice(code, 1, len(code) - 1))
    if START in inner or END in inner:
        return f'"{START}" and "{END}" may stand only at the ends of code'
    for token in inner:
        if not token:
            return "code has an empty token"
        if variant == "raw" and len(token) > MAX_TOKEN:
            return f"token {token[:20]!r}... is longer than {MAX_TOKEN} characters"
        if token.isascii() and token.isalnum():
            continue
        if re.search(r"\s", token):
            spaces_allowed = language != "java" and _INNER_BLANK_ALLOWED.match(token)
            if not spaces_allowed or re.search(r"[^\S ]", token):
                return f"token {token[:20]!r} has white space inside"
        if _LONE_SURROGATE.search(token):
            return f"token {token[:20]!r} is no valid Unicode"
    if EOL in inner:
        if language == "java":
            return f'Java code may not hold "{EOL}"'
        line_ends = [i for i, token in enumerate(code) if token == EOL]
        if line_ends[0] == 1 or line_ends[-1] == len(code) - 2 or _has_neighbours(line_ends):
            return f'"{EOL}" may not come first, last or twice in a row'
    return None


def _has_neighbours(places: list[int]) -> bool:
    return any(right - left == 1 for left, right in itertools.pairwise(places))


# --- reading rows -----------------------------------------------------------------------------------

_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, from 1, that are not blank."""
    try:
        with open_text(path) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path or run the step that makes it.") from None
    except _READ_ERRORS as error:
        raise UserError(f"{path} is cut off or damaged ({error}); fetch or make it again.") from None


def _as_record(row: Any, number: int, where: str, default_path: str = "") -> Record:
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object with a list of tokens called code.")
    if "code" not in row:
        raise UserError(f"{where}: the list of tokens called code is missing.")
    identity, path = row.get("id"), row.get("path")
    return Record(
        number - 1 if identity is None else identity, default_path if path is None else path, row["code"]
    )


def _parse(line: str, number: int, where: str, default_path: str = "") -> Record:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}).") from None
    return _as_record(row, number, where, default_path)


def read_split(path: str | Path, language: str | None = None, variant: str = "raw") -> list[Record]:
    """Read a split that `prepare` wrote.

    Args:
        path: JSON Lines, plain, .gz or .xz.
        language: `java` or `python` to check that language's rules too.
        variant: `raw` or `norm`.

    Raises:
        UserError: the file is missing, cut off or empty, or a row breaks the format; names file and row.
    """
    path = Path(path)
    records = []
    for number, line in _lines(path):
        where = f"{path.name}, row {number}"
        record = _parse(line, number, where)
        check_record(record, language, where, variant)
        if record.id != len(records):
            raise UserError(f"{where}: id is {record.id} where {len(records)} should follow.")
        record.code[:] = map(sys.intern, record.code)
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no records; make it again.")
    return records


def read_corpus(
    path: str | Path, language: str, split: str, max_files: int | None = None, seed: int = 0
) -> Iterator[Record]:
    """Read a corpus for pretraining one record at a time, in file order.

    Args:
        path: folder that holds `{language}/{split}.jsonl` (plain, .gz or .xz).
        language: `java` or `python`.
        split: such as `train`.
        max_files: read only so many records, chosen by seed; costs a first pass that counts them.
        seed: of that choice.

    Raises:
        UserError: there is no such file, or it is damaged, or a row breaks the format.
    """
    _check_language(language)
    stem = Path(path).expanduser() / language / f"{split}.jsonl"
    file = next((found for end in ("", ".gz", ".xz") if (found := Path(f"{stem}{end}")).is_file()), None)
    if file is None:
        raise UserError(f"{stem} does not exist, neither plain nor as .gz or .xz; check path and split.")
    return _corpus_records(file, language, max_files, seed)


def _corpus_records(file: Path, language: str, max_files: int | None, seed: int) -> Iterator[Record]:
    chosen = None
    if max_files is not None:
        numbers = (number for number, _ in _lines(file))
        chosen = set(heapq.nsmallest(max_files, numbers, key=lambda number: _rank(seed, "row", str(number))))
    for number, line in _lines(file):
        if chosen is None or number in chosen:
            where = f"{file.name}, row {number}"
            record = _parse(line, number, where)
            check_record(record, language, where)
            yield record


# --- sources ----------------------------------------------------------------------------------------


@dataclass
class Tree:
    """Source files of a folder, a zip or tar archive, the Python standard library, or a JDK.

    Attributes:
        path: folder or archive, `python-stdlib` or `jdk`.
        prefix: only files whose path within begins so.
        cache_dir: where Java sources are kept that have to be fetched.
    """

    path: str
    prefix: str = ""
    cache_dir: Path | None = None
    encoded: bool = False
    version: str | None = None
    _digest: Any = field(default_factory=hashlib.sha256)

    def read(self, language: str, variant: str) -> Iterator[Item]:
        """Yield plain tokens of every file of the language, sorted by path. See `Source.read`."""
        found = False
        for path, content in self._files(SUFFIXES[language]):
            found = True
            self._digest.update(f"{path}\0{len(content)}\0".encode(errors="surrogateescape") + content)
            try:
                code = plain_tokens(content.decode("utf-8-sig"), language)
            except ValueError:
                code = None
            yield Item(None, path, code)
        if not found:
            below = f" under {self.prefix}" if self.prefix else ""
            raise UserError(
                f"{self.path} holds no {SUFFIXES[language]} files{below}; check path, prefix and language."
            )

    def _files(self, suffix: str) -> Iterator[tuple[str, bytes]]:
        if self.path == "python-stdlib":
            self.version = f"CPython {platform.python_version()}"
            yield from _folder_files(Path(sysconfig.get_paths()["stdlib"]), self.prefix, suffix, _is_library)
            return
        if self.path == "jdk":
            path, self.version = find_jdk(self.cache_dir)
            yield from _zip_files(path, self.prefix or "java.base/", suffix)
            return
        path = Path(self.path).expanduser()
        name = path.name.lower()
        if path.is_dir():
            yield from _folder_files(path, self.prefix, suffix, lambda _: True)
        elif not path.exists():
            raise UserError(f"{self.path} does not exist; check the source's path in the config.")
        elif name.endswith((".zip", ".jar")):
            yield from _zip_files(path, self.prefix, suffix)
        elif name.endswith((".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz")):
            yield from _tar_files(path, self.prefix, suffix)
        else:
            raise UserError(
                f"{self.path} is no folder, .zip, .tar, .tar.gz or .tar.xz; unpack or convert it."
            )

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`; the hash covers paths and bytes of all files read."""
        return {
            "kind": "tree",
            "path": self.path,
            "prefix": self.prefix,
            "version": self.version,
            "sha256": self._digest.hexdigest(),
        }


_NO_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def _is_library(name: str) -> bool:
    # _sysconfigdata holds the build machine's paths, so no two machines have the same.
    return name not in _NO_LIBRARY and not name.startswith("_sysconfigdata")


def _folder_files(
    root: Path, prefix: str, suffix: str, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, bytes]]:
    paths = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".") and wanted(name)]
        for name in names:
            file = Path(folder, name)
            regular = name.endswith(suffix) and stat.S_ISREG(file.lstat().st_mode)
            path = file.relative_to(root).as_posix()
            if regular and path.startswith(prefix) and wanted(name):
                paths.append(path)
    for path in sorted(paths):
        try:
            yield path, (root / path).read_bytes()
        except OSError as error:
            raise UserError(f"{root / path} cannot be read ({error.strerror}); make it readable.") from None


def _zip_files(path: Path, prefix: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename):
                name = member.filename
                linked = stat.S_ISLNK(member.external_attr >> 16)
                if name.endswith(suffix) and name.startswith(prefix) and not linked:
                    yield name, archive.read(member)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, *_READ_ERRORS) as error:
        raise UserError(f"{path} cannot be read as a zip archive ({error}); fetch it again.") from None


def _tar_files(path: Path, prefix: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    contents = []
    try:
        # In the archive's own order: seeking in a compressed tar reads it again from the start.
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isreg() and name.endswith(suffix) and name.startswith(prefix):
                    contents.append((name, archive.extractfile(member).read()))
    except (tarfile.TarError, *_READ_ERRORS) as error:
        raise UserError(f"{path} cannot be read as a tar archive ({error}); fetch it again.") from None
    yield from sorted(contents)


JDK_FOLDERS = ("/usr/lib/jvm/*", "/Library/Java/JavaVirtualMachines/*/Contents/Home")
JDK_PACKAGES = ("openjdk-17-source", "openjdk-21-source", "openjdk-25-source")


def find_jdk(cache_dir: str | Path | None = None) -> tuple[Path, str]:
    """A JDK's `src.zip` with the module java.base, and its version.

    Looks under JAVA_HOME, then where `java` on PATH leads, then in the system's JVM folders (sorted), then
    in `cache_dir`. On a Debian-like system the sources are fetched into `cache_dir` if none are found.

    Raises:
        UserError: no sources, and no way to fetch them.
    """
    homes = []
    if os.environ.get("JAVA_HOME"):
        homes.append(Path(os.environ["JAVA_HOME"]))
    if java := shutil.which("java"):
        homes.append(Path(java).resolve().parent.parent)
    for pattern in JDK_FOLDERS:
        homes.extend(sorted(Path("/").glob(pattern.lstrip("/"))))
    for home in homes:
        if _has_java_base(home / "lib/src.zip"):
            return home / "lib/src.zip", _jdk_version(home)
    advice = "set JAVA_HOME to a JDK with lib/src.zip"
    if cache_dir is None:
        raise UserError(f"No Java sources found: {advice}.")
    cache_dir = Path(cache_dir)
    if found := _cached_jdk(cache_dir):
        return found
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise UserError(f"No Java sources found: {advice}, or use a folder or archive of .java files.")
    failure = ""
    for package in JDK_PACKAGES:
        failure = _fetch_package(package, cache_dir)
        if not failure and (found := _cached_jdk(cache_dir)):
            return found
    raise UserError(
        f"No Java sources found and {JDK_PACKAGES[0]} could not be fetched ({failure or 'no src.zip'}): "
        f"{advice}, or run apt-get update and try again."
    )


def _has_java_base(path: Path) -> bool:
    # Debian's lib/src.zip is a link that leads nowhere unless the source package is installed.
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.startswith("java.base/") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _jdk_version(home: Path) -> str:
    try:
        release = (home / "release").read_text(errors="replace")
    except OSError:
        return home.name
    match = re.search(r'^JAVA_(?:RUNTIME_)?VERSION="([^"]+)"', release, re.MULTILINE)
    return f"JDK {match[1]}" if match else home.name


def _cached_jdk(cache_dir: Path) -> tuple[Path, str] | None:
    for path in sorted(cache_dir.glob("openjdk-*-source_*/usr/lib/jvm/*/lib/src.zip")):
        if _has_java_base(path):
            return path, "JDK " + path.relative_to(cache_dir).parts[0].split("_")[1]
    return None


def _fetch_package(package: str, cache_dir: Path) -> str:
    """Download and unpack a Debian package into `cache_dir`, without root; returns what failed, or ""."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        try:
            _run(["apt-get", "download", package], folder)
            archive = next(Path(folder).glob("*.deb"), None)
            if archive is None:
                return f"apt-get download {package} left no file"
            _run(["dpkg-deb", "-x", archive.name, archive.stem], folder)
            target = cache_dir / archive.stem
            if not target.exists():
                os.replace(Path(folder, archive.stem), target)
        except subprocess.CalledProcessError as error:
            lines = (error.stderr or "").strip().splitlines()
            return lines[-1].rstrip(".") if lines else f"{error.cmd[0]} ended with {error.returncode}"
        except (subprocess.TimeoutExpired, OSError) as error:
            return str(error)
    return ""


def _run(command: list[str], folder: str) -> None:
    subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True, errors="replace", timeout=600
    )


class _Rows:
    """What sources of ready tokens share: the hash over all rows, and the paths of rows without one."""

    encoded = True

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def _item(self, split: str | None, record: Record) -> Item:
        line = json.dumps([split, record.path, record.code], separators=(",", ":"))
        self._digest.update(line.encode() + b"\n")
        # The hub's Python paths end in a line break.
        return Item(split, record.path.strip() or f"{split or 'all'}/{record.id}", record.code)


def _validation_start(rows: int) -> int:
    """First row of the validation part of a train split: CodeXGLUE's last 5,000, or the last 5 %."""
    return rows - (5000 if rows >= 100_000 else max(1, rows // 20))


_SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}
_TEXT_SUFFIXES = (".txt", ".txt.gz", ".txt.xz")
_ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", *_TEXT_SUFFIXES)


class TokenFiles(_Rows):
    """Files of CodeXGLUE tokens: JSON Lines with `code`, or text with one blank-separated file per line.

    `path` is one file, to be split, or a folder with train, validation (or dev) and test; where validation
    is missing, the end of train serves.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def read(self, language: str, variant: str) -> Iterator[Item]:
        """See `Source.read`."""
        path = Path(self.path).expanduser()
        if not path.exists():
            raise UserError(f"{self.path} does not exist; check the source's path in the config.")
        if path.is_file():
            for record in self._records(path, language, variant):
                yield self._item(None, record)
            return
        files = {split: self._split_file(path, split) for split in SPLITS}
        for split in ("train", "test"):
            if files[split] is None:
                raise UserError(
                    f"{self.path} has no {split} split ({split}.jsonl or {split}.txt, plain, .gz or .xz); "
                    "add it, or give the path of a single file to have it split."
                )
        for record in self._records(files["test"], language, variant):
            yield self._item("test", record)
        if files["validation"] is not None:
            for record in self._records(files["validation"], language, variant):
                yield self._item("validation", record)
            for record in self._records(files["train"], language, variant):
                yield self._item("train", record)
            return
        start = _validation_start(sum(1 for _ in _lines(files["train"])))
        train = self._records(files["train"], language, variant)
        for record in itertools.islice(train, start):
            yield self._item("train", record)
        for record in train:
            yield self._item("validation", record)

    @staticmethod
    def _split_file(folder: Path, split: str) -> Path | None:
        candidates = (folder / (name + suffix) for name in _SPLIT_NAMES[split] for suffix in _ROW_SUFFIXES)
        return next((path for path in candidates if path.is_file()), None)

    @staticmethod
    def _records(path: Path, language: str, variant: str) -> Iterator[Record]:
        if not path.name.endswith(_ROW_SUFFIXES):
            raise UserError(f"{path} is neither .jsonl nor .txt (plain, .gz or .xz); rename or convert it.")
        is_text = path.name.endswith(_TEXT_SUFFIXES)
        seen = set()
        for number, line in _lines(path):
            where = f"{path.name}, row {number}"
            record = Record(number - 1, "", line.split()) if is_text else _parse(line, number, where)
            check_record(record, language, where, variant)
            if record.id in seen:
                raise UserError(f"{where}: id {record.id} stands in an earlier row too.")
            seen.add(record.id)
            yield record

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {"kind": "jsonl", "path": self.path, "version": None, "sha256": self._digest.hexdigest()}


class Hub(_Rows):
    """A dataset of the Hugging Face hub, or a local folder of the same layout.

    `name` is the dataset or the folder, `config` the configuration (the language if None), `revision` a
    commit, tag or branch. Where there is no validation split, the end of train serves.
    """

    def __init__(self, name: str, config: str | None = None, revision: str | None = None) -> None:
        super().__init__()
        self.name = name
        self.config = config
        self.revision = revision
        self._commit: str | None = None

    def read(self, language: str, variant: str) -> Iterator[Item]:
        """See `Source.read`."""
        config = self.config or language
        parts = dict(self._load(config))
        for split in ("train", "test"):
            if split not in parts:
                raise UserError(f"{self.name} ({config}) has no {split} split; name a dataset that has one.")
        if self.name == CODEXGLUE:
            _check_counts({split: len(rows) for split, rows in parts.items()}, language, self.name)
        first = dict.fromkeys(SPLITS, 0)
        if "validation" not in parts:
            rows = len(parts["train"])
            first["validation"] = _validation_start(rows)
            parts["validation"] = parts["train"].select(range(first["validation"], rows))
            parts["train"] = parts["train"].select(range(first["validation"]))
        for split in reversed(SPLITS):
            for number, row in enumerate(parts[split], first[split] + 1):
                where = f"{self.name} ({config}), {split}, row {number}"
                record = _as_record(row, number, where)
                check_record(record, language, where, variant)
                if record.id != number - 1:
                    raise UserError(f"{where}: id is {record.id} where {number - 1} should be.")
                yield self._item(split, record)

    def fetch(self, language: str) -> dict[str, str]:
        """Bring the files that `read` needs into the hub's cache; returns their hashes.

        Afterwards `revision` is the commit.
        """
        config = self.config or language
        folder = self._folder(config)
        self.revision = self._commit
        # Another configuration may be in the same snapshot.
        data = folder / config if (folder / config).is_dir() else folder
        files = sorted(path for path in data.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): sha256(path) for path in files}

    def _folder(self, config: str) -> Path:
        """The dataset's folder, local or in the hub's cache."""
        local = Path(self.name).expanduser()
        if local.is_dir():
            return local
        # The other configurations of CodeXGLUE are folders beside this one, of hundreds of megabytes.
        in_config = [f"{config}/*{suffix}" for suffix in _DATA_SUFFIXES]
        folder = snapshot(self.name, self.revision, "dataset", [*in_config, "README.md"])
        if not (folder / config).is_dir():
            folder = snapshot(
                self.name, folder.name, "dataset", [*map("*".__add__, _DATA_SUFFIXES), "README.md"]
            )
        self._commit = folder.name
        return folder

    def _load(self, config: str) -> Mapping[str, Any]:
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"{self.name} needs the package datasets; install it or use another source."
            ) from None
        folder = self._folder(config)
        # datasets raises whatever its file systems and parsers raise.
        try:
            if (folder / config).is_dir():
                return datasets.load_dataset(str(folder / config))
            known = datasets.get_dataset_config_names(str(folder))
            return datasets.load_dataset(str(folder), config if config in known or self.config else None)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise UserError(
                f"The dataset {self.name} ({config}) could not be loaded ({reason}); "
                "check name, config and revision."
            ) from None

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`; the version is the commit that was read, where known."""
        return {
            "kind": "hub",
            "name": self.name,
            "config": self.config,
            "revision": self.revision,
            "version": self._commit or self.revision,
            "sha256": self._digest.hexdigest(),
        }


class CodeXGlue(_Rows):
    """The files that the hub's CodeXGLUE completion dataset was made from, and the same rows as there.

    `path` is the folder that holds them under their own names: for Java the three splits of the GitHub Java
    corpus (one tokenised file per line), for Python the archive of the 150k Python dataset. Their hashes
    are compared with those of the published files, or with `sha256`, before anything is used.
    """

    def __init__(self, path: str, sha256: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.path = path
        self.expected = sha256
        self._hashes: dict[str, str] = {}
        self._version: str | None = None

    def read(self, language: str, variant: str) -> Iterator[Item]:
        """See `Source.read`."""
        if variant != "raw":
            raise UserError("A codexglue source has raw tokens only; set data.variant: raw.")
        expected = self.expected or CODEXGLUE_FILES[language]
        files = {}
        for name in CODEXGLUE_FILES[language]:
            files[name] = path = Path(self.path).expanduser() / name
            if not path.is_file():
                raise UserError(f"{path} does not exist; docs/hub.md says where it comes from.")
            self._hashes[name] = sha256(path)
            if self._hashes[name] != expected.get(name):
                raise UserError(
                    f"{path} has SHA-256 {self._hashes[name]}, not {expected.get(name)}; fetch it again."
                )
        rows = self._java(files) if language == "java" else self._python(*files.values())
        seen = Counter()
        for split, record in rows:
            where = f"{split} of {self.path}, row {record.id + 1}"
            check_record(record, language, where)
            seen[split] += 1
            yield self._item(split, record)
        if self.expected is None:
            _check_counts(seen, language, self.path)

    @staticmethod
    def _java(files: Mapping[str, Path]) -> Iterator[tuple[str, Record]]:
        # In the order of CODEXGLUE_FILES: test, validation, train.
        for split, path in zip(reversed(SPLITS), files.values(), strict=True):
            for number, line in _lines(path):
                code = [token for token in line.split() if len(token) <= MAX_TOKEN]
                yield split, Record(number - 1, "", code)

    def _python(self, archive: Path) -> Iterator[tuple[str, Record]]:
        # Other Pythons split other text; the hub's rows are those of 3.6 to 3.11.
        self._version = f"tokenize of CPython {platform.python_version()}"
        train, test, codes = _py150(archive)
        start = _validation_start(len(train))
        for split, paths, first in (
            ("test", test, 0), ("validation", train[start:], start), ("train", train[:start], 0),
        ):  # fmt: skip
            for number, path in enumerate(paths, first):
                # A file that is missing or cannot be lexed has a row without tokens, as on the hub.
                yield split, Record(number, path.removeprefix("data/"), codes.get(path, [START, END]))

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`; `files` has the hashes of the files themselves."""
        return {
            "kind": "codexglue",
            "path": self.path,
            "files": self._hashes,
            "version": self._version,
            "sha256": self._digest.hexdigest(),
        }


def _py150(path: Path) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Paths of the train and test files of the 150k Python archive, and tokens of all that can be lexed."""
    try:
        with tarfile.open(path, "r:*") as archive:
            members = {Path(name).name: name for name in archive.getnames()}
            missing = [name for name in (*_PY150_LISTS, "data.tar.gz") if name not in members]
            if missing:
                raise UserError(f"{path} holds no {missing[0]}; fetch it again.")
            train, test = (
                archive.extractfile(members[name]).read().decode().split("\n") for name in _PY150_LISTS
            )
            train, test = ([line.strip() for line in lines if line.strip()] for lines in (train, test))
            wanted = {*train, *test}
            codes = {}
            with tarfile.open(fileobj=archive.extractfile(members["data.tar.gz"]), mode="r|gz") as data:
                for member in data:
                    name = member.name.removeprefix("./")
                    if member.isreg() and name in wanted:
                        code = _py150_tokens(data.extractfile(member).read())
                        if code is not None:
                            codes[name] = [sys.intern(token) for token in code]
    except (tarfile.TarError, *_READ_ERRORS) as error:
        raise UserError(f"{path} cannot be read as a tar archive ({error}); fetch it again.") from None
    return train, test, codes


def _py150_tokens(content: bytes) -> list[str] | None:
    """A Python file's row on the hub, which was read as UTF-8 and then as what its own first lines say."""
    try:
        content.decode()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return encode_tokens(plain_tokens(content.decode(encoding), "python"), "python")
    except (ValueError, LookupError, SyntaxError):
        return None


CODEXGLUE = "google/code_x_glue_cc_code_completion_token"
CODEXGLUE_ROWS = {
    "java": {"train": 12_934, "validation": 7_189, "test": 8_268},
    "python": {"train": 100_000, "test": 50_000},
}
# SHA-256 of the published files, in the order in which they are read.
CODEXGLUE_FILES = {
    "java": {
        "java_test_pre": "a88cd5c91c2ed23a928528bef3535f4fc8db1359975447211f2b13926cc38d9d",
        "java_validation_pre": "0c58a97d96aa7435396581ee5efbb93c0e74a545ba5f795f878098a6e59ab8b3",
        "java_training_pre": "676295d2756adcac22e213fbc3ea0f50669a0d152e9497e23a2929e2e2124905",
    },
    "python": {"py150_files.tar.gz": "73be7f7a78e549845cf80cf779a3bcc3a9cf351ff7017e07b89e8d1c82b8d389"},
}
_PY150_LISTS = ("python100k_train.txt", "python50k_eval.txt")
_DATA_SUFFIXES = (".parquet", ".json", ".jsonl", ".json.gz", ".jsonl.gz")


def _check_counts(found: Mapping[str, int], language: str, name: str) -> None:
    """Refuse what claims to be CodeXGLUE's dataset and has other numbers of rows."""
    expected = CODEXGLUE_ROWS[language]
    if "validation" not in expected and "validation" in found:  # already cut from train
        found = {"train": found["train"] + found["validation"], "test": found["test"]}
    for split, rows in expected.items():
        if found.get(split) != rows:
            raise UserError(
                f"{name} has {found.get(split, 0)} rows for {split} where CodeXGLUE's {language} data has "
                f"{rows}; take the published revision."
            )


_KEYS = {
    "tree": ("path", "prefix"),
    "jsonl": ("path",),
    "hub": ("name", "config", "revision"),
    "codexglue": ("path", "sha256"),
}


def needs_fetching(config: Mapping[str, Any]) -> bool:
    """Whether a source is to be brought to this machine before it can be read."""
    if config["kind"] == "hub":
        return not Path(config["name"]).expanduser().is_dir()
    return config.get("path") == "jdk"


def fetch(config: Mapping[str, Any], language: str, cache_dir: str | Path) -> dict[str, Any]:
    """Bring what a source reads to this machine: a hub dataset into HF_HOME, Java sources if none are found.

    Returns:
        `source`, the config with the commit as revision, and `files`, their SHA-256 by name.

    Raises:
        UserError: it cannot be fetched, or is damaged.
    """
    source = open_source(config, cache_dir)
    if isinstance(source, Hub):
        files = source.fetch(language)
        return {"source": {**config, "revision": source.revision}, "files": files}
    path, _ = find_jdk(cache_dir)
    return {"source": dict(config), "files": {path.name: sha256(path)}}


def open_source(config: Mapping[str, Any], cache_dir: str | Path | None = None) -> Source:
    """The source that a config names.

    Args:
        config: `kind` and its keys: `tree` (path, prefix), `jsonl` (path), `hub` (name, config, revision),
            `codexglue` (path, sha256).
        cache_dir: where a source keeps what it has to fetch.

    Raises:
        UserError: the kind or a key is unknown, or the first key is missing.
    """
    kind = config.get("kind")
    if kind not in _KEYS:
        raise UserError(f"The source kind {kind!r} is unknown; use one of {', '.join(_KEYS)}.")
    keys = {key: value for key, value in config.items() if key != "kind" and value is not None}
    unknown = sorted(set(keys) - set(_KEYS[kind]))
    if unknown:
        raise UserError(f"A {kind} source has no {unknown[0]!r}; it takes {', '.join(_KEYS[kind])}.")
    if not keys.get(_KEYS[kind][0]):
        raise UserError(f"The {kind} source lacks its {_KEYS[kind][0]}; set it in the config.")
    if kind == "tree":
        return Tree(**keys, cache_dir=Path(cache_dir) if cache_dir else None)
    return {"jsonl": TokenFiles, "hub": Hub, "codexglue": CodeXGlue}[kind](**keys)


# --- preparing --------------------------------------------------------------------------------------


def _check_language(language: str) -> None:
    if language not in SUFFIXES:
        raise UserError(f"The language {language!r} is unknown; use one of {', '.join(SUFFIXES)}.")


def _rank(seed: int, purpose: str, name: str) -> bytes:
    # Ordering by a hash is a seeded shuffle that needs no list and is the same on every Python.
    return hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode(errors="surrogateescape")).digest()


def split_items(items: list[Item], seed: int, fractions: Mapping[str, float]) -> dict[str, list[Item]]:
    """Share items out among the splits by seed and path, each split in the order of `items`.

    Every split gets its fraction of the number of items, rounded, validation and test at least one.
    """
    count = len(items)
    order = sorted(range(count), key=lambda i: (_rank(seed, "split", items[i].path), i))
    test = max(1, round(fractions["test"] * count))
    validation = max(1, round(fractions["validation"] * count))
    places = {
        "test": order[:test],
        "validation": order[test : test + validation],
        "train": order[test + validation :],
    }
    return {split: [items[i] for i in sorted(places[split])] for split in SPLITS}


def _kept(
    items: Iterable[Item],
    source: Source,
    language: str,
    variant: str,
    min_tokens: int,
    seen: set[bytes],
    left_out: Counter[str],
) -> Iterator[Item]:
    """Items that are lexable, long enough and new; the others are counted by reason in `left_out`."""
    for item in items:
        if item.code is None:
            left_out["unlexable"] += 1
            continue
        # Without an allow-list, so that neither length nor identity depend on the train split.
        code = item.code if source.encoded else encode_tokens(item.code, language, variant)
        if not source.encoded:
            check_record(Record(0, item.path, code), language, item.path, variant)
        identity = hashlib.sha256("\n".join(code).encode()).digest()
        if len(code) == 2:
            left_out["empty"] += 1
        elif len(code) - 2 < min_tokens:
            left_out["short"] += 1
        elif identity in seen:
            left_out["duplicate"] += 1
        else:
            seen.add(identity)
            kept = item.code if variant == "norm" else code
            yield item._replace(code=[sys.intern(token) for token in kept])


def _limited(items: Iterable[Item], limit: int | None, seed: int, left_out: Counter[str]) -> list[Item]:
    """At most `limit` of the items, chosen by seed and path, in their order."""
    if limit is None:
        return list(items)
    count = 0

    def numbered() -> Iterator[tuple[int, Item]]:
        nonlocal count
        for item in items:
            count += 1
            yield count, item

    chosen = heapq.nsmallest(
        limit, numbered(), key=lambda pair: (_rank(seed, "limit", pair[1].path), pair[0])
    )
    left_out["limit"] += count - len(chosen)
    return [item for _, item in sorted(chosen, key=lambda pair: pair[0])]


def _check_settings(
    language: str, variant: str, fractions: Mapping[str, float], max_files: Mapping[str, int | None]
) -> None:
    _check_language(language)
    if variant not in VARIANTS:
        raise UserError(f"The variant {variant!r} is unknown; use one of {', '.join(VARIANTS)}.")
    if set(fractions) != set(SPLITS) or min(fractions.values()) <= 0:
        raise UserError(f"The split fractions {dict(fractions)} must name {', '.join(SPLITS)}, all above 0.")
    if not math.isclose(sum(fractions.values()), 1, abs_tol=1e-6):
        raise UserError(f"The split fractions {dict(fractions)} must add up to 1.")
    for split, limit in max_files.items():
        if split not in SPLITS or not (limit is None or (type(limit) is int and limit > 0)):
            raise UserError(
                f"The file limit {split}: {limit} must be a whole number above 0 "
                f"for one of {', '.join(SPLITS)}."
            )


def prepare(
    source_config: Mapping[str, Any],
    language: str,
    variant: str = "raw",
    seed: int = 0,
    fractions: Mapping[str, float] | None = None,
    max_files: Mapping[str, int | None] | None = None,
    min_tokens: int = MIN_TOKENS,
    *,
    out_dir: str | Path,
    cache_dir: str | Path | None = None,
) -> None:
    """Turn a source into `train`, `validation` and `test.jsonl.gz` and a `manifest.json`.

    Every line is `{"id", "path", "code"}`, ids from 0. Files that cannot be lexed, are empty or short, or
    have the tokens of an earlier file are left out and counted. The test split comes first in this, so
    that published test sets stay whole and no file of theirs is left in train. The same source, settings
    and seed give the same bytes.

    Args:
        source_config: see `open_source`.
        language: `java` or `python`.
        variant: `raw` keeps literals, `norm` normalises them. For sources of ready tokens it states
            which of the two they are.
        seed: decides the splits of a source that has none, and which files a limit keeps.
        fractions: of `train`, `validation` and `test` for a source without splits; .8, .1, .1 by default.
        max_files: most files per split.
        min_tokens: fewest tokens of a file, without `<s>` and `</s>`.
        out_dir: folder for the four files.
        cache_dir: folder for what has to be fetched (JDK sources).

    Raises:
        UserError: a setting is wrong, the source is missing, damaged or breaks the format, or a split
            would be empty.
    """
    fractions = FRACTIONS if fractions is None else fractions
    max_files = max_files or {}
    _check_settings(language, variant, fractions, max_files)
    source = open_source(source_config, cache_dir)
    seen: set[bytes] = set()
    left_out = Counter(dict.fromkeys(("unlexable", "empty", "short", "duplicate", "limit"), 0))
    splits: dict[str, list[Item]] = {}
    for name, items in itertools.groupby(source.read(language, variant), key=lambda item: item.split):
        kept = _kept(items, source, language, variant, min_tokens, seen, left_out)
        parts = split_items(list(kept), seed, fractions) if name is None else {name: kept}
        for split, files in parts.items():
            splits[split] = _limited(files, max_files.get(split), seed, left_out)
    for split in SPLITS:
        if not splits.get(split):
            raise UserError(
                f"No file is left for the {split} split (left out: {_listed(left_out)}); "
                "lower min_tokens or use a larger source."
            )
    manifest: dict[str, Any] = {
        "source": source.describe(),
        "language": language,
        "variant": variant,
        "seed": seed,
        "fractions": dict(fractions) if name is None else None,
        "max_files": dict(max_files),
        "min_tokens": min_tokens,
        "left_out": dict(left_out),
    }
    if variant == "norm" and not source.encoded:
        allow = literal_allow_lists((item.code for item in splits["train"]), language)
        manifest["literals"] = allow
        for split, items in splits.items():
            splits[split] = [i._replace(code=encode_tokens(i.code, language, "norm", allow)) for i in items]
    manifest["splits"] = {
        split: _write_split(Path(out_dir) / f"{split}.jsonl.gz", splits[split]) for split in SPLITS
    }
    write_json(Path(out_dir) / "manifest.json", manifest)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count) or "none"


def _write_split(path: Path, items: list[Item]) -> dict[str, Any]:
    """Write a split line by line; returns its files, its tokens without `<s>` and `</s>`, its hash."""
    with atomic(path) as temporary, open_text(temporary, "w") as stream:
        for number, item in enumerate(items):
            row = {"id": number, "path": item.path, "code": item.code}
            stream.write(json.dumps(row, separators=(",", ":")) + "\n")
    tokens = sum(len(item.code) - 2 for item in items)
    return {"files": len(items), "tokens": tokens, "sha256": sha256(path)}
