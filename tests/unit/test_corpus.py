import gzip
import io
import json
import lzma
import sys
import tarfile
import zipfile

import pytest

from greencode import corpus
from greencode.corpus import (
    Item,
    Record,
    check_record,
    fetch,
    find_jdk,
    needs_fetching,
    open_source,
    prepare,
    read_corpus,
    read_split,
    split_items,
)
from greencode.errors import UserError
from greencode.files import read_json, sha256, write_text

SPLITS = ("train", "validation", "test")


def java_file(number: int) -> str:
    """A class of more than 35 tokens that no other number gives."""
    body = "".join(f"int f{number}x{i}(int a) {{ return a + {i}; }}\n" for i in range(4))
    return f"// comment\nclass C{number} {{\n{body}}}\n"


def java_files(count: int) -> dict[str, str]:
    return {f"java.base/p/C{i:02d}.java": java_file(i) for i in range(count)}


def write_tree(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def code(number: int, count: int = 40) -> list[str]:
    return ["<s>", *(f"t{number}" for _ in range(count)), "</s>"]


def rows(numbers, **extra) -> str:
    return "".join(json.dumps({"id": i, "code": code(n), **extra}) + "\n" for i, n in enumerate(numbers))


def prepared(source, out, language="java", **settings):
    prepare(source, language, out_dir=out, **settings)
    splits = {split: read_split(out / f"{split}.jsonl.gz", language) for split in SPLITS}
    return splits, read_json(out / "manifest.json")


def paths(splits):
    return {split: [record.path for record in records] for split, records in splits.items()}


def all_paths(splits):
    return [record.path for records in splits.values() for record in records]


# --- trees ------------------------------------------------------------------------------------------


def test_a_folder_is_split_and_described(tmp_path):
    root = write_tree(tmp_path / "src", java_files(20))
    write_tree(root, {"notes.txt": "no source", ".git/x.java": java_file(99)})
    splits, manifest = prepared({"kind": "tree", "path": str(root)}, tmp_path / "out")
    assert {split: len(records) for split, records in splits.items()} == {
        "train": 16, "validation": 2, "test": 2,
    }  # fmt: skip
    found = paths(splits)
    assert sorted(all_paths(splits)) == sorted(java_files(20))
    assert all(names == sorted(names) for names in found.values())
    assert splits["test"][0].code[:4] == ["<s>", "class", splits["test"][0].code[2], "{"]
    assert manifest["source"]["path"] == str(root)
    assert manifest["left_out"] == {"unlexable": 0, "empty": 0, "short": 0, "duplicate": 0, "limit": 0}
    for split in SPLITS:
        assert manifest["splits"][split] == {
            "files": len(splits[split]),
            "tokens": sum(len(record.code) - 2 for record in splits[split]),
            "sha256": sha256(tmp_path / "out" / f"{split}.jsonl.gz"),
        }


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_splits(tmp_path):
    root = write_tree(tmp_path / "src", java_files(30))
    source = {"kind": "tree", "path": str(root)}
    limits = {"train": 10, "validation": None}
    first, _ = prepared(source, tmp_path / "a", seed=3, max_files=limits)
    prepared(source, tmp_path / "b", seed=3, max_files=limits)
    other, _ = prepared(source, tmp_path / "c", seed=4, max_files=limits)
    for name in ("train.jsonl.gz", "validation.jsonl.gz", "test.jsonl.gz", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert paths(first)["test"] != paths(other)["test"]


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_an_archive_gives_what_its_folder_gives(tmp_path, kind):
    files = java_files(12)
    root = write_tree(tmp_path / "src", files)
    archive = tmp_path / f"src.{kind}"
    if kind == "zip":
        write_zip(archive, dict(reversed(files.items())))
    else:
        with tarfile.open(archive, "w:" + kind[4:]) as tar:
            for name in reversed(files):
                tar.add(root / name, arcname=f"./{name}")
    from_folder, folder_manifest = prepared({"kind": "tree", "path": str(root)}, tmp_path / "a")
    from_archive, manifest = prepared({"kind": "tree", "path": str(archive)}, tmp_path / "b")
    assert from_archive == from_folder
    assert manifest["source"]["sha256"] == folder_manifest["source"]["sha256"]


def test_links_are_skipped_and_nothing_is_written_beside_an_archive(tmp_path):
    archive = tmp_path / "in" / "src.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        for name, text in {**java_files(10), "../escape.java": java_file(50)}.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
        link = tarfile.TarInfo("link.java")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    splits, _ = prepared({"kind": "tree", "path": str(archive)}, tmp_path / "out")
    assert sorted(all_paths(splits)) == sorted([*java_files(10), "../escape.java"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]

    root = write_tree(tmp_path / "src", java_files(10))
    (root / "dangling.java").symlink_to("nowhere.java")
    (root / "link.java").symlink_to(root / "java.base/p/C00.java")
    _, manifest = prepared({"kind": "tree", "path": str(root)}, tmp_path / "out2")
    assert manifest["left_out"]["duplicate"] == 0


def test_a_link_in_a_zip_is_skipped(tmp_path):
    path = write_zip(tmp_path / "a.zip", java_files(10))
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("link.java")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    _, manifest = prepared({"kind": "tree", "path": str(path)}, tmp_path / "out")
    assert sum(split["files"] for split in manifest["splits"].values()) == 10


def test_a_prefix_limits_the_files(tmp_path):
    path = write_zip(tmp_path / "a.zip", {**java_files(10), "other/D.java": java_file(70)})
    splits, _ = prepared({"kind": "tree", "path": str(path), "prefix": "java.base/"}, tmp_path / "out")
    assert "other/D.java" not in all_paths(splits)


def test_left_out_files_are_counted_by_reason(tmp_path):
    files = {
        **java_files(20),
        "empty.java": "// nothing\n",
        "short.java": "class A { }",
        "broken.java": 'String s = "',
        "z/copy.java": "/* other comment */ " + java_file(3),
    }
    root = write_tree(tmp_path / "src", files)
    (root / "latin.java").write_bytes(b"// caf\xe9\n" + java_file(60).encode())
    limits = {"train": 5, "validation": 1, "test": 100}
    splits, manifest = prepared({"kind": "tree", "path": str(root)}, tmp_path / "out", max_files=limits)
    assert manifest["left_out"] == {"unlexable": 2, "empty": 1, "short": 1, "duplicate": 1, "limit": 12}
    assert {split: len(records) for split, records in splits.items()} == {
        "train": 5, "validation": 1, "test": 2,
    }  # fmt: skip
    assert "z/copy.java" not in all_paths(splits)


def test_a_limit_keeps_some_of_the_same_files(tmp_path):
    source = {"kind": "tree", "path": str(write_tree(tmp_path / "src", java_files(30)))}
    whole, _ = prepared(source, tmp_path / "a")
    for limit in (1, 7, 24, 50):
        part, manifest = prepared(source, tmp_path / "b", max_files={"train": limit})
        assert len(part["train"]) == min(limit, 24)
        assert set(paths(part)["train"]) <= set(paths(whole)["train"])
        assert part["test"] == whole["test"]
        assert manifest["left_out"]["limit"] == 24 - len(part["train"])


def test_min_tokens_is_a_least_number_of_code_tokens(tmp_path):
    lines = (json.dumps({"code": code(i, 34 + i % 2)}) for i in range(12))
    write_text(tmp_path / "a.jsonl", "\n".join(lines))
    _, manifest = prepared({"kind": "jsonl", "path": str(tmp_path / "a.jsonl")}, tmp_path / "out")
    assert manifest["left_out"]["short"] == 6


def test_the_norm_variant_takes_its_literals_from_train(tmp_path):
    files = {name: text + f'String s = "of {name}", t = "all";' for name, text in java_files(10).items()}
    root = write_tree(tmp_path / "src", files)
    splits, manifest = prepared({"kind": "tree", "path": str(root)}, tmp_path / "out", variant="norm")
    assert manifest["literals"]["str"][0] == "all"
    assert '"<STR_LIT:all>"' in splits["test"][0].code
    assert '"<STR_LIT>"' in splits["test"][0].code
    kept = {f"ofU+0020{path}" for path in paths(splits)["train"]}
    assert set(manifest["literals"]["str"]) == kept | {"all"}


def test_files_that_differ_only_in_normalised_literals_are_duplicates(tmp_path):
    root = write_tree(tmp_path / "src", java_files(10))
    write_tree(
        root, {"a.java": java_file(80) + 'String s = "a";', "b.java": java_file(80) + 'String s = "b";'}
    )
    _, raw = prepared({"kind": "tree", "path": str(root)}, tmp_path / "raw")
    _, norm = prepared({"kind": "tree", "path": str(root)}, tmp_path / "norm", variant="norm")
    assert (raw["left_out"]["duplicate"], norm["left_out"]["duplicate"]) == (0, 1)


def test_python_stdlib_leaves_tests_out(tmp_path, monkeypatch):
    def python_file(i):
        return f"def f{i}(a):\n" + "".join(f"    a += {i} + {k}\n" for k in range(12))

    names = ["os.py", "json/decoder.py", *(f"m{i}.py" for i in range(8))]
    files = {name: python_file(i) for i, name in enumerate(names)}
    left_out = [
        "test/a.py",
        "json/tests/b.py",
        "site-packages/c.py",
        "idlelib/idle_test/d.py",
        "_sysconfigdata_x.py",
    ]
    root = write_tree(tmp_path / "lib", {**files, **{name: python_file(50) for name in left_out}})
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    splits, manifest = prepared({"kind": "tree", "path": "python-stdlib"}, tmp_path / "out", "python")
    assert sorted(all_paths(splits)) == sorted(names)
    assert manifest["source"]["version"].startswith("CPython 3.")
    assert str(tmp_path) not in json.dumps(manifest)


def test_the_real_standard_library_can_be_read():
    source = open_source({"kind": "tree", "path": "python-stdlib", "prefix": "json/"})
    items = list(source.read("python", "raw"))
    assert "json/decoder.py" in [item.path for item in items]
    assert all(item.code is not None for item in items)


# --- JDKs -------------------------------------------------------------------------------------------


@pytest.fixture
def no_jdk(monkeypatch, tmp_path):
    """A machine without any Java or apt; returns its only folder of programs."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(corpus, "JDK_FOLDERS", (str(tmp_path / "jvm" / "*"),))
    return programs


def jdk(home, files=None, release='JAVA_VERSION="17.0.9"\n'):
    write_zip(home / "lib/src.zip", files or java_files(10))
    if release:
        (home / "release").write_text(release)
    return home


def test_java_home_comes_first(no_jdk, tmp_path, monkeypatch):
    jdk(tmp_path / "jvm/a")
    home = jdk(tmp_path / "home", {**java_files(10), "java.sql/S.java": java_file(90)})
    monkeypatch.setenv("JAVA_HOME", str(home))
    assert find_jdk() == (home / "lib/src.zip", "JDK 17.0.9")
    splits, manifest = prepared({"kind": "tree", "path": "jdk"}, tmp_path / "out")
    assert sorted(all_paths(splits)) == sorted(java_files(10))
    assert manifest["source"]["path"] == "jdk"
    assert manifest["source"]["version"] == "JDK 17.0.9"
    assert str(tmp_path) not in json.dumps(manifest)


def test_java_on_path_comes_before_the_system_folders(no_jdk, tmp_path):
    jdk(tmp_path / "jvm/a")
    home = jdk(tmp_path / "opt/jdk-21", release='JAVA_VERSION="21"\nJAVA_RUNTIME_VERSION="21.0.1+12"\n')
    (home / "bin").mkdir()
    (home / "bin/java").write_text("#!/bin/sh\n")
    (home / "bin/java").chmod(0o755)
    (no_jdk / "java").symlink_to(home / "bin/java")
    assert find_jdk()[0] == home / "lib/src.zip"


def test_system_folders_are_sorted_and_useless_ones_passed_over(no_jdk, tmp_path, monkeypatch):
    jdk(tmp_path / "jvm/c-jdk")
    expected = jdk(tmp_path / "jvm/b-jdk", release=None)
    jdk(tmp_path / "jvm/a-old", {"java/lang/String.java": "class String { }"})
    (tmp_path / "jvm/a-dangling/lib").mkdir(parents=True)
    (tmp_path / "jvm/a-dangling/lib/src.zip").symlink_to("../../nowhere/src.zip")
    (tmp_path / "jvm/a-broken/lib").mkdir(parents=True)
    (tmp_path / "jvm/a-broken/lib/src.zip").write_bytes(b"no zip")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "gone"))
    assert find_jdk() == (expected / "lib/src.zip", "b-jdk")


def test_no_java_sources(no_jdk, tmp_path):
    with pytest.raises(UserError, match=r"No Java sources found: set JAVA_HOME to a JDK with lib/src\.zip"):
        find_jdk()
    with pytest.raises(UserError, match="or use a folder or archive"):
        find_jdk(tmp_path / "cache")


def program(path, text):
    path.write_text(f"#!{sys.executable}\nimport pathlib, sys\n{text}")
    path.chmod(0o755)


def test_java_sources_are_fetched_once_into_the_cache(no_jdk, tmp_path):
    sources = write_zip(tmp_path / "fetched.zip", java_files(10))
    # The first package is not offered, the second is.
    program(
        no_jdk / "apt-get",
        "assert sys.argv[1] == 'download'\n"
        "if '21' not in sys.argv[2]: sys.exit('E: Unable to locate package ' + sys.argv[2])\n"
        "pathlib.Path(sys.argv[2] + '_21.0.5+9-1_all.deb').write_text('package')\n",
    )
    program(
        no_jdk / "dpkg-deb",
        "assert sys.argv[1] == '-x' and pathlib.Path(sys.argv[2]).is_file()\n"
        "target = pathlib.Path(sys.argv[3], 'usr/lib/jvm/openjdk-21/lib/src.zip')\n"
        "target.parent.mkdir(parents=True)\n"
        f"target.write_bytes(pathlib.Path({str(sources)!r}).read_bytes())\n",
    )
    cache = tmp_path / "cache"
    splits, manifest = prepared({"kind": "tree", "path": "jdk"}, tmp_path / "out", cache_dir=cache)
    assert len(splits["train"]) == 8
    assert manifest["source"]["version"] == "JDK 21.0.5+9-1"
    assert [path.name for path in cache.iterdir()] == ["openjdk-21-source_21.0.5+9-1_all"]
    (no_jdk / "apt-get").unlink()
    assert find_jdk(cache)[1] == "JDK 21.0.5+9-1"


def test_a_failed_fetch_says_why(no_jdk, tmp_path):
    program(no_jdk / "apt-get", "sys.exit('E: Unable to locate package ' + sys.argv[2])\n")
    program(no_jdk / "dpkg-deb", "")
    with pytest.raises(
        UserError, match=r"could not be fetched \(E: Unable to locate package openjdk-25-source\)"
    ):
        find_jdk(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# --- files of tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", ".gz", ".xz"])
def test_a_folder_of_jsonl_keeps_its_splits(tmp_path, end):
    for split, numbers in {"train": range(6), "validation": range(6, 8), "test": range(8, 11)}.items():
        write_text(tmp_path / f"{split}.jsonl{end}", rows(numbers))
    splits, manifest = prepared({"kind": "jsonl", "path": str(tmp_path)}, tmp_path / "out")
    assert [record.code for record in splits["test"]] == [code(8), code(9), code(10)]
    assert paths(splits)["test"] == ["test/0", "test/1", "test/2"]
    assert manifest["fractions"] is None


def test_a_row_in_two_splits_stays_only_in_test(tmp_path):
    for split, numbers in {"train": [1, 2, 2, 3], "validation": [4, 2], "test": [3, 5]}.items():
        write_text(tmp_path / f"{split}.jsonl", rows(numbers))
    splits, manifest = prepared({"kind": "jsonl", "path": str(tmp_path)}, tmp_path / "out")
    first = {split: [record.code[1] for record in records] for split, records in splits.items()}
    assert first == {"train": ["t1"], "validation": ["t4", "t2"], "test": ["t3", "t5"]}
    assert manifest["left_out"]["duplicate"] == 3


def test_codexglue_text_files(tmp_path):
    for name, numbers in {"train": range(5), "dev": [5], "test": [6, 7]}.items():
        write_text(tmp_path / f"{name}.txt", "".join(" ".join(code(n)) + "\n" for n in numbers))
    splits, _ = prepared({"kind": "jsonl", "path": str(tmp_path)}, tmp_path / "out", variant="norm")
    assert [record.code for record in splits["validation"]] == [code(5)]
    assert [len(splits[split]) for split in SPLITS] == [5, 1, 2]


def test_the_end_of_train_serves_where_validation_is_missing(tmp_path):
    write_text(tmp_path / "train.jsonl", rows(range(40)))
    write_text(tmp_path / "test.jsonl", rows([50]))
    splits, _ = prepared({"kind": "jsonl", "path": str(tmp_path)}, tmp_path / "out")
    assert [record.code[1] for record in splits["validation"]] == ["t38", "t39"]
    assert len(splits["train"]) == 38


def test_the_validation_part_of_a_large_train_split_is_5000():
    assert corpus._validation_start(100_000) == 95_000
    assert corpus._validation_start(99_999) == 99_999 - 4_999
    assert corpus._validation_start(3) == 2


def test_a_single_file_is_split(tmp_path):
    write_text(tmp_path / "all.jsonl.xz", rows(range(10), path="a/b"))
    splits, manifest = prepared({"kind": "jsonl", "path": str(tmp_path / "all.jsonl.xz")}, tmp_path / "out")
    assert [len(splits[split]) for split in SPLITS] == [8, 1, 1]
    assert manifest["fractions"] == {"train": 0.8, "validation": 0.1, "test": 0.1}
    assert splits["train"][0].path == "a/b"


# --- the hub ----------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Write a dataset of the hub's layout; returns its folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")

    def write(config, **splits):
        for split, columns in splits.items():
            path = tmp_path / "hub" / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(columns).to_parquet(path)
        return str(tmp_path / "hub")

    return write


def columns(numbers, **extra):
    return {"id": list(range(len(numbers))), "code": [code(n) for n in numbers], **extra}


def test_a_hub_dataset_keeps_its_splits(tmp_path, hub):
    name = hub("java", train=columns(range(5)), validation=columns([5, 6]), test=columns([7, 0]))
    splits, manifest = prepared({"kind": "hub", "name": name}, tmp_path / "out")
    assert [len(splits[split]) for split in SPLITS] == [4, 2, 2]
    assert splits["test"][1] == Record(1, "test/1", code(0))
    assert manifest["source"]["name"] == name


def test_python_from_the_hub_has_its_validation_split_cut_from_train(tmp_path, hub):
    names = [f"owner/repo/f{i}.py\n" for i in range(40)]
    name = hub("python", train=columns(range(40), path=names), test=columns([50], path=["owner/test.py\n"]))
    splits, _ = prepared({"kind": "hub", "name": name, "config": "python"}, tmp_path / "out", "python")
    assert paths(splits)["validation"] == ["owner/repo/f38.py", "owner/repo/f39.py"]
    assert len(splits["train"]) == 38


def test_a_faulty_hub_row_is_named(tmp_path, hub):
    broken = {"id": [0, 1], "code": [code(1), ["<s>", "a b", "</s>"]]}
    name = hub("java", train=broken, validation=columns([2]), test=columns([3]))
    with pytest.raises(UserError, match=r"hub \(java\), train, row 2: token 'a b' has white space inside"):
        prepare({"kind": "hub", "name": name}, "java", out_dir=tmp_path / "out")


def test_a_hub_dataset_that_cannot_be_loaded(tmp_path, hub):
    name = hub("java", train=columns([1]))
    (tmp_path / "hub/java/train-00000-of-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(
        UserError, match=r"hub \(java\) could not be loaded \(.+\); check name, config and rev"
    ):
        prepare({"kind": "hub", "name": name}, "java", out_dir=tmp_path / "out")


def test_a_hub_dataset_without_a_test_split(tmp_path, hub):
    with pytest.raises(UserError, match="has no test split"):
        prepare({"kind": "hub", "name": hub("java", train=columns([1]))}, "java", out_dir=tmp_path / "out")


@pytest.mark.parametrize("ids", [[0, 2], [1, 2], [0, 0]])
def test_ids_of_a_hub_dataset_are_row_numbers(tmp_path, hub, ids):
    train = {"id": ids, "code": [code(1), code(2)]}
    name = hub("java", train=train, validation=columns([3]), test=columns([4]))
    with pytest.raises(UserError, match=r"hub \(java\), train, row \d: id is \d where \d should be"):
        prepare({"kind": "hub", "name": name}, "java", out_dir=tmp_path / "out")


def write_rows(folder, splits, paths=False):
    """JSON Lines of a dataset, with the ids of their rows."""
    folder.mkdir(parents=True)
    for split, numbers in splits.items():
        lines = (
            {"id": i, "code": code(n)} | ({"path": f"{n}.py\n"} if paths else {})
            for i, n in enumerate(numbers)
        )
        write_text(folder / f"{split}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def completion(tmp_path, hub, stand_in_hub):
    """The id of a dataset on the stand-in: Java in Parquet, Python in JSON Lines, as folders."""
    hub("java", train=columns(range(5)), validation=columns([5, 6]), test=columns([7]))
    write_rows(tmp_path / "hub/python", {"train": range(40), "test": [50]}, paths=True)
    stand_in_hub.add("one/completion", tmp_path / "hub", "datasets")
    return "one/completion"


@pytest.mark.parametrize(("language", "sizes"), [("java", [5, 2, 1]), ("python", [38, 2, 1])])
def test_a_hub_dataset_is_fetched_and_then_read_offline(
    tmp_path, completion, stand_in_hub, monkeypatch, language, sizes
):
    commit = stand_in_hub.repositories["datasets", completion].branches["main"]
    source = {"kind": "hub", "name": completion, "revision": "main"}
    fetched = fetch(source, language, tmp_path)
    suffix = {"java": "-00000-of-00001.parquet", "python": ".jsonl"}[language]
    files = sorted(path for path in (tmp_path / "hub" / language).iterdir())
    assert fetched["files"] == {f"{language}/{path.name}": sha256(path) for path in files}
    assert fetched["source"] == source | {"revision": commit}
    assert all(name.endswith(suffix) for name in stand_in_hub.downloads())  # of this language only

    # The branch moves on, and the network goes away.
    (tmp_path / "hub/java/test-00000-of-00001.parquet").unlink()
    stand_in_hub.add(completion, tmp_path / "hub", "datasets")
    stand_in_hub.asked.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    splits, manifest = prepared(fetched["source"], tmp_path / "out", language)
    assert [len(splits[split]) for split in SPLITS] == sizes
    assert manifest["source"]["version"] == commit
    assert stand_in_hub.asked == []


def test_configurations_may_be_named_in_the_card_instead(tmp_path, hub, stand_in_hub):
    write_rows(tmp_path / "data/one", {"train": [1, 2], "validation": [3], "test": [4]})
    files = "".join(f"  - {{split: {split}, path: one/{split}.jsonl}}\n" for split in SPLITS)
    (tmp_path / "data/README.md").write_text(
        f"---\nconfigs:\n- config_name: java\n  data_files:\n{files}---\n"
    )
    stand_in_hub.add("one/data", tmp_path / "data", "datasets")
    splits, _ = prepared({"kind": "hub", "name": "one/data"}, tmp_path / "out")
    assert [len(splits[split]) for split in SPLITS] == [2, 1, 1]
    with pytest.raises(
        UserError, match=r"one/data \(rust\) could not be loaded \(BuilderConfig 'rust' not found"
    ):
        prepare({"kind": "hub", "name": "one/data", "config": "rust"}, "java", out_dir=tmp_path / "out")


def test_what_claims_to_be_codexglue_has_its_number_of_rows(tmp_path, hub, stand_in_hub, monkeypatch):
    hub("java", train=columns(range(5)), validation=columns([5, 6]), test=columns([7]))
    stand_in_hub.add(corpus.CODEXGLUE, tmp_path / "hub", "datasets")
    source = {"kind": "hub", "name": corpus.CODEXGLUE}
    with pytest.raises(UserError, match=r"has 5 rows for train where CodeXGLUE's java data has 12934; take"):
        prepare(source, "java", out_dir=tmp_path / "out")
    monkeypatch.setitem(corpus.CODEXGLUE_ROWS, "java", {"train": 5, "validation": 2, "test": 1})
    prepare(source, "java", out_dir=tmp_path / "out")


def test_which_sources_need_fetching(tmp_path):
    assert needs_fetching({"kind": "hub", "name": "one/data"})
    assert needs_fetching({"kind": "tree", "path": "jdk"})
    assert not needs_fetching({"kind": "hub", "name": str(tmp_path)})
    assert not needs_fetching({"kind": "tree", "path": "python-stdlib"})


# --- CodeXGLUE's original files ---------------------------------------------------------------------

# Files as they may stand in the 150k Python archive, and their rows on the hub, worked out by hand.
PY150 = {
    "a/plain.py": (
        b'#!/usr/bin/env python\n# comment\n"""Docstring."""\nimport os\n\n\nclass A(object):\n'
        b"    def f(self, x=1):  # why\n        return x + 0x1F\n",
        "import os <EOL> class A ( object ) : <EOL> def f ( self , x = 1 ) : <EOL> return x + 0x1F",
    ),
    "a/strings.py": (
        b"a = 'short one'\nb = u'longer than fourteen'\nc = r\"\\d\"\nd = '<EOL>'\ne = U'exactly fifteen'\n",
        "a = 'short\0one' <EOL> b = u'' <EOL> c = r\"\\d\" <EOL> d = '' <EOL> e =",
    ),
    "a/long.py": (
        b"x = " + b"9" * 50 + b"\ny = " + b"n" * 101 + b"\nz = " + b"m" * 100 + b" + " + b"8" * 49 + b"\n",
        "x = <EOL> y = <EOL> z = " + "m" * 100 + " + " + "8" * 49,
    ),
    "a/python2.py": (
        b"print `x`, 'y'\nraise E, 'no'\nn = 0777L\n",
        "print ` x ` , 'y' <EOL> raise E , 'no' <EOL> n = 0 777 L",
    ),
    "a/windows.py": (b"\xef\xbb\xbfa = 1\r\n\r\nb = \\\r\n    2\r\n", "a = 1 <EOL> b = 2"),
    "a/latin.py": (
        "# -*- coding: latin-1 -*-\nname = 'é'\n".encode(),
        "name = 'Ã©'",  # read as UTF-8, written again and read as it says: so it is on the hub
    ),
    "a/not_utf8.py": (b"a = '\xe9'\n", ""),
    "a/unknown.py": (b"# coding: no-such-code\na = 1\n", ""),
    "a/open.py": (b"f(1,\n", ""),
    "a/dedent.py": (b"if a:\n        b\n    c\n", ""),
    "a/empty.py": (b"# nothing\n", ""),
}


def row(text):
    """A row's tokens; \\0 stands for a blank within one."""
    return ["<s>", *(token.replace("\0", " ") for token in text.split()), "</s>"]


def write_py150(folder, train, test, files):
    """The archive, with its lists of paths and the archive of files within it."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name, content in reversed(files.items()):
            member = tarfile.TarInfo(f"data/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    lists = {"python100k_train.txt": train, "python50k_eval.txt": test}
    parts = {"data.tar.gz": inner.getvalue()}
    parts |= {name: "".join(f"data/{path}\n" for path in paths).encode() for name, paths in lists.items()}
    with tarfile.open(folder / "py150_files.tar.gz", "w:gz") as archive:
        for name, content in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return codexglue(folder)


def codexglue(folder, **changed):
    hashes = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    return {"kind": "codexglue", "path": str(folder), "sha256": hashes | changed}


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python 3.12 refuses Python 2's tokens")
def test_python_rows_from_the_original_archive_are_those_of_the_hub(tmp_path):
    train, test = [*PY150, "a/missing.py"], ["a/plain.py"]
    source = write_py150(tmp_path, train, test, {name: content for name, (content, _) in PY150.items()})
    items = list(open_source(source).read("python", "raw"))
    assert [item.split for item in items] == ["test", "validation", *["train"] * (len(train) - 1)]
    assert [item.path for item in items] == ["a/plain.py", "a/missing.py", *PY150]
    assert items[0].code == row(PY150["a/plain.py"][1])
    assert items[1].code == ["<s>", "</s>"]
    for item in items[2:]:
        assert item.code == row(PY150[item.path][1]), item.path


JAVA = [
    "<s> package a . b ; class A { } </s>",
    ' <s> String s = "with a blank" ; </s>  ',
    f"<s> {'x' * 100} {'y' * 101} ; </s>",
]


def write_java(folder):
    """The three files of the GitHub Java corpus, one tokenised source file a line."""
    for name, lines in {"training": JAVA, "validation": JAVA[1:], "test": JAVA[2:]}.items():
        (folder / f"java_{name}_pre").write_text("".join(f"{line}\n" for line in lines))
    return codexglue(folder)


def test_java_rows_from_the_original_files_are_those_of_the_hub(tmp_path):
    source = open_source(write_java(tmp_path))
    items = list(source.read("java", "raw"))
    expected = [
        ["<s>", "package", "a", ".", "b", ";", "class", "A", "{", "}", "</s>"],
        ["<s>", "String", "s", "=", '"with', "a", 'blank"', ";", "</s>"],
        ["<s>", "x" * 100, ";", "</s>"],
    ]
    assert [(item.split, item.code) for item in items] == [
        ("test", expected[2]),
        ("validation", expected[1]),
        ("validation", expected[2]),
        *(("train", code) for code in expected),
    ]
    assert source.describe()["files"] == {path.name: sha256(path) for path in sorted(tmp_path.iterdir())}


def test_the_original_files_give_the_splits_that_the_hub_gives(tmp_path, hub, stand_in_hub):
    """One dataset by both ways: from the archive, and as the hub has it."""
    files = {f"r/f{i:02d}.py": "".join(f"x{i}_{k} = {k}\n" for k in range(12)).encode() for i in range(30)}
    names = list(files)
    (tmp_path / "original").mkdir()
    original = write_py150(tmp_path / "original", names[:25], names[25:], files)
    parts = {
        split: {
            "id": list(range(len(paths))),
            "path": [f"{path}\n" for path in paths],
            "code": [row(files[path].decode().strip().replace("\n", " <EOL> ")) for path in paths],
        }
        for split, paths in {"train": names[:25], "test": names[25:]}.items()
    }
    stand_in_hub.add("one/data", hub("python", **parts), "datasets")
    for name, source in {"a": original, "b": {"kind": "hub", "name": "one/data"}}.items():
        prepare(source, "python", out_dir=tmp_path / name)
    for split in SPLITS:
        ours, theirs = (read_split(tmp_path / name / f"{split}.jsonl.gz", "python") for name in "ab")
        assert ours == theirs
        assert ours


def test_original_files_have_their_hashes(tmp_path):
    source = write_java(tmp_path)
    with open(tmp_path / "java_training_pre", "a") as stream:
        stream.write(JAVA[0])
    with pytest.raises(UserError, match=r"java_training_pre has SHA-256 \w{64}, not \w{64}; fetch it again"):
        list(open_source(source).read("java", "raw"))
    with pytest.raises(UserError, match=r"java_test_pre has SHA-256 \w{64}, not a88cd5c91c2ed23a"):
        list(open_source({"kind": "codexglue", "path": str(tmp_path)}).read("java", "raw"))
    (tmp_path / "java_test_pre").unlink()
    with pytest.raises(UserError, match=r"java_test_pre does not exist; docs/hub.md says where"):
        list(open_source(source).read("java", "raw"))


def test_original_files_have_the_published_number_of_rows(tmp_path, monkeypatch):
    hashes = write_java(tmp_path)["sha256"]
    monkeypatch.setitem(
        corpus.CODEXGLUE_FILES, "java", {name: hashes[name] for name in corpus.CODEXGLUE_FILES["java"]}
    )
    with pytest.raises(UserError, match="has 3 rows for train where CodeXGLUE's java data has 12934"):
        prepare({"kind": "codexglue", "path": str(tmp_path)}, "java", out_dir=tmp_path / "out")


def test_a_faulty_original_row_is_named(tmp_path):
    write_java(tmp_path)
    (tmp_path / "java_test_pre").write_text(f"{JAVA[0]}\nclass A {{ }} </s>\n")
    with pytest.raises(UserError, match=r"test of .*, row 2: code must begin with"):
        list(open_source(codexglue(tmp_path)).read("java", "raw"))
    with pytest.raises(UserError, match="A codexglue source has raw tokens only; set"):
        list(open_source(codexglue(tmp_path)).read("java", "norm"))


def test_an_archive_that_is_not_that_of_py150(tmp_path):
    with tarfile.open(tmp_path / "py150_files.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"holds no python100k_train.txt; fetch it again"):
        list(open_source(codexglue(tmp_path)).read("python", "raw"))
    (tmp_path / "py150_files.tar.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read as a tar archive"):
        list(open_source(codexglue(tmp_path)).read("python", "raw"))


# --- the schema -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("language", "middle"),
    [
        ("java", []),
        ("java", ["a", "größe", "x" * 100]),
        ("python", ["a", "<EOL>", "b"]),
        ("python", ["'a b'", 'rb"c d"', "<EOL>", "x"]),
        (None, ["a", "'b c'"]),
    ],
)
def test_sound_records(language, middle):
    check_record(Record(0, "p", ["<s>", *middle, "</s>"]), language, "f, row 1")


@pytest.mark.parametrize(
    ("language", "code", "fault"),
    [
        ("java", "abc", "code must be a list of strings"),
        ("java", ["<s>", 1, "</s>"], "code must be a list of strings"),
        ("java", [], 'code must begin with "<s>" and end with "</s>"'),
        ("java", ["<s>"], "code must begin with"),
        ("java", ["a", "</s>"], "code must begin with"),
        ("java", ["<s>", "a"], "code must begin with"),
        ("java", ["<s>", "<s>", "</s>"], "may stand only at the ends"),
        ("java", ["<s>", "a", "</s>", "</s>"], "may stand only at the ends"),
        ("java", ["<s>", "", "</s>"], "empty token"),
        ("java", ["<s>", "x" * 101, "</s>"], "longer than 100 characters"),
        ("java", ["<s>", '"a b"', "</s>"], "white space inside"),
        ("java", ["<s>", "a\u00a0b", "</s>"], "white space inside"),
        ("java", ["<s>", "a", "<EOL>", "b", "</s>"], 'Java code may not hold "<EOL>"'),
        ("python", ["<s>", "a b", "</s>"], "white space inside"),
        ("python", ["<s>", "'a\tb'", "</s>"], "white space inside"),
        ("python", ["<s>", "<EOL>", "a", "</s>"], "may not come first, last or twice"),
        ("python", ["<s>", "a", "<EOL>", "</s>"], "may not come first, last or twice"),
        ("python", ["<s>", "a", "<EOL>", "<EOL>", "b", "</s>"], "may not come first, last or twice"),
        ("python", ["<s>", "'\ud800'", "</s>"], "no valid Unicode"),
    ],
)
def test_faulty_records(language, code, fault):
    with pytest.raises(UserError) as caught:
        check_record(Record(0, "p", code), language, "x.jsonl, row 17")
    assert str(caught.value).startswith("x.jsonl, row 17: ")
    assert fault in str(caught.value)


def test_only_the_raw_variant_limits_the_length_of_tokens():
    check_record(Record(0, "p", ["<s>", "x" * 101, "</s>"]), "java", "f, row 1", "norm")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{broken", r"a.jsonl, row 3: not JSON \("),
        ("[1, 2]", "a.jsonl, row 3: not a JSON object"),
        ('{"id": 1}', "a.jsonl, row 3: the list of tokens called code is missing"),
        ('{"id": "x", "code": ["<s>", "</s>"]}', 'a.jsonl, row 3: id must be an integer, not "x"'),
        ('{"path": 4, "code": ["<s>", "</s>"]}', "a.jsonl, row 3: path must be a string, not 4"),
        ('{"code": ["a"]}', "a.jsonl, row 3: code must begin"),
        ('{"id": 1, "code": ["<s>", "</s>"]}', "a.jsonl, row 3: id 1 stands in an earlier row too"),
    ],
)
def test_a_faulty_row_is_named(tmp_path, line, fault):
    write_text(tmp_path / "a.jsonl", rows([1, 2]) + line + "\n")
    with pytest.raises(UserError, match=fault):
        prepare({"kind": "jsonl", "path": str(tmp_path / "a.jsonl")}, "java", out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_faulty_text_row_is_named(tmp_path):
    write_text(tmp_path / "a.txt", "<s> a </s>\n<s> b\n")
    with pytest.raises(UserError, match=r"a.txt, row 2: code must begin"):
        prepare({"kind": "jsonl", "path": str(tmp_path / "a.txt")}, "java", out_dir=tmp_path / "out")


# --- user errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "The source kind None is unknown; use one of tree, jsonl, hub, codexglue"),
        ({"kind": "git"}, "The source kind 'git' is unknown"),
        ({"kind": "tree"}, "The tree source lacks its path"),
        ({"kind": "hub", "config": "java"}, "The hub source lacks its name"),
        ({"kind": "jsonl", "path": "x", "prefix": "y"}, "A jsonl source has no 'prefix'; it takes path"),
        ({"kind": "tree", "path": "/no/such"}, "/no/such does not exist"),
        ({"kind": "jsonl", "path": "/no/such"}, "/no/such does not exist"),
    ],
)
def test_a_wrong_source(tmp_path, source, message):
    with pytest.raises(UserError, match=message):
        prepare(source, "java", out_dir=tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"language": "rust"}, "The language 'rust' is unknown; use one of java, python"),
        ({"variant": "new"}, "The variant 'new' is unknown; use one of raw, norm"),
        ({"fractions": {"train": 0.9, "test": 0.1}}, "must name train, validation, test"),
        ({"fractions": {"train": 1, "validation": 0, "test": 0}}, "all above 0"),
        ({"fractions": {"train": 0.8, "validation": 0.1, "test": 0.2}}, "must add up to 1"),
        ({"max_files": {"dev": 3}}, "The file limit dev: 3 must be a whole number above 0"),
        ({"max_files": {"test": 0}}, "The file limit test: 0 must be"),
    ],
)
def test_a_wrong_setting(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        prepare({"kind": "tree", "path": "x"}, **{"language": "java", **settings}, out_dir=tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.zip", "a.zip cannot be read as a zip archive"),
        ("a.tar.gz", "a.tar.gz cannot be read as a tar archive"),
        ("a.rar", r"a.rar is no folder, .zip, .tar"),
    ],
)
def test_a_broken_archive(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=message):
        prepare({"kind": "tree", "path": str(tmp_path / name)}, "java", out_dir=tmp_path / "out")


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz"])
def test_a_damaged_archive(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        write_zip(path, {"A.java": java_file(1)})
        path.write_bytes(path.read_bytes().replace(b"class C1 ", b"class D1 "))  # the checksum tells
    else:
        root = write_tree(tmp_path / "src", java_files(30))
        with tarfile.open(path, "w:" + kind[4:]) as tar:
            tar.add(root)
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="cannot be read as a"):
        prepare({"kind": "tree", "path": str(path)}, "java", out_dir=tmp_path / "out")


def test_a_tree_without_files_of_the_language(tmp_path):
    write_tree(tmp_path / "src", {"a.java": java_file(1)})
    source = {"kind": "tree", "path": str(tmp_path / "src")}
    with pytest.raises(UserError, match=r"src holds no .py files; check"):
        prepare(source, "python", out_dir=tmp_path / "out")
    with pytest.raises(UserError, match=r"src holds no .java files under b/; check"):
        prepare({**source, "prefix": "b/"}, "java", out_dir=tmp_path / "out")


def test_a_source_too_small_to_split(tmp_path):
    root = write_tree(tmp_path / "src", {"a.java": java_file(1), "b.java": "class B { }"})
    with pytest.raises(UserError, match=r"No file is left for the train split \(left out: 1 short\)"):
        prepare({"kind": "tree", "path": str(root)}, "java", out_dir=tmp_path / "out")


def test_jsonl_with_a_wrong_suffix_or_a_missing_split(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match=r"a.json is neither .jsonl nor .txt"):
        prepare({"kind": "jsonl", "path": str(tmp_path / "a.json")}, "java", out_dir=tmp_path / "out")
    write_text(tmp_path / "train.jsonl", rows([1]))
    with pytest.raises(UserError, match=r"has no test split \(test.jsonl or test.txt"):
        prepare({"kind": "jsonl", "path": str(tmp_path)}, "java", out_dir=tmp_path / "out")


# --- reading back -----------------------------------------------------------------------------------


def test_read_split_names_the_faulty_row(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    write_text(path, rows([1, 2]) + json.dumps({"id": 2, "path": "p", "code": ["<s>", "a"]}) + "\n")
    with pytest.raises(UserError, match=r"^train.jsonl.gz, row 3: code must begin"):
        read_split(path)
    write_text(path, rows([1]) + json.dumps({"id": 5, "path": "p", "code": code(1)}) + "\n")
    with pytest.raises(UserError, match=r"^train.jsonl.gz, row 2: id is 5 where 1 should follow"):
        read_split(path)


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.xz", lzma.compress)])
def test_read_split_reports_missing_cut_off_damaged_and_empty_files(tmp_path, name, pack):
    path = tmp_path / name
    with pytest.raises(UserError, match="does not exist"):
        read_split(path)
    whole = pack(rows(range(50)).encode())
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=f"{name} is cut off or damaged"):
        read_split(path)
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match=f"{name} is cut off or damaged"):
        read_split(path)
    path.write_bytes(pack(b"\xff\n"))
    with pytest.raises(UserError, match=f"{name} is cut off or damaged"):
        read_split(path)
    path.write_bytes(pack(b""))
    with pytest.raises(UserError, match=f"{name} holds no records"):
        read_split(path)


def test_read_split_checks_the_language_if_told(tmp_path):
    write_text(
        tmp_path / "a.jsonl", json.dumps({"id": 0, "path": "", "code": ["<s>", "a", "<EOL>", "b", "</s>"]})
    )
    assert len(read_split(tmp_path / "a.jsonl", "python")) == 1
    with pytest.raises(UserError, match="Java code"):
        read_split(tmp_path / "a.jsonl", "java")


@pytest.mark.parametrize("end", ["", ".gz", ".xz"])
def test_read_corpus(tmp_path, end):
    write_text(tmp_path / "java" / f"train.jsonl{end}", rows(range(20)))
    everything = list(read_corpus(tmp_path, "java", "train"))
    assert [record.code[1] for record in everything] == [f"t{i}" for i in range(20)]
    some = list(read_corpus(tmp_path, "java", "train", max_files=5, seed=1))
    assert len(some) == 5
    assert [record.id for record in some] == sorted(record.id for record in some)
    assert some == list(read_corpus(tmp_path, "java", "train", max_files=5, seed=1))
    assert some != list(read_corpus(tmp_path, "java", "train", max_files=5, seed=2))
    assert len(list(read_corpus(tmp_path, "java", "train", max_files=500))) == 20


def test_read_corpus_streams(tmp_path):
    write_text(tmp_path / "java/train.jsonl", rows([1, 2]) + "broken\n")
    records = read_corpus(tmp_path, "java", "train")
    assert next(records).code == code(1)
    assert next(records).code == code(2)
    with pytest.raises(UserError, match=r"train.jsonl, row 3: not JSON"):
        next(records)


def test_read_corpus_without_a_file(tmp_path):
    with pytest.raises(UserError, match=r"java/train.jsonl does not exist, neither plain nor"):
        read_corpus(tmp_path, "java", "train")
    with pytest.raises(UserError, match="The language 'c' is unknown"):
        read_corpus(tmp_path, "c", "train")


def test_splits_are_disjoint_and_complete_whatever_the_order():
    items = [Item(None, f"p{i}", []) for i in range(101)]
    splits = split_items(items, 0, corpus.FRACTIONS)
    assert {split: len(part) for split, part in splits.items()} == {"train": 81, "validation": 10, "test": 10}
    assert sorted(item.path for part in splits.values() for item in part) == sorted(i.path for i in items)
    backwards = split_items(items[::-1], 0, corpus.FRACTIONS)
    assert {item.path for item in backwards["test"]} == {item.path for item in splits["test"]}
