"""What learning the agent costs: recorded episodes against the model in the loop, and PPO to its end."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.engine import NEW_TOKENS
from benchmarks.table import Row, compare, cpu_seconds
from greencode import models
from greencode.agent import PRESETS, Settings, train
from greencode.engine import Engine
from greencode.environment import ExitEnvironment, VectorExitEnvironment
from greencode.episodes import EpisodeSource
from greencode.reward import Reward
from greencode.trajectories import Draw, LiveEpisodes, record

PPO_MOST_SECONDS = 360


def seconds_per_step(source: EpisodeSource, steps: int) -> float:
    """CPU seconds per step of random actions, one environment, no learning; resets included."""
    environment = ExitEnvironment(source, Reward(1.0, 1.0, 1.0, 0.1))
    actions = np.random.default_rng(0).integers(2, size=steps).tolist()
    environment.reset(seed=0)

    def walk() -> None:
        for action in actions:
            if environment.step(action)[2]:
                environment.reset()

    return cpu_seconds(walk) / steps


def seconds_per_vector_step(source: EpisodeSource, steps: int, count: int) -> float:
    """CPU seconds per step of each of `count` environments that advance together."""
    environment = VectorExitEnvironment(source, Reward(1.0, 1.0, 1.0, 0.1), count)
    rng = np.random.default_rng(0)
    actions = [rng.integers(2, size=count) for _ in range(steps // count)]
    environment.reset()

    def walk() -> None:
        for action in actions:
            environment.step(action)

    return cpu_seconds(walk) / (len(actions) * count)


def measure(directory: Path, quick: bool) -> list[Row]:
    """All rows of one bundled model, on random texts: what it costs does not depend on what they say."""
    engine = Engine(models.load(directory))
    name, rng = directory.name, np.random.default_rng(0)
    files = rng.integers(3, engine.family.config.vocab_size, (64, 800)).tolist()
    episodes, live_steps, steps, ppo_steps = (8, 60, 2_000, 8_192) if quick else (600, 900, 50_000, 500_000)
    draw = Draw(new_tokens=NEW_TOKENS)
    start = time.perf_counter()
    recorded = record(engine, files, range(64), episodes, draw, 0, 16, "benchmark", "random")
    recording = time.perf_counter() - start

    live = seconds_per_step(LiveEpisodes(engine, files, draw), live_steps)
    one, many = seconds_per_step(recorded, steps), seconds_per_vector_step(recorded, 4 * steps, 64)
    rows = [
        Row(name, "steps/s, 1 recorded environment", "live environment", live / one, least=100),
        Row(name, "steps/s, 64 recorded environments", "live environment", live / many, least=100),
    ]
    for environments in (64, 1):
        settings = Settings(**PRESETS["large"], steps=ppo_steps, environments=environments)
        start = time.perf_counter()
        train(recorded, recorded, Reward(1.0, 1.0, 1.0, 0.1), settings)
        learning = time.perf_counter() - start
        plural = "environments" if environments > 1 else "environment"
        rows += [
            compare(
                name, f"PPO, {ppo_steps:,} steps, {environments} {plural}, wall", "6 minutes", learning,
                PPO_MOST_SECONDS, most=1,
            ),
            # The model in the loop for as many steps, learning left out, from its measured steps.
            compare(
                name, f"  and recording {episodes} episodes before", "estimate: live, without learning",
                recording + learning, live * ppo_steps,
            ),
        ]  # fmt: skip
    torch.set_num_threads(1)
    return rows
