"""Exit rules: recorded scores decide as the running rule does, and trained rules learn what can be learnt."""

import itertools

import numpy as np
import pytest

from greencode.engine import Engine
from greencode.episodes import Episodes
from greencode.errors import UserError
from greencode.policies import AgentExit, DeviceAgent, ExitPolicy, ScriptedExit
from greencode.rules import KINDS, Rule, curve, replay
from greencode.signals import SIGNALS, signals
from greencode.stopping import Settings, train
from greencode.trajectories import Draw, record

POINTS = (1, 2, 4, 6)
HIDDEN = 6


def make(count=300, tokens=4, seed=0):
    """Episodes whose observations tell, each exit point in its own direction, whether it is right."""
    rng = np.random.default_rng(seed)
    exits = len(POINTS) - 1
    optimal = rng.choice(exits + 1, size=(count, tokens), p=[0.4, 0.2, 0.2, 0.2])
    right = np.arange(exits) >= optimal[..., None]
    observations = rng.normal(size=(count, tokens, exits, HIDDEN)).astype(np.float32)
    for place in range(exits):
        observations[..., place, place] += np.where(right[..., place], 2, -2)
    final = rng.integers(0, 50, size=(count, tokens, 1))
    return Episodes(
        observations=observations,
        tokens=np.concatenate([np.where(right, final, final + 1), final], axis=-1),
        signals=rng.random((count, tokens, exits, 3)).astype(np.float32),
        exit_points=POINTS,
        observation="final_norm",
        fingerprint="abc",
        files=np.arange(count),
        contexts=np.full(count, 10),
    )


def heads(seed=0, hidden=(5,), size=32):
    """A trained rule with a network of its own for each exit point."""
    rng = np.random.default_rng(seed)
    sizes, exits = (size, *hidden, 1), len(POINTS) - 1
    layers = [
        (rng.normal(size=(exits, out, into)) / into**0.5, rng.normal(size=(exits, out)) / 2)
        for into, out in itertools.pairwise(sizes)
    ]
    return ExitPolicy(layers, POINTS, "final_norm", "tiny", {})


def rule_of(kind, make_agent):
    if kind == "agent":
        return Rule(kind, kind, make_agent(32, POINTS))
    return Rule(kind, kind, heads() if kind in ("stopping", "classifier") else None)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "random"])
def test_recorded_scores_decide_as_the_running_rule(kind, tiny, make_agent):
    engine, rule = Engine(tiny("llama"), POINTS), rule_of(kind, make_agent)
    rng = np.random.default_rng(1)
    files = [rng.integers(0, 61, size=40).tolist() for _ in range(3)]
    draw = Draw(max_context=20, min_context=2, new_tokens=6)
    episodes = record(engine, files, range(3), 6, draw, 0, 3, "tiny", "test")
    scores = rule.scores(episodes)
    assert scores.shape == (6, 6, 3)
    assert scores.min() >= 0
    assert scores.max() <= 1
    for threshold in np.quantile(scores, [0.3, 0.7]):
        # Half way to the next score: no score is so near that rounding decides.
        above = scores[scores > threshold]
        threshold = (threshold + above.min()) / 2 if len(above) else threshold
        depths, agreement = replay(episodes, scores, threshold)
        for index in range(6):
            context = files[episodes.files[index]][: episodes.contexts[index]]
            policy = rule.policy(threshold, POINTS)
            done = engine.complete(context, 6, policy)
            # Up to the first token that is not the full model's, the two see the same.
            same = int(np.argmin(np.append(agreement[index], False)))
            assert done.depths[: same + 1] == depths[index, : same + 1].tolist()
            assert done.tokens[:same] == episodes.tokens[index, :same, -1].tolist()


def test_rules_that_read_logits_are_charged_for_them(tiny):
    engine = Engine(tiny("llama"), POINTS)
    for kind, heads_run in (("confidence", 4), ("patience", 4), ("random", 1)):
        done = engine.complete([1, 2, 3], 5, Rule(kind, kind).policy(1.0, POINTS))
        assert done.usage.head_calls == 5 * heads_run
        assert done.depths == [6] * 5


def test_signals_by_hand():
    import torch

    even, sure = torch.zeros(4), torch.tensor([100.0, 0, 0, 0])
    assert signals(even).tolist() == pytest.approx([0.25, 0, 0], abs=1e-6)
    assert signals(sure).tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    two = torch.log(torch.tensor([0.5, 0.3, 0.1, 0.1]))
    entropy = -sum(p * np.log(p) for p in (0.5, 0.3, 0.1, 0.1))
    assert signals(two).tolist() == pytest.approx([0.5, 0.2, 1 - entropy / np.log(4)], abs=1e-6)
    assert list(SIGNALS) == ["confidence", "margin", "entropy"]


def test_patience_counts_exit_points_in_a_row():
    episodes = make(count=1, tokens=1)
    episodes.tokens[0, 0] = [7, 7, 7, 9]
    assert Rule("p", "patience").scores(episodes)[0, 0].tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    episodes.tokens[0, 0] = [7, 8, 8, 8]
    assert Rule("p", "patience").scores(episodes)[0, 0].tolist() == pytest.approx([0, 0, 1 / 3])


def test_random_rule_runs_as_deep_as_asked():
    episodes = make()
    rule = Rule("r", "random", seed=3)
    found = curve(episodes, rule.scores(episodes))
    depths, agreement = replay(episodes, rule.scores(episodes), found.thresholds[found.nearest(3)])
    assert depths.mean() == pytest.approx(3, abs=0.1)
    assert (found.depth[0], found.agreement[0]) == (6, 1)
    assert agreement.mean() < 0.8


def test_script_repeats_the_oracle(tiny):
    engine = Engine(tiny("llama"), POINTS)
    context = [4, 8, 15, 16, 23]
    _, tokens, _ = engine.trace([context], 8)
    optimal = (tokens[0] == tokens[0][:, -1:]).argmax(axis=-1)
    depths = np.array(POINTS)[optimal].tolist()
    done = engine.complete(context, 8, ScriptedExit(depths, POINTS))
    assert done.depths == depths
    assert done.tokens == engine.complete(context, 8, kv="full").tokens


def test_networks_of_their_own_for_each_exit_point(tmp_path):
    policy = heads()
    states = np.random.default_rng(0).normal(size=(5, 3, 32)).astype(np.float32)
    whole = policy.probability(states)
    assert whole.shape == (5, 3)
    device = DeviceAgent(policy, "cpu")
    for place in range(3):
        logit = policy.logit(states[2, place], place)
        assert 1 / (1 + np.exp(-logit)) == pytest.approx(whole[2, place], abs=1e-6)
        import torch

        assert float(device(torch.from_numpy(states[2, place]), place)) == pytest.approx(
            whole[2, place], abs=1e-6
        )
    policy.save(tmp_path / "p.safetensors")
    again = ExitPolicy.load(tmp_path / "p.safetensors", "tiny", POINTS)
    np.testing.assert_array_equal(again.probability(states), whole)
    with pytest.raises(UserError, match="hidden states of size"):
        policy.probability(states[:, :2])
    assert AgentExit(policy, 0.5).agent is policy


@pytest.mark.parametrize(("hidden", "price"), [((), 0.0), ((16,), 0.5)])
def test_a_trained_rule_beats_chance_by_far(hidden, price):
    training, held_back = make(seed=0), make(seed=1)
    policy = train(training, Settings(hidden=hidden, price=price, batch_size=64, epochs=10))
    scores = Rule("s", "stopping", policy).scores(held_back)
    ours = curve(held_back, scores)
    chance = curve(held_back, Rule("r", "random").scores(held_back))
    oracle = np.array(POINTS)[held_back.optimal_exits()].mean()
    at = [float(np.interp(oracle, c.depth[::-1], c.agreement[::-1])) for c in (ours, chance)]
    assert at[0] > 0.8
    assert at[0] > at[1] + 0.15


def test_the_price_of_layers_decides_where_gains_change_sign():
    """A gain of 0 is a score of 0.5: what is dear is left early."""
    episodes = make()
    depths = []
    for price in (0.05, 0.5, 2.0):
        policy = train(episodes, Settings(hidden=(16,), price=price, batch_size=64, epochs=10))
        depths.append(replay(episodes, Rule("s", "stopping", policy).scores(episodes), 0.5)[0].mean())
    assert depths[0] > depths[1] > depths[2]


def test_training_repeats_with_its_seed_and_leaves_the_generator_alone(tmp_path):
    import torch

    episodes, settings = make(count=60), Settings(hidden=(4,), epochs=2, batch_size=32, seed=5)
    torch.manual_seed(0)
    before = torch.rand(1)
    torch.manual_seed(0)
    for name in "ab":
        train(episodes, settings).save(tmp_path / name)
    assert torch.rand(1) == before
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    train(episodes, Settings(hidden=(4,), epochs=2, batch_size=32, seed=6)).save(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()
