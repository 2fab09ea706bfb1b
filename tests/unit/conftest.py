"""Tiny models of every supported family, with random weights that give clear-cut answers."""

import itertools
from collections.abc import Callable
from functools import cache
from zlib import crc32

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from greencode.policies import ExitPolicy
from tests.hub import libraries_at, stand_in

LAYERS = 6
WINDOW = 64
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": WINDOW,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48}
OPT = SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=3),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=16),
    "opt": lambda: OPTConfig(**OPT, tie_word_embeddings=False),
    "opt-projected": lambda: OPTConfig(**OPT | {"word_embed_proj_dim": 16}),
    "opt-post-norm": lambda: OPTConfig(**OPT, do_layer_norm_before=False, tie_word_embeddings=False),
}


@cache
def make_model(name: str) -> PreTrainedModel:
    """The tiny model of this name; equal weights every time.

    Weights keep the scale of their input and every norm weight and bias is random, so that no logits are
    nearly tied, no two depths agree by chance, and a norm left out or applied twice shows.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(crc32(name.encode()))
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 2:
                weight.copy_(noise if "embed" in key else noise / weight.shape[1] ** 0.5)
            else:
                weight.copy_(0.1 * noise + (not key.endswith("bias")))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.requires_grad_(False)


@pytest.fixture(scope="session", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each family's tiny model in turn. Shared: leave its weights alone."""
    return make_model(request.param)


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], PreTrainedModel]:
    """The tiny model of a name in `CONFIGS`. Shared: leave its weights alone."""
    return make_model


@pytest.fixture(scope="session")
def make_agent() -> Callable[..., ExitPolicy]:
    """An exit agent with random weights: `make_agent(hidden size, exit points, seed=0, hidden=(8, 8))`."""

    def make(size: int, points: tuple[int, ...], seed: int = 0, hidden: tuple[int, ...] = (8, 8)):
        rng = np.random.default_rng(seed)
        sizes = (size, *hidden, 2)
        layers = [
            (rng.normal(size=(out, into)) / into**0.5, rng.normal(size=out) / 2)
            for into, out in itertools.pairwise(sizes)
        ]
        return ExitPolicy(layers, points, "final_norm", "tiny", {})

    return make


@pytest.fixture
def stand_in_hub(tmp_path, monkeypatch):
    """A stand-in for the hub that the hub's libraries ask here, with an empty cache."""
    with stand_in() as hub, libraries_at(hub.url, tmp_path / "hub-cache", monkeypatch):
        yield hub
