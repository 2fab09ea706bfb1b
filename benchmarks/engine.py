"""What early-exit decoding costs: the engine against `model.generate` and against its own rivals."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.table import Row, compare, cpu_seconds, interleaved, medians
from greencode import models
from greencode.engine import Completion, Engine, ExitView
from greencode.policies import AgentExit, ExitPolicy, FixedExit

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NEW_TOKENS = 15


class Script:
    """Leaves token t at `depths[t]`."""

    def __init__(self, depths: list[int], first: int):
        self.depths = depths
        self.first = first
        self.token = -1

    def leaves(self, view: ExitView) -> bool:
        # The first exit point is asked once per token, so it counts them.
        self.token += view.depth == self.first
        return view.depth >= self.depths[self.token]


def mixed_depths(points: tuple[int, ...], seed: int = 0) -> list[int]:
    """A depth for each new token: every exit point occurs and their mean is about N/2."""
    depths = list(points)
    while len(depths) < NEW_TOKENS:
        left = NEW_TOKENS - len(depths)
        wanted = (NEW_TOKENS * points[-1] / 2 - sum(depths)) / left
        depths.append(min(points, key=lambda point: abs(point - wanted)))
    random.Random(seed).shuffle(depths)
    return depths


def random_agent(hidden: int, points: tuple[int, ...]) -> ExitPolicy:
    """An agent of the paper's size, two layers of 64 tanh units, with random weights."""
    rng = np.random.default_rng(0)
    layers = [(rng.normal(size=shape) / shape[1] ** 0.5, np.zeros(shape[0])) for shape in
              ((64, hidden), (64, 64), (2, 64))]  # fmt: skip
    return ExitPolicy(layers, points, "final_norm", "random", {})


def shapes(quick: bool) -> dict[str, PreTrainedConfig]:
    """The models that are measured; `quick` ones only show that everything runs."""
    from transformers import LlamaConfig, OPTConfig

    hidden = 128 if quick else 1024
    common = {
        "vocab_size": 1000 if quick else 32_000,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "max_position_embeddings": 1024,
    }
    llama = LlamaConfig(
        num_hidden_layers=28, intermediate_size=hidden * 11 // 4,
        num_key_value_heads=max(1, hidden // 256), **common,
    )  # fmt: skip
    opt = OPTConfig(num_hidden_layers=32, ffn_dim=4 * hidden, word_embed_proj_dim=hidden, **common)
    return {"Llama, 28 layers": llama, "OPT, 32 layers": opt}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights that never ends a text by itself."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@dataclass(frozen=True)
class Machine:
    """What one thread reaches here at best."""

    flops: float
    bytes: float

    @classmethod
    def measure(cls) -> Machine:
        """FLOP/s of a matrix product and bytes/s of a matrix-vector product, float32; best of several."""
        a, b = torch.randn(1024, 1024), torch.randn(1024, 4096)
        matrix, vector = torch.randn(16_384, 8_192), torch.randn(8_192)
        product = min(cpu_seconds(lambda: a @ b) for _ in range(10))
        reading = min(cpu_seconds(lambda: matrix @ vector) for _ in range(5))
        return cls(2 * 1024 * 1024 * 4096 / product, matrix.nbytes / reading)


@dataclass(frozen=True)
class Floor:
    """The least work of completions of one model, and its least time on a machine.

    A pass of a layer over some positions takes the longer of its arithmetic and of reading its weights
    and the keys and values before it, once.
    """

    engine: Engine
    machine: Machine

    def passes(self, depths: list[int], context: int, cached: bool = True) -> Iterator[tuple[int, int]]:
        """(positions before, positions run) of every pass of a layer that cannot be avoided."""
        for layer in range(self.engine.family.depth):
            ends = [context + token for token, depth in enumerate(depths) if depth > layer]
            for start, end in itertools.pairwise([0, *ends]):
                yield (start, end - start) if cached else (0, end)

    def work(self, before: int, count: int) -> tuple[float, float]:
        """FLOPs and bytes of one pass."""
        family = self.engine.family
        heads, size = family.kv_shape()
        width = family.config.num_attention_heads * size
        weights = sum(weight.numel() for weight in family.layers[0].parameters())
        # Scores and their products with the values, each position with those up to itself.
        attention = 2 * 2 * width * (count * before + count * count / 2)
        return (
            2 * weights * count + attention,
            family.dtype.itemsize * (weights + 2 * heads * size * (before + count)),
        )

    def seconds(self, depths: list[int], context: int, cached: bool = True) -> float:
        """Least time of a completion whose tokens have these depths."""
        head = self.engine.family.lm_head.weight
        total = len(depths) * max(2 * head.numel() / self.machine.flops, head.nbytes / self.machine.bytes)
        for before, count in self.passes(depths, context, cached):
            flops, read = self.work(before, count)
            total += max(flops / self.machine.flops, read / self.machine.bytes)
        return total

    def summary(self, context: int) -> dict[str, float]:
        """Work of the whole model over a context, and of one more token."""
        depth, head = self.engine.family.depth, self.engine.family.lm_head.weight
        (context_flops, _), (token_flops, token_bytes) = self.work(0, context), self.work(context, 1)
        return {
            "context_gflop": depth * context_flops / 1e9,
            "token_gflop": (depth * token_flops + 2 * head.numel()) / 1e9,
            "token_mbytes": (depth * token_bytes + head.nbytes) / 1e6,
        }


def check_overhead(engine: Engine, context: list[int], rounds: int) -> tuple[float, float]:
    """Seconds per token that an agent costs which is asked at every exit point and never leaves, and
    seconds per token without one.

    Two completions advance in turn, token by token, so that both meet the same machine: the difference of
    whole completions would drown in its noise. Medians over all tokens but the first of each completion.
    """
    policies = None, AgentExit(random_agent(engine.family.hidden_size, engine.exit_points), threshold=1)
    plain, extra = [], []
    for _ in range(rounds):
        streams: list[Iterator] = [engine.stream(context, 33, policy) for policy in policies]
        for stream in streams:
            next(stream)
        for token in range(32):
            taken = [0.0, 0.0]
            for which in (0, 1) if token % 2 else (1, 0):
                taken[which] = cpu_seconds(lambda stream=streams[which]: next(stream))
            plain.append(taken[0])
            extra.append(taken[1] - taken[0])
    return statistics.median(extra), statistics.median(plain)


def overhead_rows(
    name: str, engine: Engine, context: list[int], rounds: int, full: float, most: float
) -> list[Row]:
    """The agent's overhead on a completion that takes `full` seconds without it."""
    extra, token = check_overhead(engine, context, rounds)
    checks = len(engine.exit_points) - 1
    return [
        compare(name, "agent that never leaves", "full", full + NEW_TOKENS * extra, full, most=most),
        compare(
            name, f"  per token after the context, {checks} checks", "full", token + extra, token
        ),
    ]  # fmt: skip


def measure(
    name: str, config: PreTrainedConfig, context_tokens: int, repeats: int, machine: Machine
) -> tuple[list[Row], dict[str, Any]]:
    """All rows of one model, and what they come from."""
    engine = Engine(build(config))
    model, points, depth = engine.family.model, engine.exit_points, engine.family.depth
    context = torch.randint(3, config.vocab_size, (context_tokens,)).tolist()
    ids = torch.tensor([context])
    depths = mixed_depths(points)

    def generate(**options: Any) -> Callable[[], Any]:
        return lambda: model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, **options
        )

    def scripted(depths: list[int], kv: str = "deferred") -> Callable[[], Completion]:
        return lambda: engine.complete(context, NEW_TOKENS, Script(depths, points[0]), kv=kv)

    # transformers' self-speculation runs all layers of OPT against a cache for a few, and fails.
    speculations = () if config.model_type == "opt" else (points[0], points[len(points) // 2])
    adverse = {
        "first exit, last token full": [points[0]] * (NEW_TOKENS - 1) + [depth],
        "first exit and full in turn": [points[0], depth] * (NEW_TOKENS // 2) + [depth],
        "each exit in turn, upwards": sorted(depths),
    }
    fixed = [point for point in points if point < depth]
    actions: dict[str, Callable[[], Any]] = {
        "full": lambda: engine.complete(context, NEW_TOKENS, kv="full"),
        "generate": generate(use_cache=True),
        "full, one token": lambda: engine.complete(context, 1, kv="full"),
        "deferred": scripted(depths),
        "none": scripted(depths, "none"),
        **{f"deferred: {pattern}": scripted(script) for pattern, script in adverse.items()},
        **{
            f"fixed {point}": lambda point=point: engine.complete(context, NEW_TOKENS, FixedExit(point))
            for point in fixed
        },
        **{f"speculation {point}": generate(assistant_early_exit=point) for point in speculations},
    }
    seconds = interleaved(actions, repeats, name)
    median = medians(seconds)
    deferred, none = actions["deferred"](), actions["none"]()
    differing = sum(a != b for a, b in zip(deferred.tokens, none.tokens, strict=True))
    mean = statistics.mean(depths) / depth
    full, first = median["full"], median["full, one token"]
    floor = Floor(engine, machine)

    def least(depths: list[int], cached: bool = True) -> float:
        return floor.seconds(depths, context_tokens, cached)

    full_floor = least([depth] * NEW_TOKENS)
    rows = [
        compare(
            name, "full", "model.generate, cached", full, median["generate"], most=1.02,
            floor_seconds=full_floor,
        ),
        *(
            compare(
                name, f"fixed {point}", "full", median[f"fixed {point}"], full, most=point / depth + 0.05,
                floor_seconds=least([point] * NEW_TOKENS),
            )
            for point in fixed
        ),
        compare(
            name, f"deferred, mean depth {mean:.2f} N", "none", median["deferred"], median["none"],
            most=1 / 6, floor_seconds=least(depths),
        ),
        compare(
            name, "  of a perfect engine, at this machine's floor", "none", least(depths),
            least(depths, cached=False),
        ),
        Row(name, "deferred: tokens that differ", "none", differing, most=0),
        compare(
            name, "deferred, after the first token", "full", median["deferred"] - first, full - first,
            most=mean + 0.15,
        ),
        compare(name, "deferred, whole completion", "full", median["deferred"], full, most=1.03),
        *(
            compare(
                name, f"deferred: {pattern}", "full", median[f"deferred: {pattern}"], full, most=1.03,
                floor_seconds=least(script),
            )
            for pattern, script in adverse.items()
        ),
        *overhead_rows(name, engine, context, repeats, full, 1.01),
        *(
            compare(
                name, ours, f"assistant_early_exit={point}", median[key], median[f"speculation {point}"]
            )
            for point in speculations
            for ours, key in (("full", "full"), (f"deferred, mean depth {mean:.2f} N", "deferred"))
        ),
        compare(
            name, "full", "floor of this machine", full, full_floor, floor_seconds=full_floor
        ),
    ]  # fmt: skip
    return rows, {
        "depth": depth, "floor": floor.summary(context_tokens), "depths": depths, "seconds": seconds
    }  # fmt: skip


def bundled_rows(directory: Path, context_tokens: int, repeats: int) -> list[Row]:
    """The agent's overhead on a model of the default study."""
    engine = Engine(models.load(directory))
    context = torch.randint(3, engine.family.config.vocab_size, (context_tokens,)).tolist()
    full = statistics.median(
        cpu_seconds(lambda: engine.complete(context, NEW_TOKENS)) for _ in range(4 * repeats)
    )
    return overhead_rows(directory.name, engine, context, 4 * repeats, full, 1.03)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Time of a completion against the exit's depth, beside the line that no engine can beat by much."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(results), 3.6), layout="constrained")
    for axes, (name, result) in zip(
        figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True
    ):
        median, depth = medians(result["seconds"]), result["depth"]
        points = [int(key.split()[1]) for key in median if key.startswith("fixed")]
        share = [median[f"fixed {point}"] / median["full"] for point in points]
        axes.plot([0, depth], [0, 1], color="0.6", label="depth / N")
        axes.plot([*points, depth], [*share, 1], "o-", color="C0", label="fixed exit; full")
        axes.axhline(median["generate"] / median["full"], color="C1", ls="--", label="model.generate, cached")
        mean = statistics.mean(result["depths"])
        axes.plot(mean, median["deferred"] / median["full"], "s", color="C2", label="mixed depths, deferred")
        axes.set(title=name, xlabel="(mean) depth, layers", ylabel="CPU time / full", xlim=0, ylim=0)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
