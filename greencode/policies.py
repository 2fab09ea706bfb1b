"""Exit policies: small objects with one method, `leaves(view)`, asked at each exit point.

Never leaving is no policy at all (`None`). Rules are objects, not settings of the model: a threshold is
an argument of one request. Trained rules are networks on the observation (`ExitPolicy`); how they are
trained is in `greencode.agent` (PPO) and `greencode.stopping` (supervised).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from greencode.episodes import read_safetensors, write_safetensors
from greencode.errors import UserError
from greencode.signals import SIGNALS

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
    """The network of a trained rule, in numpy: P(exit) of an observation.

    It keeps no state between calls, so threads may share it.

    Attributes:
        layers: (weight float32 [out, in], bias float32 [out]) of each layer; tanh between them; the last
            one gives the logits of continue and exit, or their difference alone. With a leading axis of
            E, [E, out, in] and [E, out], each exit point before the final layer has a network of its own.
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
        exits = len(self.exit_points) - 1
        self.shared = self.layers[0][0].ndim == 2
        networks = [_Network(self.layers)] if self.shared else [
            _Network([(weight[place], bias[place]) for weight, bias in self.layers]) for place in range(exits)
        ]  # fmt: skip
        self.networks = networks * exits if self.shared else networks

    @property
    def hidden_size(self) -> int:
        """H, the size of an observation."""
        return self.layers[0][0].shape[-1]

    def probability(self, observation: np.ndarray, temperature: float = 1.0) -> Any:
        """P(exit).

        Args:
            observation: [..., H]; [..., E, H] where each exit point has its own network.
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
        sizes = (self.hidden_size,) if self.shared else (len(self.networks), self.hidden_size)
        if state.shape[-len(sizes) :] != sizes:
            raise self._wrong_size(state)
        if self.shared:
            logits = self.networks[0].logits(state)
        else:
            seen = [network.logits(state[..., place, :]) for place, network in enumerate(self.networks)]
            logits = np.stack(seen, axis=-1)
        # By way of tanh, as exp would overflow.
        return (1 + np.tanh(logits / np.float32(temperature) / 2)) / 2

    def logit(self, state: np.ndarray, place: int = 0) -> float:
        """Log odds of exit for one observation, float32 [H]. The decision of a running completion: lean.

        Args:
            place: index of the exit point, 0..E - 1.

        Raises:
            UserError: if H is another model's.
        """
        try:
            return self.networks[place].logit(state)
        except ValueError:
            raise self._wrong_size(state) from None

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


class _Network:
    """One network of an `ExitPolicy`: tanh layers, then the difference of the two logits."""

    __slots__ = ("difference", "hidden", "offset")

    def __init__(self, layers: list[tuple[np.ndarray, np.ndarray]]):
        *self.hidden, (weight, bias) = layers
        # The softmax of two logits is the sigmoid of their difference: one row serves instead of two.
        self.difference = weight[-1] if len(weight) == 1 else weight[1] - weight[0]
        self.offset = float(bias[-1]) if len(bias) == 1 else float(bias[1]) - float(bias[0])

    def logit(self, state: np.ndarray) -> float:
        """Log odds of one state [H]."""
        for weight, bias in self.hidden:
            state = weight.dot(state)
            state += bias
            np.tanh(state, out=state)
        return float(self.difference.dot(state)) + self.offset

    def logits(self, states: np.ndarray) -> np.ndarray:
        """Log odds [...] of states [..., H]."""
        shape, states = states.shape[:-1], states.reshape(-1, states.shape[-1])
        for weight, bias in self.hidden:
            states = states @ weight.T
            states += bias
            np.tanh(states, out=states)
        return (states @ self.difference + np.float32(self.offset)).reshape(shape)


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
    """A rule's network on a torch device: P(exit) of an observation, without leaving the device."""

    def __init__(self, agent: ExitPolicy, device: str, temperature: float = 1.0):
        import torch

        def there(array: np.ndarray) -> torch.Tensor:
            return torch.tensor(array, device=device)

        self.temperature = temperature
        self._networks = [
            ([(there(w), there(b)) for w, b in network.hidden], there(network.difference), network.offset)
            for network in agent.networks
        ]

    def __call__(self, observation: torch.Tensor, place: int = 0) -> torch.Tensor:
        """P(exit), a number, of one observation [H] at exit point number `place`."""
        import torch

        hidden, difference, offset = self._networks[place]
        state = observation.float()
        for weight, bias in hidden:
            state = torch.tanh(torch.addmv(bias, weight, state))
        return torch.sigmoid((difference.dot(state) + offset) / self.temperature)


class AgentExit:
    """A trained rule: leave if P(exit) > threshold (never argmax).

    On the CPU the network runs in plain numpy. On a GPU it runs there, and one boolean per exit point
    comes back to the host.
    """

    def __init__(self, agent: ExitPolicy, threshold: float, temperature: float = 1.0, device: str = "cpu"):
        self.agent = agent
        self.threshold = check_threshold(threshold)
        if temperature <= 0:
            raise UserError(f"The agent's temperature is {temperature}; it must be above 0.")
        self.temperature = temperature
        self._place = {depth: place for place, depth in enumerate(agent.exit_points)}
        self._network = None if device.startswith("cpu") else DeviceAgent(agent, device, temperature)

    def leaves(self, view: ExitView) -> bool:
        place = self._place[view.depth]
        if self._network is None:
            logit = self.agent.logit(view.to_host(view.observation), place)
            return _sigmoid(logit / self.temperature) > self.threshold
        return bool(view.to_host(self._network(view.observation, place) > self.threshold))


class SignalExit:
    """Leave if an exit's logits are sure enough: one of `greencode.signals.SIGNALS` > threshold.

    It pays for the LM head at every exit point that it looks at, and is charged for it.
    """

    def __init__(self, signal: str, threshold: float):
        self.threshold = check_threshold(threshold)
        self._signal = SIGNALS[signal]

    def leaves(self, view: ExitView) -> bool:
        return bool(view.to_host(self._signal(view.logits.float())) > self.threshold)


class PatienceExit:
    """Leave once the exit points passed so far have said the same token often enough in a row.

    The score of an exit point is the number of exit points right before it with its token, as a share of
    E, so that thresholds lie in 0..1 (patience as in PABEE, Zhou et al. 2020, made comparable). It pays
    for the LM head at every exit point, and holds the state of one completion: use it for one at a time.
    """

    def __init__(self, threshold: float, exit_points: tuple[int, ...]):
        self.threshold = check_threshold(threshold)
        self._first, self._exits = exit_points[0], len(exit_points) - 1
        self._said, self._row = -1, 0

    def leaves(self, view: ExitView) -> bool:
        said = int(view.to_host(view.logits.argmax()))
        again = view.depth != self._first and said == self._said
        self._said, self._row = said, self._row + 1 if again else 0
        return self._row / self._exits > self.threshold


class RandomExit:
    """Leave where a random number in [0, 1) is above the threshold; looks at nothing."""

    def __init__(self, threshold: float, seed: int):
        self.threshold = check_threshold(threshold)
        self._rng = np.random.default_rng(seed)

    def leaves(self, view: ExitView) -> bool:
        return self._rng.random() > self.threshold


class ScriptedExit:
    """Leave each token at a depth that is known before: how the oracle's cost is measured.

    Args:
        depths: of each token of one completion.
        exit_points: the engine's.
    """

    def __init__(self, depths: Iterable[int], exit_points: tuple[int, ...]):
        self._depths, self._first = iter(depths), exit_points[0]
        self._depth = 0

    def leaves(self, view: ExitView) -> bool:
        if view.depth == self._first:
            self._depth = next(self._depths)
        return view.depth >= self._depth
