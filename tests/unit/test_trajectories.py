import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from greencode.engine import OBSERVATION, Engine, as_policy
from greencode.environment import ExitEnvironment
from greencode.episodes import Episode
from greencode.errors import UserError
from greencode.policies import AgentExit
from greencode.reward import Reward
from greencode.signals import SIGNALS
from greencode.trajectories import Along, Draw, LiveEpisodes, eligible, record

POINTS = (1, 2, 4, 6)
DRAW = Draw(max_context=20, min_context=2, new_tokens=5)
REWARD = Reward(alpha=0.5, beta=0.8, gamma=0.6, epsilon=0.1)


def make_files(count: int = 6, seed: int = 0) -> list[list[int]]:
    """Files of 15 to 60 tokens, the first one too short for an episode."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(15, 61, size=count)
    return [[1, 2, 3], *(rng.integers(0, 61, size=length).tolist() for length in lengths)]


def record_some(engine: Engine, files=None, **changes):
    files = make_files() if files is None else files
    settings = {"episodes": 9, "draw": DRAW, "seed": 3, "batch": 4, "fingerprint": "abc", "split": "train"}
    return record(engine, files, [10 + i for i in range(len(files))], **settings | changes)


@pytest.fixture
def engine(tiny):
    return Engine(tiny("qwen2"), POINTS)


class Only:
    """One episode, again and again."""

    def __init__(self, episode: Episode):
        self.episode = episode
        self.exit_points = POINTS
        count, exits, hidden = episode.observations.shape
        self.shape = (count, exits, hidden)

    def sample(self, rng):
        return self.episode


def walk(source, seed: int) -> list[tuple]:
    """What an environment says to random actions."""
    environment = ExitEnvironment(source, REWARD)
    rng = np.random.default_rng(seed)
    environment.reset(seed=0)
    said, ended = [], False
    while not ended:
        _, reward, ended, _, info = environment.step(int(rng.integers(2)))
        said.append((reward, ended, info))
    return said


def test_batches_are_the_episodes_one_at_a_time(model):
    # Of different lengths, so that all but one are padded, and past the sliding windows.
    live = LiveEpisodes(Engine(model, POINTS), make_files(), DRAW)
    rng = np.random.default_rng(0)
    contexts = [rng.integers(0, 61, size=size).tolist() for size in (1, 3, 8, 17, 17)]
    observations, tokens, _ = live.engine.trace(contexts, DRAW.new_tokens)
    assert observations.shape == (5, *live.shape)
    for row, context in enumerate(contexts):
        episode = live.episode(context)
        np.testing.assert_array_equal(tokens[row], episode.tokens)
        np.testing.assert_allclose(observations[row], episode.observations, atol=1e-4)
        assert tokens[row, :, -1].tolist() == live.engine.complete(context, 5, kv="full").tokens


def test_recording(engine):
    files = make_files()
    episodes = record_some(engine, files)
    assert episodes.shape == (5, 3, 32)
    assert len(episodes) == 9
    assert (episodes.exit_points, episodes.observation) == (POINTS, OBSERVATION)
    assert 10 not in episodes.files  # too short
    live = LiveEpisodes(engine, files, DRAW)
    for index in range(9):
        context = files[episodes.files[index] - 10][: episodes.contexts[index]]
        np.testing.assert_array_equal(episodes.tokens[index], live.episode(context).tokens)


def test_recording_repeats_with_its_seed(engine):
    first, again, batched, other = (
        record_some(engine, **changes) for changes in ({}, {}, {"batch": 9}, {"seed": 4})
    )
    for name in ("observations", "tokens", "signals", "files", "contexts"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    np.testing.assert_array_equal(first.tokens, batched.tokens)
    np.testing.assert_allclose(first.observations, batched.observations, atol=1e-4)
    assert (first.contexts != other.contexts).any()


def test_recorded_and_live_environments_are_equal(engine):
    files = make_files()
    episodes = record_some(engine, files)
    live = LiveEpisodes(engine, files, DRAW)
    for index in range(len(episodes)):
        context = files[episodes.files[index] - 10][: episodes.contexts[index]]
        recorded = walk(Only(episodes.episode(index)), seed=index)
        assert recorded == walk(Only(live.episode(context)), seed=index)


@pytest.mark.filterwarnings("ignore:.*infinity.*")
def test_live_environment_passes_the_checkers(engine):
    live = LiveEpisodes(engine, make_files(), DRAW)
    assert live.shape == (5, 3, 32)
    check_env(ExitEnvironment(live, REWARD), skip_render_check=True)
    check_env_sb3(ExitEnvironment(live, REWARD))


def test_live_episodes_repeat_with_their_seed(engine):
    live = LiveEpisodes(engine, make_files(), DRAW)
    first, again, other = (live.sample(np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.observations, again.observations)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.observations.shape == other.observations.shape
    assert (first.observations != other.observations).any()


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    length=st.integers(1, 3000),
    shares=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    bounds=st.tuples(st.integers(1, 600), st.integers(1, 600)).map(sorted),
    seed=st.integers(0, 2**32),
)
def test_contexts_stay_within_bounds(length, shares, bounds, seed):
    draw = Draw(low=shares[0], high=shares[1], min_context=bounds[0], max_context=bounds[1])
    tokens = range(length)
    visible = draw.visible(tokens)
    assert visible <= length
    if visible:
        context = draw.context(tokens, np.random.default_rng(seed))
        assert draw.min_context <= len(context) <= draw.max_context
        assert context == list(range(len(context)))
        assert int(visible * draw.low) <= len(context) <= visible * draw.high


def test_contexts_vary_uniformly():
    rng = np.random.default_rng(0)
    shares = [len(Draw().context(range(800), rng)) / 800 for _ in range(2000)]
    assert np.histogram(shares, 4, (0.2, 0.6))[0].min() > 420
    # A file longer than the longest context shows gives contexts of every length, too.
    sizes = [len(Draw().context(range(9000), rng)) for _ in range(500)]
    assert min(sizes) < 180
    assert 500 < max(sizes) <= 512


def test_too_short_files_are_refused(engine):
    assert eligible(make_files(), DRAW, "train") == [1, 2, 3, 4, 5, 6]
    for attempt in (
        lambda: record_some(engine, [[1] * 9, []]),
        lambda: LiveEpisodes(engine, [[1] * 9, []], DRAW),
    ):
        with pytest.raises(UserError, match="None of the 2 train"):
            attempt()


# --- along early-exit text ---------------------------------------------------------------------------


class Watched(AgentExit):
    """An agent that keeps what it saw."""

    def leaves(self, view):
        self.seen.append((view.depth, view.to_host(view.observation)))
        return super().leaves(view)


def test_along_an_agent_that_never_leaves_all_is_as_without(model, make_agent, tmp_path):
    engine = Engine(model, POINTS)
    never = Along(make_agent(32, POINTS), 1.0, 1.0)
    for name, along in (("plain", None), ("along", never)):
        record_some(engine, along=along).save(tmp_path / name)
    assert (tmp_path / "along").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.6])
def test_along_an_agent_its_own_text_is_answered_by_the_full_model(model, make_agent, threshold):
    engine, agent, files = Engine(model, POINTS), make_agent(32, POINTS, seed=5), make_files()
    episodes = record_some(engine, files, along=Along(agent, threshold, 1.0))
    exits = []
    for index in range(len(episodes)):
        context = files[episodes.files[index] - 10][: episodes.contexts[index]]
        watched = Watched(agent, threshold)
        watched.seen = []
        done = engine.complete(context, DRAW.new_tokens, watched, "deferred")
        exits += done.depths
        seen = iter(watched.seen)
        for place, (token, depth) in enumerate(zip(done.tokens, done.depths, strict=True)):
            # The agent's token is that of the exit it left at, and what it saw on the way was recorded.
            assert episodes.tokens[index, place, POINTS.index(depth)] == token
            for exit, point in enumerate(POINTS[:-1]):
                if point <= depth:
                    at, state = next(seen)
                    assert at == point
                    np.testing.assert_allclose(episodes.observations[index, place, exit], state, atol=1e-4)
            # What is right is the model's own next token after this text, by a plain forward pass.
            prefix = torch.tensor([context + done.tokens[:place]])
            with torch.no_grad():
                assert episodes.tokens[index, place, -1] == model(prefix).logits[0, -1].argmax()
    assert set(exits) == {POINTS[0]} if threshold == 0 else len(set(exits)) > 1


def test_a_share_of_the_episodes_is_along_the_agent_and_the_rest_as_without(engine, make_agent):
    plain = record_some(engine)
    mixed = record_some(engine, along=Along(make_agent(32, POINTS), 0.0, 1 / 3))
    np.testing.assert_array_equal(mixed.files, plain.files)
    np.testing.assert_array_equal(mixed.contexts, plain.contexts)
    np.testing.assert_array_equal(mixed.tokens[:, 0], plain.tokens[:, 0])  # the same contexts
    same = (mixed.observations == plain.observations).all(axis=(1, 2, 3))
    assert same.tolist() == [False] * 3 + [True] * 6


def test_recorded_signals_are_those_of_a_running_completion(model):
    engine = Engine(model, POINTS)
    seen = []

    def look(view):
        seen.append([float(of(view.logits)) for of in SIGNALS.values()])
        return False

    context = [5, 3, 9, 7, 1]
    engine.complete(context, 4, as_policy(look))
    _, _, recorded = engine.trace([context, context[:2]], 4)
    np.testing.assert_allclose(recorded[0].reshape(-1, len(SIGNALS)), seen, atol=1e-4)
