"""Model directories: what is accepted, refused, copied and fingerprinted."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from greencode import models
from greencode.errors import UserError
from greencode.files import read_json, sha256
from greencode.pretrain import new_model

torch.set_num_threads(1)

SHAPE = {"family": "llama", "layers": 4, "hidden": 16, "heads": 2, "feed_forward": 24}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made") / "tiny"
    models.save(new_model(SHAPE, 32, 64, 0, 1, seed=0), directory)
    return directory


@pytest.fixture
def tiny(made, tmp_path):
    """A model directory of this test's own."""
    return shutil.copytree(made, tmp_path / "tiny")


def shard(directory):
    """Split the weights into two files with an index, as large models come."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    index = {}
    for number in (1, 2):
        name = f"model-{number:05d}-of-00002.safetensors"
        part = {key: weights[key] for key in sorted(weights)[number - 1 :: 2]}
        save_file(part, directory / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def source(directory, **other):
    return {"path": str(directory), "layers": 4, "exit_points": [4], "revision": "main"} | other


def test_the_configuration_of_a_supported_family(tiny):
    config = models.read_config(tiny)
    assert config["model_type"] == "llama"
    assert models.layer_count(config) == 4


def test_an_unsupported_family_is_named_with_those_supported(tmp_path):
    GPT2Config(n_layer=4).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"family 'gpt2', which is not supported; supported are llama, opt"):
        models.read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "config.json does not exist"),
        ("{", "cannot be read as JSON"),
        ("[]", "family None"),
        ("{}", "None"),
    ],
)
def test_a_missing_or_broken_configuration_is_named(tiny, content, fault):
    (tiny / "config.json").unlink()
    if content is not None:
        (tiny / "config.json").write_text(content)
    with pytest.raises(UserError, match=fault):
        models.read_config(tiny)


def test_a_path_that_is_no_directory_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a model directory"):
        models.read_config(tmp_path / "nowhere")


def test_complete_weights_pass(tiny):
    assert models.check_weights(tiny) == [tiny / "model.safetensors"]


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_truncated_weights_are_named_whether_in_header_or_body(tiny, kept):
    path = tiny / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    for use in (models.check_weights, models.fingerprint, models.load):
        with pytest.raises(UserError, match=r"model\.safetensors is truncated or not a safetensors file"):
            use(tiny)


@pytest.mark.parametrize(
    "content",
    [bytes(16), b"version https://git-lfs.github.com/spec/v1\n" * 3, (2).to_bytes(8, "little") + b"[]",
     (7).to_bytes(8, "little") + b'{"a":1}'],
)  # fmt: skip
def test_what_is_not_safetensors_is_named(tiny, content):
    (tiny / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        models.check_weights(tiny)


def test_bytes_too_many_are_named(tiny):
    with open(tiny / "model.safetensors", "ab") as stream:
        stream.write(b"\0")
    with pytest.raises(UserError, match="truncated or not"):
        models.check_weights(tiny)


def test_sharded_weights_are_those_of_one_file(tiny, made):
    shard(tiny)
    assert [path.name[:11] for path in models.check_weights(tiny)] == ["model-00001", "model-00002"]
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        torch.testing.assert_close(models.load(tiny)(ids).logits, models.load(made)(ids).logits)


def test_a_missing_shard_is_named(tiny):
    shard(tiny)
    (tiny / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model-00002-of-00002\.safetensors, which its index names"):
        models.check_weights(tiny)


@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": 1}'])
def test_an_index_without_weights_is_named(tiny, index):
    (tiny / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"index\.json names no weights"):
        models.check_weights(tiny)


def test_pickled_weights_are_refused(tiny):
    torch.save(load_file(tiny / "model.safetensors"), tiny / "pytorch_model.bin")
    (tiny / "model.safetensors").unlink()
    for use in (models.check_weights, models.load):
        with pytest.raises(UserError, match=r"holds no \*\.safetensors; convert the weights"):
            use(tiny)


def test_the_fingerprint_is_that_of_the_weights_alone(tiny):
    before = models.fingerprint(tiny)
    assert len(before) == 16
    assert int(before, 16) >= 0
    (tiny / "README.md").write_text("a card")
    assert models.fingerprint(tiny) == before
    weights = load_file(tiny / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    assert models.fingerprint(tiny) != before


def test_a_loaded_model_is_the_saved_one_ready_to_run(tiny):
    model = models.load(tiny)
    assert not model.training
    assert model.dtype == torch.float32
    saved = load_file(tiny / "model.safetensors")
    for name, weight in saved.items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)
    assert models.load(tiny, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_weights_that_do_not_fill_the_model_are_refused(tiny):
    path = tiny / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack model\.layers\.2\.mlp\.up_proj\.weight"):
        models.load(tiny)


def test_weights_that_do_not_fit_are_refused(tiny):
    path = tiny / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="cannot be loaded"):
        models.load(tiny)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda_is_named(tiny):
    with pytest.raises(UserError, match="no CUDA device is available; set device: cpu"):
        models.load(tiny, device="cuda")


def test_a_device_is_picked_only_if_asked():
    assert models.pick_device("cpu") == "cpu"
    assert models.pick_device("cuda:1") == "cuda:1"
    assert models.pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_fetch_copies_the_model_and_describes_it(tiny, tmp_path):
    (tiny / "tokenizer.json").write_text("{}")
    (tiny / "README.md").write_text("a card")
    (tiny / "pytorch_model.bin").write_text("a pickle")
    out = tmp_path / "out" / "base"
    models.fetch(source(tiny), out)
    copied = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert set(os.listdir(out)) == copied | {"info.json"}
    info = read_json(out / "info.json")
    assert info["files"] == {name: sha256(tiny / name) for name in sorted(copied)}
    assert info["fingerprint"] == models.fingerprint(tiny) == models.fingerprint(out)
    # Embedding 32 x 16; per layer: q k v o, gate up down, two norms; final norm; the head is tied.
    assert info["parameters"] == 32 * 16 + 4 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 16
    assert {key: info[key] for key in ("family", "layers", "hidden", "exit_points", "source")} == {
        "family": "llama",
        "layers": 4,
        "hidden": 16,
        "exit_points": [4],
        "source": {"path": str(tiny), "revision": "main"},
    }


def test_fetch_copies_every_shard(tiny, tmp_path):
    shard(tiny)
    models.fetch(source(tiny), tmp_path / "out")
    assert len(models.check_weights(tmp_path / "out")) == 2


def test_fetch_leaves_nothing_of_another_source_or_of_a_killed_job(tiny, made, tmp_path):
    shard(tiny)
    out = tmp_path / "out"
    models.fetch(source(tiny), out)
    (out / ".model.safetensors.abc.safetensors").write_text("half of a file")
    models.fetch(source(made), out)
    assert [path.name for path in models.check_weights(out)] == ["model.safetensors"]
    assert models.fingerprint(out) == models.fingerprint(made)


def test_fetch_of_a_model_with_other_layers_is_named_and_writes_nothing(tiny, tmp_path):
    with pytest.raises(UserError, match="has 4 layers, not 28 as configured"):
        models.fetch(source(tiny, layers=28), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fetch_of_truncated_weights_writes_nothing(tiny, tmp_path):
    path = tiny / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        models.fetch(source(tiny), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- layouts of the hub -------------------------------------------------------------------------------


def test_a_model_of_the_hub_is_fetched_as_a_local_one(tiny, made, tmp_path, stand_in_hub):
    shard(tiny)
    (tiny / "original").mkdir()
    (tiny / "original/params.json").write_text("{}")
    (tiny / "pytorch_model.bin").write_text("a pickle")
    commit = stand_in_hub.add("one/model", tiny)
    origin = {key: value for key, value in source(tiny).items() if key != "path"} | {"hub": "one/model"}
    models.fetch(origin, tmp_path / "hub")
    models.fetch(source(tiny), tmp_path / "local")
    local, hub = (read_json(tmp_path / name / "info.json") for name in ("local", "hub"))
    assert hub["source"] == {"hub": "one/model", "revision": "main", "commit": commit}
    assert {key: value for key, value in hub.items() if key != "source"} == {
        key: value for key, value in local.items() if key != "source"
    }
    assert "generation_config.json" in hub["files"]
    assert not {"pytorch_model.bin", "params.json"} & set(stand_in_hub.downloads())
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        expected, found = (models.load(path)(ids).logits for path in (made, tmp_path / "hub"))
    torch.testing.assert_close(found, expected)


def test_a_hub_model_without_safetensors_is_refused_and_not_downloaded(tiny, tmp_path, stand_in_hub):
    torch.save(load_file(tiny / "model.safetensors"), tiny / "pytorch_model.bin")
    (tiny / "model.safetensors").unlink()
    stand_in_hub.add("one/model", tiny)
    origin = {"hub": "one/model", "revision": "main", "layers": 4, "exit_points": [4]}
    with pytest.raises(
        UserError, match=r"^one/model holds no safetensors at main, .*name a revision that has"
    ):
        models.fetch(origin, tmp_path / "out")
    assert "pytorch_model.bin" not in stand_in_hub.downloads()
    assert not (tmp_path / "out").exists()


def test_opt_weights_may_be_named_as_in_the_hubs_first_releases(tmp_path):
    """Without `model.` and with the tied head left out, as in the files that were converted from pickles."""
    models.save(new_model(SHAPE | {"family": "opt"}, 32, 64, 0, 1, seed=0), tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    weights = load_file(tmp_path / "new/model.safetensors")
    renamed = {name.removeprefix("model."): weight for name, weight in weights.items()}
    assert set(renamed).isdisjoint(weights)
    save_file(renamed, tmp_path / "old/model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        expected, found = (models.load(tmp_path / name)(ids).logits for name in ("new", "old"))
    torch.testing.assert_close(found, expected)
