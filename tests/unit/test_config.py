"""The configuration: one canonical form, and one sentence for every fault before any long work."""

import copy
import shutil
import warnings
from pathlib import Path

import pytest
import yaml
from snakemake.utils import update_config
from transformers import GPT2Config

from greencode import config as study
from greencode import models
from greencode.errors import UserError
from greencode.pretrain import new_model

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"family": "llama", "layers": 8, "hidden": 16, "heads": 2, "feed_forward": 24}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a model and a dataset, which relative paths of the configuration name."""
    folder = tmp_path_factory.mktemp("root")
    models.save(new_model(SHAPE, 32, 512, 0, 1, seed=0), folder / "model")
    (folder / "data.jsonl").write_text("")
    (folder / "gpt2").mkdir()
    GPT2Config(n_layer=8).save_pretrained(folder / "gpt2")
    shutil.copytree(folder / "model", folder / "truncated")
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return folder


@pytest.fixture
def config():
    return {
        "datasets": {"d": {"language": "java", "source": {"kind": "jsonl", "path": "data.jsonl"}}},
        "models": {"m": {"path": "model", "layers": 8}},
        "agents": {"a": {}},
    }


def put(config, where, value):
    """Set a nested key, named by its path with dots."""
    *blocks, last = where.split(".")
    for block in blocks:
        config = config.setdefault(block, {})
    config[last] = value


# --- one canonical form ------------------------------------------------------------------------------


def test_the_least_configuration_is_completed_and_passes(config, root):
    full = study.complete(config)
    study.check(full, root)
    assert full["seed"] == 1
    assert full["finetune"]["learning_rate"] == 1e-5
    assert full["finetune"]["budgets"] == [0.7, 0.2, 0.1]
    assert full["data"]["max_files"] == {"train": 0, "validation": 0, "test": 0}
    assert full["agents"]["a"]["reward"] == {"alpha": 1.0, "beta": 1.0, "gamma": 1.0, "epsilon": 0.1}
    assert full["thresholds"] == [0.6, 0.8, 0.9, 0.91, 0.92]
    assert full["generate"]["kv"] == "deferred"
    assert "pretrain" not in full  # made only where it is asked for


def test_what_is_given_is_not_changed(config):
    before = copy.deepcopy(config)
    study.complete(config)
    assert config == before


def test_explicit_defaults_are_implicit_ones(config):
    full = study.complete(config)
    assert repr(study.complete(full)) == repr(full)


@pytest.mark.parametrize(
    ("where", "one", "other"),
    [
        ("agents.a.reward.alpha", 1, 1.0),
        ("finetune.epochs", 1, 1.0),
        ("finetune.accumulation", 32, 32.0),
        ("seed", 1, 1.0),
        ("thresholds", [1, 0], [1.0, 0.0]),
        ("agents.a.datasets", {"d": {"beta": 1}}, {"d": {"beta": 1.0}}),
        ("models.m.exit_points", [4, 8], [4.0, 8.0]),
    ],
)
def test_a_number_has_one_form(config, where, one, other):
    again = copy.deepcopy(config)
    put(config, where, one)
    put(again, where, other)
    assert repr(study.complete(config)) == repr(study.complete(again))


def test_whole_numbers_stay_whole(config):
    put(config, "threads", 2.0)
    assert type(study.complete(config)["threads"]) is int


def test_the_order_of_keys_does_not_matter(config):
    put(config, "finetune", {"epochs": 2, "accumulation": 4})
    put(config, "data", {"variant": "norm", "min_tokens": 50})
    turned = {key: config[key] for key in reversed(config)}
    turned["finetune"] = {"accumulation": 4, "epochs": 2}
    assert repr(study.complete(turned)) == repr(study.complete(config))


def test_another_value_gives_another_configuration(config):
    before = study.complete(config)
    put(config, "agents.a.reward.gamma", 0.5)
    after = study.complete(config)
    assert after["agents"]["a"]["reward"]["gamma"] == 0.5
    after["agents"]["a"]["reward"]["gamma"] = 1.0
    assert after == before


def test_null_takes_a_key_out(config):
    expected = study.complete(config)
    config["models"]["other"] = None
    config["finetune"] = {"max_blocks": None, "datasets": {"d": None}}
    config["data"] = None
    config["agents"]["a"] = {"reward": None}
    assert study.complete(config) == expected


def test_rewards_and_fine_tuning_of_single_datasets(config):
    config["datasets"]["e"] = config["datasets"]["d"]
    put(config, "agents.a.reward", {"alpha": 0.75})
    put(config, "agents.a.datasets", {"e": {"alpha": 0.5, "beta": 0.5}})
    put(config, "finetune", {"epochs": 2, "datasets": {"e": {"epochs": 10}}})
    full = study.complete(config)
    assert study.reward_of(full, "a", "d") == {"alpha": 0.75, "beta": 1.0, "gamma": 1.0, "epsilon": 0.1}
    assert study.reward_of(full, "a", "e") == {"alpha": 0.5, "beta": 0.5, "gamma": 1.0, "epsilon": 0.1}
    agent = study.agent_of(full, "a", "m", "e")
    assert agent["reward"] == study.reward_of(full, "a", "e")
    assert agent["steps"] == 500_000
    assert "datasets" not in agent
    first, second = study.finetune_of(full, "d"), study.finetune_of(full, "e")
    assert repr(second) == repr(first | {"epochs": 10.0})
    assert first["epochs"] == 2.0
    assert "datasets" not in first


def test_costs_are_of_the_models_that_are_named(config, root):
    put(config, "models.n", {"path": "model", "layers": 8, "exit_points": [2, 5, 8]})
    put(config, "agents.a.reward", {"alpha": 0.75, "costs": {"n": [3, 3.0]}})
    put(config, "agents.a.datasets", {"d": {"alpha": 0.5}})
    full = study.complete(config)
    study.check(full, root)
    coefficients = {"alpha": 0.5, "beta": 1.0, "gamma": 1.0, "epsilon": 0.1}
    assert study.agent_of(full, "a", "n", "d")["reward"] == coefficients | {"costs": [3.0, 3.0]}
    assert study.agent_of(full, "a", "m", "d")["reward"] == coefficients


def test_an_agent_may_learn_along_one_that_learnt_along_another(config, root):
    text = {"agent": "a", "threshold": 0.5}
    config["agents"] |= {"b": {"along": text}, "c": {"along": text | {"agent": "b", "threshold": 1}}}
    full = study.complete(config)
    study.check(full, root)
    assert full["agents"]["c"]["along"] == {"agent": "b", "threshold": 1.0, "share": 0.5}
    assert "along" not in full["agents"]["a"]


def test_seeds_of_an_agent_are_its_own_or_the_studys(config):
    put(config, "seed", 5)
    alone = study.complete(config)
    assert study.seeds_of(alone, "a") == [5]
    put(config, "agents.a.seeds", [7, 5, 0])
    several = study.complete(config)
    assert study.seeds_of(several, "a") == [7, 5, 0]
    assert study.agent_of(several, "a", "m", "d") == study.agent_of(alone, "a", "m", "d")


def test_exit_points_of_a_model_are_its_own_or_the_papers(config):
    assert study.points_of(study.complete(config)["models"]["m"]) == (4, 8)
    put(config, "models.m.exit_points", [2, 5, 8])
    assert study.points_of(study.complete(config)["models"]["m"]) == (2, 5, 8)


# --- faults ------------------------------------------------------------------------------------------


def fault_of(config, root):
    """The one sentence that a faulty configuration gives."""
    with pytest.raises(UserError) as raised:
        study.check(study.complete(config), root)
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert not sentence.endswith("..")
    return sentence


def test_a_rule_and_an_agent_of_one_name_are_refused(config, root):
    config["frontier"] = {"rules": {"a": {"kind": "margin"}}}
    assert "a is an agent and a rule of the frontier" in fault_of(config, root)
    config["frontier"] = {"verified": {"b": [0.5]}}
    assert "frontier.verified names 'b'" in fault_of(config, root)


@pytest.mark.parametrize(
    ("where", "value", "fault"),
    [
        (
            "sed",
            1,
            "unknown key 'sed' in the top level; known keys are agents, calibration, carbon_intensity, data,",
        ),
        ("finetune.epoch", 3, "unknown key 'epoch' in finetune; known keys are accumulation,"),
        ("data.max_files.dev", 3, "unknown key 'dev' in data.max_files; known keys are test, train, "),
        ("agents.a.reward.delta", 1, "unknown key 'delta' in agents.a.reward"),
        ("finetune.datasets.d.epoch", 3, "unknown key 'epoch' in finetune.datasets.d"),
        ("models.m.dtype", "x", "unknown key 'dtype' in models.m"),
        ("generate.temperatur", 1, "unknown key 'temperatur' in generate"),
    ],
)
def test_unknown_keys_are_named_with_those_known(config, root, where, value, fault):
    put(config, where, value)
    assert fault in fault_of(config, root)


@pytest.mark.parametrize(
    ("agents", "fault"),
    [
        ({"a": "a"}, "agents.a.along goes in a circle (a along a); begin with an agent without along."),
        ({"a": "b", "b": "a"}, "agents.a.along goes in a circle (a along b along a)"),
        ({"a": "b", "b": "c", "c": "b"}, "agents.a.along goes in a circle (a along b along c along b)"),
        ({"a": "margin"}, "agents.a.along names 'margin', which is not an agent."),
        ({"a": "b", "b": "gone"}, "agents.b.along names 'gone', which is not an agent."),
    ],
)
def test_text_that_nobody_writes_is_named(config, root, agents, fault):
    config["agents"] = {n: {"along": {"agent": other, "threshold": 0.5}} for n, other in agents.items()}
    assert fault in fault_of(config, root)


@pytest.mark.parametrize(
    ("along", "fault"),
    [
        ({"agent": "a"}, "agents.b.along: 'threshold' is a required property."),
        ({"agent": "a", "threshold": 1.5}, "agents.b.along.threshold: 1.5 is greater than the maximum of 1"),
        ({"agent": "a", "threshold": 0.5, "share": 0}, "agents.b.along.share: 0 is less than or equal to"),
        ({"agent": "a", "threshold": 0.5, "half": 1}, "unknown key 'half' in agents.b.along"),
    ],
)
def test_a_fault_in_along_is_named(config, root, along, fault):
    put(config, "agents.b", {"along": along})
    assert fault in fault_of(config, root)


@pytest.mark.parametrize(
    ("costs", "fault"),
    [
        ({"n": [1]}, "agents.a.reward.costs names 'n', which is not a model."),
        ({"m": [1, 2]}, "costs.m has 2 numbers, but needs 1, one for each of the exit points [4, 8] but the"),
        ({"m": [0]}, "agents.a.reward.costs.m.0: 0 is less than or equal to the minimum of 0"),
        ([1], "agents.a.reward.costs: [1] is not of type 'object'"),
    ],
)
def test_costs_that_do_not_fit_are_named(config, root, costs, fault):
    put(config, "agents.a.reward.costs", costs)
    assert fault in fault_of(config, root)


def test_a_key_that_is_no_text_is_named(config, root):
    config[1] = 2
    assert "unknown key 1 in the top level" in fault_of(config, root)


@pytest.mark.parametrize("block", ["datasets", "models", "agents"])
def test_a_name_that_is_no_text_is_named(config, root, block):
    config[block][2024] = next(iter(config[block].values()))
    assert f"{block}: 2024 is not of type 'string'" in fault_of(config, root)


@pytest.mark.parametrize(
    ("where", "value", "fault"),
    [
        ("finetune.epochs", "3", "finetune.epochs: '3' is not of type 'number' (Passes over the"),
        ("seed", "one", "seed: 'one' is not of type 'integer' (Seed of every split, draw and training run)."),
        ("seed", -1, "seed: -1 is less than the minimum of 0"),
        ("threads", True, "threads: True is not of type 'integer'"),
        ("agents.a.steps", 1.5, "agents.a.steps: 1.5 is not of type 'integer'"),
        ("agents.a.seeds", 2, "agents.a.seeds: 2 is not of type 'array'"),
        ("agents.a.seeds", [1, -2], "agents.a.seeds.1: -2 is less than the minimum of 0"),
        ("agents.a.seeds", [2**32], "agents.a.seeds.0: 4294967296 is greater than the maximum"),
        ("agents.a.seeds", [1, 2, 1], "agents.a.seeds: [1, 2, 1] has non-unique elements"),
        ("finetune.bf16", "yes", "finetune.bf16: 'yes' is not of type 'boolean'"),
        ("finetune.datasets.d.epochs", "3", "finetune.datasets.d.epochs: '3' is not of type 'number'"),
        ("finetune", 3, "finetune: 3 is not of type 'object'"),
        ("device", "gpu", "device: 'gpu' does not match"),
        ("generate.kv", "full", "generate.kv: 'full' is not one of ['deferred', 'none', 'propagate']"),
        ("generate.context", 1.0, "generate.context: 1.0 is greater than or equal to the maximum of 1"),
        ("agents.a.preset", "huge", "agents.a.preset: 'huge' is not one of ['large', 'small']"),
        ("datasets.d.language", "c", "datasets.d.language: 'c' is not one of ['java', 'python']"),
        ("datasets.d.source.kind", "ftp", "datasets.d.source.kind: 'ftp' is not one of"),
    ],
)
def test_mistyped_values_are_named_with_their_meaning(config, root, where, value, fault):
    put(config, where, value)
    assert fault_of(config, root).startswith(f"Configuration: {fault}")


@pytest.mark.parametrize("where", ["agents.a.reward", "agents.a.datasets.d"])
@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "epsilon"])
@pytest.mark.parametrize(("value", "fault"), [(1.5, "greater than the maximum of 1"), (-0.5, "less than")])
def test_coefficients_lie_in_0_to_1(config, root, where, name, value, fault):
    put(config, f"{where}.{name}", value)
    sentence = fault_of(config, root)
    assert sentence.startswith(f"Configuration: {where}.{name}: ")
    assert fault in sentence


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ([0.6, 1.2], "thresholds.1: 1.2 is greater than the maximum of 1"),
        ([-0.1], "thresholds.0: -0.1 is less than the minimum of 0"),
        ([], "thresholds: []"),
        ([0.6, 0.6], "thresholds: [0.6, 0.6] has non-unique elements"),
        (0.6, "thresholds: 0.6 is not of type 'array'"),
    ],
)
def test_thresholds_lie_in_0_to_1(config, root, values, fault):
    config["thresholds"] = values
    assert fault in fault_of(config, root)


@pytest.mark.parametrize("values", [[0], [1], [0, 0.5, 1]])
def test_thresholds_may_be_0_and_1(config, root, values):
    config["thresholds"] = values
    study.check(study.complete(config), root)


@pytest.mark.parametrize("block", ["datasets", "models", "agents"])
def test_blocks_without_default_must_be_there(config, root, block):
    del config[block]
    assert fault_of(config, root) == f"Configuration: the top level: '{block}' is a required property."


@pytest.mark.parametrize("name", ["base", "full", "fixed", "two-words", "9th", ""])
def test_names_of_methods_are_no_names_of_agents(config, root, name):
    config["agents"] = {name: {}}
    sentence = fault_of(config, root)
    assert sentence.startswith(f"Configuration: agents: {name!r} does not match")
    assert "base, full and fixed are taken" in sentence


def test_an_agent_may_be_named_almost_like_a_method(config, root):
    config["agents"] = {"fullsteam": {}, "baseline2": {}}
    study.check(study.complete(config), root)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ({"kind": "jsonl", "path": "gone.jsonl"}, "datasets.d.source.path: gone.jsonl does not exist."),
        ({"kind": "tree", "path": "gone"}, "datasets.d.source.path: gone does not exist."),
        ({"kind": "tree"}, "datasets.d.source of kind tree needs path."),
        ({"kind": "hub", "path": "data.jsonl"}, "datasets.d.source of kind hub needs name"),
        ({"path": "data.jsonl"}, "datasets.d.source: 'kind' is a required property."),
    ],
)
def test_a_missing_source_is_named(config, root, source, fault):
    config["datasets"]["d"]["source"] = source
    assert fault_of(config, root).startswith(f"Configuration: {fault}")


@pytest.mark.parametrize(
    "source",
    [
        {"kind": "tree", "path": "jdk"},
        {"kind": "tree", "path": "python-stdlib"},
        {"kind": "hub", "name": "someone/something"},
    ],
)
def test_sources_that_are_found_later_pass(config, root, source):
    config["datasets"]["d"]["source"] = source
    study.check(study.complete(config), root)


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        ({"path": "gpt2", "layers": 8}, "family 'gpt2', which is not supported; supported are llama, opt"),
        ({"path": "truncated", "layers": 8}, "model.safetensors is truncated or not a safetensors file"),
        ({"path": "gone", "layers": 8}, "gone is not a model directory"),
        ({"path": "model", "layers": 16}, "models.m.layers is 16, but model has 8."),
        ({"layers": 8}, "models.m needs either path or hub."),
        ({"path": "model", "hub": "x/y", "layers": 8}, "models.m needs either path or hub."),
        ({"path": "model"}, "models.m: 'layers' is a required property."),
        ({"path": "model", "layers": 3}, "models.m.layers: 3 is less than the minimum of 4"),
    ],
)
def test_an_unusable_model_is_named(config, root, model, fault):
    config["models"]["m"] = model
    assert fault in fault_of(config, root)


@pytest.mark.parametrize(
    ("points", "fault"),
    [
        ([4, 9], "Exit 9 is outside the model's layers 1..8"),
        ([0, 8], "Exit 0 is outside the model's layers 1..8"),
        ([4, 6], "must ascend without repeats and end at the final layer 8."),
        ([6, 4, 8], "must ascend"),
    ],
)
def test_exit_points_beyond_the_model_are_named(config, root, points, fault):
    put(config, "models.m.exit_points", points)
    assert fault in fault_of(config, root)


def test_shares_must_sum_to_one(config, root):
    put(config, "data.fractions", [0.8, 0.1, 0.2])
    assert fault_of(config, root) == "Configuration: data.fractions [0.8, 0.1, 0.2] must sum to 1."


def test_shares_sum_to_one_up_to_rounding(config, root):
    put(config, "data.fractions", [0.7, 0.2, 0.1])
    assert sum([0.7, 0.2, 0.1]) != 1
    study.check(study.complete(config), root)


def test_the_least_context_is_below_the_largest(config, root):
    put(config, "trajectories", {"low": 0.7, "high": 0.6})
    assert fault_of(config, root) == "Configuration: trajectories.low is above trajectories.high."


@pytest.mark.parametrize("block", ["agents.a", "finetune"])
def test_settings_for_a_dataset_that_is_none_are_named(config, root, block):
    put(config, f"{block}.datasets.nowhere", {})
    expected = f"Configuration: {block}.datasets names 'nowhere', which is not a dataset."
    assert fault_of(config, root) == expected


@pytest.mark.parametrize(
    ("reward", "own", "warns"),
    [
        ({"alpha": 1.0, "beta": 1.0}, {}, False),
        ({"alpha": 0.5, "beta": 1.0}, {}, False),
        ({"alpha": 1.0, "beta": 0.5}, {}, True),
        ({"alpha": 0.9, "beta": 0.9}, {"beta": 0.8}, True),
        ({"alpha": 0.9, "beta": 0.5}, {"alpha": 0.5}, False),
    ],
)
def test_alpha_above_beta_warns_and_runs(config, root, reward, own, warns):
    config["agents"]["a"] = {"reward": reward, "datasets": {"d": own}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        study.check(study.complete(config), root)
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert len(messages) == warns
    if warns:
        alpha, beta = ((reward | own)[name] for name in ("alpha", "beta"))
        assert messages[0].startswith(f"agents.a: alpha {alpha:g} is above beta {beta:g} on d;")


# --- the schema and the studies that come with it ----------------------------------------------------


def properties(schema, path=""):
    """Every property of the schema with its path."""
    for name, part in schema.get("properties", {}).items():
        yield f"{path}{name}", part
        yield from properties(part, f"{path}{name}.")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from properties(schema["additionalProperties"], f"{path}*.")


def test_every_key_is_described():
    found = dict(properties(yaml.safe_load(study.SCHEMA.read_text())))
    assert len(found) > 100
    assert [path for path, part in found.items() if not part.get("description")] == []


def test_every_key_of_every_block_has_a_default_that_fits_its_own_schema(config):
    """Else a study could not leave the block out."""
    full = study.complete(config)
    assert study.complete(full) == full
    schema = yaml.safe_load(study.SCHEMA.read_text())["properties"]
    for name, block in schema.items():
        if name in ("datasets", "models", "agents", "pretrain"):
            continue
        assert "default" in block, name
        assert [key for key, part in block.get("properties", {}).items() if "default" not in part] == [], name


def test_the_table_of_options_names_every_key():
    table = study.options_markdown()
    for path, _ in properties(yaml.safe_load(study.SCHEMA.read_text())):
        assert f"`{path}`" in table, path


def read(name):
    return yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text())


def merged(name):
    """A study as Snakemake gives it: laid over the default study."""
    config = read("config")
    update_config(config, read(name))
    return config


def test_the_default_study_is_valid():
    full = study.complete(read("config"))
    study.check(full, ROOT)
    assert len(full["models"]) == len(full["datasets"]) == 2
    assert {study.points_of(model) for model in full["models"].values()} == {(4, 6, 8, 12, 16)}


def test_the_study_of_the_paper_has_nothing_of_the_default_study():
    full = study.complete(merged("paper"))
    study.check(full, ROOT)
    assert full == study.complete(read("paper"))


def test_the_study_of_the_paper_is_the_papers():
    full = study.complete(merged("paper"))
    assert {name: study.points_of(model) for name, model in full["models"].items()} == {
        "llama-3.2-3b": (4, 6, 8, 10, 12, 14, 18, 22, 26, 28),
        "opt-2.7b": (4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32),
    }
    java, python = (study.finetune_of(full, dataset) for dataset in ("java", "python"))
    assert (java["epochs"], python["epochs"]) == (10.0, 1.0)
    assert (java["learning_rate"], java["schedule"]) == (1e-5, "constant")
    assert (java["batch_size"], java["accumulation"], java["sequence_length"]) == (4, 32, 256)
    assert java["bf16"]
    assert java["gradient_checkpointing"]
    for dataset, value in (("java", 1.0), ("python", 0.5)):
        reward = {"alpha": value, "beta": value, "gamma": value, "epsilon": 0.1}
        assert study.reward_of(full, "agent", dataset) == reward
    agent = study.agent_of(full, "agent", next(iter(full["models"])), "java")
    assert (agent["preset"], agent["steps"], agent["environments"]) == ("large", 500_000, 1)
    assert full["thresholds"] == [0.6, 0.8, 0.9, 0.91, 0.92]
    assert (full["generate"]["samples"], full["generate"]["context"]) == (1000, 0.2)
    revision = "54bdbd7ee7e40c7f3c68ba5a5a20ab0b2d38d5b2"
    assert {dataset["source"]["revision"] for dataset in full["datasets"].values()} == {revision}


def test_the_base_models_are_made_by_config_pretrain():
    full = study.complete(merged("pretrain"))
    study.check(full, ROOT)
    made = full["pretrain"]
    assert set(made["models"]) == set(full["models"])
    for name, family, inner in (("llama-code", "llama", 432), ("opt-code", "opt", 640)):
        shape = {"family": family, "layers": 16, "hidden": 160, "heads": 2, "feed_forward": inner}
        assert made["models"][name] == shape
        assert models.read_config(ROOT / "resources" / "models" / name)["model_type"] == family
    assert {name: part for name, part in full.items() if name not in ("pretrain", "threads")} == {
        name: part for name, part in study.complete(read("config")).items() if name != "threads"
    }


def test_a_study_of_the_model_it_makes_itself_needs_no_model_yet(tmp_path):
    full = study.complete(merged("medium"))
    (tmp_path / "results/held-back").mkdir(parents=True)
    for language in ("java", "python"):
        (tmp_path / f"results/held-back/{language}.jsonl.xz").touch()
    study.check(full, tmp_path)
    model = new_model(full["pretrain"]["models"]["llama-medium"] | {"layers": 4}, 8192, 64, 0, 1, 1)
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    assert 28 * layer + 8192 * 512 == pytest.approx(100e6, rel=0.02)
    assert len(study.points_of(full["models"]["llama-medium"])) >= 6
    full["models"]["llama-medium"]["layers"] = 24
    with pytest.raises(UserError, match="layers is 24, but results/pretrain/llama-medium has 28"):
        study.check(full, tmp_path)


# --- what a rule's code is ---------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of the library and the scripts, to be edited."""
    for part in ("greencode", "workflow/scripts"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(study, "ROOT", tmp_path)
    return tmp_path


def edit(path):
    path.write_text(path.read_text() + "\n# edited\n")


@pytest.mark.parametrize(
    ("script", "module", "changes"),
    [
        ("finetune_model", "finetune", True),
        ("finetune_model", "exits", True),  # by way of finetune
        ("finetune_model", "families", True),
        ("finetune_model", "reward", False),
        ("finetune_model", "figures", False),
        ("generate_method", "families", True),  # by way of engine
        ("generate_method", "pretrain", False),
        ("generate_method", "figures", False),
        ("train_agent", "reward", True),
        ("train_agent", "figures", False),
        ("train_agent", "finetune", False),
        ("prepare_corpus", "lexing", True),  # by way of corpus
        ("prepare_corpus", "engine", False),
        ("evaluate_method", "metrics", True),
        ("evaluate_method", "engine", False),
        ("draw_figure", "tables", True),
        ("draw_figure", "finetune", False),
        ("draw_figure", "engine", False),
    ],
)
def test_an_edited_module_changes_the_rules_that_use_it_and_no_others(tree, script, module, changes):
    path = tree / "workflow" / "scripts" / f"{script}.py"
    before = study.code_of(path)
    assert study.code_of(path) == before
    edit(tree / "greencode" / f"{module}.py")
    assert (study.code_of(path) != before) is changes


def test_an_edited_script_changes_its_rule(tree):
    scripts = sorted((tree / "workflow" / "scripts").glob("*.py"))
    before = {path: study.code_of(path) for path in scripts}
    assert len(set(before.values())) == len(scripts) > 10
    edit(scripts[0])
    assert [path for path in scripts if study.code_of(path) != before[path]] == [scripts[0]]


def test_the_place_of_the_repository_does_not_matter(tree, monkeypatch):
    script = Path("workflow/scripts/train_agent.py")
    elsewhere = study.code_of(tree / script)
    monkeypatch.setattr(study, "ROOT", ROOT)
    assert study.code_of(ROOT / script) == elsewhere
