"""What early-exit decoding costs, as ratios measured in one run.

    python -m benchmarks.engine [--quick] [--out results/benchmarks]

Models have random weights, so that anyone can repeat it. Every figure is process CPU time of one thread, the
median over repeats; the repeats of everything compared are interleaved, so that a busy machine slows all
alike. Written to `--out`: `engine.csv` (the table), `engine.json` (all seconds, floor, versions) and
`engine.png`.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from greencode import models
from greencode.engine import Completion, Engine, ExitView
from greencode.files import write_json
from greencode.policies import AgentExit, ExitPolicy, FixedExit
from greencode.progress import progress
from greencode.results import device_name, versions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NEW_TOKENS = 15


@dataclass(frozen=True)
class Row:
    """One line of the table; a row without a target is for information."""

    model: str
    what: str
    measured: float
    target: float | None = None

    @property
    def met(self) -> str:
        """Whether the target is reached."""
        return "" if self.target is None else "yes" if self.measured <= self.target else "NO"


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


def cpu_seconds(action: Callable[[], Any]) -> float:
    """CPU time of this process that `action` takes."""
    start = time.process_time()
    action()
    return time.process_time() - start


def interleaved(actions: dict[str, Callable[[], Any]], repeats: int, label: str) -> dict[str, list[float]]:
    """Seconds of each action, `repeats` times; all once before any a second time, after a warm-up of each
    kind, in an order that changes.
    """
    for name in list(actions)[:2]:
        actions[name]()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    order = list(actions)
    for _ in progress(range(repeats), label):
        random.Random(0).shuffle(order)
        for name in order:
            seconds[name].append(cpu_seconds(actions[name]))
    return seconds


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
    name: str, engine: Engine, context: list[int], rounds: int, full: float, target: float
) -> list[Row]:
    """The agent's overhead on a completion that takes `full` seconds without it."""
    extra, token = check_overhead(engine, context, rounds)
    checks = len(engine.exit_points) - 1
    return [
        Row(name, "agent that never leaves / full", 1 + NEW_TOKENS * extra / full, target),
        Row(name, "agent that never leaves / full, decoding only", 1 + extra / token),
        Row(name, "microseconds per check", 1e6 * extra / checks),
    ]


def machine_peaks() -> tuple[float, float]:
    """What one thread reaches here at best: FLOP/s of a matrix product, bytes/s of a matrix-vector one."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 4096)
    matrix, vector = torch.randn(16_384, 8_192), torch.randn(8_192)
    product = min(cpu_seconds(lambda: a @ b) for _ in range(10))
    reading = min(cpu_seconds(lambda: matrix @ vector) for _ in range(5))
    return 2 * 1024 * 1024 * 4096 / product, matrix.nbytes / reading


def floor(engine: Engine, context: int, peaks: tuple[float, float]) -> dict[str, float]:
    """Least work of a full-depth completion, and its time at the machine's peaks.

    The context is bound by arithmetic, and each further token by reading every weight and the cache once.
    """
    family = engine.family
    heads, size = family.kv_shape()
    width = family.config.num_attention_heads * size
    layer = sum(weight.numel() for weight in family.layers[0].parameters())
    head = family.lm_head.weight.numel()
    # Scores and their products with the values, each position with those up to itself.
    attention = 2 * 2 * width * context * context / 2
    context_flops = family.depth * (2 * layer * context + attention) + 2 * head
    cached = 2 * family.depth * heads * size * (context + NEW_TOKENS / 2)
    token_bytes = family.dtype.itemsize * (family.depth * layer + head + cached)
    return {
        "context_gflop": context_flops / 1e9,
        "token_gflop": 2 * (family.depth * layer + head) / 1e9,
        "token_mbytes": token_bytes / 1e6,
        "seconds": context_flops / peaks[0] + (NEW_TOKENS - 1) * token_bytes / peaks[1],
    }


def measure(
    name: str, config: PreTrainedConfig, context_tokens: int, repeats: int, peaks: tuple[float, float]
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
    actions: dict[str, Callable[[], Any]] = {
        "full": lambda: engine.complete(context, NEW_TOKENS, kv="full"),
        "generate": generate(use_cache=True),
        "full, one token": lambda: engine.complete(context, 1, kv="full"),
        "deferred": scripted(depths),
        "none": scripted(depths, "none"),
        **{f"deferred: {pattern}": scripted(script) for pattern, script in adverse.items()},
        **{
            f"fixed {point}": lambda point=point: engine.complete(context, NEW_TOKENS, FixedExit(point))
            for point in points
        },
        **{f"speculation {point}": generate(assistant_early_exit=point) for point in speculations},
    }
    seconds = interleaved(actions, repeats, name)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    deferred, none = actions["deferred"](), actions["none"]()
    differing = sum(a != b for a, b in zip(deferred.tokens, none.tokens, strict=True))
    mean = statistics.mean(depths) / depth
    full = median["full"]
    decoding = {key: median[key] - median["full, one token"] for key in ("full", "deferred")}
    least = floor(engine, context_tokens, peaks)
    rows = [
        Row(name, "full / model.generate", full / median["generate"], 1.02),
        *(
            Row(name, f"fixed {point} / full", median[f"fixed {point}"] / full, point / depth + 0.05)
            for point in points
        ),
        Row(name, f"deferred / none, mean depth {mean:.2f} N", median["deferred"] / median["none"], 1 / 6),
        Row(name, "deferred against none: tokens that differ", differing, 0),
        Row(name, "deferred / full, decoding only", decoding["deferred"] / decoding["full"], mean + 0.15),
        Row(name, "deferred / full", median["deferred"] / full, 1.03),
        *(
            Row(name, f"deferred / full: {pattern}", median[f"deferred: {pattern}"] / full, 1.03)
            for pattern in adverse
        ),
        *overhead_rows(name, engine, context, repeats, full, 1.01),
        *(
            Row(name, f"assistant_early_exit={point} / full", median[f"speculation {point}"] / full)
            for point in speculations
        ),
        *(
            Row(
                name,
                f"deferred / assistant_early_exit={point}",
                median["deferred"] / median[f"speculation {point}"],
            )
            for point in speculations
        ),
        Row(name, "full / floor", full / least["seconds"]),
    ]
    return rows, {"floor": least, "depths": depths, "seconds": seconds}


def bundled_rows(directory: Path, context_tokens: int, repeats: int) -> list[Row]:
    """The agent's overhead on a model of the default study."""
    engine = Engine(models.load(directory))
    context = torch.randint(3, engine.family.config.vocab_size, (context_tokens,)).tolist()
    full = statistics.median(
        cpu_seconds(lambda: engine.complete(context, NEW_TOKENS)) for _ in range(4 * repeats)
    )
    return overhead_rows(directory.name, engine, context, 2 * repeats, full, 1.03)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Time of a completion against the exit's depth, beside the line that no engine can beat by much."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(results), 3.6), layout="constrained")
    for axes, (name, result) in zip(
        figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True
    ):
        median = {key: statistics.median(values) for key, values in result["seconds"].items()}
        points = [int(key.split()[1]) for key in median if key.startswith("fixed")]
        share = [median[f"fixed {point}"] / median["full"] for point in points]
        axes.plot([0, points[-1]], [0, 1], color="0.6", label="depth / N")
        axes.plot(points, share, "o-", label="fixed exit")
        axes.axhline(median["generate"] / median["full"], color="C1", ls="--", label="model.generate")
        mean = statistics.mean(result["depths"])
        axes.plot(mean, median["deferred"] / median["full"], "s", color="C2", label="mixed depths, deferred")
        axes.set(title=name, xlabel="(mean) depth, layers", ylabel="CPU time / full", xlim=0, ylim=0)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that it runs, no more")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="folder to write to")
    parser.add_argument("--repeats", type=int, help="of each measurement; 5 unless told, 1 if quick")
    arguments = parser.parse_args()
    context, repeats = (64, 1) if arguments.quick else (512, 5)
    repeats = arguments.repeats or repeats

    torch.set_num_threads(1)
    start = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    peaks = machine_peaks()
    rows, results = [], {}
    for name, config in shapes(arguments.quick).items():
        found, results[name] = measure(name, config, context, repeats, peaks)
        rows += found
    for directory in sorted(Path("resources/models").glob("*/config.json")):
        rows += bundled_rows(directory.parent, context, repeats)

    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / "engine.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["model", "what", "measured", "target", "met"])
        writer.writerows([row.model, row.what, row.measured, row.target, row.met] for row in rows)
    about = {
        "start": start,
        "device": device_name("cpu"),
        "versions": versions(),
        "threads": 1,
        "dtype": "float32",
        "context_tokens": context,
        "new_tokens": NEW_TOKENS,
        "repeats": repeats,
        "peak_gflop_per_second": peaks[0] / 1e9,
        "peak_gbyte_per_second": peaks[1] / 1e9,
    }
    write_json(
        arguments.out / "engine.json", about | {"rows": [asdict(row) for row in rows], "models": results}
    )
    draw(results, arguments.out / "engine.png")

    for row in rows:
        target = "" if row.target is None else f"<= {row.target:.3f}"
        print(f"{row.model:17} {row.what:46} {row.measured:7.3f} {target:>9} {row.met:>4}")
    for name, result in results.items():
        least = result["floor"]
        print(
            f"{name}: floor {least['context_gflop']:.0f} GFLOP for the context, then per token "
            f"{least['token_mbytes']:.0f} MB and {least['token_gflop']:.2f} GFLOP: "
            f"{least['seconds']:.2f} s at {peaks[0] / 1e9:.0f} GFLOP/s and {peaks[1] / 1e9:.1f} GB/s; "
            f"full takes {statistics.median(result['seconds']['full']):.2f} s"
        )
    print(f"{about['device']}; " + ", ".join(f"{key} {value}" for key, value in about["versions"].items()))
    print(f"{sum(row.met == 'NO' for row in rows)} targets missed", file=sys.stderr)


if __name__ == "__main__":
    main()
