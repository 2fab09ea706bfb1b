import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from greencode.environment import ExitEnvironment, VectorExitEnvironment
from greencode.episodes import Episode, Episodes
from greencode.reward import CONTINUE, EXIT, Reward

POINTS = (4, 6, 8, 12)
REWARD = Reward(alpha=0.5, beta=0.8, gamma=0.6, epsilon=0.1)


def make(count=7, tokens=3, hidden=4, seed=0):
    rng = np.random.default_rng(seed)
    return Episodes(
        observations=rng.normal(size=(count, tokens, 3, hidden)).astype(np.float32),
        tokens=rng.integers(0, 2, size=(count, tokens, 4)),
        signals=np.zeros((count, tokens, 3, 3), np.float32),
        exit_points=POINTS,
        observation="final_norm",
        fingerprint="abc",
        files=np.arange(count),
        contexts=np.full(count, 10),
    )


class Live:
    """The recorded episodes, given as a language model that runs now would give them."""

    def __init__(self, episodes):
        self.episodes = episodes
        self.exit_points = episodes.exit_points
        self.shape = episodes.shape

    def sample(self, rng):
        return self.episodes.sample(rng)


class Script(Live):
    """Episodes in the order of a script."""

    def __init__(self, episodes, script):
        super().__init__(episodes)
        self.script = list(script)

    def sample(self, rng):
        return self.episodes.episode(self.script.pop(0))


@pytest.mark.filterwarnings("ignore:.*infinity.*")
def test_both_checkers_pass():
    check_env(ExitEnvironment(make(), REWARD), skip_render_check=True)
    check_env_sb3(ExitEnvironment(make(), REWARD))


def test_one_episode_by_hand():
    observations = np.arange(2 * 3 * 1, dtype=np.float32).reshape(2, 3, 1)
    tokens = np.array([[1, 7, 7, 7], [7, 1, 7, 7]])  # optimal exits 1 and 0 of three

    class One:
        exit_points = POINTS
        shape = (2, 3, 1)

        def sample(self, rng):
            return Episode(observations, tokens)

    environment = ExitEnvironment(One(), REWARD)
    observation, info = environment.reset(seed=0)
    assert (observation.item(), info) == (0.0, {"token": 0, "exit_point": 0, "depth": 4})
    observation, reward, terminated, truncated, info = environment.step(CONTINUE)
    assert (observation.item(), reward, terminated, truncated) == (1.0, 1.0, False, False)
    assert info == {"token": 0, "exit_point": 1, "depth": 6}
    observation, reward, *_, info = environment.step(EXIT)
    assert (observation.item(), reward) == (3.0, 1.0)
    assert info == {"token": 1, "exit_point": 0, "depth": 4}
    rewards = []
    for _ in range(3):  # past every exit of the last token, to the final layer
        observation, reward, terminated, _, info = environment.step(CONTINUE)
        rewards.append(reward)
    assert rewards == pytest.approx([-0.6 / 3, -0.6 * 2 / 3, -0.6])
    assert terminated
    assert observation.item() == 5.0


def test_leaving_too_early_costs_beta_and_too_late_epsilon():
    tokens = np.array([[1, 7, 2, 7]])

    class One:
        exit_points = POINTS
        shape = (1, 3, 1)

        def sample(self, rng):
            return Episode(np.zeros((1, 3, 1), np.float32), tokens)

    environment = ExitEnvironment(One(), REWARD)
    environment.reset(seed=0)
    assert environment.step(EXIT)[1:3] == (pytest.approx(-0.8 / 3), True)
    environment.reset(seed=0)
    environment.step(CONTINUE)
    environment.step(CONTINUE)
    assert environment.step(EXIT)[1:3] == (-0.1, True)


def test_the_same_seed_gives_the_same_walk():
    walks = []
    for _ in range(2):
        environment = ExitEnvironment(make(count=50), REWARD)
        observation, _ = environment.reset(seed=5)
        walks.append([observation, environment.step(1)[0], environment.reset()[0]])
    np.testing.assert_array_equal(walks[0], walks[1])


@pytest.mark.parametrize("count", [1, 4])
def test_vector_equals_single_step_by_step(count):
    episodes = make()
    vector = VectorExitEnvironment(episodes, REWARD, count, seed=3)
    now = vector.reset()
    singles, scripts = [], []
    for index in range(count):
        scripts.append(Script(episodes, [vector._episode[index]]))
        singles.append(ExitEnvironment(scripts[index], REWARD))
        np.testing.assert_array_equal(singles[index].reset(seed=0)[0], now[index])
    rng = np.random.default_rng(0)
    finished = []
    sums, lengths = np.zeros(count), np.zeros(count)
    counts = np.zeros(4, int)
    for step in range(1, 201):
        played = vector._episode.copy()
        actions = rng.integers(2, size=count)
        now, rewards, dones, infos = vector.step(actions)
        assert now.dtype == rewards.dtype == np.float32
        for index, single in enumerate(singles):
            observation, reward, terminated, truncated, _ = single.step(actions[index])
            assert rewards[index] == pytest.approx(reward, abs=1e-6)
            assert (dones[index], False) == (terminated, truncated)
            sums[index] += reward
            lengths[index] += 1
            if not terminated:
                assert infos[index] == {}
            else:
                np.testing.assert_array_equal(infos[index]["terminal_observation"], observation)
                assert infos[index]["episode"]["r"] == pytest.approx(sums[index], abs=1e-5)
                assert infos[index]["episode"]["l"] == lengths[index]
                finished.append((step * count, sums[index] / lengths[index]))
                counts += np.bincount(episodes.optimal_exits()[played[index]], minlength=4)
                sums[index] = lengths[index] = 0
                scripts[index].script = [vector._episode[index]]
                observation, _ = single.reset()
            np.testing.assert_array_equal(now[index], observation)
    steps, means = vector.curve()
    assert len(steps) > 20
    assert steps.tolist() == [step for step, _ in finished]
    np.testing.assert_allclose(means, [mean for _, mean in finished], atol=1e-6)
    np.testing.assert_array_equal(vector.optimal_counts, counts)


def test_live_episodes_give_the_same_as_recorded_ones():
    episodes = make()
    both = [VectorExitEnvironment(source, REWARD, 1, seed=2) for source in (episodes, Live(episodes))]
    np.testing.assert_array_equal(*(vector.reset() for vector in both))
    rng = np.random.default_rng(1)
    for _ in range(200):
        actions = rng.integers(2, size=1)
        recorded, live = (vector.step(actions) for vector in both)
        for part in range(3):
            np.testing.assert_array_equal(recorded[part], live[part])
    np.testing.assert_array_equal(both[0].optimal_counts, both[1].optimal_counts)


def test_observations_are_standardised_on_request_and_the_source_kept():
    episodes = make()
    before = episodes.observations.copy()
    mean, scale = np.full(4, 0.5, np.float32), np.full(4, 2.0, np.float32)
    plain = VectorExitEnvironment(episodes, REWARD, 3, seed=1)
    standard = VectorExitEnvironment(episodes, REWARD, 3, (mean, scale), seed=1)
    np.testing.assert_allclose(standard.reset(), (plain.reset() - 0.5) / 2)
    for _ in range(20):
        seen, *_ = standard.step(np.ones(3, int))
        np.testing.assert_allclose(seen, (plain.step(np.ones(3, int))[0] - 0.5) / 2)
    np.testing.assert_array_equal(episodes.observations, before)


@pytest.mark.parametrize("source", [make(), Live(make())], ids=["recorded", "live"])
def test_a_restored_environment_goes_on_as_if_never_interrupted(source):
    rng = np.random.default_rng(0)
    actions = rng.integers(2, size=(80, 4))
    one = VectorExitEnvironment(source, REWARD, 4, seed=1)
    one.reset()
    for action in actions[:40]:
        one.step(action)
    other = VectorExitEnvironment(source, REWARD, 4, seed=9)
    other.restore(one.state())
    np.testing.assert_array_equal(one.observe(), other.observe())
    for action in actions[40:]:
        for left, right in zip(one.step(action)[:3], other.step(action)[:3], strict=True):
            np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(one.curve(), other.curve())
    np.testing.assert_array_equal(one.optimal_counts, other.optimal_counts)


def test_spaces():
    vector = VectorExitEnvironment(make(), REWARD, 2)
    assert vector.action_space == gymnasium.spaces.Discrete(2)
    assert vector.observation_space.shape == (4,)
    assert vector.env_is_wrapped(gymnasium.Wrapper) == [False, False]
