"""The reward of Eq. 2 (exit) and Eq. 3 (continue), over exit points (paper, section IV-D).

Exit points are counted 0..E here, E being the final layer: the paper scales penalties by distance and
"exits are not allowed on non-finetuned layers", so a distance is a number of exit points. Penalties are
divided by the largest possible distance, E, and so lie in [-1, 0]; the reward of an optimal decision
stays 1. With `costs` a distance is what the layers between two exit points cost, in any unit.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from greencode.episodes import optimal_exits
from greencode.errors import UserError

CONTINUE = 0
EXIT = 1
COEFFICIENTS = ("alpha", "beta", "gamma", "epsilon")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Reward:
    """Coefficients of the reward, each in [0, 1].

    Attributes:
        alpha: weight of leaving too late.
        beta: weight of leaving too early. The paper keeps alpha <= beta.
        gamma: weight of going on where leaving was right.
        epsilon: penalty of leaving past the optimal exit with a wrong token. A small constant that is in
            [0, 1] already, hence not divided by the distance.
        costs: of the E segments from one exit point to the next, the final layer included, in any unit
            (layers, milliseconds, joules): distances are sums of them, divided by the sum of all. None:
            equal costs, as in the paper.

    Raises:
        UserError: if a coefficient is not a number in [0, 1], or a cost not a number above 0.
    """

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    epsilon: float = 0.1
    costs: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in COEFFICIENTS:
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise UserError(
                    f"Reward coefficient {name} is {value!r}; set it to a number between 0 and 1."
                )
        if self.costs is not None:
            object.__setattr__(self, "costs", tuple(self.costs))
            for cost in self.costs:
                if not _is_number(cost) or not 0 < cost < math.inf:
                    raise UserError(f"Reward cost {cost!r} is no number above 0; give what a segment costs.")
        if self.alpha > self.beta:
            warnings.warn(
                f"Reward coefficients alpha {self.alpha} > beta {self.beta} punish leaving late more than "
                "leaving early; the paper keeps alpha <= beta.",
                stacklevel=3,
            )

    def _places(self, exits: int) -> np.ndarray:
        """Way from the first exit point to each, [E + 1]; a distance is a difference over the last."""
        if self.costs is None:
            return np.arange(exits + 1)
        if len(self.costs) != exits:
            raise UserError(
                f"The reward has {len(self.costs)} costs, but {exits} segments lie between exit points; "
                "give one for each."
            )
        return np.cumsum((0.0, *self.costs))

    def _distance(self, low: int, high: int, exits: int) -> float:
        places = self._places(exits)
        return float((places[high] - places[low]) / places[-1])

    def exit_reward(self, current: int, optimal: int, correct: bool, exits: int) -> float:
        """Eq. 2: the reward of leaving.

        Args:
            current: exit point that is left at, 0..E-1.
            optimal: first exit point with the final layer's token, 0..E.
            correct: whether the token at `current` is the final layer's.
            exits: E, the number of exit points before the final layer.

        Raises:
            ValueError: if `correct` contradicts what `optimal` means.
        """
        if (correct and current < optimal) or (not correct and current == optimal):
            raise ValueError(f"exit point {current} cannot have correct={correct} when {optimal} is optimal")
        if correct and current == optimal:
            return 1.0
        if correct:
            return -self._distance(optimal, current, exits) * self.alpha
        if current < optimal:
            return -self._distance(current, optimal, exits) * self.beta
        return -self.epsilon

    def continue_reward(self, current: int, optimal: int, exits: int) -> float:
        """Eq. 3: the reward of going on from `current` to the next exit point, current + 1.

        From the last exit point, E - 1, the next one is the final layer, E, which ends the token.
        Arguments as for `exit_reward`.
        """
        if current < optimal:
            return 1.0
        return -self._distance(optimal, current + 1, exits) * self.gamma

    def table(self, tokens: np.ndarray) -> np.ndarray:
        """Both rewards at every exit point, at once.

        Args:
            tokens: [..., E + 1], predicted tokens, the final layer last.

        Returns:
            float32 [..., E, 2]: last axis `CONTINUE`, `EXIT`.
        """
        places = self._places(tokens.shape[-1] - 1)
        optimal = places[optimal_exits(tokens)][..., None]
        correct = tokens[..., :-1] == tokens[..., -1:]
        ahead = (optimal - places[:-1]) / places[-1]  # > 0: the optimal exit is still to come
        going = np.where(ahead > 0, 1.0, (optimal - places[1:]) / places[-1] * self.gamma)
        leaving = np.where(
            correct,
            np.where(ahead == 0, 1.0, ahead * self.alpha),
            np.where(ahead > 0, -ahead * self.beta, -self.epsilon),
        )
        return np.stack([going, leaving], axis=-1).astype(np.float32)
