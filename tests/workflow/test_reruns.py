"""What re-runs after a change, and what does not: the dry-run after a run that made every file."""

import copy
import re

import pytest

from greencode.config import complete

CONFIG = {
    "datasets": {
        "one": {"language": "python", "source": {"kind": "tree", "path": "sources"}},
        "two": {"language": "python", "source": {"kind": "tree", "path": "two.zip"}},
    },
    "models": {"tiny": {"path": "model", "layers": 8}},
    "agents": {"agent": {"reward": {"alpha": 0.5, "beta": 0.75}}},
    "thresholds": [0.5, 0.8],
}
PAIRS = ["tiny/one", "tiny/two"]
FIGURES = {
    "fig01_fixed_exit",
    "fig03_exit_weights",
    "fig04_loss_curves",
    "fig06_agent_reward",
    "fig07_optimal_exits",
    "fig08_tiny_one",
    "fig09_tiny_two",
    "published_vs_measured",
}
TABLES = {
    f"results/tables/{name}"
    for name in (
        "table1_datasets.csv",
        "table2_models.csv",
        "table3_ppo.csv",
        "table4_overhead.csv",
        "summary.csv",
        "all_results.csv",
        "summary.md",
    )
}


def figures(*numbers):
    """Files of the figures whose names begin so; of all without an argument."""
    chosen = {name for name in FIGURES if not numbers or name.startswith(numbers)}
    return {f"results/figures/{name}.{format}" for name in chosen for format in ("pdf", "png", "csv")}


def prepared(*datasets):
    """Files of datasets."""
    splits = [f"results/data/{d}/{s}.jsonl.gz" for d in datasets for s in ("train", "validation", "test")]
    return {*splits, *(f"results/data/{dataset}/manifest.json" for dataset in datasets)}


def trained(agent="agent", pairs=PAIRS):
    """Files of an agent's training."""
    return {f"results/agents/{p}/{agent}/{f}" for p in pairs for f in ("policy.safetensors", "learning.json")}


def overhead(agent="agent", pairs=PAIRS):
    """Files of the measurement of an agent's overhead."""
    return {f"results/overhead/{pair}/{agent}.json" for pair in pairs}


def evaluated(*methods, pairs=PAIRS):
    """Evaluations of methods."""
    return {f"results/evaluation/{pair}/{method}.json" for pair in pairs for method in methods}


def scored(*methods, pairs=PAIRS):
    """Generations of methods and their evaluations."""
    generations = {f"results/generations/{pair}/{method}.jsonl" for pair in pairs for method in methods}
    return generations | evaluated(*methods, pairs=pairs)


MANIFEST = {"results/manifest.json", "results/tables/cost.csv"}
# Figure 1 shows fixed exits, 3 and 4 fine-tuning, 6 and 7 the agent's training, 8 and on every method.
SHOWS_AGENTS = ("fig06", "fig07", "fig08", "fig09", "published")
SHOWS_METHODS = ("fig08", "fig09", "published")
BASELINES = ("base", "full", "fixed-4")
AGENTS = ("agent-T0.5", "agent-T0.8")
ALL = (*BASELINES, *AGENTS)
TRAJECTORIES = {
    f"results/trajectories/{pair}/{s}.safetensors" for pair in PAIRS for s in ("train", "validation")
}
FINETUNED = {f"results/models/{pair}/{f}" for pair in PAIRS for f in ("model.safetensors", "loss_curve.json")}
AFTER_AGENTS = trained() | scored(*AGENTS) | overhead() | TABLES | figures(*SHOWS_AGENTS)
AFTER_FINETUNING = (
    AFTER_AGENTS | FINETUNED | TRAJECTORIES | scored("full", "fixed-4") | figures("fig01", "fig04")
)
AFTER_FETCHING = AFTER_FINETUNING | scored("base") | {"results/models/tiny/base/info.json"}


@pytest.fixture(scope="module")
def study(new_study, new_stub_model):
    """A study of which every file is there, with the metadata of a finished run."""
    study = new_study("reruns")
    new_stub_model(study.folder / "model")
    (study.folder / "sources").mkdir()
    (study.folder / "two.zip").write_bytes(b"an archive")
    study.configure(CONFIG)
    outputs = [name for name, _, _ in study.summary()]
    for name in outputs:
        path = study.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    done = study.snakemake("--touch", "--forceall", "figures", cores=1)
    assert done.returncode == 0, done.stderr
    assert set(outputs) == prepared("one", "two") | AFTER_FETCHING | figures() | MANIFEST
    return study


@pytest.fixture
def config():
    """The config that the study's files were made with."""
    return copy.deepcopy(CONFIG)


def pending(study, config):
    """Files that a run with this config would make, but for the manifest, which is made with any other."""
    study.configure(config)
    made = {name for name, _, anew in study.summary() if anew}
    assert made & MANIFEST == (MANIFEST if made else set())
    return made - MANIFEST


def test_nothing_to_be_done(study, config):
    study.configure(config)
    done = study.snakemake("-n", "figures")
    assert done.returncode == 0
    assert "Nothing to be done" in done.stderr + done.stdout


def test_the_dry_run_lists_the_same_rules_as_the_summary(study, config):
    config["agents"]["agent"]["reward"]["alpha"] = 0.25
    study.configure(config)
    done = study.snakemake("-n", "figures")
    assert done.returncode == 0, done.stderr
    counts = re.findall(r"^(\w+) +\d+$", done.stdout, re.MULTILINE)
    assert set(counts) - {"figures", "total"} == {rule for _, rule, anew in study.summary() if anew}


def test_a_reward_coefficient_re_runs_the_agent_and_what_it_decides(study, config):
    config["agents"]["agent"]["reward"]["alpha"] = 0.25
    assert pending(study, config) == AFTER_AGENTS


def test_two_swapped_coefficients_re_run_the_agent(study, config):
    config["agents"]["agent"]["reward"] = {"alpha": 0.75, "beta": 0.5}
    assert pending(study, config) == AFTER_AGENTS


def test_a_dataset_of_its_own_coefficient_re_runs_that_pair(study, config):
    config["agents"]["agent"]["datasets"] = {"two": {"gamma": 0.5}}
    two = ["tiny/two"]
    assert pending(study, config) == (
        trained(pairs=two)
        | scored(*AGENTS, pairs=two)
        | overhead(pairs=two)
        | TABLES
        | figures("fig06", "fig07", "fig09", "published")
    )


def test_costs_of_a_models_layers_re_run_its_agent(study, config):
    config["agents"]["agent"]["reward"]["costs"] = {"tiny": [4]}
    assert pending(study, config) == AFTER_AGENTS


def test_a_new_threshold_runs_alone(study, config):
    config["thresholds"] = [0.5, 0.8000001, 0.8]
    assert pending(study, config) == scored("agent-T0.8000001") | TABLES | figures(*SHOWS_METHODS)


def test_a_dropped_threshold_runs_nothing_but_tables_and_plots(study, config):
    config["thresholds"] = [0.8]
    assert pending(study, config) == TABLES | figures(*SHOWS_METHODS)


def test_a_new_target_is_calibrated_and_runs_alone(study, config):
    config["targets"] = {"saving": [0.25]}
    calibrated = {f"results/calibration/{pair}/agent.json" for pair in PAIRS}
    assert pending(study, config) == (
        calibrated | scored("agent-saving0.25") | TABLES | figures(*SHOWS_METHODS)
    )


@pytest.mark.parametrize("look", [{"dpi": 100}, {"font_size": 8}], ids=str)
def test_looks_re_run_the_figures(study, config, look):
    config["figures"] = look
    assert pending(study, config) == figures()


def test_an_intensity_re_runs_the_manifest_only(study, config):
    config["carbon_intensity"] = 50
    study.configure(config)
    assert {name for name, _, anew in study.summary() if anew} == MANIFEST


def test_scoring_settings_re_run_the_scores(study, config):
    config["evaluate"] = {"resamples": 50}
    assert pending(study, config) == evaluated(*ALL) | TABLES | figures("fig01", *SHOWS_METHODS)


def test_a_second_agent_adds_only_its_own(study, config):
    config["agents"]["frugal"] = {"reward": {"alpha": 0.0}}
    new = ("frugal-T0.5", "frugal-T0.8")
    assert pending(study, config) == (
        trained("frugal") | scored(*new) | overhead("frugal") | TABLES | figures(*SHOWS_AGENTS)
    )


def test_an_agent_along_another_adds_its_episodes_and_its_own(study, config):
    config["agents"]["dagger"] = {"along": {"agent": "agent", "threshold": 0.5}}
    new = ("dagger-T0.5", "dagger-T0.8")
    episodes = {f"results/trajectories/{pair}/dagger/train.safetensors" for pair in PAIRS}
    assert pending(study, config) == (
        episodes | trained("dagger") | scored(*new) | overhead("dagger") | TABLES | figures(*SHOWS_AGENTS)
    )


def of_seed(seed, pairs=PAIRS):
    """Files of an agent's training with a seed that is not its first."""
    return trained(f"agent/seed-{seed}", pairs)


def test_another_seed_is_trained_and_shown(study, config):
    config["agents"]["agent"]["seeds"] = [1]
    assert pending(study, config) == set()
    config["agents"]["agent"]["seeds"] = [1, 7, 8]
    assert pending(study, config) == of_seed(7) | of_seed(8) | figures("fig06")


def test_another_first_seed_re_runs_the_agent(study, config):
    config["agents"]["agent"]["seeds"] = [7, 1]
    assert pending(study, config) == AFTER_AGENTS | of_seed(1)


def test_another_seed_measures_no_frontier_anew(study, config):
    study.configure(config)
    for name, _, _ in study.summary("frontier"):
        path = study.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    done = study.snakemake("--touch", "--forceall", "frontier", cores=1)
    assert done.returncode == 0, done.stderr
    config["agents"]["agent"]["seeds"] = [1, 7]
    study.configure(config)
    anew = {name for name, _, anew in study.summary("frontier") if anew}
    shown = [name for name in anew if name.startswith(("results/figures", "results/tables"))]
    frontier = {f"results/frontier/{pair}/frontier.json" for pair in PAIRS}
    assert anew - set(shown) == of_seed(7) | frontier | {"results/frontier_manifest.json"}
    assert "results/tables/frontier_seeds.csv" in shown


def test_explicit_defaults_equal_implicit_ones(study, config):
    config = complete(config)
    config["agents"]["agent"]["reward"] = dict(reversed(config["agents"]["agent"]["reward"].items()))
    config["agents"]["agent"]["reward"]["epsilon"] = 0.1
    config["generate"]["temperature"] = 1
    assert pending(study, dict(reversed(config.items()))) == set()


MODULES = {
    "metrics": evaluated(*ALL) | TABLES | figures("fig01", *SHOWS_METHODS),
    "figures": figures(),
    "trajectories": TRAJECTORIES | AFTER_AGENTS,
    "finetune": AFTER_FINETUNING,
    "generate": scored(*ALL) | overhead() | TABLES | figures("fig01", *SHOWS_METHODS),
    "agent": AFTER_AGENTS,
    "environment": AFTER_AGENTS,
    "reward": AFTER_AGENTS,
}


@pytest.mark.parametrize("module", MODULES)
def test_an_edited_module_re_runs_the_rules_that_use_it(study, config, module):
    with study.edited(f"greencode/{module}.py", lambda text: text + b"\n# An edit.\n"):
        assert pending(study, config) == MODULES[module]


def test_a_touched_module_re_runs_nothing(study, config):
    with study.edited("greencode/metrics.py", bytes):
        assert pending(study, config) == set()


def test_a_replaced_model_re_runs_what_was_made_of_it(study, config):
    with study.edited("model/model.safetensors", lambda weights: weights[:-1] + b"\1"):
        assert pending(study, config) == AFTER_FETCHING


def test_a_replaced_dataset_re_runs_what_was_made_of_it(study, config):
    with study.edited("two.zip", lambda archive: archive + b"s"):
        assert pending(study, config) == prepared("two") | {
            name for name in AFTER_FETCHING if "/tiny/one/" not in name and "base/info" not in name
        } - figures("fig08")
