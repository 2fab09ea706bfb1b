"""The studies of hub models, on a stand-in for the hub: models of the same shapes, a few hundred kB each."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, OPTConfig, Qwen2Config

from greencode.files import read_json, write_text
from greencode.models import fingerprint
from tests.hub import TOKEN, stand_in

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
OPT = {"ffn_dim": 32, "num_attention_heads": 2, "word_embed_proj_dim": 16}
# Families and depths of the studies' models.
SHAPES = {
    "meta-llama/Llama-3.2-3B": lambda: LlamaConfig(num_hidden_layers=28, hidden_size=16, **LLAMA),
    "facebook/opt-2.7b": lambda: OPTConfig(num_hidden_layers=32, hidden_size=16, **OPT),
    "HuggingFaceTB/SmolLM2-135M": lambda: LlamaConfig(num_hidden_layers=30, hidden_size=16, **LLAMA),
    "facebook/opt-125m": lambda: OPTConfig(num_hidden_layers=12, hidden_size=16, **OPT),
    "Qwen/Qwen2.5-Coder-0.5B": lambda: Qwen2Config(num_hidden_layers=24, hidden_size=16, **LLAMA),
}
GATED = "meta-llama/Llama-3.2-3B"
COMPLETION = "one/completion"


def code_of(language, number):
    """A file of 60 tokens or so, unlike any other."""
    words = {"java": "int v{0} = {1} ;", "python": "v{0} = {1} <EOL>"}[language]
    body = " ".join(words.format(number * 31 + i, i % 7) for i in range(16))
    return ["<s>", *body.removesuffix(" <EOL>").split(), "</s>"]


def publish_dataset(hub, folder):
    """Java and Python rows in the hub's layout, Java in Parquet."""
    from datasets import Dataset

    sizes = {"java": {"train": 40, "validation": 8, "test": 12}, "python": {"train": 48, "test": 12}}
    for number, (language, splits) in enumerate(sizes.items()):
        for offset, (split, count) in enumerate(splits.items()):
            codes = [code_of(language, number * 1000 + offset * 100 + i) for i in range(count)]
            path = folder / language / f"{split}-00000-of-00001"
            path.parent.mkdir(parents=True, exist_ok=True)
            if language == "java":
                Dataset.from_dict({"id": range(count), "code": codes}).to_parquet(f"{path}.parquet")
            else:
                rows = ({"id": i, "path": f"{i}.py\n", "code": code} for i, code in enumerate(codes))
                write_text(Path(f"{path}.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    hub.add(COMPLETION, folder, "datasets")


def publish_model(hub, name, tokenizer, folder):
    """A model with random weights as the hub has it: in shards, with what else lies beside them."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = SHAPES[name]()
    config.vocab_size = len(tokenizer)
    config.max_position_embeddings = 256
    config.pad_token_id = config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.do_sample = True
    model.save_pretrained(folder, max_shard_size="150KB")
    tokenizer.save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "original").mkdir()
    (folder / "original/params.json").write_text("{}")
    hub.add(name, folder, gated=name == GATED)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The stand-in with all that the studies name."""
    from transformers import AutoTokenizer

    from greencode.tokenise import text_of, train_tokenizer

    folder = tmp_path_factory.mktemp("hub")
    codes = [code_of(language, number) for language in ("java", "python") for number in range(30)]
    train_tokenizer(map(text_of, codes), 300, 256, folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    with stand_in() as server:
        publish_dataset(server, folder / "data")
        for name in SHAPES:
            publish_model(server, name, tokenizer, folder / name)
        yield server


SMALL = {
    "device": "cpu",
    "datasets": {
        language: {"source": {"name": COMPLETION, "revision": "main"}} for language in ("java", "python")
    },
    "data": {"max_files": {"train": 24, "validation": 6, "test": 10}},
    "finetune": {
        "sequence_length": 32,
        "batch_size": 2,
        "accumulation": 1,
        "epochs": 1,
        "max_blocks": 4,
        "validation_blocks": 2,
        "log_every": 1,
        "datasets": {"java": {"epochs": 1}},
    },
    "trajectories": {"train_episodes": 8, "validation_episodes": 4, "new_tokens": 3},
    "agents": {"agent": {"preset": "small", "steps": 256, "environments": 4}},
    "thresholds": [0.5],
    "generate": {"samples": 2, "new_tokens": 3, "warmup": 0, "idle_seconds": 0},
    "overhead": {"samples": 1, "repeats": 1},
    "evaluate": {"resamples": 20},
    "figures": {"dpi": 50},
}


def new_hub_study(new_study, name):
    """A shipped study of hub models, its sizes and no more made small; returns it with its models."""
    study = new_study(name)
    (study.folder / "resources/models").symlink_to(ROOT / "resources/models")
    shipped = yaml.safe_load((ROOT / f"config/{name}.yaml").read_text())
    models = {name: model for name, model in shipped["models"].items() if model}
    changed = {
        name: {"revision": "main", "exit_points": [4, model["layers"]]} for name, model in models.items()
    }
    (study.folder / "small.yaml").write_text(yaml.safe_dump(SMALL | {"models": changed}))
    return study, models


def run(study, name, hub, *arguments, **environment):
    """The study on the stand-in, with a login for gated models."""
    known = {"HF_ENDPOINT": hub.url, "HF_HOME": str(study.folder / "hub"), "HF_TOKEN": TOKEN}
    configs = ("--configfile", f"config/{name}.yaml", "small.yaml")
    return study.snakemake(*arguments, *configs, environment=known | environment)


def test_models_and_data_come_from_the_hub_and_the_rest_needs_no_network(new_study, hub):
    """The start of the paper's study: what is gated, in shards, and in Parquet."""
    study, _ = new_hub_study(new_study, "paper")
    model, source, data = (
        "results/models/llama-3.2-3b/base/info.json",
        "results/data/java/source.json",
        "results/data/java/manifest.json",
    )
    refused = run(study, "paper", hub, model, HF_TOKEN="")
    assert refused.returncode != 0
    assert "fetch_base_model: The model meta-llama/Llama-3.2-3B is gated: accept" in refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr
    assert not (study.folder / "results/models").exists() or not list(
        (study.folder / "results/models").rglob("*.*")
    )

    done = run(study, "paper", hub, model, source)
    assert done.returncode == 0, done.stderr
    info = read_json(study.folder / model)
    repository = hub.repositories["models", GATED]
    assert info["source"]["commit"] == repository.branches["main"]
    files = repository.commits[repository.branches["main"]]
    assert set(info["files"]) == {name for name in files if "/" not in name and not name.endswith(".bin")}
    assert sum(name.endswith(".safetensors") for name in info["files"]) > 1
    assert {"generation_config.json", "model.safetensors.index.json"} <= set(info["files"])
    assert info["fingerprint"] == fingerprint((study.folder / model).parent)
    assert not any(name.endswith(".bin") for name in hub.downloads())

    hub.asked.clear()
    done = run(study, "paper", hub, data)
    assert done.returncode == 0, done.stderr
    assert (
        read_json(study.folder / data)["source"]["version"]
        == read_json(study.folder / source)["source"]["revision"]
    )
    assert hub.asked == []


def test_of_pickles_the_download_says_where_safetensors_are(new_study, hub, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "opt", "num_hidden_layers": 12, "hidden_size": 16}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    hub.add("facebook/opt-125m", tmp_path, branch="pickles")
    common = {"status": "open", "isPullRequest": True, "createdAt": "2023-01-01T00:00:00.000Z"}
    common |= {"author": {"name": "someone"}, "repo": {"name": "facebook/opt-125m", "type": "model"}}
    requests = hub.repositories["models", "facebook/opt-125m"].requests
    requests[:] = [common | {"num": 7, "title": "Adding `safetensors` variant of this model"}]
    study, _ = new_hub_study(new_study, "small-hub")
    changed = yaml.safe_load((study.folder / "small.yaml").read_text())
    changed["models"]["opt-125m"]["revision"] = "pickles"
    (study.folder / "small.yaml").write_text(yaml.safe_dump(changed))
    done = run(study, "small-hub", hub, "results/models/opt-125m/base/info.json")
    assert done.returncode != 0
    assert (
        "facebook/opt-125m holds no safetensors at pickles, and pickles are not read; its pull request"
        in done.stderr
    )
    assert "set revision: refs/pr/7." in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "small-hub"])
def test_a_hub_study_runs_to_its_figures(new_study, hub, name):
    study, models = new_hub_study(new_study, name)
    hub.drops["tokenizer.json"] = 1
    done = run(study, name, hub, "figures", "--until", "fetch_base_model", "fetch_corpus")
    assert done.returncode == 0, done.stderr[-4000:]
    hub.asked.clear()
    # Whatever still asks for something, from whom ever, comes to the stand-in and is noted.
    done = run(study, name, hub, "figures", HTTP_PROXY=hub.url, HTTPS_PROXY=hub.url)
    assert done.returncode == 0, done.stderr[-4000:]
    assert hub.asked == []
    figures = {path.stem for path in (study.folder / "results/figures").glob("*.pdf")}
    assert {f"{model}_java" for model in models} <= {stem.partition("_")[2] for stem in figures}
    done = run(study, name, hub, "figures")
    assert "Nothing to be done" in done.stderr

    # The other KV protocol needs no new training: docs/hub.md.
    small = yaml.safe_load((study.folder / "small.yaml").read_text())
    small["generate"]["kv"] = "none"
    (study.folder / "small.yaml").write_text(yaml.safe_dump(small))
    done = run(study, name, hub, "figures", "--dry-run", "--quiet", "rules")
    rules = set(re.findall(r"^(\w+) +\d+$", done.stdout, re.MULTILINE))
    assert {"generate_base", "generate_agent", "evaluate_method", "measure_overhead"} <= rules
    assert not rules & {"fetch_base_model", "prepare_corpus", "finetune_model", "train_agent"}
