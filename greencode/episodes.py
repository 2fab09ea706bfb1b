"""Episodes: what the agent sees and what each exit would have predicted, recorded or live.

An episode is one completion of T new tokens. For each token it holds the observation at the E exit
points before the final layer, and the token that each of them and the final layer predicts. That is all
the reinforcement learning needs (paper, sections IV-B to IV-F), so the language model runs once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from greencode.errors import UserError
from greencode.files import atomic

FORMAT = "greencode-episodes-2"


@dataclass(frozen=True)
class Episode:
    """One completion.

    Attributes:
        observations: float32 [T, E, H], the state at each exit point before the final layer.
        tokens: int64 [T, E + 1], the token predicted at each exit point, the final layer last.
    """

    observations: np.ndarray
    tokens: np.ndarray


class EpisodeSource(Protocol):
    """Where the environments get episodes from: recorded ones, or a language model that runs now.

    Attributes:
        exit_points: depths 1..N, the final layer included: E + 1 of them.
        shape: (T, E, H), the same for every episode.
    """

    exit_points: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def sample(self, rng: np.random.Generator) -> Episode:
        """A random episode; the same state of `rng` gives the same episode."""
        ...


def optimal_exits(tokens: np.ndarray) -> np.ndarray:
    """Index of the first exit point whose token is the final layer's (l_opt of Eq. 2 and 3).

    Args:
        tokens: [..., E + 1], the final layer last.

    Returns:
        int64 [...], 0..E; E means that only the final layer gives its token.
    """
    return (tokens == tokens[..., -1:]).argmax(axis=-1)


@dataclass(frozen=True)
class Episodes:
    """Recorded episodes of one split; an `EpisodeSource`.

    Attributes:
        observations: float32 [episodes, T, E, H].
        tokens: int64 [episodes, T, E + 1].
        signals: float32 [episodes, T, E, S], how sure each exit point before the final layer was of its
            token, in the order of `greencode.signals.SIGNALS`.
        exit_points: depths 1..N, ending at N: E + 1 of them.
        observation: name of the observation's definition, e.g. `final_norm`.
        fingerprint: of the model that was recorded.
        files: int64 [episodes], id of the file that each episode completes.
        contexts: int64 [episodes], its number of context tokens.

    Raises:
        ValueError: if the shapes or types do not fit together.
    """

    observations: np.ndarray
    tokens: np.ndarray
    signals: np.ndarray
    exit_points: tuple[int, ...]
    observation: str
    fingerprint: str
    files: np.ndarray
    contexts: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "exit_points", tuple(int(point) for point in self.exit_points))
        count, tokens, exits, _ = self.observations.shape
        fits = (
            self.tokens.shape == (count, tokens, exits + 1)
            and self.signals.shape[:3] == (count, tokens, exits)
            and len(self.exit_points) == exits + 1
            and self.files.shape == self.contexts.shape == (count,)
            and self.observations.dtype == self.signals.dtype == np.float32
            and self.tokens.dtype == np.int64
        )
        if not fits:
            raise ValueError(
                f"observations {self.observations.dtype} {self.observations.shape}, "
                f"tokens {self.tokens.dtype} {self.tokens.shape} and {len(self.exit_points)} exit points "
                "do not fit together"
            )
        # Episodes sorted by file, so that a file and one of its episodes can be drawn by arithmetic.
        order = np.argsort(self.files, kind="stable")
        _, starts, counts = np.unique(self.files[order], return_index=True, return_counts=True)
        object.__setattr__(self, "_by_file", (order, starts, counts))

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, E, H)."""
        return self.observations.shape[1:]

    def episode(self, index: int) -> Episode:
        """Episode number `index`, without copying."""
        return Episode(self.observations[index], self.tokens[index])

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` episode numbers: a file uniformly (section IV-F), then one of its episodes uniformly.

        Raises:
            UserError: if there are no episodes.
        """
        if not len(self):
            raise UserError(
                "There are no recorded episodes to learn from; record trajectories of more files."
            )
        order, starts, counts = self._by_file
        files = rng.integers(len(starts), size=count)
        return order[starts[files] + rng.integers(counts[files])]

    def sample(self, rng: np.random.Generator) -> Episode:
        """A random episode, drawn as `draw` does."""
        return self.episode(int(self.draw(rng, 1)[0]))

    def optimal_exits(self) -> np.ndarray:
        """int64 [episodes, T]: index into `exit_points` of each token's optimal exit."""
        return optimal_exits(self.tokens)

    def save(self, path: str | Path) -> None:
        """Write as safetensors, whole or not at all; equal episodes give equal bytes."""
        head = {
            "format": FORMAT,
            "exit_points": self.exit_points,
            "observation": self.observation,
            "fingerprint": self.fingerprint,
        }
        tensors = {
            "observations": self.observations,
            "tokens": self.tokens,
            "signals": self.signals,
            "files": self.files.astype(np.int64),
            "contexts": self.contexts.astype(np.int64),
        }
        write_safetensors(path, head, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Episodes:
        """Read what `save` wrote.

        Raises:
            UserError: if the file is missing, truncated, or something else.
        """
        head, tensors = read_safetensors(path, FORMAT, "a trajectory file", "record the trajectories again")
        try:
            return cls(
                exit_points=tuple(head["exit_points"]),
                observation=head["observation"],
                fingerprint=head["fingerprint"],
                **tensors,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not a trajectory file ({error}); delete it and record the trajectories again."
            ) from None


def check_episodes(episodes: EpisodeSource, validation: Episodes) -> None:
    """Faults that would spoil a training.

    Raises:
        UserError: episodes that are none, not finite, or not of one model.
    """
    for name, split in (("train", episodes), ("validation", validation)):
        if isinstance(split, Episodes):
            if not len(split):
                raise UserError(
                    f"There are no episodes in the {name} split; record trajectories of more files."
                )
            if not np.isfinite(split.observations.sum(dtype=np.float64)):
                raise UserError(
                    f"The {name} trajectories contain numbers that are not finite; record them again."
                )
    alike = episodes.exit_points == validation.exit_points and episodes.shape[1:] == validation.shape[1:]
    if isinstance(episodes, Episodes):
        alike = alike and (episodes.fingerprint, episodes.observation) == (
            validation.fingerprint, validation.observation,
        )  # fmt: skip
    if not alike:
        raise UserError(
            "The train and validation trajectories are of different models or exit points; record both "
            "with the same model."
        )
    if not episodes.shape[1]:
        raise UserError(
            "The model has no exit point before its final layer, so there is nothing to learn; add some."
        )


def write_safetensors(path: str | Path, head: dict, tensors: dict[str, np.ndarray]) -> None:
    """Write arrays and a header for `read_safetensors`, whole or not at all, the same bytes every time."""
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    with atomic(path) as temporary:
        # One metadata entry: safetensors writes several in no fixed order.
        save_file(tensors, temporary, metadata={"greencode": json.dumps(head, sort_keys=True)})


def read_safetensors(
    path: str | Path, format: str, kind: str, remedy: str
) -> tuple[dict, dict[str, np.ndarray]]:
    """Header and arrays of a file whose metadata entry `greencode` is JSON with this `format`.

    Raises:
        UserError: saying that the file is missing, or that it is not `kind` and what to do (`remedy`).
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; {remedy}.")
    try:
        with safe_open(path, framework="numpy") as stream:
            head = json.loads((stream.metadata() or {})["greencode"])
            if head["format"] != format:
                raise ValueError(f"its format is {head['format']}")
            return head, {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except KeyError:
        raise UserError(
            f"{path} is not {kind} (it was written by something else); delete it and {remedy}."
        ) from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not {kind} ({error}); delete it and {remedy}.") from None
