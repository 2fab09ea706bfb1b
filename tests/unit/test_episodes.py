from dataclasses import replace

import numpy as np
import pytest

from greencode.episodes import Episodes, optimal_exits
from greencode.errors import UserError

POINTS = (4, 6, 8)


def make(files, seed=0, tokens=3, hidden=5):
    rng = np.random.default_rng(seed)
    count = len(files)
    return Episodes(
        observations=rng.normal(size=(count, tokens, 2, hidden)).astype(np.float32),
        tokens=rng.integers(0, 3, size=(count, tokens, 3)),
        signals=rng.random((count, tokens, 2, 3), np.float32),
        exit_points=POINTS,
        observation="final_norm",
        fingerprint="abc",
        files=np.array(files, dtype=np.int64),
        contexts=np.arange(count) + 10,
    )


def test_optimal_exit_is_the_first_with_the_final_token():
    tokens = np.array([[7, 1, 7], [1, 7, 7], [7, 7, 7], [1, 2, 7]])
    assert optimal_exits(tokens).tolist() == [0, 1, 0, 2]


def test_saved_and_loaded_episodes_are_equal(tmp_path):
    episodes = make([5, 5, 9])
    path = tmp_path / "deep" / "train.safetensors"
    episodes.save(path)
    loaded = Episodes.load(path)
    for name in ("observations", "tokens", "signals", "files", "contexts"):
        before, after = getattr(episodes, name), getattr(loaded, name)
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)
    assert (loaded.exit_points, loaded.observation, loaded.fingerprint) == (POINTS, "final_norm", "abc")
    assert [file.name for file in path.parent.iterdir()] == ["train.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_view_in_another_order_is_saved_as_it_reads(tmp_path):
    whole = make([1, 2, 3, 4])
    path = tmp_path / "half.safetensors"
    half = Episodes(
        whole.observations[::2], whole.tokens[::2], whole.signals[::2], POINTS, "final_norm", "abc",
        whole.files[::2], whole.contexts[::2],
    )  # fmt: skip
    half.save(path)
    np.testing.assert_array_equal(Episodes.load(path).observations, whole.observations[::2])


def test_equal_episodes_give_equal_bytes(tmp_path):
    for name in "ab":
        make([1, 2]).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_episode_is_one_row():
    episodes = make([1, 2])
    assert len(episodes) == 2
    assert episodes.shape == (3, 2, 5)
    np.testing.assert_array_equal(episodes.episode(1).tokens, episodes.tokens[1])
    np.testing.assert_array_equal(episodes.episode(1).observations, episodes.observations[1])
    np.testing.assert_array_equal(episodes.optimal_exits()[1], optimal_exits(episodes.tokens[1]))


def test_files_are_drawn_uniformly_whatever_their_number_of_episodes():
    episodes = make([8, 3, 8, 8, 8, 8, 8, 8, 8, 8])
    drawn = episodes.draw(np.random.default_rng(0), 20_000)
    shares = np.bincount(drawn, minlength=10) / len(drawn)
    assert shares[1] == pytest.approx(0.5, abs=0.02)
    np.testing.assert_allclose(np.delete(shares, 1), 0.5 / 9, atol=0.01)


def test_the_same_seed_draws_the_same_episode():
    episodes = make(range(50))
    first, second = (episodes.sample(np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first.tokens, second.tokens)


def test_no_episodes_to_draw():
    with pytest.raises(UserError, match="no recorded episodes"):
        make([]).sample(np.random.default_rng(0))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "train.safetensors"
    make([1, 2]).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"train.safetensors is not a trajectory file"):
        Episodes.load(path)


def test_a_foreign_or_missing_file_is_named(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "weights.safetensors"
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(UserError, match="is not a trajectory file"):
        Episodes.load(path)
    save_file({"x": np.zeros(3)}, path, metadata={"greencode": '{"format": "another"}'})
    with pytest.raises(UserError, match="its format is another"):
        Episodes.load(path)
    with pytest.raises(UserError, match="does not exist"):
        Episodes.load(tmp_path / "none.safetensors")


def test_arrays_that_do_not_fit_are_refused():
    good = make([1, 2])
    with pytest.raises(ValueError, match="do not fit together"):
        replace(good, exit_points=(4, 8))
