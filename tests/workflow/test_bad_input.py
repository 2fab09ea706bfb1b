"""Bad input ends in one sentence and a failing exit code, before any work and without a trace."""

import copy
import gzip
import re

import pytest

CONFIG = {
    "datasets": {"code": {"language": "python", "source": {"kind": "tree", "path": "sources"}}},
    "models": {"tiny": {"path": "model", "layers": 8}},
    "agents": {"agent": {}},
    "thresholds": [0.5],
}
# What Snakemake says by itself before it reads the config.
PREAMBLE = "Using workflow specific profile profiles/default for setting default command line arguments."
REWARD = ("agents", "agent", "reward")
SOURCE = ("datasets", "code", "source")

FAULTS = {
    "unknown key": (("treshold",), [0.5], "unknown key 'treshold' in the top level; known keys are "),
    "unknown key inside": (("generate", "sample"), 4, "unknown key 'sample' in generate"),
    "mistyped": (("seed",), "one", "seed: 'one' is not of type 'integer'"),
    "no list": (("thresholds",), 0.5, "thresholds: 0.5 is not of type 'array'"),
    "alpha above 1": ((*REWARD, "alpha"), 1.5, "reward.alpha: 1.5 is greater than the maximum of 1"),
    "threshold above 1": (("thresholds",), [0.5, 1.5], "thresholds.1: 1.5 is greater than the maximum of 1"),
    "threshold below 0": (("thresholds",), [-0.5], "thresholds.0: -0.5 is less than the minimum of 0"),
    "exit beyond N": (
        ("models", "tiny", "exit_points"),
        [4, 12],
        "Exit 12 is outside the model's layers 1..8",
    ),
    "other depth": (("models", "tiny", "layers"), 16, "models.tiny.layers is 16, but model has 8"),
    "window": (
        ("finetune", "sequence_length"),
        4096,
        "finetune.sequence_length is 4096, but model reads at most",
    ),
    "no launcher": (("finetune", "processes"), 2, "finetune.fsdp need finetune.launcher: accelerate"),
    "no model": (("models", "tiny", "path"), "nowhere", "nowhere is not a model directory"),
    "family": (("models", "tiny", "path"), "gpt2", "of family 'gpt2', which is not supported"),
    "truncated": (("models", "tiny", "path"), "cut", "cut/model.safetensors is truncated"),
    "missing file": ((*SOURCE, "path"), "nowhere.zip", "source.path: nowhere.zip does not exist"),
    "no path": (SOURCE, {"kind": "jsonl"}, "datasets.code.source of kind jsonl needs path"),
    "agent named base": (("agents",), {"base": {}}, "agents"),
}


@pytest.fixture(scope="module")
def study(new_study, new_stub_model):
    """A study that never gets as far as a job."""
    study = new_study("bad")
    (study.folder / "sources").mkdir()
    new_stub_model(study.folder / "model")
    new_stub_model(study.folder / "gpt2", family="gpt2")
    new_stub_model(study.folder / "cut")
    weights = study.folder / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    return study


@pytest.fixture
def config():
    """A config without a fault."""
    return copy.deepcopy(CONFIG)


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_config_is_one_sentence(study, config, name):
    keys, value, sentence = FAULTS[name]
    block = config
    for key in keys[:-1]:
        block = block.setdefault(key, {})
    block[keys[-1]] = value
    study.configure(config)
    done = study.snakemake("figures")
    assert done.returncode != 0
    assert done.stdout == ""
    said = done.stderr.strip().removeprefix(PREAMBLE).strip()
    assert sentence in said
    assert said.count("\n") == 0
    assert said.endswith(".")
    assert not any((study.folder / name).exists() for name in ("results", "logs", "benchmarks"))


def test_the_dry_run_finds_the_same_faults(study, config):
    config["thresholds"] = [2]
    study.configure(config)
    done = study.snakemake("-n", "figures")
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.splitlines()[1:] == [
        "Configuration: thresholds.0: 2 is greater than the maximum of 1."
    ]


def test_broken_yaml_has_no_traceback(study):
    study.configure("seed: [1\nthresholds: 2")
    done = study.snakemake("figures")
    assert done.returncode != 0
    assert "Config file is not valid JSON or YAML" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_alpha_above_beta_is_a_warning_and_said_once(study, config):
    config["agents"]["agent"]["reward"] = {"alpha": 0.75, "beta": 0.5}
    study.configure(config)
    done = study.snakemake("-n", "figures")
    assert done.returncode == 0
    assert done.stderr.count("Warning: agents.agent: alpha 0.75 is above beta 0.5 on code") == 1


CORRUPT = {
    "row.jsonl": (
        b'{"code": ["<s>", "a", "</s>"]}\n{"code": ["<s>", "a b", "</s>"]}\n',
        "row 2: token 'a b' has",
    ),
    "cut.jsonl.gz": (gzip.compress(b'{"code": ["<s>", "</s>"]}')[:20], "is cut off or damaged"),
    "cut.zip": (b"PK", "cannot be read as a zip archive"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_dataset_file_is_named(study, config, name):
    content, sentence = CORRUPT[name]
    (study.folder / name).write_bytes(content)
    config["agents"]["agent"]["reward"] = {"alpha": 0.75, "beta": 0.5}
    config["datasets"]["code"]["source"] = {"kind": "jsonl" if "jsonl" in name else "tree", "path": name}
    study.configure(config)
    done = study.snakemake("results/data/code/manifest.json")
    assert done.returncode != 0
    assert re.search(rf"^prepare_corpus: {name},? {sentence}", done.stderr, re.MULTILINE)
    assert done.stderr.count("Warning: ") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert f"{sentence} " in (study.folder / "logs/prepare_corpus/code.log").read_text()
    assert [path for path in (study.folder / "results").rglob("*") if path.is_file()] == []
