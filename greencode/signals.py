"""What an exit's logits say about their own certainty: the scores of the classic exit rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def _confidence(logits: torch.Tensor) -> torch.Tensor:
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def _margin(logits: torch.Tensor) -> torch.Tensor:
    best = logits.topk(2, dim=-1).values
    shares = (best - logits.logsumexp(-1, keepdim=True)).exp()
    return shares[..., 0] - shares[..., 1]


def _certainty(logits: torch.Tensor) -> torch.Tensor:
    logs = logits.log_softmax(-1)
    return 1 + (logs.exp() * logs).sum(-1) / math.log(logits.shape[-1])


SIGNALS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "confidence": _confidence,
    "margin": _margin,
    "entropy": _certainty,
}
"""Name -> function of logits [..., V] that gives scores [...] in 0..1, higher where the exit is surer:
the largest probability; the largest minus the second (both as in CALM, Schuster et al. 2022); and
1 - H / log V, where H is the entropy (as in DeeBERT, Xin et al. 2020, turned round)."""


def signals(logits: torch.Tensor) -> torch.Tensor:
    """Every signal of logits [..., V]: float32 [..., len(SIGNALS)], in the order of `SIGNALS`."""
    import torch

    logits = logits.float()
    return torch.stack([of(logits) for of in SIGNALS.values()], dim=-1)
