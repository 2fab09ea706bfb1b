import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from greencode import models
from greencode.engine import _LayerCache
from greencode.errors import UserError
from greencode.families import _ADAPTERS, Family, OPTFamily, adapt

DEPTH = 6


@pytest.fixture
def ids():
    return torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(0))


def run_all(family: Family, ids: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states at depths 0..N, through the adapter, with a plain causal mask per layer."""
    count = ids.shape[1]
    positions = torch.arange(count)[None].expand(len(ids), -1)
    rotary = family.rotary(positions)
    states = [family.embed(ids, positions)]
    for layer in range(family.depth):
        window = family.sliding_window(layer) or count
        mask = torch.ones(count, count, dtype=torch.bool).tril().triu(1 - window)[None, None]
        states.append(family.run(layer, states[-1], positions, mask, None, rotary))
    return states


def test_layers_one_by_one_are_the_model(model, ids):
    family = adapt(model)
    states = run_all(family, ids)
    whole = model(ids, output_hidden_states=True, use_cache=False)
    for depth in range(family.depth):
        torch.testing.assert_close(states[depth], whole.hidden_states[depth], rtol=0, atol=1e-5)
    observation = family.observe(states[-1])
    torch.testing.assert_close(family.logits(observation), whole.logits, rtol=0, atol=1e-5)


def test_facts_of_the_model(model, ids):
    family = adapt(model)
    assert family.depth == DEPTH
    assert family.window == 64
    assert family.dtype == torch.float32
    assert family.device == torch.device("cpu")
    hidden = run_all(family, ids)[-1]
    assert hidden.shape == (2, 11, family.hidden_size)
    assert family.observe(hidden).shape == hidden.shape
    assert family.logits(family.observe(hidden[0, -1])).shape == (61,)


def test_propagated_keys_and_values_are_those_of_the_layer(model, ids):
    family, positions = adapt(model), torch.arange(11)[None]
    hidden = torch.randn(1, 11, family.hidden_size, generator=torch.Generator().manual_seed(1))
    rotary = family.rotary(positions)
    ran, filled = _LayerCache(family, 11), _LayerCache(family, 11)
    for layer in range(family.depth):
        family.run(layer, hidden, positions, None, ran, rotary)
        family.propagate(layer, hidden, filled, rotary)
        for ours, theirs in ((filled._keys, ran._keys), (filled._values, ran._values)):
            assert ours[layer].shape[1::2] == family.kv_shape()
            torch.testing.assert_close(ours[layer], theirs[layer])
    assert filled.lengths == ran.lengths == [11] * DEPTH


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("llama", [None] * 6),
        ("qwen3", [None] * 6),
        ("qwen2", [None] * 3 + [5] * 3),
        ("mistral", [5] * 6),
        ("opt", [None] * 6),
    ],
)
def test_sliding_windows(tiny, name, windows):
    family = adapt(tiny(name))
    assert [family.sliding_window(layer) for layer in range(6)] == windows


def test_each_model_has_its_adapter(model):
    family = adapt(model)
    assert type(family) is (OPTFamily if model.config.model_type == "opt" else Family)
    assert (family.rotary(torch.arange(3)[None]) is None) == (model.config.model_type == "opt")


def test_loading_and_decoding_support_the_same_families():
    assert set(models.FAMILIES) == set(_ADAPTERS)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_change_with_length_are_refused(kind):
    factors = {"factor": 2.0} if kind == "dynamic" else {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 32, **factors}
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, rope_parameters=rope
    )
    with pytest.raises(UserError, match=kind):
        adapt(LlamaForCausalLM._from_config(config, attn_implementation="sdpa"))
