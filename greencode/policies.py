"""Exit policies: small objects with one method, `leaves(view)`, asked at each exit point.

Never leaving is no policy at all (`None`). Rules are objects, not settings of the model: a threshold is
an argument of one request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from greencode.agent import ExitPolicy, check_threshold
from greencode.errors import UserError

if TYPE_CHECKING:
    from greencode.engine import ExitView


@dataclass(frozen=True)
class FixedExit:
    """Every token leaves at the same depth, which must be an exit point."""

    depth: int

    def leaves(self, view: ExitView) -> bool:
        return view.depth >= self.depth


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
        self._on_device = None
        if not device.startswith("cpu"):
            self._on_device = [
                (torch.tensor(weight, device=device), torch.tensor(bias, device=device))
                for weight, bias in agent.layers
            ]

    def leaves(self, view: ExitView) -> bool:
        if self._on_device is None:
            observation = view.observation.float().cpu().numpy()
            return self.agent.probability(observation, self.temperature) > self.threshold
        state = view.observation.float()
        *hidden, last = self._on_device
        for weight, bias in hidden:
            state = torch.tanh(torch.addmv(bias, weight, state))
        stay, leave = torch.addmv(last[1], last[0], state)
        return bool(torch.sigmoid((leave - stay) / self.temperature) > self.threshold)
