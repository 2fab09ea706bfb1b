"""The reward of Eq. 2 (exit) and Eq. 3 (continue), over exit points (paper, section IV-D).

Exit points are counted 0..E here, E being the final layer: the paper scales penalties by distance and
"exits are not allowed on non-finetuned layers", so a distance is a number of exit points. Penalties are
divided by the largest possible distance, E, and so lie in [-1, 0]; the reward of an optimal decision
stays 1.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields

import numpy as np

from greencode.episodes import optimal_exits
from greencode.errors import UserError

CONTINUE = 0
EXIT = 1


@dataclass(frozen=True)
class Reward:
    """Coefficients of the reward, each in [0, 1].

    Attributes:
        alpha: weight of leaving too late.
        beta: weight of leaving too early. The paper keeps alpha <= beta.
        gamma: weight of going on where leaving was right.
        epsilon: penalty of leaving past the optimal exit with a wrong token. A small constant that is in
            [0, 1] already, hence not divided by the distance.

    Raises:
        UserError: if a coefficient is not a number in [0, 1].
    """

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    epsilon: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UserError(
                    f"Reward coefficient {field.name} is {value!r}; set it to a number between 0 and 1."
                )
        if self.alpha > self.beta:
            warnings.warn(
                f"Reward coefficients alpha {self.alpha} > beta {self.beta} punish leaving late more than "
                "leaving early; the paper keeps alpha <= beta.",
                stacklevel=3,
            )

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
            return -(current - optimal) / exits * self.alpha
        if current < optimal:
            return -(optimal - current) / exits * self.beta
        return -self.epsilon

    def continue_reward(self, current: int, optimal: int, exits: int) -> float:
        """Eq. 3: the reward of going on from `current` to the next exit point, current + 1.

        From the last exit point, E - 1, the next one is the final layer, E, which ends the token.
        Arguments as for `exit_reward`.
        """
        if current < optimal:
            return 1.0
        return -(current + 1 - optimal) / exits * self.gamma

    def table(self, tokens: np.ndarray) -> np.ndarray:
        """Both rewards at every exit point, at once.

        Args:
            tokens: [..., E + 1], predicted tokens, the final layer last.

        Returns:
            float32 [..., E, 2]: last axis `CONTINUE`, `EXIT`.
        """
        exits = tokens.shape[-1] - 1
        current = np.arange(exits)
        optimal = optimal_exits(tokens)[..., None]
        correct = tokens[..., :-1] == tokens[..., -1:]
        ahead = (optimal - current) / exits  # > 0: the optimal exit is still to come
        going = np.where(ahead > 0, 1.0, (ahead - 1 / exits) * self.gamma)
        leaving = np.where(
            correct,
            np.where(ahead == 0, 1.0, ahead * self.alpha),
            np.where(ahead > 0, -ahead * self.beta, -self.epsilon),
        )
        return np.stack([going, leaving], axis=-1).astype(np.float32)
