"""Early exit at the paper's scale on one GPU: time and energy per token at every depth, and the roofline.

    python -m benchmarks.gpu_paper_scale [--model llama|opt] [--out docs/results/gpu]

Shapes of Llama-3.2-3B and OPT-2.7B with random weights in bfloat16, batch size 1, a context of 512 tokens.
Two engines: the library's (eager), and one whose segments between exit points are captured as CUDA graphs
over a static cache, since a launch takes the host longer than the GPU needs for a small kernel: eager time
follows the number of launches, not of bytes. Energy by NVML through Zeus, idle power subtracted, windows of
`--seconds`. About 8 minutes a model on an H100. Written to `--out`: one CSV and one figure per model.

`--micro` runs everything on tiny models, on the CPU where there is no GPU (without graphs): it shows that the
script works, no more.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.engine import random_agent
from benchmarks.table import write_csv
from benchmarks.verified import DRAFTS, make_right
from greencode.energy import Meter
from greencode.engine import Engine, ExitView
from greencode.errors import UserError
from greencode.files import write_json
from greencode.policies import AgentExit, DeviceAgent, ExitPolicy, FixedExit
from greencode.results import device_name, versions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def shapes(micro: bool) -> dict[str, PreTrainedConfig]:
    """The two models of the paper, or tiny ones of as many layers."""
    from transformers import LlamaConfig, OPTConfig

    llama = {
        "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 8192, "vocab_size": 128_256, "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    opt = {
        "hidden_size": 2560, "word_embed_proj_dim": 2560, "num_hidden_layers": 32, "num_attention_heads": 32,
        "ffn_dim": 10_240, "vocab_size": 50_272, "max_position_embeddings": 2048,
    }  # fmt: skip
    if micro:
        small = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 61}
        llama |= small | {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
        opt |= small | {"word_embed_proj_dim": 32, "ffn_dim": 48}
    return {"llama": LlamaConfig(**llama), "opt": OPTConfig(**opt)}


def build(config: PreTrainedConfig, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, made on the device."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


class StaticCache:
    """Keys and values of one text in buffers that never move; a graph may read and write them."""

    def __init__(self, family: Any, capacity: int):
        heads, size = family.kv_shape()
        buffer = torch.zeros(family.depth, 2, 1, heads, capacity, size, device=family.device)
        self._stored = buffer.to(family.dtype)
        self.positions = torch.zeros(1, dtype=torch.long, device=family.device)

    def update(self, keys, values, layer, *args, **kwargs):
        stored_keys, stored_values = self._stored[layer]
        stored_keys.index_copy_(2, self.positions, keys)
        stored_values.index_copy_(2, self.positions, values)
        return stored_keys, stored_values


class GraphDecoder:
    """Greedy decoding in segments between exit points, each captured as a CUDA graph.

    One token at a time, all from one buffer: embed, segments, then head and choice of the token. On a CPU
    the same segments run uncaptured, so that they can be compared with `Engine`.

    Args:
        agent: asked after every segment but the last, and its answer read by the host, which then goes on
            all the same: its cost, not its saving. None asks nobody.
    """

    def __init__(self, engine: Engine, capacity: int, agent: ExitPolicy | None = None):
        self.family, self.points, self.capacity = engine.family, engine.exit_points, capacity
        family, device = self.family, self.family.device
        self.cache = StaticCache(family, capacity)
        self.keys = torch.arange(capacity, device=device)
        self.id = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.hidden = torch.zeros(1, 1, family.hidden_size, dtype=family.dtype, device=device)
        self.leave = torch.zeros((), dtype=torch.bool, device=device)
        self.agent = DeviceAgent(agent, str(device)) if agent else None
        self._steps: dict[Any, Callable[[], None]] = {}
        with torch.inference_mode():
            self._steps["embed"] = self._capture(self._embed)
            for first, last in itertools.pairwise([0, *self.points]):
                self._steps[last] = self._capture(lambda first=first, last=last: self._segment(first, last))
            self._steps["answer"] = self._capture(self._answer)

    def _capture(self, step: Callable[[], None]) -> Callable[[], None]:
        if not self.id.is_cuda:
            return step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def _embed(self) -> None:
        self.hidden.copy_(self.family.embed(self.id, self.position))

    def _layers(self, first: int, last: int, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rotary = self.family.rotary(positions)
        masks: dict[int | None, torch.Tensor] = {}
        for layer in range(first, last):
            window = self.family.sliding_window(layer)
            if window not in masks:
                mask = self.keys <= positions[0][:, None]
                if window is not None:
                    mask &= self.keys > positions[0][:, None] - window
                masks[window] = mask[None, None]
            hidden = self.family.run(layer, hidden, positions, masks[window], self.cache, rotary)
        return hidden

    def _segment(self, first: int, last: int) -> None:
        self.cache.positions = self.position[0]
        self.hidden.copy_(self._layers(first, last, self.hidden, self.position))
        if self.agent is not None and last < self.family.depth:
            self.leave.copy_(self.agent(self.family.observe(self.hidden[0, -1])) > 1)

    def _answer(self) -> None:
        logits = self.family.logits(self.family.observe(self.hidden[0, -1]))
        self.id.copy_(logits.argmax().view(1, 1))
        self.position += 1

    @torch.inference_mode()
    def start(self, context: list[int], depth: int) -> int:
        """Read a context up to `depth`; the first token."""
        device = self.family.device
        ids = torch.tensor([context], device=device)
        positions = torch.arange(len(context), device=device)[None]
        self.cache.positions = positions[0]
        hidden = self._layers(0, depth, self.family.embed(ids, positions), positions)
        self.hidden.copy_(hidden[:, -1:])
        self.position.fill_(len(context) - 1)
        self._steps["answer"]()
        return int(self.id)

    @torch.inference_mode()
    def next(self, depth: int) -> int:
        """One more token, left at `depth` like all before it."""
        self._steps["embed"]()
        for point in self.points:
            if point > depth:
                break
            self._steps[point]()
            if self.agent is not None and point < self.family.depth:
                bool(self.leave)
        self._steps["answer"]()
        return int(self.id)

    def stream(self, context: list[int], tokens: int, depth: int) -> Iterator[int]:
        """`tokens` tokens that all leave at `depth`."""
        if len(context) + tokens > self.capacity:
            raise UserError(f"{len(context)} + {tokens} tokens do not fit the cache of {self.capacity}.")
        yield self.start(context, depth)
        for _ in range(tokens - 1):
            yield self.next(depth)


@dataclass(frozen=True)
class Measured:
    """One row: a way to decode at one depth. Times and joules are medians over the windows.

    Attributes:
        engine: `eager`, or `graphs`.
        what: `full`, `fixed`, `none` (fixed, without a cache), `deferred` (depths in turn), `agent` (asked
            everywhere, never leaves); `first` is the time to the first token.
        depth: layers per token; the mean where they vary.
        seconds, low, high: per token after the first (`first`: of the first); median, least, most.
        joules: per token, idle power subtracted; None where nothing measures.
        floor_seconds: reading the weights of these layers, the cache and the LM head once, at the bandwidth
            that a large copy reached here; None for what reads more.
    """

    model: str
    engine: str
    what: str
    depth: float
    seconds: float
    low: float
    high: float
    joules: float | None
    floor_seconds: float | None
    windows: int
    tokens_per_window: int


class Rhythm:
    """Leaves at each exit point in turn, the final layer included."""

    def __init__(self, points: tuple[int, ...]):
        self.turn = itertools.cycle(points)
        self.first = points[0]

    def leaves(self, view: ExitView) -> bool:
        if view.depth == self.first:
            self.depth = next(self.turn)
        return view.depth >= self.depth


class Bench:
    """Measures one model."""

    def __init__(self, name: str, model: PreTrainedModel, settings: argparse.Namespace, bandwidth: float):
        self.name, self.settings, self.bandwidth = name, settings, bandwidth
        self.engine = Engine(model)
        self.family, self.points = self.engine.family, self.engine.exit_points
        self.context = torch.randint(3, model.config.vocab_size, (settings.context,)).tolist()
        self.capacity = min(2048, self.family.window)
        self.meter = Meter.open(str(self.family.device))
        self.rows: list[Measured] = []

    def floor(self, depth: float, tokens: int) -> float:
        """Seconds to read what a token of this depth must read, in the middle of a window."""
        heads, size = self.family.kv_shape()
        layer = sum(weight.numel() for weight in self.family.layers[0].parameters())
        cached = 2 * heads * size * (len(self.context) + tokens / 2)
        numbers = depth * (layer + cached) + self.family.lm_head.weight.numel()
        return numbers * self.family.dtype.itemsize / self.bandwidth

    def windows(
        self, engine: str, what: str, depth: float, begin: Callable[[], Iterator], floor: bool = True
    ) -> None:
        """Time tokens after the first of the streams that `begin` gives, in windows of whole seconds."""
        room = self.capacity - len(self.context) - 1
        stream = begin()
        next(stream)
        trial = min(16, room - 1)
        start = time.perf_counter()
        for _ in itertools.islice(stream, trial):
            pass
        each = (time.perf_counter() - start) / trial
        tokens = max(trial, min(room - 1, round(self.settings.seconds / each)))
        seconds, joules = [], []
        for _ in range(self.settings.repeats):
            stream = begin()
            next(stream)
            with self.meter.window() as window:
                for _ in itertools.islice(stream, tokens):
                    pass
            seconds.append(window.energy.seconds / tokens)
            joules.append(window.energy.joules)
        self.add(engine, what, depth, seconds, joules, tokens, self.floor(depth, tokens) if floor else None)

    def completions(self, engine: str, what: str, depth: float, action: Callable[[], Any], per: int) -> None:
        """Time whole calls of `action`, which gives `per` tokens, in windows of whole seconds."""
        action()
        start = time.perf_counter()
        action()
        calls = max(1, round(self.settings.seconds / (time.perf_counter() - start)))
        seconds, joules = [], []
        for _ in range(self.settings.repeats):
            with self.meter.window() as window:
                for _ in range(calls):
                    action()
            seconds.append(window.energy.seconds / (calls * per))
            joules.append(window.energy.joules)
        self.add(engine, what, depth, seconds, joules, calls * per, None)

    def add(self, engine, what, depth, seconds, joules, tokens, floor) -> None:
        """Keep a row, and say so."""
        known = [value / tokens for value in joules if value is not None]
        row = Measured(
            self.name, engine, what, depth, statistics.median(seconds), min(seconds), max(seconds),
            statistics.median(known) if known else None, floor, len(seconds), tokens,
        )  # fmt: skip
        self.rows.append(row)
        share = "" if floor is None else f", {floor / row.seconds:.0%} of the roofline"
        energy = "" if row.joules is None else f", {row.joules:.3f} J"
        print(f"{self.name:6} {engine:6} {what:9} {depth:5.1f}: {row.seconds * 1e3:8.3f} ms{energy}{share}")

    def run(self) -> list[Measured]:
        """Everything, in an order that has the important rows first, should the time run out."""
        engine, context, depth, points = self.engine, self.context, self.family.depth, self.points
        agent = random_agent(self.family.hidden_size, points)
        self.meter.measure_idle(self.settings.seconds)
        room = self.capacity - len(context)

        def eager(policy: Any, kv: str = "deferred") -> Callable[[], Iterator]:
            return lambda: engine.stream(context, room, policy() if policy else None, kv=kv)

        self.windows("eager", "full", depth, eager(None, "full"))
        graphs = GraphDecoder(engine, self.capacity)
        for point in reversed(points):
            what = "full" if point == depth else "fixed"
            self.windows("graphs", what, point, lambda point=point: graphs.stream(context, room, point))
        asking = GraphDecoder(engine, self.capacity, agent)
        self.windows("graphs", "agent", depth, lambda: asking.stream(context, room, depth))
        asked = AgentExit(agent, 1.0, device=str(self.family.device))
        self.windows("eager", "agent", depth, eager(lambda: asked))
        for point in points[:-1]:
            self.windows("eager", "fixed", point, eager(lambda point=point: FixedExit(point)))
        mean = statistics.mean(points)
        self.windows("eager", "deferred", mean, eager(lambda: Rhythm(points)))
        for point in points:
            self.completions(
                "eager", "first", point, lambda point=point: engine.complete(context, 1, FixedExit(point)), 1
            )
        new = self.settings.new_tokens
        for point in points:
            self.completions(
                "eager", "none", point,
                lambda point=point: engine.complete(context, new, FixedExit(point), kv="none"), new,
            )  # fmt: skip
        # What verification saves at best; it changes the weights, so it comes last.
        middle = depth // 2
        make_right(engine, middle)
        for drafts in DRAFTS:
            self.windows(
                "eager", f"verified {drafts}", middle,
                lambda drafts=drafts: engine.stream(
                    context, room, FixedExit(middle), "verified", drafts=drafts
                ),
                floor=False,
            )  # fmt: skip
        return self.rows


def copy_bandwidth(device: str, numbers: int) -> float:
    """Bytes per second that a large copy moves on the device, read and written; the best of several."""
    source = torch.zeros(numbers, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(8):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def draw(rows: list[Measured], path: Path) -> None:
    """Milliseconds and joules per token against depth."""
    from matplotlib.figure import Figure

    measures = [("seconds", 1e3, "ms per token")]
    if any(row.joules is not None for row in rows):
        measures.append(("joules", 1, "J per token, idle subtracted"))
    figure = Figure(figsize=(4.4 * len(measures), 3.6), layout="constrained")
    styles = {("eager", "fixed"): "o-", ("graphs", "fixed"): "s-", ("eager", "none"): "^--"}
    for axes, (key, scale, label) in zip(
        figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True
    ):
        for (engine, what), style in styles.items():
            chosen = [row for row in rows if row.engine == engine and row.what in (what, "full")]
            if what == "none":
                chosen = [row for row in rows if (row.engine, row.what) == (engine, what)]
            chosen = sorted((r for r in chosen if getattr(r, key) is not None), key=lambda r: r.depth)
            name = {"none": "no KV cache"}.get(what, f"KV cache, {engine}")
            axes.plot([r.depth for r in chosen], [scale * getattr(r, key) for r in chosen], style, label=name)
        floors = sorted(
            {(r.depth, r.floor_seconds) for r in rows if r.engine == "graphs" and r.what != "agent"}
        )
        if key == "seconds":
            axes.plot(*zip(*((d, scale * f) for d, f in floors), strict=True), color="0.6", label="roofline")
        axes.set(xlabel="depth, layers", ylabel=label, xlim=0, yscale="log")
        axes.legend(frameon=False, fontsize="small")
    figure.suptitle(rows[0].model)
    figure.savefig(path, dpi=150)


def summary(rows: list[Measured]) -> dict[str, float]:
    """The figures that the targets are about."""
    found = {(row.engine, row.what, row.depth): row for row in rows}
    depth = max(row.depth for row in rows)
    full = found["graphs", "full", depth]
    line = [r for r in rows if r.engine == "graphs" and r.what in ("fixed", "full")]
    mean_x, mean_y = (statistics.mean(getattr(r, k) for r in line) for k in ("depth", "seconds"))
    slope = sum((r.depth - mean_x) * (r.seconds - mean_y) for r in line) / sum(
        (r.depth - mean_x) ** 2 for r in line
    )
    return {
        "roofline_share_at_full_depth": full.floor_seconds / full.seconds,
        "largest_distance_from_a_line_in_depth": max(
            abs(r.seconds - mean_y - slope * (r.depth - mean_x)) / r.seconds for r in line
        ),
        "eager_over_graphs_at_full_depth": found["eager", "full", depth].seconds / full.seconds,
        "agent_overhead_graphs": found["graphs", "agent", depth].seconds / full.seconds - 1,
        "agent_overhead_eager": (
            found["eager", "agent", depth].seconds / found["eager", "full", depth].seconds - 1
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=("llama", "opt"), help="one of the two; both unless told")
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu"), help="folder to write to")
    parser.add_argument("--context", type=int, default=512, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=15, help="of a completion without a cache")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a window")
    parser.add_argument("--repeats", type=int, default=5, help="windows of each measurement")
    parser.add_argument("--micro", action="store_true", help="tiny models: shows that it runs, no more")
    settings = parser.parse_args(arguments)
    if settings.micro:
        settings.context, settings.seconds, settings.repeats = 24, 0.01, 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not settings.micro:
        sys.exit("gpu_paper_scale: there is no GPU here; --micro shows on a CPU that the script works.")
    bandwidth = copy_bandwidth(device, 2**20 if settings.micro else 2**29)
    settings.out.mkdir(parents=True, exist_ok=True)
    for name, config in shapes(settings.micro).items():
        if settings.model not in (None, name):
            continue
        start = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        bench = Bench(name, build(config, device, dtype), settings, bandwidth)
        rows = bench.run()
        write_csv([asdict(row) for row in rows], settings.out / f"{name}.csv")
        about = {
            "start": start,
            "device": device_name(device),
            "versions": versions(),
            "dtype": str(dtype).removeprefix("torch."),
            "energy": bench.meter.note,
            "copy_gbyte_per_second": bandwidth / 1e9,
            "settings": {key: value for key, value in vars(settings).items() if key != "out"},
            "summary": summary(rows),
        }
        write_json(settings.out / f"{name}.json", about)
        draw(rows, settings.out / f"{name}.png")
        for key, value in about["summary"].items():
            print(f"{name}: {key.replace('_', ' ')}: {value:.3f}")
        del bench
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
