"""Result files: written and read back equal, never half read, and honest about what was not measured."""

import dataclasses
import json
import re

import pytest

from greencode import results
from greencode.errors import UserError
from greencode.files import read_json, write_json
from greencode.results import Completion, Evaluation, Generation, Interval, Provenance, config_hash

PROVENANCE = Provenance.now({"kv": "none", "samples": 2}, device="cpu", dtype="float32", threads=1, seed=3)


def completion(id=0, joules=1.5):
    return Completion(
        id=id, context_tokens=20, tokens=[1, 2], reference=[1, 3], text='"ü" <EOL>\n', reference_text="漢",
        depths=[4, 28], seconds=0.25, cpu_seconds=0.5, joules=joules, layer_positions=100, checks=7,
    )  # fmt: skip


def generation(**other):
    fields = {
        "model": "m", "dataset": "d", "language": "java", "method": "agent-T0.9", "layers": 28,
        "exit_points": [4, 28], "energy_source": "estimate", "energy_note": "An estimate.",
        "provenance": PROVENANCE, "completions": [completion(0), completion(5)],
    }  # fmt: skip
    return Generation(**(fields | other))


def evaluation(**other):
    fields = {
        "model": "m", "dataset": "d", "language": "java", "method": "full", "layers": 28,
        "exit_points": [4, 28], "samples": 2, "quality": {"bleu": Interval(0.5, 0.25, 0.75)},
        "cost": {"seconds": Interval(1.0, 0.5, 2.0)}, "depth_counts": {4: 3, 28: 10},
        "energy_source": None, "energy_note": "Energy was not measured.", "provenance": PROVENANCE,
    }  # fmt: skip
    return Evaluation(**(fields | other))


@pytest.mark.parametrize("name", ["full.jsonl", "full.jsonl.gz"])
def test_a_generation_is_read_as_it_was_written(tmp_path, name):
    generation().write(tmp_path / "deep" / name)
    assert Generation.read(tmp_path / "deep" / name) == generation()


def test_a_generation_is_one_head_line_and_one_line_per_completion(tmp_path):
    generation().write(tmp_path / "full.jsonl")
    head, *rows = map(json.loads, (tmp_path / "full.jsonl").read_text().splitlines())
    assert head["method"] == "agent-T0.9"
    assert head["provenance"]["config_hash"] == PROVENANCE.config_hash
    assert "completions" not in head
    assert [row["id"] for row in rows] == [0, 5]


def test_what_was_not_measured_stays_none(tmp_path):
    unmeasured = generation(energy_source=None, completions=[completion(joules=None)])
    unmeasured.write(tmp_path / "full.jsonl")
    again = Generation.read(tmp_path / "full.jsonl")
    assert again.energy_source is None
    assert again.completions[0].joules is None
    assert again.provenance.kv is None
    evaluation().write(tmp_path / "full.json")
    assert Evaluation.read(tmp_path / "full.json").energy_source is None
    assert "joules" not in Evaluation.read(tmp_path / "full.json").cost


def test_a_generation_without_completions_is_read_back(tmp_path):
    generation(completions=[]).write(tmp_path / "full.jsonl")
    assert Generation.read(tmp_path / "full.jsonl") == generation(completions=[])


def broken_generations():
    head, row = json.dumps({"model": "m"}), json.dumps(dataclasses.asdict(completion()))
    return [b"", b"\n", b"[]\n", b'"text"\n', b"\xff\xfe\n", head.encode(), f"{head}\n{row}\n".encode()]


@pytest.mark.parametrize("content", broken_generations())
def test_what_is_no_generation_is_named(tmp_path, content):
    path = tmp_path / "full.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"full\.jsonl is not a generations file .*; delete it and run again"):
        Generation.read(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_truncated_generation_is_named(tmp_path, share):
    path = tmp_path / "full.jsonl"
    generation().write(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match="not a generations file"):
        Generation.read(path)


@pytest.mark.parametrize("change", [lambda row: row.pop("depths"), lambda row: row.update(extra=1)])
def test_a_completion_with_other_fields_is_named(tmp_path, change):
    path = tmp_path / "full.jsonl"
    generation().write(path)
    *lines, last = path.read_text().splitlines()
    row = json.loads(last)
    change(row)
    path.write_text("\n".join([*lines, json.dumps(row)]))
    with pytest.raises(UserError, match="not a generations file"):
        Generation.read(path)


def test_a_missing_result_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl is not a generations file"):
        Generation.read(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"gone\.json does not exist"):
        Evaluation.read(tmp_path / "gone.json")


def test_an_evaluation_is_read_as_it_was_written(tmp_path):
    evaluation().write(tmp_path / "full.json")
    again = Evaluation.read(tmp_path / "full.json")
    assert again == evaluation()
    assert again.depth_counts == {4: 3, 28: 10}  # numbers, though JSON has only strings as keys


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("quality"),
        lambda record: record.update(quality=[]),
        lambda record: record["quality"]["bleu"].pop("low"),
        lambda record: record.update(depth_counts={"four": 1}),
        lambda record: record.update(provenance=None),
        lambda record: record.update(extra=1),
    ],
)
def test_what_is_no_evaluation_is_named(tmp_path, change):
    path = tmp_path / "full.json"
    evaluation().write(path)
    record = read_json(path)
    change(record)
    write_json(path, record)
    with pytest.raises(UserError, match=r"full\.json is not an evaluation file .*; delete it and run again"):
        Evaluation.read(path)


@pytest.mark.parametrize("content", ["[]", "1", "null"])
def test_json_that_is_no_object_is_no_evaluation(tmp_path, content):
    (tmp_path / "full.json").write_text(content)
    with pytest.raises(UserError, match="not an evaluation file"):
        Evaluation.read(tmp_path / "full.json")


def test_the_hash_names_a_configuration_whatever_its_order():
    first = {"a": 1, "b": {"c": 2.0, "d": [1, 2]}}
    assert config_hash(first) == config_hash({"b": {"d": [1, 2], "c": 2.0}, "a": 1})
    assert re.fullmatch("[0-9a-f]{12}", config_hash(first))
    others = [{"a": 2}, {"b": {"c": 2.0, "d": [2, 1]}}, {"b": {"c": 2.5, "d": [1, 2]}}]
    assert len({config_hash(first | other) for other in others} | {config_hash(first)}) == 4


def test_provenance_tells_how_a_number_was_made():
    assert PROVENANCE.config_hash == config_hash({"samples": 2, "kv": "none"})
    assert PROVENANCE.settings == {"kv": "none", "samples": 2}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", PROVENANCE.started)
    assert {"python", "torch", "transformers", "numpy"} <= set(PROVENANCE.versions)
    assert (PROVENANCE.device, PROVENANCE.dtype, PROVENANCE.kv) == ("cpu", "float32", None)
    assert (PROVENANCE.threads, PROVENANCE.seed) == (1, 3)


def test_a_commit_has_a_mark_if_edited_and_is_none_outside_a_repository(tmp_path, monkeypatch):
    commit = results.git_commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}\+?", commit)
    monkeypatch.setattr(results, "__file__", str(tmp_path / "greencode" / "results.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.git_commit() is None


def test_a_device_is_named_with_its_hardware():
    assert re.fullmatch(r"cpu \(.+\)", results.device_name("cpu"))
