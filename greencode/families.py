"""One small adapter per model family: a causal LM of transformers, driven through its own modules.

An adapter names the parts that families call differently (embedding, positions, final norm, projection)
and runs single layers. No modelling code is copied. Another family needs an entry in `_ADAPTERS`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

import torch

from greencode.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rotary = tuple[torch.Tensor, torch.Tensor]


class Cache(Protocol):
    """What a layer needs of a KV cache."""

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [batch, heads, positions, head size]; return all of the layer's."""
        ...


class Family:
    """Adapter of the rotary families: Llama, Mistral, Qwen2, Qwen3.

    Shapes: B sequences, P positions, H hidden size, V vocabulary.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.config = model.config
        self.decoder = model.get_decoder()
        self.layers = self.decoder.layers
        self.lm_head = model.get_output_embeddings()
        self.norm = self.decoder.norm
        rope = getattr(model.config, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") in ("dynamic", "longrope"):
            raise UserError(
                f"Rotary embeddings of type {rope['rope_type']!r} change with the length of the text, "
                "so layers run at different times would disagree; they are not supported."
            )

    @property
    def depth(self) -> int:
        """N, the number of layers."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.config.hidden_size

    @property
    def window(self) -> int | None:
        """Longest text the model can read (None: no limit stated)."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def sliding_window(self, layer: int) -> int | None:
        """Positions that `layer` can look back, itself included, or None for all."""
        types = getattr(self.config, "layer_types", None)
        if types is not None and types[layer] != "sliding_attention":
            return None
        return getattr(self.config, "sliding_window", None)

    def kv_shape(self) -> tuple[int, int]:
        """(key-value heads, head size)."""
        heads = self.config.num_attention_heads
        size = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        return getattr(self.config, "num_key_value_heads", None) or heads, size

    def embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, P, H] at depth 0 of ids [B, P] at positions [B, P]."""
        return self.decoder.embed_tokens(ids)

    def rotary(self, positions: torch.Tensor) -> Rotary | None:
        """Cosines and sines [B, P, head size] for positions [B, P]; None where positions are learned."""
        reference = torch.empty(0, dtype=self.dtype, device=positions.device)
        return self.decoder.rotary_emb(reference, position_ids=positions)

    def run(
        self,
        layer: int,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        rotary: Rotary | None,
    ) -> torch.Tensor:
        """Hidden states [B, P, H] after one layer."""
        return self.layers[layer](
            hidden,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            position_embeddings=rotary,
        )

    def observe(self, hidden: torch.Tensor) -> torch.Tensor:
        """The observation: the hidden state [.., H] after the model's final norm.

        It is what the LM head reads, so an exit that is taken pays the norm only once.
        """
        return self.norm(hidden)

    def logits(self, observation: torch.Tensor) -> torch.Tensor:
        """Logits [.., V] of an observation [.., H]: projection (where the family has one) and LM head."""
        return self.lm_head(observation)

    def propagate(self, layer: int, hidden: torch.Tensor, cache: Cache, rotary: Rotary | None) -> None:
        """Fill a skipped layer's keys and values from an exit's hidden state (CALM), nothing else."""
        block = self.layers[layer]
        attention = block.self_attn
        hidden = block.input_layernorm(hidden)
        shape = (*hidden.shape[:-1], -1, attention.head_dim)
        keys = attention.k_proj(hidden).view(shape)
        if hasattr(attention, "k_norm"):
            keys = attention.k_norm(keys)
        keys = keys.transpose(1, 2)
        values = attention.v_proj(hidden).view(shape).transpose(1, 2)
        rotate = sys.modules[type(self.decoder).__module__].apply_rotary_pos_emb
        _, keys = rotate(keys, keys, *rotary)
        cache.update(keys, values, layer)


class OPTFamily(Family):
    """Adapter of OPT: learned positions, optional projections around the layers, optional final norm."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.config = model.config
        self.decoder = model.get_decoder()
        self.layers = self.decoder.layers
        self.lm_head = model.get_output_embeddings()
        self.norm = self.decoder.final_layer_norm or torch.nn.Identity()
        self.project_out = self.decoder.project_out or torch.nn.Identity()

    def sliding_window(self, layer: int) -> int | None:
        return None

    def embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self.decoder.embed_tokens(ids)
        if self.decoder.project_in is not None:
            hidden = self.decoder.project_in(hidden)
        return hidden + self.decoder.embed_positions(None, 0, position_ids=positions)

    def rotary(self, positions: torch.Tensor) -> Rotary | None:
        return None

    def run(self, layer, hidden, positions, mask, cache, rotary):
        return self.layers[layer](
            hidden,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )

    def logits(self, observation: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.project_out(observation))

    def propagate(self, layer, hidden, cache, rotary) -> None:
        block = self.layers[layer]
        attention = block.self_attn
        if block.do_layer_norm_before:
            hidden = block.self_attn_layer_norm(hidden)
        shape = (*hidden.shape[:-1], attention.num_heads, attention.head_dim)
        keys = attention.k_proj(hidden).view(shape).transpose(1, 2)
        values = attention.v_proj(hidden).view(shape).transpose(1, 2)
        cache.update(keys, values, layer)


_ADAPTERS: dict[str, type[Family]] = {
    "llama": Family,
    "mistral": Family,
    "qwen2": Family,
    "qwen3": Family,
    "opt": OPTFamily,
}


def adapt(model: PreTrainedModel) -> Family:
    """The adapter of a model's family.

    Raises:
        UserError: a family without an adapter (the message lists those with one), or attention that is
            not sdpa.
    """
    family = model.config.model_type
    if family not in _ADAPTERS:
        raise UserError(
            f"Models of family {family!r} are not supported; supported are {', '.join(_ADAPTERS)}."
        )
    attention = model.config._attn_implementation
    if attention != "sdpa":
        # Masks are left out where sdpa is causal by itself; others would attend to the future, silently.
        raise UserError(f"The model's attention is {attention!r}; load it with attn_implementation='sdpa'.")
    return _ADAPTERS[family](model)
