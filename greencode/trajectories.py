"""Recording what every exit would have answered, so that the agent learns without the model in the loop.

An episode is one completion by the fine-tuned model at full depth: its own text, seen from every exit
point (paper, section IV-F). Recorded in batches, or one at a time by the very decoding that serves
(`LiveEpisodes`); both give the same observations and tokens. Once an agent leaves with a wrong token its
text is not the full model's any more, so a share of the episodes can be recorded `Along` early-exit text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from greencode.corpus import read_split
from greencode.engine import OBSERVATION, Engine, ExitView
from greencode.episodes import Episode, Episodes
from greencode.errors import UserError
from greencode.models import fingerprint as fingerprint_of
from greencode.progress import progress
from greencode.signals import SIGNALS
from greencode.tokenise import encode, load_tokenizer


@dataclass(frozen=True)
class Draw:
    """How contexts are drawn (section IV-F).

    Attributes:
        low, high: the context's share of its file, uniform between them.
        max_context: at most this many tokens. Of a longer file only the first `max_context / high` count,
            so that long files too give contexts of every length; the paper does not say.
        min_context: files that are too short for it are left out.
        new_tokens: T, tokens per episode.
    """

    low: float = 0.2
    high: float = 0.6
    max_context: int = 512
    min_context: int = 20
    new_tokens: int = 15

    def visible(self, tokens: Sequence[int]) -> int:
        """Number of a file's tokens that count; 0 if the file is too short for an episode."""
        length = min(len(tokens), int(self.max_context / self.high))
        return length if int(length * self.low) >= self.min_context else 0

    def context(self, tokens: Sequence[int], rng: np.random.Generator) -> list[int]:
        """A random context of a file that is long enough."""
        return list(tokens[: int(self.visible(tokens) * rng.uniform(self.low, self.high))])


class Writer(Protocol):
    """What `Along` needs of an agent; here, so that recordings do not hang on the code of all policies."""

    def probability(self, observation: np.ndarray) -> np.ndarray:
        """P(exit) of observations [B, E, H], [B, E]."""
        ...


@dataclass(frozen=True)
class Along:
    """Early-exit text to record episodes along, as DAgger does (Ross et al. 2011).

    What is right stays the full model's answer, after the text so far: the agent learns to agree with it
    also where an agent has led the text elsewhere.

    Attributes:
        agent: writes the text, greedily and with an exact cache; a `policies.ExitPolicy` of the same model.
        threshold: it leaves where P(exit) is above.
        share: of the episodes; the others are those that are recorded without.
    """

    agent: Writer
    threshold: float
    share: float = 0.5

    def leaves(self, observations: np.ndarray, follows: np.ndarray) -> np.ndarray:
        """Of observations [B, E, H]: whether the agent leaves, bool [B, E].

        Args:
            follows: bool [B], the completions that the agent writes; the others never leave.
        """
        return (self.agent.probability(observations) > self.threshold) & follows[:, None]


def eligible(files: Sequence[Sequence[int]], draw: Draw, split: str) -> list[int]:
    """Indices of the files that are long enough; none is a `UserError`."""
    kept = [index for index, file in enumerate(files) if draw.visible(file)]
    if not kept:
        raise UserError(
            f"None of the {len(files)} {split} files is long enough for a context of "
            f"{draw.min_context} tokens; use longer files or a lower min_context."
        )
    return kept


def record(
    engine: Engine,
    files: Sequence[Sequence[int]],
    ids: Sequence[int],
    episodes: int,
    draw: Draw,
    seed: int,
    batch: int,
    fingerprint: str,
    split: str,
    along: Along | None = None,
) -> Episodes:
    """Record `episodes` completions of files drawn uniformly, each from a context drawn by `draw`.

    The same seed gives the same contexts, whatever text is recorded along.

    Args:
        files: model tokens of each file.
        ids: the files' ids.
        batch: completions made at once; of similar length, to pad little.
        split: for messages.
        along: whose text a share of the completions are; the full model's if None.
    """
    rng = np.random.default_rng(seed)
    kept = eligible(files, draw, split)
    chosen = [kept[i] for i in rng.integers(len(kept), size=episodes)]
    contexts = [draw.context(files[index], rng) for index in chosen]
    exits = len(engine.exit_points) - 1
    shape = (episodes, draw.new_tokens, exits, engine.family.hidden_size)
    observations = np.empty(shape, np.float32)
    tokens = np.empty((episodes, draw.new_tokens, exits + 1), np.int64)
    signals = np.empty((*shape[:3], len(SIGNALS)), np.float32)
    # Files and contexts are drawn independently, so the first episodes are as good a share as any.
    follows = np.arange(episodes) < (0 if along is None else round(along.share * episodes))
    by_length = sorted(range(episodes), key=lambda i: len(contexts[i]))
    for start in progress(range(0, episodes, batch), f"record {split}"):
        rows = by_length[start : start + batch]
        leaves = along and partial(along.leaves, follows=follows[rows])
        seen = engine.trace([contexts[i] for i in rows], draw.new_tokens, leaves)
        observations[rows], tokens[rows], signals[rows] = seen
    return Episodes(
        observations=observations,
        tokens=tokens,
        signals=signals,
        exit_points=engine.exit_points,
        observation=OBSERVATION,
        fingerprint=fingerprint,
        files=np.array([ids[index] for index in chosen], np.int64),
        contexts=np.array([len(context) for context in contexts], np.int64),
    )


def record_split(
    engine: Engine,
    directory: str | Path,
    path: str | Path,
    split: str,
    settings: Mapping[str, Any],
    along: Along | None = None,
) -> Episodes:
    """`record` for a split of a dataset, as the study's settings have it.

    Args:
        directory: of the engine's model and its tokenizer.
        path: the split's file.
        split: `train` or `validation`; the seed is one more for the latter.
        settings: `trajectories` of the configuration, and `seed`.
    """
    records = read_split(path)
    return record(
        engine,
        list(encode(load_tokenizer(directory), (one.code for one in records))),
        [one.id for one in records],
        settings[f"{split}_episodes"],
        Draw(**{field.name: settings[field.name] for field in fields(Draw)}),
        settings["seed"] + ("train", "validation").index(split),
        settings["batch_size"],
        fingerprint_of(directory),
        split,
        along,
    )


@dataclass
class _Witness:
    """A policy that never leaves and keeps what each exit point shows."""

    observations: list[np.ndarray] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def leaves(self, view: ExitView) -> bool:
        self.observations.append(view.to_host(view.observation))
        self.tokens.append(int(view.logits.argmax()))
        return False


class LiveEpisodes:
    """Episodes with the model in the loop; an `EpisodeSource`. Slow, and the measure of the recorded ones."""

    def __init__(self, engine: Engine, files: Sequence[Sequence[int]], draw: Draw):
        self.engine = engine
        self.files = files
        self.draw = draw
        self.kept = eligible(files, draw, "training")
        self.exit_points = engine.exit_points

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, E, H)."""
        return self.draw.new_tokens, len(self.exit_points) - 1, self.engine.family.hidden_size

    def episode(self, context: Sequence[int]) -> Episode:
        """The episode that this context gives, through `Engine.stream`."""
        witness = _Witness()
        done = self.engine.complete(context, self.draw.new_tokens, witness)
        count, exits, hidden = self.shape
        return Episode(
            observations=np.stack(witness.observations).reshape(count, exits, hidden),
            tokens=np.column_stack(
                [np.array(witness.tokens, np.int64).reshape(count, exits), np.array(done.tokens, np.int64)]
            ),
        )

    def sample(self, rng: np.random.Generator) -> Episode:
        """A random file, a random context, and the model's completion of it."""
        file = self.files[self.kept[rng.integers(len(self.kept))]]
        return self.episode(self.draw.context(file, rng))
