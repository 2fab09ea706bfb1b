"""A tiny study from source code to every figure, by the real snakemake."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_study import CONFIG
from transformers import AutoModelForCausalLM, AutoTokenizer

from greencode.corpus import read_split
from greencode.episodes import Episodes
from greencode.policies import ExitPolicy
from greencode.promises import Calibration
from greencode.results import Evaluation, Generation, read_generations

METHODS = ["base", "full", "fixed-4", "agent-T0.5", "agent-agreement0.25"]
FIGURES = [
    "fig01_fixed_exit",
    "fig03_exit_weights",
    "fig04_loss_curves",
    "fig06_agent_reward",
    "fig07_optimal_exits",
    "fig08_tiny_code",
    "published_vs_measured",
]
TABLES = [
    "table1_datasets",
    "table2_models",
    "table3_ppo",
    "table4_overhead",
    "summary",
    "all_results",
    "cost",
]


def test_every_target_is_there(study):
    expected = {f"figures/{name}.{end}" for name in FIGURES for end in ("pdf", "png", "csv")}
    expected |= {f"tables/{name}.csv" for name in TABLES} | {"tables/summary.md"}
    results = study.folder / "results"
    found = {f"{path.parent.name}/{path.name}" for path in results.glob("[ft]*s/*.*")}
    assert found == expected
    for method in METHODS:
        assert (results / f"evaluation/tiny/code/{method}.json").is_file()


@pytest.mark.parametrize("name", FIGURES)
def test_figures_hold_something(study, name):
    stem = study.folder / "results/figures" / name
    pdf, png = (stem.with_suffix(end).read_bytes() for end in (".pdf", ".png"))
    assert pdf.startswith(b"%PDF")
    assert pdf.rstrip().endswith(b"%%EOF")
    assert png.startswith(b"\x89PNG")
    assert len(png) > 5000


@pytest.mark.parametrize("name", [f"figures/{name}" for name in FIGURES] + [f"tables/{n}" for n in TABLES])
def test_csv_files_can_be_read(study, name):
    with open(study.folder / f"results/{name}.csv", newline="", encoding="utf-8") as stream:
        head, *rows = csv.reader(stream)
    assert rows
    assert len(set(head)) == len(head) > 1
    assert all(len(row) == len(head) for row in rows)


def test_nothing_temporary_is_left(study):
    left = [
        path
        for path in (study.folder / "results").rglob("*")
        if path.name.startswith((".", "tmp", "checkpoint"))
    ]
    assert left == []


def test_results_say_how_they_were_made(study):
    results = study.folder / "results"
    heads = [json.loads(path.read_text().splitlines()[0]) for path in results.glob("generations/*/*/*.jsonl")]
    records = [json.loads(path.read_text()) for path in results.glob("evaluation/*/*/*.json")]
    records += [json.loads(path.read_text()) for path in results.glob("overhead/*/*/*.json")]
    records += [json.loads(path.read_text()) for path in results.glob("agents/*/*/*/learning.json")]
    assert len(heads + records) == 2 * len(METHODS) + 2
    for record in heads + records:
        made = record["provenance"]
        assert made["config_hash"]
        assert made["seed"] == 1
        assert {"python", "torch"} <= set(made["versions"]) or "numpy" in made["versions"]
        assert made["started"].startswith("20")
    for head in heads:
        assert head["energy_source"] in ("nvml", "rapl", "estimate")
        assert head["provenance"]["dtype"] == "float32"
        assert head["provenance"]["kv"] == ("full" if head["method"] in ("base", "full") else "deferred")


JOBS = {
    "prepare_corpus": 1, "fetch_base_model": 1, "finetune_model": 1, "record_trajectories": 1,
    "train_agent": 2, "measure_overhead": 1, "generate_base": 1, "generate_full": 1, "generate_fixed": 1,
    "generate_agent": 1, "calibrate": 1, "generate_promise": 1,
    "evaluate_method": len(METHODS), "write_tables": 1, "figure_fixed_exit": 1,
    "figure_exit_weights": 1, "figure_loss_curves": 1, "figure_agent_reward": 1, "figure_optimal_exits": 1,
    "figure_pair": 1, "figure_published_vs_measured": 1,
}  # fmt: skip


def test_the_manifest_has_every_file_and_what_every_job_cost(study):
    made = json.loads((study.folder / "results/manifest.json").read_text())
    files = {path.relative_to(study.folder).as_posix() for path in (study.folder / "results").rglob("*.*")}
    assert files == {*made["outputs"], "results/manifest.json"}
    read = {
        f"{name}/{path.name}" for name in ("model", "sources") for path in (study.folder / name).iterdir()
    }
    assert set(made["inputs"]) == read | {"config/config.yaml", "resources/published_values.csv"}
    assert made["datasets"]["code"]["sha256"]
    assert {rule: cost["jobs"] for rule, cost in made["rules"].items()} == JOBS
    for cost in (*made["rules"].values(), made["total"]):
        assert cost["seconds"] > 0
        assert cost["cpu_seconds"] > 0
        assert cost["memory_mb"] > 20
        assert cost["joules"] > 0
        assert cost["energy_source"]
    assert "Not on record" not in made["total"]["energy_note"]
    assert "Not measured" not in made["total"]["energy_note"]
    assert made["total"]["joules"] == pytest.approx(sum(cost["joules"] for cost in made["rules"].values()))
    assert made["total"]["grams_co2e"] == pytest.approx(made["total"]["joules"] / 3.6e6 * 473)


def test_the_files_are_as_the_manifest_says(study):
    command = [sys.executable, "-m", "greencode.manifest", "verify"]
    done = subprocess.run(command, cwd=study.folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("All ")
    with study.edited("results/figures/fig01_fixed_exit.csv", lambda text: text + b"\n"):
        done = subprocess.run(command, cwd=study.folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(": 1 differ (results/figures/fig01_fixed_exit.csv).\n")


def test_the_scores_are_of_the_samples_asked_for(study):
    for method in METHODS:
        evaluation = Evaluation.read(study.folder / f"results/evaluation/tiny/code/{method}.json")
        assert evaluation.samples == CONFIG["generate"]["samples"]
        assert all(0 <= score.low <= score.value <= score.high <= 1 for score in evaluation.quality.values())
    assert set(evaluation.depth_counts) <= {4, 8}


@pytest.mark.parametrize(("method", "weights"), [("base", "base"), ("full", "code")])
def test_full_depth_equals_greedy_generate(study, method, weights):
    torch.set_num_threads(1)
    directory = study.folder / "results/models/tiny" / weights
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )
    records = read_split(study.folder / "results/data/code/test.jsonl.gz")
    generation = Generation.read(study.folder / f"results/generations/tiny/code/{method}.jsonl")
    for done in generation.completions:
        file = tokenizer(" ".join(records[done.id].code[1:-1]), return_tensors="pt")["input_ids"]
        length = done.context_tokens
        assert length == file.shape[1] // 5
        assert done.reference == file[0, length : length + 15].tolist()
        expected = model.generate(file[:, :length], do_sample=False, max_new_tokens=15)[0, length:]
        assert done.tokens == expected.tolist()
        assert set(done.depths) == {8}


def test_a_fixed_exit_runs_its_layers_only(study):
    generation = Generation.read(study.folder / "results/generations/tiny/code/fixed-4.jsonl")
    for done in generation.completions:
        assert set(done.depths) == {4}
        assert done.layer_positions == 4 * (done.context_tokens + len(done.tokens) - 1)


def test_a_promise_runs_at_the_threshold_that_keeps_it(study):
    calibration = Calibration.load(study.folder / "results/calibration/tiny/code/agent.json")
    asked = {(one.wanted, one.target) for one in calibration.promises}
    assert asked == {("saving", 0.1), ("agreement", 0.5), ("agreement", 0.25)}
    promise = calibration.find("agreement", 0.25)
    generation = Generation.read(study.folder / "results/generations/tiny/code/agent-agreement0.25.jsonl")
    assert generation.threshold == (promise.threshold if promise else 1)
    plain = Generation.read(study.folder / "results/generations/tiny/code/agent-T0.5.jsonl")
    assert plain.threshold == 0.5
    with open(study.folder / "results/tables/summary.csv", newline="", encoding="utf-8") as stream:
        thresholds = {row["method"]: row["threshold"] for row in csv.DictReader(stream)}
    assert float(thresholds["agent-agreement0.25"]) == pytest.approx(generation.threshold)
    assert thresholds["full"] == ""


def test_a_second_run_has_nothing_to_do(study):
    done = study.snakemake("figures")
    assert done.returncode == 0
    assert "Nothing to be done" in done.stderr


def test_the_report_has_captions_and_categories(study):
    done = study.snakemake("--report", "report.html", "figures")
    assert done.returncode == 0, done.stderr
    report = (study.folder / "report.html").read_text(encoding="utf-8")
    for category in (
        "1 Motivation",
        "2 Fine-tuning",
        "3 Agent",
        "4 Results",
        "5 Against the paper",
        "6 Tables",
    ):
        assert category in report
    for name in FIGURES:
        assert f"{name}.png" in report
    assert "tiny on code" in report


@pytest.fixture(scope="module")
def frontier(study):
    """The study with every exit rule side by side."""
    done = study.snakemake("frontier")
    assert done.returncode == 0, done.stderr[-4000:]
    return study


def test_every_rule_is_on_the_frontier(frontier):
    record = json.loads((frontier.folder / "results/frontier/tiny/code/frontier.json").read_text())
    rules = [*sorted(CONFIG["frontier"]["rules"]), "agent"]
    points = {point["method"]: point for point in record["points"]}
    drawn = [f"{rule}-D0.7" for rule in rules]
    assert list(points) == ["full", "fixed-4", "oracle", *drawn, "agent-V0.7"]
    full, oracle = points["full"]["metrics"], points["oracle"]["metrics"]
    assert full["agreement"]["value"] == oracle["agreement"]["value"] == 1
    assert full["time_saved"]["value"] == 0
    assert oracle["layers"]["value"] == pytest.approx(oracle["forced_layers"]["value"])
    verified = points["agent-V0.7"]
    assert verified["rule"] == "agent verified"
    assert verified["metrics"]["agreement"]["value"] == verified["metrics"]["forced_agreement"]["value"] == 1
    assert verified["metrics"]["layers"]["value"] == verified["metrics"]["forced_layers"]["value"] == 8
    assert {row["rule"] for row in record["summaries"]} == {"fixed", "oracle", "agent verified", *rules}
    assert len(record["tests"]) == 2 * len(rules) * (len(rules) - 1) // 2
    assert len(record["calibration"]) == 3 * len(rules)
    assert record["samples"] == 3


def test_seeds_of_the_agent_differ_and_are_told(frontier):
    results = frontier.folder / "results"
    folders = [results / "agents/tiny/code/agent" / name for name in ("", "seed-2")]
    policies = [ExitPolicy.load(folder / "policy.safetensors") for folder in folders]
    assert [policy.training["settings"]["seed"] for policy in policies] == [1, 2]
    assert (policies[0].layers[0][0] != policies[1].layers[0][0]).any()
    learnt = [json.loads((folder / "learning.json").read_text()) for folder in folders]
    assert [record["provenance"]["seed"] for record in learnt] == [1, 2]
    with open(results / "figures/fig06_agent_reward.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    shortest = min(len(record["episode_reward"]) for record in learnt)
    last = [sum(record["episode_reward"][shortest - 50 : shortest]) / 50 for record in learnt]
    assert (rows[-1]["seeds"], rows[-1]["episode"]) == ("2", str(shortest))
    found = [float(rows[-1][name]) for name in ("low", "reward", "high")]
    assert found == pytest.approx([min(last), sum(last) / 2, max(last)])

    record = json.loads((results / "frontier/tiny/code/frontier.json").read_text())
    first, second = record["seeds"]
    assert [(row["rule"], row["seed"], row["share"]) for row in (first, second)] == [
        ("agent", 1, 0.7),
        ("agent", 2, 0.7),
    ]
    (point,) = (point for point in record["points"] if point["method"] == "agent-D0.7")
    assert first["threshold"] == point["threshold"]
    for name in ("forced_layers", "forced_agreement"):
        assert first[name] == pytest.approx(point["metrics"][name]["value"])
    with open(results / "tables/frontier_seeds.csv", newline="", encoding="utf-8") as stream:
        (row,) = csv.DictReader(stream)
    layers = [one["forced_layers"] for one in (first, second)]
    assert row["seeds"] == "2"
    assert float(row["forced_layers_mean"]) == pytest.approx(sum(layers) / 2)
    assert "Agreement of agent along the full model's text over 2 seeds" in (
        results / "tables/frontier.md"
    ).read_text(encoding="utf-8")


def test_every_rule_completed_the_same_samples(frontier):
    generations = read_generations(frontier.folder / "results/frontier/tiny/code/generations.jsonl.gz")
    assert {one.method: one.provenance.kv for one in generations if one.provenance.kv != "deferred"} == {
        "full": "full",
        "agent-V0.7": "verified",
    }
    by_method = {one.method: one.completions for one in generations}
    full = by_method["full"]
    for completions in by_method.values():
        assert [one.id for one in completions] == [one.id for one in full]
    for method in ("oracle", "agent-V0.7"):
        assert [one.tokens for one in by_method[method]] == [one.tokens for one in full]
    assert sum(one.drafts for one in by_method["agent-V0.7"]) > 0 == sum(one.drafts for one in full)
    assert {depth for one in by_method["fixed-4"] for depth in one.depths} == {4}


def test_the_frontier_is_told_in_figures_tables_and_words(frontier):
    results = frontier.folder / "results"
    for name in ("frontier_tiny_code", "fig12_calibration"):
        assert (results / f"figures/{name}.png").stat().st_size > 5000
        assert (results / f"figures/{name}.pdf").read_bytes().startswith(b"%PDF")
    for name in ("frontier_points", "frontier_savings", "frontier_tests", "frontier_seeds", "calibration"):
        with open(results / f"tables/{name}.csv", newline="", encoding="utf-8") as stream:
            assert len(list(csv.reader(stream))) > 1
    words = (results / "tables/frontier.md").read_text(encoding="utf-8")
    assert "## tiny on code" in words
    assert "hypervolume" in words
    again = frontier.snakemake("frontier")
    assert "Nothing to be done" in again.stderr


def test_the_frontier_has_a_manifest_of_its_own(frontier):
    results = frontier.folder / "results"
    made = {
        name: json.loads((results / f"{name}.json").read_text()) for name in ("manifest", "frontier_manifest")
    }
    own = {
        path.relative_to(frontier.folder).as_posix()
        for pattern in (
            "policies/**/*.*",
            "frontier/**/*.*",
            "*/frontier_*",
            "*/*calibration*",
            "*/frontier.md",
        )
        for path in results.glob(pattern)
    }
    assert len(own) > 12
    assert own <= made["frontier_manifest"]["outputs"].keys()
    assert not own & made["manifest"]["outputs"].keys()
    assert "results/models/tiny/code/model.safetensors" in made["frontier_manifest"]["outputs"]
    rules = {"train_policy", "choose_thresholds", "generate_frontier", "evaluate_frontier", "write_frontier"}
    assert rules <= made["frontier_manifest"]["rules"].keys()
    assert "Not on record" not in made["frontier_manifest"]["total"]["energy_note"]
    command = [sys.executable, "-m", "greencode.manifest", "verify"]
    done = subprocess.run(command, cwd=frontier.folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout.count("All ")) == (0, "", 2)


def test_figures_do_not_need_the_frontier(frontier):
    frontier.configure(CONFIG | {"frontier": CONFIG["frontier"] | {"samples": 2}})
    made = {rule for _, rule, anew in frontier.summary() if anew}
    frontier.configure(CONFIG)
    assert made == {"write_manifest"}  # it holds the whole configuration


def test_an_agent_learns_along_another_ones_text(study):
    text = {"agent": "agent", "threshold": 0, "share": 0.75}
    dagger = CONFIG["agents"]["agent"] | {"along": text, "reward": {"costs": {"tiny": [4]}}}
    study.configure(CONFIG | {"agents": CONFIG["agents"] | {"dagger": dagger}})
    results = study.folder / "results"
    try:
        done = study.snakemake("results/agents/tiny/code/dagger/policy.safetensors")
        assert done.returncode == 0, done.stderr[-4000:]
        plain, mixed = (
            Episodes.load(results / f"trajectories/tiny/code/{name}train.safetensors")
            for name in ("", "dagger/")
        )
        learned = json.loads((results / "agents/tiny/code/dagger/learning.json").read_text())
    finally:
        study.configure(CONFIG)
        for folder in ("trajectories", "agents"):
            shutil.rmtree(results / folder / "tiny/code/dagger", ignore_errors=True)
    assert learned["reward"]["costs"] == [4.0]
    np.testing.assert_array_equal(mixed.files, plain.files)
    np.testing.assert_array_equal(mixed.contexts, plain.contexts)
    # The other agent leaves at the first exit. Where its text parts from the full model's, all that follows
    # is of another text; 12 of the 16 episodes are along it.
    parts = (plain.tokens[:, :-1, 0] != plain.tokens[:, :-1, -1]).any(axis=1)
    parts[12:] = False
    changed = (mixed.observations != plain.observations).any(axis=(1, 2, 3))
    assert changed.tolist() == parts.tolist()
