"""Training the exit agent with PPO, and the exported policy that decides at inference (paper, section V).

The rule is: leave if P(exit) > T. It is never the larger of two actions, so that every threshold counts.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from greencode.episodes import Episodes, EpisodeSource, check_episodes
from greencode.errors import UserError
from greencode.files import atomic
from greencode.policies import ExitPolicy
from greencode.results import versions
from greencode.reward import Reward
from greencode.rules import in_chunks, replay

if TYPE_CHECKING:
    from stable_baselines3 import PPO

# The two settings that Table III can be read as; the first is the one of the authors' example.
PRESETS: dict[str, dict[str, Any]] = {
    "large": {"batch_size": 512, "buffer": 4096, "epochs": 6, "learning_rate": 5e-5, "hidden": (64, 64)},
    "small": {"batch_size": 32, "buffer": 256, "epochs": 2, "learning_rate": 1e-4, "hidden": (32, 32)},
}


@dataclass(frozen=True)
class Settings:
    """Settings of PPO (Table III); what is not here is the default of Stable-Baselines3.

    Attributes:
        batch_size: steps per gradient update.
        buffer: steps collected, over all environments, before the updates.
        epochs: passes through the buffer.
        learning_rate: at the start; falls linearly to 0.
        hidden: units of each hidden layer (tanh), of the actor and of the critic.
        discount: of future rewards.
        entropy: weight of the entropy bonus.
        steps: training steps, over all environments; rounded up to whole buffers.
        environments: parallel episodes; the paper has 1, more are faster.
        normalise: standardise observations by the training episodes. The exported policy contains it.
        seed: of everything random.
        threads: CPU threads of torch.

    Raises:
        UserError: if a value is out of range or values do not divide as they must.
    """

    batch_size: int = 512
    buffer: int = 4096
    epochs: int = 6
    learning_rate: float = 5e-5
    hidden: tuple[int, ...] = (64, 64)
    discount: float = 0.99
    entropy: float = 0.0
    steps: int = 500_000
    environments: int = 1
    normalise: bool = False
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for name in ("batch_size", "buffer", "epochs", "steps", "environments", "threads"):
            _check_setting(name, getattr(self, name), int, 1, math.inf)
        for units in self.hidden:
            _check_setting("hidden", units, int, 1, math.inf)
        _check_setting("seed", self.seed, int, 0, 2**32 - 1)
        _check_setting("learning_rate", self.learning_rate, int | float, 0, math.inf)
        _check_setting("discount", self.discount, int | float, 0, 1)
        _check_setting("entropy", self.entropy, int | float, 0, math.inf)
        if not self.hidden:
            raise UserError("Agent setting hidden is empty; give the units of at least one hidden layer.")
        for name in ("batch_size", "environments"):
            if self.buffer % getattr(self, name):
                raise UserError(
                    f"Agent setting buffer ({self.buffer}) is not a multiple of {name} "
                    f"({getattr(self, name)}); change one of them."
                )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Settings:
        """A preset of Table III, `large` or `small`, with some settings changed.

        Raises:
            UserError: if there is no such preset or setting, or a value is out of range.
        """
        if name not in PRESETS:
            raise UserError(f"There is no agent preset {name!r}; choose one of {', '.join(PRESETS)}.")
        known = [field.name for field in fields(cls)]
        for key in overrides:
            if key not in known:
                raise UserError(f"There is no agent setting {key!r}; the settings are {', '.join(known)}.")
        return cls(**(PRESETS[name] | overrides))


def _check_setting(name: str, value: Any, kind: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        whole = "a whole number" if kind is int else "a number"
        span = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise UserError(f"Agent setting {name} is {value!r}; set it to {whole} {span}.")


class ValidationRow(NamedTuple):
    """Offline result of one threshold: mean layers run, and share of tokens equal to the full model's."""

    threshold: float
    mean_depth: float
    agreement: float


def validation_table(
    episodes: Episodes, policy: ExitPolicy, thresholds: list[float] | tuple[float, ...]
) -> list[ValidationRow]:
    """Mean depth and agreement with the full model at each threshold, on recorded episodes."""
    probabilities = in_chunks(policy.probability, episodes.observations)
    rows = []
    for threshold in thresholds:
        depths, agreement = replay(episodes, probabilities, threshold)
        rows.append(ValidationRow(float(threshold), float(depths.mean()), float(agreement.mean())))
    return rows


@dataclass(frozen=True)
class Trained:
    """A trained agent and how it learned.

    Attributes:
        policy: the exported network.
        curve_steps: int64 [episodes], training steps made by the end of each training episode.
        curve_rewards: float64 [episodes], mean reward per step of each training episode (Fig. 6).
        optimal_counts: int64 [E + 1], tokens met in training by optimal exit (Fig. 7).
        seconds: wall time of the training, since it was last resumed.
        steps_per_second: training steps per second of that time.
    """

    policy: ExitPolicy
    curve_steps: np.ndarray
    curve_rewards: np.ndarray
    optimal_counts: np.ndarray
    seconds: float
    steps_per_second: float

    def record(self) -> dict[str, Any]:
        """The learning curve as JSON values; `optimal_exits` is keyed by depth, 1..N."""
        counts = zip(self.policy.exit_points, self.optimal_counts, strict=True)
        return {
            "episode_steps": self.curve_steps.tolist(),
            "episode_reward": [round(reward, 4) for reward in self.curve_rewards.tolist()],
            "optimal_exits": {str(depth): int(count) for depth, count in counts},
            "seconds": self.seconds,
            "steps_per_second": self.steps_per_second,
        }


def train(
    episodes: EpisodeSource,
    validation: Episodes,
    reward: Reward,
    settings: Settings,
    checkpoint_dir: str | Path | None = None,
) -> Trained:
    """Train an exit policy with PPO (sections IV-F and V) and export it.

    The same arguments give the same policy, bit for bit, on the same machine and packages with the same
    number of threads. With `checkpoint_dir` the state is saved about every tenth of the steps, and a
    later call with the same arguments goes on from there to the same policy. A checkpoint of other
    arguments, or a broken one, is not used; the episodes themselves are not compared beyond their model
    and shape, so the directory must change with them. The file stays when training is done: the caller
    removes it with the results.

    Torch's and numpy's global generators are seeded, torch's number of threads is set for the duration.

    Args:
        episodes: of the training split, recorded or live.
        validation: recorded episodes of another split, of the same model; the exported network is
            compared with the trained one on them.
        reward: coefficients of Eq. 2 and 3.
        settings: of PPO.
        checkpoint_dir: where to keep `checkpoint.pt`, or None.

    Raises:
        UserError: if the episodes are none, not finite, or not of one model, or `normalise` is asked of a
            live source.
        RuntimeError: if the exported network does not decide as the trained one.
    """
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.utils import LinearSchedule

    from greencode.environment import VectorExitEnvironment

    check_episodes(episodes, validation)
    standard = _standard(episodes, settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        environment = VectorExitEnvironment(episodes, reward, settings.environments, standard, settings.seed)
        hidden = list(settings.hidden)
        model = PPO(
            "MlpPolicy",
            environment,
            n_steps=settings.buffer // settings.environments,
            batch_size=settings.batch_size,
            n_epochs=settings.epochs,
            learning_rate=LinearSchedule(settings.learning_rate, 0.0, 1.0),
            gamma=settings.discount,
            ent_coef=settings.entropy,
            policy_kwargs={"net_arch": {"pi": hidden, "vf": hidden}},
            seed=settings.seed,
            device="cpu",
        )
        # Its own logger makes a folder in the system's temporary one, and leaves it there.
        model.set_logger(Logger(folder=None, output_formats=[]))
        path = None if checkpoint_dir is None else Path(checkpoint_dir) / "checkpoint.pt"
        key = json.dumps(
            [asdict(settings), asdict(reward), validation.fingerprint, validation.observation,
             episodes.exit_points, episodes.shape, versions()],
            sort_keys=True,
        )  # fmt: skip
        done = 0 if path is None else _resume(path, key, model)
        started = time.perf_counter()
        if done < settings.steps:
            model.learn(
                settings.steps - done,
                callback=_callback(path, key, settings.steps),
                log_interval=None,
                reset_num_timesteps=not done,
            )
        seconds = time.perf_counter() - started
        policy = export(model, validation, reward, settings, standard)
        # Folding the standardisation into the weights rounds a little more.
        tolerance = 1e-5 if standard is None else 1e-4
        if not actions_agree(policy, model, validation.observations, standard, tolerance):
            raise RuntimeError("the exported policy does not decide as the trained one")
    finally:
        torch.set_num_threads(threads)
    speed = (model.num_timesteps - done) / seconds
    print(f"{model.num_timesteps - done} steps in {seconds:.0f} s, {speed:.0f} per second", file=sys.stderr)
    steps, rewards = environment.curve()
    return Trained(policy, steps, rewards, environment.optimal_counts, seconds, speed)


def export(
    model: PPO,
    episodes: Episodes,
    reward: Reward,
    settings: Settings,
    standard: tuple[np.ndarray, np.ndarray] | None = None,
) -> ExitPolicy:
    """The actor of a model as an `ExitPolicy`, with the standardisation (mean, scale) folded in.

    Args:
        episodes: of the model that it is for.
    """
    from torch import nn

    linear = [part for part in model.policy.mlp_extractor.policy_net if isinstance(part, nn.Linear)]
    layers = [
        (part.weight.detach().numpy().copy(), part.bias.detach().numpy().copy())
        for part in (*linear, model.policy.action_net)
    ]
    if standard is not None:
        mean, scale = (part.astype(np.float64) for part in standard)
        weight, bias = layers[0]
        weight = weight / scale
        layers[0] = (weight, bias - weight @ mean)
    training = {"reward": asdict(reward), "settings": asdict(settings), "versions": versions()}
    return ExitPolicy(
        layers,
        episodes.exit_points,
        episodes.observation,
        episodes.fingerprint,
        json.loads(json.dumps(training)),
    )


def actions_agree(
    policy: ExitPolicy,
    model: PPO,
    observations: np.ndarray,
    standard: tuple[np.ndarray, np.ndarray] | None = None,
    tolerance: float = 1e-5,
) -> bool:
    """Whether the exported network decides as the model does, on these observations.

    P(exit) must be equal within `tolerance`, and the model's own choice (its `predict`) be the larger of
    the two probabilities wherever they differ by more than that.

    Args:
        observations: [episodes, ..., H].
        standard: mean and scale that the model's observations were standardised with.
    """
    import torch

    for start in range(0, len(observations), 64):
        raw = observations[start : start + 64].reshape(-1, observations.shape[-1])
        seen = raw if standard is None else (raw - standard[0]) / standard[1]
        with torch.no_grad():
            wanted = model.policy.get_distribution(torch.as_tensor(seen)).distribution.probs[:, 1].numpy()
        found = policy.probability(raw)
        chosen, _ = model.predict(seen, deterministic=True)
        clear = np.abs(found - 0.5) > tolerance
        # Written so that a NaN fails.
        if not (np.abs(found - wanted) <= tolerance).all() or ((found > 0.5) != chosen)[clear].any():
            return False
    return True


def _standard(episodes: EpisodeSource, settings: Settings) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and standard deviation of the observations, float32 [H] each; None if not asked for."""
    if not settings.normalise:
        return None
    if not isinstance(episodes, Episodes):
        raise UserError(
            "Agent setting normalise needs recorded trajectories; record them or set it to false."
        )
    hidden = episodes.shape[2]
    count = episodes.observations.size // hidden
    mean = episodes.observations.reshape(-1, hidden).mean(axis=0, dtype=np.float64)
    square = np.zeros(hidden)
    for episode in episodes.observations:
        square += ((episode.reshape(-1, hidden) - mean) ** 2).sum(axis=0)
    scale = np.sqrt(square / count)
    # A state that never changes tells nothing; dividing by 0 would.
    scale[scale < 1e-6] = 1.0
    return mean.astype(np.float32), scale.astype(np.float32)


def _callback(path: Path | None, key: str, steps: int) -> Any:
    """Progress bar on a terminal, and checkpoints at the start of a rollout."""
    from stable_baselines3.common.callbacks import BaseCallback
    from tqdm import tqdm

    class Callback(BaseCallback):
        def _on_training_start(self) -> None:
            self.bar = tqdm(
                total=steps, initial=self.num_timesteps, unit="step", disable=not sys.stderr.isatty()
            )
            self.due = self.num_timesteps + steps / 10

        def _on_rollout_start(self) -> None:
            self.bar.update(self.num_timesteps - self.bar.n)
            if path is not None and self.num_timesteps >= self.due:
                self.due += steps / 10
                _save_checkpoint(path, key, self.model)

        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            self.bar.update(self.num_timesteps - self.bar.n)
            self.bar.close()

    return Callback()


def _save_checkpoint(path: Path, key: str, model: PPO) -> None:
    import torch

    legacy = np.random.get_state(legacy=False)
    legacy["state"]["key"] = legacy["state"]["key"].tolist()
    state = {
        "key": key,
        "steps": model.num_timesteps,
        "policy": model.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict(),
        "episode_starts": torch.as_tensor(model._last_episode_starts),
        "environment": {
            name: value if isinstance(value, str) else torch.as_tensor(value)
            for name, value in model.env.state().items()
        },
        "numpy_rng": json.dumps(legacy),
        "torch_rng": torch.get_rng_state(),
    }
    with atomic(path) as temporary:
        torch.save(state, temporary)


def _resume(path: Path, key: str, model: PPO) -> int:
    """Put the model where its checkpoint was, if there is one; steps already done."""
    import torch

    if not path.is_file():
        return 0
    try:
        state = torch.load(path, weights_only=True)
        if state["key"] != key:
            print(f"{path} is of other settings; training from the start", file=sys.stderr)
            return 0
    except Exception as error:  # torch raises many kinds; starting again mends all of them
        print(f"{path} cannot be read ({error}); training from the start", file=sys.stderr)
        return 0
    model.policy.load_state_dict(state["policy"])
    model.policy.optimizer.load_state_dict(state["optimizer"])
    model.env.restore(
        {
            name: value if isinstance(value, str) else value.numpy()
            for name, value in state["environment"].items()
        }
    )
    model.num_timesteps = state["steps"]
    model._last_obs = model.env.observe()
    model._last_episode_starts = state["episode_starts"].numpy()
    legacy = json.loads(state["numpy_rng"])
    legacy["state"]["key"] = np.array(legacy["state"]["key"], np.uint32)
    np.random.set_state(legacy)
    torch.set_rng_state(state["torch_rng"])
    return model.num_timesteps
