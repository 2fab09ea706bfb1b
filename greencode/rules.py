"""The exit rules of a study, rivals and agents alike: scores on recorded episodes, policies at inference.

Every rule gives each exit point a score in 0..1 and leaves above a threshold. What it scores differs: the
logits' certainty, agreement among exits, a trained network on the observation, or chance. To add a rule:
its scores of recorded episodes, its policy, its name in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from greencode.episodes import Episodes
from greencode.errors import UserError
from greencode.policies import (
    AgentExit,
    ExitPolicy,
    PatienceExit,
    RandomExit,
    SignalExit,
    check_threshold,
)
from greencode.signals import SIGNALS

if TYPE_CHECKING:
    from greencode.engine import Policy

TRAINED = ("agent", "stopping", "classifier")
KINDS = (*SIGNALS, "patience", "random", *TRAINED)
"""What a rule may be. `agent` is PPO (`greencode.agent`); `stopping` and `classifier` are trained by
`greencode.stopping`."""


@dataclass(frozen=True)
class Rule:
    """An exit rule without its threshold.

    Attributes:
        name: in the study.
        kind: one of `KINDS`.
        network: of a trained rule.
        seed: of the random rule.
        temperature: of a trained rule's softmax.
    """

    name: str
    kind: str
    network: ExitPolicy | None = None
    seed: int = 0
    temperature: float = 1.0

    def scores(self, episodes: Episodes) -> np.ndarray:
        """Score of every exit point before the final layer, float32 [episodes, T, E]."""
        if self.kind in SIGNALS:
            return episodes.signals[..., list(SIGNALS).index(self.kind)]
        if self.kind == "patience":
            return _runs(episodes.tokens[..., :-1])
        if self.kind == "random":
            return np.random.default_rng(self.seed).random(episodes.observations.shape[:3], np.float32)
        assert self.network is not None
        network = self.network
        return in_chunks(lambda seen: network.probability(seen, self.temperature), episodes.observations)

    def policy(self, threshold: float, exit_points: tuple[int, ...], device: str = "cpu") -> Policy:
        """The rule at inference, for one completion after another."""
        if self.kind in SIGNALS:
            return SignalExit(self.kind, threshold)
        if self.kind == "patience":
            return PatienceExit(threshold, exit_points)
        if self.kind == "random":
            return RandomExit(threshold, self.seed)
        assert self.network is not None
        return AgentExit(self.network, threshold, self.temperature, device)


def _runs(tokens: np.ndarray) -> np.ndarray:
    """Of tokens [..., E]: how many exit points right before each said the same, as a share of E."""
    runs = np.zeros(tokens.shape, np.float32)
    for place in range(1, tokens.shape[-1]):
        same = tokens[..., place] == tokens[..., place - 1]
        runs[..., place] = np.where(same, runs[..., place - 1] + 1, 0)
    return runs / np.float32(tokens.shape[-1])


def replay(episodes: Episodes, scores: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Leave recorded episodes where the score is above the threshold, without the language model.

    Args:
        scores: [episodes, T, E], of each exit point before the final layer; P(exit) for an agent.
        threshold: T in [0, 1].

    Returns:
        Depths, int64 [episodes, T] of layers run; agreement, bool [episodes, T]: the token is the full
        model's.

    Raises:
        UserError: if the threshold is not in [0, 1].
    """
    leave = scores > check_threshold(threshold)
    exits = leave.shape[-1]
    index = np.where(leave.any(axis=-1), leave.argmax(axis=-1), exits)
    tokens = np.take_along_axis(episodes.tokens, index[..., None], axis=-1)[..., 0]
    return np.array(episodes.exit_points)[index], tokens == episodes.tokens[..., -1]


def in_chunks(function: Callable, observations: np.ndarray, chunk: int = 64) -> np.ndarray:
    """`function` of [episodes, ...], a few episodes at a time to bound memory."""
    return np.concatenate(
        [function(observations[start : start + chunk]) for start in range(0, len(observations), chunk)]
    )


@dataclass(frozen=True)
class Curve:
    """A rule on recorded episodes at every threshold that makes a difference, most careful first.

    Attributes:
        thresholds: float64 [n], falling from 1 (never leave) to 0.
        depth: float64 [n], mean layers run.
        agreement: float64 [n], share of tokens equal to the full model's.
    """

    thresholds: np.ndarray
    depth: np.ndarray
    agreement: np.ndarray

    def nearest(self, depth: float) -> int:
        """Index of the point whose mean depth is nearest, the more careful of two."""
        return int(np.abs(self.depth - depth).argmin())


def curve(episodes: Episodes, scores: np.ndarray, points: int = 200) -> Curve:
    """The rule's trade-off; of many distinct scores about `points`, evenly spread over their ranks.

    Raises:
        UserError: if there are no episodes.
    """
    if not len(episodes):
        raise UserError("There are no recorded episodes to draw a curve from; record more.")
    wanted = np.unique(np.quantile(scores, np.linspace(0, 1, points), method="lower").astype(np.float64))
    thresholds = np.unique(np.concatenate([[0.0], wanted.clip(0, 1), [1.0]]))[::-1]
    outcomes = [replay(episodes, scores, threshold) for threshold in thresholds]
    return Curve(
        thresholds,
        np.array([depths.mean() for depths, _ in outcomes]),
        np.array([agreement.mean() for _, agreement in outcomes]),
    )


def point_name(rule: str, share: float) -> str:
    """Name of a rule's operating point at a share of the layers: `confidence-D0.5`."""
    return f"{rule}-D{share:g}"


def verified_points(
    rules: Sequence[Rule], validation: Episodes, verified: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """Rows as of `operating_points` for rules whose drafts are verified, under the rule `{name} verified`.

    Args:
        verified: rule -> shares of the layers that its drafts take on validation episodes.
    """
    rows = []
    for rule in (rule for rule in rules if rule.name in verified):
        for row in operating_points([rule], validation, verified[rule.name]):
            method = f"{rule.name}-V{row['share']:g}"
            rows.append(row | {"method": method, "rule": f"{rule.name} verified", "kv": "verified"})
    return rows


def operating_points(
    rules: Sequence[Rule], validation: Episodes, shares: Sequence[float]
) -> list[dict[str, Any]]:
    """Thresholds at which rules run `share` of the layers on validation episodes, as table rows.

    A rule that cannot run that deep or shallow gets its nearest threshold; `depth` says what it runs.
    `policy` names the rule that decides, `kv` a mode of the cache other than the study's.
    """
    layers = validation.exit_points[-1]
    rows = []
    for rule in rules:
        found = curve(validation, rule.scores(validation))
        for share in shares:
            place = found.nearest(share * layers)
            rows.append(
                {
                    "method": point_name(rule.name, share),
                    "rule": rule.name,
                    "policy": rule.name,
                    "kv": None,
                    "share": share,
                    "threshold": float(found.thresholds[place]),
                    "depth": float(found.depth[place]),
                    "agreement": float(found.agreement[place]),
                }
            )
    return rows


def load_rules(
    kinds: Mapping[str, str],
    files: Iterable[str | Path],
    episodes: Episodes,
    seed: int,
    temperature: float = 1.0,
) -> list[Rule]:
    """The study's rules by name and kind; each trained one's network is in the folder of its name.

    Args:
        files: `.../{rule}/policy.safetensors` of every trained rule.
        episodes: of the model that they must be for.

    Raises:
        UserError: a file that is missing, broken, or for another model.
    """
    found = {
        Path(path).parent.name: ExitPolicy.load(
            path, episodes.fingerprint, episodes.exit_points, episodes.observation
        )
        for path in files
    }
    return [Rule(name, kind, found.get(name), seed, temperature) for name, kind in kinds.items()]
