"""The exit decision as a Gymnasium environment (paper, sections IV-A to IV-F).

The agent walks the tokens of a completion, and within a token its exit points. Action 1 leaves: the token
is done. Action 0 goes on to the next exit point; from the last one it runs the final layer, which ends the
token as well. The episode ends with the last token. The tokens are those of the full-depth model, whatever
the agent does, as in section IV-F.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from greencode.episodes import Episodes, EpisodeSource, optimal_exits
from greencode.reward import EXIT, Reward


def _spaces(source: EpisodeSource) -> tuple[spaces.Box, spaces.Discrete]:
    hidden = source.shape[2]
    return spaces.Box(-np.inf, np.inf, (hidden,), np.float32), spaces.Discrete(2)


class ExitEnvironment(gymnasium.Env):
    """One episode at a time; the definition that `VectorExitEnvironment` is tested against.

    Observation: float32 [H]. Actions: 0 continue, 1 exit. `info` has `token` (0..T-1), `exit_point`
    (0..E-1) and `depth` (layers run). After the last step the observation is the last one again, as
    nothing follows it.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, source: EpisodeSource, reward: Reward) -> None:
        self.source = source
        self.reward = reward
        self.observation_space, self.action_space = _spaces(source)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a random episode of the source, drawn with the environment's own generator."""
        super().reset(seed=seed)
        self._episode = self.source.sample(self.np_random)
        self._optimal = optimal_exits(self._episode.tokens)
        self._token = self._exit = 0
        return self._observe()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Leave or go on; the reward is Eq. 2 or Eq. 3."""
        tokens = self._episode.tokens[self._token]
        optimal = int(self._optimal[self._token])
        exits = len(tokens) - 1
        if action == EXIT:
            correct = bool(tokens[self._exit] == tokens[-1])
            reward = self.reward.exit_reward(self._exit, optimal, correct, exits)
        else:
            reward = self.reward.continue_reward(self._exit, optimal, exits)
        token_done = action == EXIT or self._exit == exits - 1
        terminated = token_done and self._token == len(self._episode.tokens) - 1
        if not terminated:
            self._token, self._exit = (self._token + 1, 0) if token_done else (self._token, self._exit + 1)
        observation, info = self._observe()
        return observation, reward, terminated, False, info

    def _observe(self) -> tuple[np.ndarray, dict[str, Any]]:
        info = {
            "token": self._token,
            "exit_point": self._exit,
            "depth": self.source.exit_points[self._exit],
        }
        return self._episode.observations[self._token, self._exit].copy(), info


class VectorExitEnvironment(VecEnv):
    """`count` episodes at once, in arrays, with auto-reset: `ExitEnvironment`, fast enough to train on.

    `infos` are empty but for environments that have just ended an episode, which have
    `terminal_observation` and `episode` (sum of rewards `r`, steps `l`).

    Args:
        source: recorded episodes are read in place; those of another source are copied as they come.
        reward: coefficients of Eq. 2 and 3.
        count: number of parallel episodes.
        standard: mean and scale, float32 [H] each; observations are given as (x - mean) / scale.
        seed: of the generator that draws episodes.

    Attributes:
        optimal_counts: int64 [E + 1], tokens of the finished episodes by optimal exit (Fig. 7).
    """

    render_mode = None

    def __init__(
        self,
        source: EpisodeSource,
        reward: Reward,
        count: int,
        standard: tuple[np.ndarray, np.ndarray] | None = None,
        seed: int = 0,
    ) -> None:
        self.source = source
        self.reward = reward
        self.standard = standard
        self._tokens, self._exits, hidden = source.shape
        self._recorded = isinstance(source, Episodes)
        tokens = (
            source.tokens if self._recorded else np.zeros((count, self._tokens, self._exits + 1), np.int64)
        )
        observations = (
            source.observations
            if self._recorded
            else np.zeros((count, self._tokens, self._exits, hidden), np.float32)
        )
        # Rows of (episode, token, exit point): the whole state of an environment is one row number.
        self._observations = observations.reshape(-1, hidden)
        self._rewards = reward.table(tokens).reshape(-1, 2)
        self._counts = self._count_optimal(tokens)
        self._rng = np.random.default_rng(seed)
        self._episode = np.zeros(count, np.int64)
        self._row = np.zeros(count, np.int64)
        self._sum = np.zeros(count)
        self._length = np.zeros(count, np.int64)
        self._steps = 0
        self._curve: list[tuple[np.ndarray, np.ndarray]] = []
        self.optimal_counts = np.zeros(self._exits + 1, np.int64)
        self._no_infos: list[dict[str, Any]] = [{} for _ in range(count)]
        super().__init__(count, *_spaces(source))

    def _count_optimal(self, tokens: np.ndarray) -> np.ndarray:
        optimal = optimal_exits(tokens)
        return np.stack([(optimal == exit).sum(axis=-1) for exit in range(self._exits + 1)], axis=-1)

    def _begin(self, which: np.ndarray) -> None:
        """Give the environments `which` a new episode each."""
        if self._recorded:
            self._episode[which] = self.source.draw(self._rng, len(which))
        else:
            rows = self._tokens * self._exits
            for index in which:
                episode = self.source.sample(self._rng)
                own = slice(index * rows, (index + 1) * rows)
                self._observations[own] = episode.observations.reshape(rows, -1)
                self._rewards[own] = self.reward.table(episode.tokens).reshape(rows, 2)
                self._counts[index] = self._count_optimal(episode.tokens)
                self._episode[index] = index
        self._row[which] = self._episode[which] * (self._tokens * self._exits)
        self._sum[which] = 0
        self._length[which] = 0

    def observe(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Observations of all environments now, float32 [count, H] (or of other rows)."""
        found = self._observations[self._row if rows is None else rows]
        if self.standard is not None:
            found -= self.standard[0]
            found /= self.standard[1]
        return found

    def reset(self) -> np.ndarray:
        """Begin a new episode everywhere."""
        self._begin(np.arange(self.num_envs))
        return self.observe()

    def step_async(self, actions: np.ndarray) -> None:
        """Take note of the actions, int [count]."""
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Observations, rewards (float32), dones and infos of the actions noted."""
        before = self._row
        rewards = self._rewards[before, self._actions]
        self._sum += rewards
        self._length += 1
        self._steps += self.num_envs
        # Leaving skips the token's remaining exit points; going on from the last one ends the token too.
        self._row = before + np.where(self._actions == EXIT, self._exits - before % self._exits, 1)
        dones = self._row == (self._episode + 1) * (self._tokens * self._exits)
        infos = self._no_infos
        if dones.any():
            which = np.flatnonzero(dones)
            infos = self._finish(which, self.observe(before[which]))
            self._begin(which)
        return self.observe(), rewards, dones, infos

    def _finish(self, which: np.ndarray, last: np.ndarray) -> list[dict[str, Any]]:
        sums, lengths = self._sum[which], self._length[which]
        self._curve.append((np.full(len(which), self._steps), sums / lengths))
        self.optimal_counts += self._counts[self._episode[which]].sum(axis=0)
        infos = list(self._no_infos)
        for place, index in enumerate(which):
            episode = {"r": float(sums[place]), "l": int(lengths[place])}
            infos[index] = {"terminal_observation": last[place], "episode": episode}
        return infos

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each finished episode: steps of all environments by its end, and its mean step reward (Fig. 6).

        Returns:
            int64 [episodes] and float64 [episodes].
        """
        if not self._curve:
            return np.zeros(0, np.int64), np.zeros(0)
        steps, rewards = zip(*self._curve, strict=True)
        return np.concatenate(steps), np.concatenate(rewards)

    def state(self) -> dict[str, np.ndarray | str]:
        """All that `restore` needs to go on from here as if never interrupted."""
        steps, rewards = self.curve()
        state = {
            "rng": json.dumps(self._rng.bit_generator.state),
            "episode": self._episode.copy(),
            "row": self._row.copy(),
            "sum": self._sum.copy(),
            "length": self._length.copy(),
            "steps": np.array(self._steps),
            "optimal_counts": self.optimal_counts.copy(),
            "curve_steps": steps,
            "curve_rewards": rewards,
        }
        if not self._recorded:
            state |= {"observations": self._observations.copy(), "rewards": self._rewards.copy()}
            state["counts"] = self._counts.copy()
        return state

    def restore(self, state: dict[str, np.ndarray | str]) -> None:
        """Go on from what `state` returned, over the same source."""
        self._rng.bit_generator.state = json.loads(state["rng"])
        self._episode, self._row = state["episode"].copy(), state["row"].copy()
        self._sum, self._length = state["sum"].copy(), state["length"].copy()
        self._steps = int(state["steps"])
        self.optimal_counts = state["optimal_counts"].copy()
        self._curve = [(state["curve_steps"], state["curve_rewards"])]
        if not self._recorded:
            self._observations[:] = state["observations"]
            self._rewards[:] = state["rewards"]
            self._counts[:] = state["counts"]

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Start the generator anew; takes effect at the next episode."""
        self._rng = np.random.default_rng(seed)
        return [seed] * self.num_envs

    def close(self) -> None:
        """Nothing to close."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute, once per environment asked for."""
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Not possible: the environments share their attributes."""
        raise NotImplementedError("the environments share their attributes")

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list:
        """Not possible: there are no separate environments."""
        raise NotImplementedError("there are no separate environments to call")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """False: there is nothing to wrap."""
        return [False] * len(list(self._get_indices(indices)))
