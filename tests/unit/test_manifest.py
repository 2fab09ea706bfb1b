"""The manifest of a study: its files, what they cost, and whether they are still the same."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from greencode import manifest
from greencode.config import SCHEMA
from greencode.files import write_json
from greencode.results import config_hash

STUDY = {"datasets": {"code": {}}, "models": {"tiny": {}}, "carbon_intensity": 100.0}
JOBS = {
    "train_agent/a": ("train_agent", ["results/agents/policy.safetensors"], 30.0, 100.0, 500.0, False, None),
    "draw/1": ("draw", ["results/1.pdf", "results/1.png"], 2.0, 1.5, 90.0, False, None),
    "draw/2": ("draw", ["results/2.pdf"], 3.0, 2.5, 110.0, False, None),
    "finetune/gpu": (
        "finetune",
        ["results/models/tiny/code/model.safetensors"],
        60.0,
        70.0,
        None,
        True,
        7200.0,
    ),
}
COST = ("rule", "output", "seconds", "cpu_seconds", "memory_mb", "on_gpu", "joules")
MADE = [name for job in JOBS.values() for name in job[1]]


def leave_costs(jobs=JOBS, **others):
    for name, values in jobs.items():
        cost = dict(zip(COST, values, strict=True))
        source = "nvml" if cost["joules"] is not None else None
        write_json(f"logs/{name}.json", cost | {"energy_source": source} | others)


@pytest.fixture(autouse=True)
def study(tmp_path, monkeypatch):
    """The files of a small study, in whose folder the test runs."""
    monkeypatch.chdir(tmp_path)
    for name in (*MADE, "results/models/tiny/base/config.json", "config/mine.yaml", "published.csv"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    Path("results/models/tiny/code/tokenizer.json").write_text("{}")
    Path("results/models/tiny/code/.tmp0815").write_text("of a killed job")
    write_json("results/data/code/manifest.json", {"source": {"kind": "tree", "sha256": "12"}})
    write_json("results/models/tiny/base/info.json", {"source": {"path": "there"}, "fingerprint": "ab"})
    made = {"versions": {"torch": "0.1"}, "settings": {}}
    made = {"versions": {"torch": "0.2"}, "settings": {"generation": made}}
    write_json("results/evaluation/full.json", {"provenance": made})
    leave_costs()
    return tmp_path


OUTPUTS = [
    *MADE,
    "results/data/code/manifest.json",
    "results/evaluation/full.json",
    "results/models/tiny/base/info.json",
]


def build(**costs):
    """Build and write the manifest."""
    sources = [str(Path("published.csv").absolute())]
    record = manifest.build(STUDY, OUTPUTS, sources, ["config/mine.yaml"], costs)
    write_json(manifest.MANIFEST, record)
    return record


def test_it_says_what_was_made_of_what_and_with_what():
    record = build(total={"joules": 1.0})
    assert record["config"] == STUDY
    assert record["config_hash"] == config_hash(STUDY)
    assert record["datasets"] == {"code": {"kind": "tree", "sha256": "12"}}
    assert record["models"] == {"tiny": {"path": "there", "fingerprint": "ab"}}
    assert set(record["inputs"]) == {"published.csv", "config/mine.yaml"}
    assert set(record["outputs"]) == {
        *OUTPUTS,
        "results/models/tiny/base/config.json",
        "results/models/tiny/code/tokenizer.json",
    }
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # of {}
    assert record["outputs"]["results/models/tiny/code/tokenizer.json"] == {"bytes": 2, "sha256": digest}
    assert record["total"] == {"joules": 1.0}
    assert re.fullmatch("[0-9a-f]{40}", record["code"]["commit"])
    assert record["code"]["edited"] in (True, False)


def test_versions_are_those_of_the_results_too():
    versions = build()["versions"]
    assert versions["torch"].startswith("0.1, 0.2, ")
    assert re.fullmatch(r"[\d.]+", versions["numpy"])


def test_costs_add_up_by_rule_and_in_all():
    costs = manifest.costs_of(MADE, 15.0, 360.0)
    assert costs["rules"]["draw"] == {
        "jobs": 2, "seconds": 5.0, "cpu_seconds": 4.0, "memory_mb": 110.0, "joules": 60.0,
        "energy_source": "estimate",
    }  # fmt: skip
    assert costs["rules"]["train_agent"]["joules"] == 1500.0
    assert (costs["rules"]["finetune"]["joules"], costs["rules"]["finetune"]["energy_source"]) == (
        7200.0,
        "nvml",
    )
    total = costs["total"]
    assert (total["jobs"], total["seconds"], total["cpu_seconds"], total["memory_mb"]) == (
        4,
        95.0,
        174.0,
        500.0,
    )
    assert total["joules"] == 8760.0
    assert total["energy_source"] == "estimate, nvml"
    assert total["kwh"] == pytest.approx(8760 / 3.6e6)
    assert total["grams_co2e"] == pytest.approx(0.876)
    assert total["energy_note"].startswith(
        "An estimate, 15 W x CPU seconds: 1560 J. Measured by nvml: 7200 J. Not counted: "
    )
    assert total["co2e_note"] == "An estimate: energy x 360 g/kWh (the configuration's carbon_intensity)."


def test_jobs_of_another_configuration_do_not_count():
    costs = manifest.costs_of(["results/2.pdf", "results/1.pdf"], 15.0, 360.0)
    assert list(costs["rules"]) == ["draw"]
    assert costs["total"]["jobs"] == 1
    assert "Not on record: the jobs of 1 files." in costs["total"]["energy_note"]


def test_what_nothing_measures_is_unknown_and_said():
    leave_costs(joules=None)
    costs = manifest.costs_of(MADE, 15.0, 360.0)
    assert costs["rules"]["finetune"]["joules"] is None
    assert costs["total"]["joules"] == 1560.0
    assert "Not measured: finetune." in costs["total"]["energy_note"]
    total = manifest.costs_of(MADE, None, 360.0)["total"]
    assert (total["joules"], total["kwh"], total["grams_co2e"]) == (None, None, None)
    assert "Not measured: draw, finetune, train_agent." in total["energy_note"]


def test_without_logs_nothing_is_known():
    costs = manifest.costs_of(["results/0.pdf"], 15.0, 360.0)
    assert costs["rules"] == {}
    assert costs["total"]["joules"] is None
    assert list(manifest.cost_table(costs)["rule"]) == ["total"]


def test_the_half_of_a_killed_job_is_no_cost():
    folder = Path("logs/draw/.3.json.partial")
    folder.mkdir()
    (folder / "3.json").write_text("{")
    assert manifest.costs_of(MADE, 15.0, 360.0)["total"]["jobs"] == 4


def test_the_table_has_a_line_per_rule_and_the_total_last():
    table = manifest.cost_table(manifest.costs_of(MADE, 15.0, 360.0))
    assert list(table["rule"]) == ["train_agent", "finetune", "draw", "total"]
    assert list(table["joules"]) == [1500.0, 7200.0, 60.0, 8760.0]
    assert table["grams_co2e"].tolist()[-1] == pytest.approx(0.876)
    assert table["grams_co2e"].isna().sum() == 3


def test_the_default_intensity_is_the_worlds_of_that_source():
    schema = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))["properties"]["carbon_intensity"]
    assert schema["default"] == manifest.WORLD_INTENSITY
    note = manifest.costs_of([], None, schema["default"])["total"]["co2e_note"]
    assert "world's average of 2024" in schema["description"]
    assert "473 g/kWh (the world's average of 2024, Ember, Global Electricity Review 2025)" in note


def test_files_as_they_were_are_told_in_one_line(capsys):
    number = len(build()["outputs"]) + 2
    assert manifest.main(["verify"]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (
        f"All {number} files are as recorded in results/manifest.json.\n",
        "",
    )


def test_files_that_changed_or_went_are_named(capsys, monkeypatch, study):
    build()
    Path("results/1.pdf").write_text("RESULTS/1.pdf")  # as long as before
    Path("results/2.pdf").write_text("longer than before")
    os.remove("config/mine.yaml")
    monkeypatch.chdir(study.parent)
    path = f"{study.name}/results/manifest.json"
    assert manifest.main(["verify", path]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        f"Of 12 files in {path}: 2 differ (results/1.pdf, results/2.pdf); 1 missing (config/mine.yaml).\n"
    )


def test_the_frontiers_manifest_is_compared_too(capsys):
    number = len(build()["outputs"]) + 2
    Path("results/tables").mkdir()
    Path("results/tables/frontier.md").write_text("of the frontier")
    record = manifest.build(STUDY, ["results/tables/frontier.md"], [], [], {})
    write_json(manifest.FRONTIER, record)
    assert manifest.main(["verify"]) == 0
    assert capsys.readouterr().out == (
        f"All {number} files are as recorded in results/manifest.json.\n"
        "All 1 files are as recorded in results/frontier_manifest.json.\n"
    )
    os.remove("results/tables/frontier.md")
    assert manifest.main(["verify"]) == 1
    assert manifest.main(["verify", manifest.MANIFEST]) == 0
    assert capsys.readouterr().err == (
        "Of 1 files in results/frontier_manifest.json: 1 missing (results/tables/frontier.md).\n"
    )


@pytest.mark.parametrize("text", ["[1]", '{"inputs": {}}', '{"inputs": {}, "outputs": {"a": 1}}'])
def test_something_else_is_no_manifest(capsys, text):
    Path("results/manifest.json").write_text(text)
    assert manifest.main(["verify"]) == 1
    assert capsys.readouterr().err == (
        "results/manifest.json is not a manifest; delete it and draw the figures again.\n"
    )


def test_a_missing_manifest_is_one_sentence(capsys):
    assert manifest.main(["verify"]) == 1
    assert (
        capsys.readouterr().err
        == "results/manifest.json does not exist; it comes with the figures of a study.\n"
    )


def test_a_manifest_holds_no_times_but_those_of_its_making():
    first, again = build(), build()
    assert json.dumps({**first, "written": ""}) == json.dumps({**again, "written": ""})
