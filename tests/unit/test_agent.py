import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from greencode.agent import (
    PRESETS,
    ExitPolicy,
    Settings,
    ValidationRow,
    actions_agree,
    export,
    train,
    validation_table,
)
from greencode.environment import VectorExitEnvironment
from greencode.episodes import Episodes
from greencode.errors import UserError
from greencode.policies import check_threshold
from greencode.reward import Reward
from greencode.rules import replay

POINTS = (4, 6, 8, 12, 16)
HIDDEN = 12
REWARD = Reward()
QUICK = {"environments": 16, "steps": 2048, "learning_rate": 1e-3, "buffer": 512, "batch_size": 128}


def make(count=200, tokens=5, seed=0, **changes):
    """Episodes whose observations tell, through noise, whether the exit has the final token."""
    rng = np.random.default_rng(seed)
    exits = len(POINTS) - 1
    direction = np.linspace(-1, 1, HIDDEN)
    optimal = rng.choice(exits + 1, size=(count, tokens), p=[0.5, 0.2, 0.1, 0.1, 0.1])
    reached = np.arange(exits) >= optimal[..., None]
    observations = rng.normal(size=(count, tokens, exits, HIDDEN)) + 5
    observations += np.where(reached, 1.0, -1.0)[..., None] * direction
    final = rng.integers(0, 100, size=(count, tokens, 1))
    right = reached ^ (rng.random(reached.shape) < 0.03)
    predicted = np.concatenate([np.where(right, final, final + 1), final], axis=-1)
    fields = {
        "observations": observations.astype(np.float32),
        "tokens": predicted,
        "signals": rng.random((count, tokens, exits, 3), np.float32),
        "exit_points": POINTS,
        "observation": "final_norm",
        "fingerprint": "abc",
        "files": np.arange(count) // 2,
        "contexts": np.full(count, 50),
    }
    return Episodes(**(fields | changes))


class Live:
    """The recorded episodes, given as a language model that runs now would give them."""

    def __init__(self, episodes):
        self.episodes = episodes
        self.exit_points = episodes.exit_points
        self.shape = episodes.shape

    def sample(self, rng):
        return self.episodes.sample(rng)


def make_policy(seed=0, **changes):
    rng = np.random.default_rng(seed)
    sizes = [HIDDEN, 8, 6, 2]
    fields = {
        "layers": [
            (rng.normal(size=(after, before)), rng.normal(size=after)) for before, after in pairwise(sizes)
        ],
        "exit_points": POINTS,
        "observation": "final_norm",
        "fingerprint": "abc",
        "training": {"reward": {"alpha": 1.0}, "settings": {"steps": 64}, "versions": {"torch": "1"}},
    }
    return ExitPolicy(**(fields | changes))


@pytest.fixture(scope="module")
def episodes():
    return make()


@pytest.fixture(scope="module")
def validation():
    return make(count=70, seed=1)


@pytest.fixture(scope="module")
def trained(episodes, validation):
    settings = Settings.preset("large", **(QUICK | {"steps": 16_384}))
    return train(episodes, validation, REWARD, settings)


def test_presets_are_table_iii():
    large, small = Settings.preset("large"), Settings.preset("small")
    assert (large.batch_size, large.buffer, large.epochs, large.learning_rate) == (512, 4096, 6, 5e-5)
    assert (small.batch_size, small.buffer, small.epochs, small.learning_rate) == (32, 256, 2, 1e-4)
    assert (large.hidden, small.hidden) == ((64, 64), (32, 32))
    for settings in (large, small):
        assert (settings.discount, settings.steps, settings.environments) == (0.99, 500_000, 1)
    assert set(PRESETS) == {"large", "small"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"speed": 3}, "no agent setting 'speed'"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"learning_rate": -1}, "learning_rate is -1"),
        ({"discount": 1.01}, "discount is 1.01"),
        ({"hidden": ()}, "hidden is empty"),
        ({"hidden": (64, 0)}, "hidden is 0"),
        ({"environments": 3}, "not a multiple of environments"),
        ({"batch_size": 500}, "not a multiple of batch_size"),
    ],
)
def test_wrong_settings_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        Settings.preset("large", **overrides)


def test_unknown_preset():
    with pytest.raises(UserError, match="choose one of large, small"):
        Settings.preset("huge")


@pytest.mark.parametrize("threshold", [-0.01, 1.01, float("nan"), None, "0.5"])
def test_threshold_outside_the_unit_interval(threshold):
    with pytest.raises(UserError, match="Threshold"):
        check_threshold(threshold)


def test_probability_is_the_softmax_of_the_logits():
    policy = make_policy()
    states = np.random.default_rng(1).normal(size=(3, 4, HIDDEN)).astype(np.float32)
    for temperature in (1.0, 2.5):
        layer = states.astype(np.float64)
        for index, (weight, bias) in enumerate(policy.layers):
            layer = (np.tanh(layer) if index else layer) @ weight.T + bias
        odds = np.exp(layer / temperature)
        expected = odds[..., 1] / odds.sum(axis=-1)
        found = policy.probability(states, temperature)
        assert found.shape == (3, 4)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        one = policy.probability(states[1, 2], temperature)
        assert isinstance(one, float)
        assert one == pytest.approx(expected[1, 2], abs=1e-6)


def test_probability_stays_finite_for_extreme_logits():
    weight = np.zeros((2, HIDDEN))
    weight[1, 0] = 1e4
    policy = make_policy(layers=[(weight, np.zeros(2))])
    states = np.zeros((2, HIDDEN), np.float32)
    states[:, 0] = 1, -1
    np.testing.assert_array_equal(policy.probability(states), [1, 0])
    assert [policy.probability(state) for state in states] == [1, 0]


def test_wrong_arguments_to_probability():
    with pytest.raises(UserError, match="not positive"):
        make_policy().probability(np.zeros(HIDDEN), temperature=0)
    with pytest.raises(UserError, match="size 12"):
        make_policy().probability(np.zeros(HIDDEN + 1))


def test_policy_survives_saving(tmp_path):
    policy = make_policy()
    for name in "ab":
        policy.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = ExitPolicy.load(tmp_path / "a", fingerprint="abc", exit_points=POINTS, observation="final_norm")
    state = np.random.default_rng(2).normal(size=HIDDEN).astype(np.float32)
    assert loaded.probability(state) == policy.probability(state)
    for name in ("exit_points", "observation", "fingerprint", "hidden_size", "training"):
        assert getattr(loaded, name) == getattr(policy, name)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"fingerprint": "xyz"}, "was trained for another model"),
        ({"exit_points": (4, 16)}, r"trained for the exit points \[4, 6, 8, 12, 16\]"),
        ({"observation": "raw"}, "trained on the observation 'final_norm'"),
    ],
)
def test_a_policy_for_something_else_is_refused(tmp_path, expected, message):
    make_policy().save(tmp_path / "policy.safetensors")
    with pytest.raises(UserError, match=message):
        ExitPolicy.load(tmp_path / "policy.safetensors", **expected)


def test_a_broken_policy_file_is_named(tmp_path):
    path = tmp_path / "policy.safetensors"
    make_policy().save(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"policy.safetensors is not an agent file"):
        ExitPolicy.load(path)
    make(count=2).save(path)
    with pytest.raises(UserError, match="is not an agent file"):
        ExitPolicy.load(path)
    with pytest.raises(UserError, match="does not exist; train the agent again"):
        ExitPolicy.load(tmp_path / "none")


def test_replay_leaves_at_the_first_exit_above_the_threshold():
    recorded = make(count=1, tokens=4)
    episodes = replace(recorded, tokens=np.array([[[1, 7, 7, 2, 7]] * 4]))
    probabilities = np.array([[[0.9, 0, 0, 0], [0.2, 0.6, 0.9, 0], [0, 0.5, 0, 1], [0.5, 0.5, 0.5, 0.5]]])
    depths, agreement = replay(episodes, probabilities, 0.5)
    assert depths.tolist() == [[4, 6, 12, 16]]
    assert agreement.tolist() == [[False, True, False, True]]


def test_threshold_one_never_exits_and_zero_always(episodes):
    certain = np.ones((len(episodes), *episodes.shape[:2]))
    depths, agreement = replay(episodes, certain, 1)
    assert (depths == 16).all()
    assert agreement.all()
    assert (replay(episodes, certain, 0)[0] == 4).all()
    with pytest.raises(UserError, match="Threshold"):
        replay(episodes, certain, 2)


def test_validation_table(episodes):
    policy = make_policy()
    rows = validation_table(episodes, policy, [0, 0.3, 0.7, 1])
    assert [row.threshold for row in rows] == [0, 0.3, 0.7, 1]
    assert rows[0].mean_depth == 4
    assert rows[-1] == ValidationRow(1.0, 16.0, 1.0)
    depths = [row.mean_depth for row in rows]
    assert depths == sorted(depths)
    # The same by hand, token by token.
    total = right = 0
    for index in range(len(episodes)):
        one = episodes.episode(index)
        for states, tokens in zip(one.observations, one.tokens, strict=True):
            place = next((i for i, state in enumerate(states) if policy.probability(state) > 0.3), 4)
            total += POINTS[place]
            right += tokens[place] == tokens[-1]
    count = len(episodes) * 5
    assert rows[1].mean_depth == pytest.approx(total / count)
    assert rows[1].agreement == pytest.approx(right / count)


def test_agent_learns(trained, episodes, validation):
    table = REWARD.table(episodes.tokens)
    always_continue = table[..., 0].mean()
    rewards = trained.curve_rewards
    assert rewards[-100:].mean() > max(always_continue, rewards[:100].mean()) + 0.3
    probabilities = trained.policy.probability(validation.observations)
    right = validation.tokens[..., :-1] == validation.tokens[..., -1:]
    assert probabilities[right].mean() > probabilities[~right].mean() + 0.2


def test_learning_curve(trained):
    assert len(trained.curve_steps) == len(trained.curve_rewards) > 500
    assert (np.diff(trained.curve_steps) >= 0).all()
    assert trained.curve_steps[-1] <= 16_384
    assert trained.optimal_counts.sum() == 5 * len(trained.curve_rewards)
    record = trained.record()
    assert list(record["optimal_exits"]) == ["4", "6", "8", "12", "16"]
    assert len(record["episode_reward"]) == len(record["episode_steps"])
    assert math.isfinite(record["steps_per_second"])


def quick_train(tmp_path, name, source, validation, settings, **options):
    policy = train(source, validation, REWARD, settings, **options).policy
    policy.save(tmp_path / name)
    return (tmp_path / name).read_bytes()


def test_same_seed_same_bytes(tmp_path, episodes, validation):
    settings = [Settings.preset("small", **QUICK, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (
        quick_train(tmp_path, str(index), episodes, validation, one) for index, one in enumerate(settings)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("live", [False, True], ids=["recorded", "live"])
def test_an_interrupted_training_resumes_to_the_same_policy(
    tmp_path, episodes, validation, live, monkeypatch, capsys
):
    from stable_baselines3 import PPO

    source = Live(episodes) if live else episodes
    settings = Settings.preset("small", **(QUICK | {"steps": 4096}), normalise=not live)
    whole = train(source, validation, REWARD, settings)
    whole.policy.save(tmp_path / "whole")

    update, updates = PPO.train, []

    def interrupted(model):
        updates.append(model.num_timesteps)
        if len(updates) == 5:
            raise KeyboardInterrupt
        update(model)

    folder = tmp_path / "checkpoints"
    monkeypatch.setattr(PPO, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(source, validation, REWARD, settings, checkpoint_dir=folder)
    monkeypatch.undo()
    assert [file.name for file in folder.iterdir()] == ["checkpoint.pt"]
    capsys.readouterr()
    resumed = train(source, validation, REWARD, settings, checkpoint_dir=folder)
    assert capsys.readouterr().err.startswith("2048 steps")
    resumed.policy.save(tmp_path / "resumed")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()
    np.testing.assert_array_equal(whole.curve_rewards, resumed.curve_rewards)
    np.testing.assert_array_equal(whole.optimal_counts, resumed.optimal_counts)


def test_a_checkpoint_that_does_not_fit_is_not_used(tmp_path, episodes, validation, capsys):
    settings = Settings.preset("small", **QUICK)
    fresh = quick_train(tmp_path, "fresh", episodes, validation, settings)
    folder = tmp_path / "checkpoints"
    other = Settings.preset("small", **QUICK, seed=8)
    quick_train(tmp_path, "other", episodes, validation, other, checkpoint_dir=folder)
    assert (folder / "checkpoint.pt").is_file()
    assert quick_train(tmp_path, "a", episodes, validation, settings, checkpoint_dir=folder) == fresh
    assert "of other settings" in capsys.readouterr().err
    (folder / "checkpoint.pt").write_bytes(b"PK half of it")
    assert quick_train(tmp_path, "b", episodes, validation, settings, checkpoint_dir=folder) == fresh
    assert "cannot be read" in capsys.readouterr().err


def test_the_standardisation_is_folded_into_the_policy(episodes, validation):
    from stable_baselines3 import PPO

    mean = episodes.observations.reshape(-1, HIDDEN).mean(axis=0)
    scale = episodes.observations.reshape(-1, HIDDEN).std(axis=0)
    environment = VectorExitEnvironment(episodes, REWARD, 4, (mean, scale))
    model = PPO("MlpPolicy", environment, n_steps=16, batch_size=64, seed=0, device="cpu")
    settings = Settings.preset("large")
    folded = export(model, validation, REWARD, settings, (mean, scale))
    plain = export(model, validation, REWARD, settings)
    seen = (validation.observations - mean) / scale
    np.testing.assert_allclose(
        folded.probability(validation.observations), plain.probability(seen), atol=1e-6
    )
    assert actions_agree(folded, model, validation.observations, (mean, scale))
    assert actions_agree(plain, model, validation.observations)
    assert not actions_agree(plain, model, validation.observations, (mean, scale))
    plain.layers[0][0][0] += 1
    assert not actions_agree(plain, model, validation.observations)


def test_training_fails_loudly_if_the_export_disagrees(episodes, validation, monkeypatch):
    monkeypatch.setattr("greencode.agent.actions_agree", lambda *_: False)
    with pytest.raises(RuntimeError, match="does not decide"):
        train(episodes, validation, REWARD, Settings.preset("small", **(QUICK | {"steps": 512})))


def test_trajectories_that_cannot_be_learnt_from(episodes, validation):
    settings = Settings.preset("small", **QUICK)
    with pytest.raises(UserError, match="no episodes in the train split"):
        train(make(count=0), validation, REWARD, settings)
    with pytest.raises(UserError, match="different models"):
        train(episodes, make(count=3, fingerprint="xyz"), REWARD, settings)
    with pytest.raises(UserError, match="different models"):
        train(episodes, make(count=3, observation="raw"), REWARD, settings)
    bare = replace(
        episodes,
        observations=episodes.observations[:, :, :0],
        tokens=episodes.tokens[..., -1:],
        signals=episodes.signals[:, :, :0],
        exit_points=(16,),
    )
    with pytest.raises(UserError, match="no exit point before its final layer"):
        train(bare, bare, REWARD, settings)
    broken = make(count=3)
    broken.observations[1, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="validation trajectories contain numbers that are not finite"):
        train(episodes, broken, REWARD, settings)
    with pytest.raises(UserError, match="normalise needs recorded"):
        train(Live(episodes), validation, REWARD, Settings.preset("small", **QUICK, normalise=True))


def test_torch_threads_are_put_back(episodes, validation):
    import torch

    before = torch.get_num_threads()
    train(
        episodes, validation, REWARD, Settings.preset("small", **(QUICK | {"steps": 512}), threads=before + 1)
    )
    assert torch.get_num_threads() == before
