from dataclasses import dataclass

import numpy as np
import pytest
import torch

from greencode.engine import Engine, as_policy
from greencode.errors import UserError
from greencode.policies import AgentExit, DeviceAgent, FixedExit

POINTS = (1, 2, 4, 6)


@dataclass
class View:
    """What a policy may look at."""

    depth: int = 1
    observation: torch.Tensor | None = None

    def to_host(self, value: torch.Tensor) -> np.ndarray:
        return value.numpy()


def on_torch(agent, threshold: float, temperature: float = 1.0) -> AgentExit:
    """The policy as it decides on a GPU, here on the CPU."""
    policy = AgentExit(agent, threshold, temperature)
    policy._network = DeviceAgent(agent, "cpu", temperature)
    return policy


@pytest.fixture
def agent(make_agent):
    return make_agent(32, POINTS)


def test_fixed_exit():
    assert [FixedExit(4).leaves(View(depth)) for depth in POINTS] == [False, False, True, True]


def test_as_policy():
    policy = as_policy(lambda view: view.depth % 2 == 0)
    assert policy.leaves(View(2)) is True
    assert policy.leaves(View(1)) is False


def test_agent_leaves_above_its_threshold_only(agent):
    state = torch.randn(32, generator=torch.Generator().manual_seed(0))
    probability = agent.probability(state.numpy())
    view = View(observation=state)
    assert not AgentExit(agent, probability).leaves(view)
    assert AgentExit(agent, np.nextafter(probability, 0).item()).leaves(view)
    assert AgentExit(agent, 0).leaves(view)
    assert not AgentExit(agent, 1).leaves(view)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), "0.5", None])
def test_invalid_thresholds(agent, threshold):
    with pytest.raises(UserError, match="Threshold"):
        AgentExit(agent, threshold)


@pytest.mark.parametrize("temperature", [0, -1])
def test_invalid_temperatures(agent, temperature):
    with pytest.raises(UserError, match="temperature"):
        AgentExit(agent, 0.5, temperature)


def test_temperature_blurs_the_decision(agent):
    state = torch.randn(32, generator=torch.Generator().manual_seed(0))
    sure, unsure = (agent.probability(state.numpy(), temperature) for temperature in (0.1, 100))
    assert abs(unsure - 0.5) < 0.05 < abs(sure - 0.5)
    between = (0.5 + 3 * sure) / 4
    leaves = [
        AgentExit(agent, between, temperature).leaves(View(observation=state)) for temperature in (0.1, 100)
    ]
    assert leaves == ([True, False] if sure > 0.5 else [False, True])


@pytest.mark.parametrize("temperature", [0.5, 1, 3])
def test_numpy_and_torch_decide_alike(agent, temperature):
    states = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    threshold = float(np.median(agent.probability(states.numpy(), temperature)))
    views = [View(observation=state) for state in states]
    policies = AgentExit(agent, threshold, temperature), on_torch(agent, threshold, temperature)
    here, there = ([policy.leaves(view) for view in views] for policy in policies)
    assert 80 < sum(here) < 120
    clear = np.abs(agent.probability(states.numpy(), temperature) - threshold) > 1e-6
    assert (np.array(here) == np.array(there))[clear].all()


def test_numpy_and_torch_complete_alike(tiny, agent):
    engine, context = Engine(tiny("qwen3"), POINTS), list(range(9))
    depths = set()
    for threshold in (0.2, 0.5, 0.8):
        here = engine.complete(context, 10, AgentExit(agent, threshold))
        there = engine.complete(context, 10, on_torch(agent, threshold))
        assert (here.tokens, here.depths, here.usage) == (there.tokens, there.depths, there.usage)
        assert here.usage.host_syncs == here.usage.checks + 10
        depths |= set(here.depths)
    assert len(depths) > 1


def test_one_policy_serves_many_requests(tiny, agent):
    engine, policy = Engine(tiny("qwen3"), POINTS), AgentExit(agent, 0.5)
    first = engine.complete([1, 2, 3], 6, policy)
    engine.complete([4, 5], 6, policy)
    assert engine.complete([1, 2, 3], 6, policy) == first


def test_agent_of_another_model_is_refused(tiny, make_agent):
    with pytest.raises(UserError, match="hidden states of size 16"):
        Engine(tiny("llama"), POINTS).complete([1, 2], 2, AgentExit(make_agent(16, POINTS), 0.5))
