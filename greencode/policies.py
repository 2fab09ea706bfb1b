"""Exit policies: small objects with one method, `leaves(view)`, asked at each exit point.

Never leaving is no policy at all (`None`). Rules are objects, not settings of the model: a threshold is
an argument of one request. The trained agent's network is here too (`ExitPolicy`); how it is trained is in
`greencode.agent`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from greencode.episodes import read_safetensors, write_safetensors
from greencode.errors import UserError

if TYPE_CHECKING:
    import torch

    from greencode.engine import ExitView

FORMAT = "greencode-policy-2"


def check_threshold(threshold: float) -> float:
    """The threshold T as a float.

    Raises:
        UserError: if it is not in [0, 1].
    """
    if not isinstance(threshold, Real) or not 0 <= threshold <= 1:
        raise UserError(f"Threshold {threshold!r} is not a number between 0 and 1; choose one, e.g. 0.9.")
    return float(threshold)


class ExitPolicy:
    """The actor of a trained agent, in numpy: P(exit) of an observation.

    It keeps no state between calls, so threads may share it.

    Attributes:
        layers: (weight float32 [out, in], bias float32 [out]) of each layer; tanh between them; the last
            one gives the logits of continue and exit.
        exit_points: depths that it was trained on, ending at N.
        observation: name of the observation's definition.
        fingerprint: of the model that it was trained on.
        training: how it was trained: `reward`, `settings`, `versions`; JSON values.
    """

    def __init__(
        self,
        layers: list[tuple[np.ndarray, np.ndarray]],
        exit_points: tuple[int, ...],
        observation: str,
        fingerprint: str,
        training: dict[str, Any],
    ) -> None:
        self.layers = [
            (np.ascontiguousarray(weight, np.float32), np.ascontiguousarray(bias, np.float32))
            for weight, bias in layers
        ]
        self.exit_points = tuple(int(point) for point in exit_points)
        self.observation = observation
        self.fingerprint = fingerprint
        self.training = training
        *self._hidden, (weight, bias) = self.layers
        # The softmax of two logits is the sigmoid of their difference: one row serves instead of two.
        self._difference = weight[1] - weight[0]
        self._offset = float(bias[1]) - float(bias[0])

    @property
    def hidden_size(self) -> int:
        """H, the size of an observation."""
        return self.layers[0][0].shape[1]

    def probability(self, observation: np.ndarray, temperature: float = 1.0) -> Any:
        """P(exit).

        Args:
            observation: [..., H].
            temperature: divides the logits; above 1 the agent is less sure, below 1 surer.

        Returns:
            A float for one observation, else float32 [...].

        Raises:
            UserError: if the temperature is not positive, or H is another model's.
        """
        if temperature <= 0:
            raise UserError(f"Temperature {temperature} is not positive; choose one above 0, e.g. 1.")
        state = np.asarray(observation, np.float32)
        if state.ndim == 1:
            return _sigmoid(self.logit(state) / temperature)
        if state.shape[-1:] != (self.hidden_size,):
            raise self._wrong_size(state)
        shape = state.shape[:-1]
        state = state.reshape(-1, self.hidden_size)
        for weight, bias in self._hidden:
            state = state @ weight.T
            state += bias
            np.tanh(state, out=state)
        logits = (state @ self._difference + np.float32(self._offset)) / np.float32(temperature)
        # By way of tanh, as exp would overflow.
        return ((1 + np.tanh(logits / 2)) / 2).reshape(shape)

    def logit(self, state: np.ndarray) -> float:
        """Log odds of exit for one observation, float32 [H]. The decision of a running completion: lean.

        Raises:
            UserError: if H is another model's.
        """
        try:
            for weight, bias in self._hidden:
                state = weight.dot(state)
                state += bias
                np.tanh(state, out=state)
        except ValueError:
            raise self._wrong_size(state) from None
        return float(self._difference.dot(state)) + self._offset

    def _wrong_size(self, state: np.ndarray) -> UserError:
        return UserError(
            f"The agent expects hidden states of size {self.hidden_size}, not shape {state.shape}; "
            "use an agent trained on this model."
        )

    def save(self, path: str | Path) -> None:
        """Write as safetensors, whole or not at all; equal policies give equal bytes."""
        head = {
            "format": FORMAT,
            "exit_points": self.exit_points,
            "observation": self.observation,
            "fingerprint": self.fingerprint,
            "hidden_size": self.hidden_size,
            "training": self.training,
        }
        tensors = {}
        for index, (weight, bias) in enumerate(self.layers):
            tensors |= {f"layers.{index}.weight": weight, f"layers.{index}.bias": bias}
        write_safetensors(path, head, tensors)

    @classmethod
    def load(
        cls,
        path: str | Path,
        fingerprint: str | None = None,
        exit_points: tuple[int, ...] | None = None,
        observation: str | None = None,
    ) -> ExitPolicy:
        """Read what `save` wrote; what is given besides must be what the agent was trained with.

        Raises:
            UserError: if the file is missing, broken or something else, or the agent is for another
                model, other exit points or another observation.
        """
        remedy = "train the agent again"
        head, tensors = read_safetensors(path, FORMAT, "an agent file", remedy)
        try:
            policy = cls(
                layers=[
                    (tensors[f"layers.{index}.weight"], tensors[f"layers.{index}.bias"])
                    for index in range(len(tensors) // 2)
                ],
                exit_points=tuple(head["exit_points"]),
                observation=head["observation"],
                fingerprint=head["fingerprint"],
                training=head["training"],
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{path} is not an agent file ({error}); delete it and {remedy}.") from None
        if fingerprint is not None and policy.fingerprint != fingerprint:
            raise UserError(
                f"{path} was trained for another model (fingerprint {policy.fingerprint}, this model has "
                f"{fingerprint}); train an agent on this model."
            )
        if exit_points is not None and policy.exit_points != tuple(exit_points):
            raise UserError(
                f"{path} was trained for the exit points {list(policy.exit_points)}, not "
                f"{list(exit_points)}; train an agent on these or use its own."
            )
        if observation is not None and policy.observation != observation:
            raise UserError(
                f"{path} was trained on the observation {policy.observation!r}, not {observation!r}; "
                "use the same one or train an agent on this one."
            )
        return policy


def _sigmoid(logit: float) -> float:
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    odds = math.exp(logit)
    return odds / (1 + odds)


@dataclass(frozen=True)
class FixedExit:
    """Every token leaves at the same depth, which must be an exit point."""

    depth: int

    def leaves(self, view: ExitView) -> bool:
        return view.depth >= self.depth


class DeviceAgent:
    """The actor's network on a torch device: P(exit) of an observation, without leaving the device."""

    def __init__(self, agent: ExitPolicy, device: str, temperature: float = 1.0):
        import torch

        self.temperature = temperature
        *self._hidden, (weight, bias) = (
            (torch.tensor(weight, device=device), torch.tensor(bias, device=device))
            for weight, bias in agent.layers
        )
        self._difference, self._offset = weight[1] - weight[0], bias[1] - bias[0]

    def __call__(self, observation: torch.Tensor) -> torch.Tensor:
        """P(exit), a number, of one observation [H]."""
        import torch

        state = observation.float()
        for weight, bias in self._hidden:
            state = torch.tanh(torch.addmv(bias, weight, state))
        return torch.sigmoid((self._difference.dot(state) + self._offset) / self.temperature)


class AgentExit:
    """The trained agent: leave if P(exit) > threshold (never argmax).

    On the CPU the network runs in plain numpy. On a GPU it runs there, and one boolean per exit point
    comes back to the host.
    """

    def __init__(self, agent: ExitPolicy, threshold: float, temperature: float = 1.0, device: str = "cpu"):
        self.agent = agent
        self.threshold = check_threshold(threshold)
        if temperature <= 0:
            raise UserError(f"The agent's temperature is {temperature}; it must be above 0.")
        self.temperature = temperature
        self._network = None if device.startswith("cpu") else DeviceAgent(agent, device, temperature)

    def leaves(self, view: ExitView) -> bool:
        if self._network is None:
            logit = self.agent.logit(view.to_host(view.observation))
            return _sigmoid(logit / self.temperature) > self.threshold
        return bool(view.to_host(self._network(view.observation) > self.threshold))
