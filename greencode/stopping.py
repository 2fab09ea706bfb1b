"""Exit rules trained by supervision on recorded episodes.

Given a token, when to leave is an optimal-stopping problem over its few exit points, and a recorded episode
shows the outcome of every choice. So what PPO has to find by trial can be computed: backward induction over
the exit points gives what leaving would have gained over going on, and a network per exit point learns to
foretell that gain from the observation alone (fitted value iteration). The price of a layer decides what a
gain is; a threshold on the foretold gain then trades quality against depth, as with the agent's P(exit).
With a price of 0 and no hidden layer the same code is the usual classifier: will this exit's token be the
full model's?
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from greencode.episodes import Episodes, check_episodes
from greencode.policies import ExitPolicy
from greencode.results import versions


@dataclass(frozen=True)
class Settings:
    """How a rule is trained.

    Attributes:
        hidden: units of each hidden layer (tanh); none is a linear classifier.
        price: what running all N layers for a token costs, in wrong tokens. Leaving at depth d saves
            price * (N - d) / N. 0 counts quality only.
        epochs, batch_size, learning_rate, weight_decay, dropout: of AdamW on one cycle of learning rates.
        seed: of everything random.
        threads: CPU threads of torch.
    """

    hidden: tuple[int, ...] = (128,)
    price: float = 0.5
    epochs: int = 20
    batch_size: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    dropout: float = 0.2
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))

    def linear(self) -> Settings:
        """The rival classifier: no hidden layer, and nothing but the exit's own token counts."""
        return replace(self, hidden=(), price=0.0, dropout=0.0)


def train(episodes: Episodes, settings: Settings) -> ExitPolicy:
    """A rule with a network for each exit point, from recorded episodes of the training split.

    From the last exit point to the first: the value of going on is what the later exit points' own
    decisions earn, less the price of the layers to them; the target is the difference between leaving here
    (1 if the token is the full model's, else 0) and that. The score, and so the threshold, is the sigmoid
    of the foretold gain in units of its standard deviation: 0.5 is the optimum at this price, more is more
    careful.

    The same arguments give the same bytes on the same machine and packages.

    Raises:
        UserError: if there are no episodes, or they hold numbers that are not finite.
    """
    import torch

    check_episodes(episodes, episodes)
    _, exits, size = episodes.shape
    states = episodes.observations.reshape(-1, exits, size)
    tokens = episodes.tokens.reshape(-1, exits + 1)
    right = torch.from_numpy((tokens[:, :-1] == tokens[:, -1:]).astype(np.float32))
    depths = np.array(episodes.exit_points)
    steps = settings.price * np.diff(depths) / depths[-1]
    onward = torch.ones(len(right))  # the full model's own token is right
    networks = []
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        for place in reversed(range(exits)):
            onward = onward - float(steps[place])
            seen = torch.from_numpy(np.ascontiguousarray(states[:, place]))
            layers, gain = _regress(seen, right[:, place] - onward, settings, settings.seed + place)
            networks.insert(0, layers)
            if settings.price:  # else going on is never wrong, and a foretold gain is an error
                onward = torch.where(gain > 0, right[:, place], onward)
    finally:
        torch.set_num_threads(threads)
    layers = [
        (np.stack([weight for weight, _ in parts]), np.stack([bias for _, bias in parts]))
        for parts in zip(*networks, strict=True)
    ]
    training = {"kind": "stopping", "settings": asdict(settings), "versions": versions()}
    training["settings"]["hidden"] = list(settings.hidden)
    return ExitPolicy(layers, episodes.exit_points, episodes.observation, episodes.fingerprint, training)


def _regress(states: Any, target: Any, settings: Settings, seed: int) -> tuple[list, Any]:
    """Least squares of target [n] on states [n, H]: layers for `ExitPolicy` that give it in units of its
    standard deviation (standardisation of the states folded in), and the fitted values [n]."""
    import torch
    from torch import nn

    mean, scale = states.mean(0), states.std(0)
    scale = torch.where(scale < 1e-6, 1.0, scale)
    spread = float(target.std()) or 1.0
    inputs, wanted = (states - mean) / scale, (target / spread)[:, None]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the weights and of dropout
        sizes = (states.shape[1], *settings.hidden, 1)
        linear = [nn.Linear(into, out) for into, out in itertools.pairwise(sizes)]
        parts: list[nn.Module] = []
        for part in linear[:-1]:
            parts += [part, nn.Tanh(), nn.Dropout(settings.dropout)]
        network = nn.Sequential(*parts, linear[-1])
        batches = max(len(inputs) // settings.batch_size, 1)
        optimiser = torch.optim.AdamW(
            network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, settings.learning_rate, settings.epochs * batches
        )
        for _ in range(settings.epochs):
            order = torch.randperm(len(inputs), generator=generator)
            for rows in torch.tensor_split(order, batches):
                loss = nn.functional.mse_loss(network(inputs[rows]), wanted[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    with torch.no_grad():
        fitted = network.eval()(inputs)[:, 0] * spread
    layers = [(part.weight.detach().double(), part.bias.detach().double()) for part in linear]
    weight = layers[0][0] / scale.double()
    layers[0] = (weight, layers[0][1] - weight @ mean.double())
    return [(weight.float().numpy(), bias.float().numpy()) for weight, bias in layers], fitted
