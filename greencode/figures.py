"""Figures 1, 3, 4, 6-11 of the paper and the comparison with its published values.

Each function draws one figure, writes `<stem>.pdf`, `<stem>.png` and `<stem>.csv`, the last holding
exactly the plotted numbers, and returns the figure. The same input gives the same bytes. Error bars and
bands are 95 % intervals. Depths are layers run, 1..N. An energy that is an estimate says so on its axis;
one that was not measured is left out and says so too.

`style` has dpi (of the PNG), palette (`colorblind`, or colours by method kind or agent name that replace
some of it), font_size (pt) and formats (some of pdf, png, svg); each may be left out.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from greencode.errors import UserError
from greencode.exits import exit_points, lite_weights
from greencode.files import atomic
from greencode.results import Evaluation, Interval
from greencode.tables import (
    Method,
    Pair,
    change_percent,
    group,
    parse_method,
    published_metric,
    require_full,
    signed_percent,
    write_table,
)

Style = Mapping[str, Any]

COLUMN, PAGE = 3.5, 7.2
"""Widths of a printed column and page, inches."""

STYLE: dict[str, Any] = {"dpi": 300, "palette": "colorblind", "font_size": 8.0, "formats": ["pdf", "png"]}

# Okabe and Ito's colours, which colour-blind readers tell apart.
_BLUE, _GREEN, _ORANGE, _VERMILION = "#0072B2", "#009E73", "#E69F00", "#D55E00"
_PURPLE, _SKY = "#CC79A7", "#56B4E9"
PALETTE = {"base": "#BBBBBB", "full": "#333333", "fixed": _ORANGE}
_AGENTS = (_BLUE, _GREEN, _PURPLE, _VERMILION)
_SERIES = (_BLUE, _VERMILION, _GREEN, _PURPLE, _ORANGE, _SKY)
_MARKERS = ("o", "D", "v", "P", "X", "h")
_FAINT = "#777777"

_QUALITY = {
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "codebleu": "CodeBLEU",
    "codebleu_syntax": "Syntax",
    "codebleu_dataflow": "Data flow",
}
_METADATA = {
    "pdf": {"CreationDate": None},
    "png": {"Software": None},
    "svg": {"Date": None},
}


# --- Fig. 1 -----------------------------------------------------------------------------------------


def fig01_fixed_exit(evaluations: Sequence[Evaluation], style: Style, stem: str | Path) -> Figure:
    """Fig. 1: quality (0..1), energy (J) and latency (s) per completion against the depth of a fixed exit.

    One column per model and dataset; the deepest point is `full`. Other methods are not shown.

    Raises:
        UserError: if a pair has no fixed exit.
    """
    with _styled(style) as look:
        columns = {pair: _by_depth(pair, methods) for pair, methods in group(evaluations).items()}
        shown = [e for series in columns.values() for e in series.values()]
        width = PAGE if len(columns) > 1 else COLUMN
        figure = Figure(figsize=(max(width, 1.75 * len(columns) + 0.5), 4.6), layout="constrained")
        axes = figure.subplots(3, len(columns), sharex="col", sharey="row", squeeze=False)
        rows: list[dict[str, Any]] = []
        for column, (pair, series) in zip(axes.T, columns.items(), strict=True):
            column[0].set_title(_title(pair, "\n"))
            for axis, metrics in zip(
                column, (("rougeL", "codebleu"), ("joules",), ("seconds",)), strict=True
            ):
                for place, metric in enumerate(metrics):
                    points = {depth: _metric(e, metric) for depth, e in series.items()}
                    points = {depth: interval for depth, interval in points.items() if interval}
                    rows += [
                        {"model": pair[0], "dataset": pair[1], "metric": metric, "depth": depth}
                        | {"method": series[depth].method}
                        | _interval_row(interval)
                        | {"energy_source": series[depth].energy_source if metric == "joules" else None}
                        for depth, interval in points.items()
                    ]
                    colour = (_BLUE, _VERMILION)[place] if len(metrics) > 1 else look.colours["fixed"]
                    marker = ("o", "s")[place] if len(metrics) > 1 else "^"
                    _band(axis, points, colour, marker, _QUALITY.get(metric, ""))
                    if not points:
                        _not_measured(axis, _QUALITY.get(metric))
            column[0].xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 4, 8, 10]))
            column[0].set_xlim(0, max(series) * 1.04)
        for row in axes:
            row[0].set_ylim(bottom=0)
        axes[0, 0].set_ylabel("Quality\n[0..1]")
        axes[1, 0].set_ylabel(_energy_label(shown, "\n[J per completion]"))
        axes[2, 0].set_ylabel("Latency\n[s per completion]")
        axes[0, 0].legend(loc="upper left")
        figure.supxlabel("Exit depth [layers run]", fontsize=look.size)
        _save(figure, pd.DataFrame(rows), stem, look)
    return figure


def _by_depth(pair: Pair, methods: Mapping[str, Evaluation]) -> dict[int, Evaluation]:
    found = {method.depth: methods[method.name] for method in map(parse_method, methods) if method.depth}
    if not found:
        raise UserError(
            f"No fixed exit of {pair[0]} on {pair[1]} was evaluated; evaluate some, e.g. 'fixed-8'."
        )
    full = methods.get("full")
    if full:
        found.setdefault(full.layers, full)
    return dict(sorted(found.items()))


def _band(
    axis: Axes, points: Mapping[int, Interval], colour: Any, marker: str, label: str | None = None
) -> None:
    depths = list(points)
    low, value, high = ([getattr(i, end) for i in points.values()] for end in ("low", "value", "high"))
    axis.fill_between(depths, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.plot(depths, value, color=colour, marker=marker, markersize=3.5, label=label)


# --- Fig. 3 -----------------------------------------------------------------------------------------


def fig03_exit_weights(models: Sequence[Mapping[str, Any]], style: Style, stem: str | Path) -> Figure:
    """Fig. 3: weight w_i of each exit's loss, of each model and of the paper's 28-layer Llama 3.2.

    Args:
        models: name, layers, and if they are not the paper's, exit_points and weights of each.
    """
    with _styled(style) as look:
        paper = {"name": "Llama 3.2 3B (paper)", "layers": 28}
        shown = [*models, paper]
        columns = min(len(shown), 3)
        count = -(-len(shown) // columns)
        width = COLUMN if columns == 1 else PAGE * columns / 3
        figure = Figure(figsize=(width, 1.9 * count + 0.3), layout="constrained")
        axes = figure.subplots(count, columns, sharey=True, squeeze=False).ravel()
        colours = {"first half": _GREEN, "second half": _BLUE, "final layer": _VERMILION}
        hatches = {"first half": None, "second half": "////", "final layer": "xxxx"}
        rows: list[dict[str, Any]] = []
        for axis, model in zip(axes, shown, strict=False):
            layers = model["layers"]
            points = tuple(model.get("exit_points") or exit_points(layers))
            weights = tuple(model.get("weights") or lite_weights(points))
            parts = [_half(point, layers) for point in points]
            bars = axis.bar(points, weights, width=0.012 * layers + 0.6)
            for bar, part in zip(bars, parts, strict=True):
                _fill(bar, colours[part], hatches[part])
            axis.set_title(f"{model['name']}, {layers} layers")
            axis.set_xticks(points)
            axis.tick_params("x", labelsize=look.size - 1.5)
            axis.set_xlim(2, layers + 2)
            axis.set_xlabel("Exit depth [layers run]")
            rows += [
                {"model": model["name"], "layers": layers, "exit": point, "part": part, "weight": weight}
                for point, part, weight in zip(points, parts, weights, strict=True)
            ]
        for axis in axes[::columns]:
            axis.set_ylabel("Weight $w_i$ of the loss")
        for axis in axes[len(shown) :]:
            axis.remove()
        handles = [_fill(Patch(label=part), colours[part], hatches[part]) for part in colours]
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
        _save(figure, pd.DataFrame(rows), stem, look)
    return figure


def _half(point: int, layers: int) -> str:
    if point == layers:
        return "final layer"
    return "first half" if 2 * point <= layers else "second half"


# --- Fig. 4 -----------------------------------------------------------------------------------------


def fig04_loss_curves(curves: Mapping[Pair, Mapping[str, Any]], style: Style, stem: str | Path) -> Figure:
    """Fig. 4: loss in fine-tuning (nats per token) against optimiser steps, per model and dataset.

    Thick: Eq. 1. Thin: each exit. Dots: Eq. 1 on the validation split.

    Args:
        curves: (model, dataset) -> loss curve of the fine-tuning.

    Raises:
        UserError: if there is no curve, or one has no steps.
    """
    with _styled(style) as look:
        figure, axes = _panels(curves, 2.5, "fine-tune at least one model")
        rows: list[dict[str, Any]] = []
        for axis, (pair, record) in zip(axes, curves.items(), strict=True):
            series = _loss_series(record)
            if not series["train"]:
                raise UserError(
                    f"The loss curve of {pair[0]} on {pair[1]} has no steps; fine-tune with more data."
                )
            exits = [name for name in series if name.startswith("exit_")]
            for place, name in enumerate(exits):
                colour = mpl.colormaps["viridis_r"](0.15 + 0.8 * place / max(1, len(exits) - 1))
                axis.plot(*_columns(series[name]), color=colour, linewidth=0.8)
            axis.plot(*_columns(series["train"]), color="black", linewidth=1.6)
            axis.plot(*_columns(series["validation"]), "o--", color=_VERMILION, markersize=3.5, linewidth=0.9)
            losses = [loss for points in series.values() for loss in points.values()]
            if min(losses) > 0 and max(losses) / min(losses) > 4:
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(_nice_log(min(losses), max(losses)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_locator(NullLocator())
                axis.yaxis.set_minor_formatter(NullFormatter())
            ends = {
                f"exit {name[5:]}": float(np.mean(list(series[name].values())[-9:]))
                for name in exits
                if series[name]
            }
            _end_labels(axis, ends, look, [line.get_color() for line in axis.lines])
            axis.set_title(_title(pair))
            rows += [
                {"model": pair[0], "dataset": pair[1], "series": name, "step": step, "loss": loss}
                for name, points in series.items()
                for step, loss in points.items()
            ]
        _outer_labels(axes, "Optimiser step", "Loss [nats per token]")
        handles = [
            Line2D([], [], color="black", linewidth=1.6, label="training, weighted over exits (Eq. 1)"),
            Line2D([], [], color=_FAINT, linewidth=0.8, label="training, each exit"),
            Line2D([], [], color=_VERMILION, linestyle="--", marker="o", markersize=3.5, linewidth=0.9,
                   label="validation (Eq. 1)"),
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside upper center", ncols=3 if len(curves) > 1 else 1)
        _save(figure, pd.DataFrame(rows), stem, look)
    return figure


def _loss_series(record: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Loss by step of `train`, `validation` and each exit, as `exit_4`."""
    exits = [f"exit_{point}" for point in record["exit_points"]]
    series: dict[str, dict[int, float]] = {"train": {}, "validation": {}} | {name: {} for name in exits}
    ends = ((0, record.get("validation_before")), (record["steps"], record.get("validation_after")))
    series["validation"] |= {step: found["loss"] for step, found in ends if found and "loss" in found}
    for entry in record["curve"]:
        step = entry["step"]
        if "loss" in entry:
            series["train"][step] = entry["loss"]
        for name in exits:
            if name in entry:
                series[name][step] = entry[name]
        if "eval_loss" in entry:
            series["validation"][step] = entry["eval_loss"]
        elif all(f"eval_{name}" in entry for name in exits):
            losses = [entry[f"eval_{name}"] for name in exits]
            series["validation"][step] = float(np.average(losses, weights=record["weights"]))
    return {name: dict(sorted(points.items())) for name, points in series.items()}


def _nice_log(low: float, high: float) -> Any:
    nice = [m * 10.0**e for e in range(-3, 4) for m in (1, 1.5, 2, 3, 4, 6, 8)]
    return mpl.ticker.FixedLocator([tick for tick in nice if low * 0.8 <= tick <= high * 1.2])


def _end_labels(axis: Axes, ends: Mapping[str, float], look: _Look, colours: Sequence[Any]) -> None:
    """Name lines at their right end, moved apart where they would overlap."""
    to_axes = axis.transScale + axis.transLimits
    axis.autoscale_view()
    heights = [to_axes.transform((1, value))[1] for value in ends.values()]
    gap = 1.15 * (look.size - 1.5) / 72 / 1.6
    order = np.argsort(heights)
    placed = np.array(heights)
    for _ in range(200):  # push neighbours apart until none overlap
        for below, above in itertools.pairwise(order):
            lack = gap - (placed[above] - placed[below])
            if lack > 1e-6:
                placed[below] -= lack / 2
                placed[above] += lack / 2
    placed += max(0.0, -placed.min())
    for name, height, colour in zip(ends, placed, colours, strict=False):
        axis.text(
            1.02, height, name, transform=axis.transAxes, va="center", fontsize=look.size - 1.5,
            color=_darker(colour),
        )  # fmt: skip


# --- Figs. 6 and 7 ----------------------------------------------------------------------------------


def fig06_agent_reward(
    learning: Sequence[Mapping[str, Any]], style: Style, stem: str | Path, window: int = 50
) -> Figure:
    """Fig. 6: mean step reward per episode of PPO, moving average over `window` episodes.

    One panel per dataset (the coefficients of the reward may differ between them), one line per model
    and agent. Several records of one are its seeds: the line is their mean, the band goes from the lowest
    to the highest, and both end with the seed that has the fewest episodes.

    Raises:
        UserError: if there is no record, or one has no episodes.
    """
    with _styled(style) as look:
        datasets = dict.fromkeys(record["dataset"] for record in learning)
        figure, axes = _panels(datasets, 2.4, "train at least one agent", share="y")
        models = list(dict.fromkeys(record["model"] for record in learning))
        look.agents = sorted({record["agent"] for record in learning})
        seeds: dict[tuple[str, str, str], list[np.ndarray]] = {}
        for record in learning:
            of = record["model"], record["dataset"], record["agent"]
            seeds.setdefault(of, []).append(np.asarray(record["episode_reward"], dtype=float))
        rows: list[dict[str, Any]] = []
        for (model, dataset, agent), curves in seeds.items():
            axis = axes[list(datasets).index(dataset)]
            count = min(map(len, curves))
            if not count:
                raise UserError(
                    f"Agent {agent} of {model} on {dataset} ended no episode; train it for more steps."
                )
            span = min(window, count)
            means = np.array(
                [np.convolve(curve[:count], np.ones(span) / span, mode="valid") for curve in curves]
            )
            episodes = np.arange(span, count + 1)
            # More points than a printed line can show only make the files large.
            every = -(-len(episodes) // 2000)
            means, episodes = means[:, ::-1][:, ::every][:, ::-1], episodes[::-1][::every][::-1]
            label = model if len(look.agents) == 1 else f"{model}, {agent}"
            colour = look.series_colour(model, agent, models)
            mean, low, high = means.mean(axis=0), None, None
            if len(curves) > 1:
                low, high = means.min(axis=0), means.max(axis=0)
                label += f", {len(curves)} seeds"
                axis.fill_between(episodes, low, high, color=colour, alpha=0.35, linewidth=0)
            axis.plot(
                episodes, mean, label=label, linewidth=0.9, color=colour,
                linestyle=("-", "--", ":", "-.")[look.agents.index(agent) % 4],
            )  # fmt: skip
            table = pd.DataFrame({"episode": episodes, "reward": mean, "low": low, "high": high})
            about = {"model": model, "dataset": dataset, "agent": agent, "seeds": len(curves)}
            rows += [about | row for row in table.to_dict("records")]
        for axis, dataset in zip(axes, datasets, strict=True):
            axis.set_title(dataset)
            axis.set_xlim(left=0)
            axis.legend(loc="lower right")
        _outer_labels(axes, "Episode", f"Mean step reward\n(moving average, {window} episodes)")
        _save(figure, pd.DataFrame(rows), stem, look)
    return figure


def fig07_optimal_exits(learning: Sequence[Mapping[str, Any]], style: Style, stem: str | Path) -> Figure:
    """Fig. 7: how often each exit was the optimal one in training, in percent of tokens.

    One panel per model and dataset; bars by exit, and their running sum. Several agents of a pair count
    together.

    Raises:
        UserError: if there is no record, or one counted no tokens.
    """
    with _styled(style) as look:
        counts: dict[Pair, Counter[int]] = {}
        for record in learning:
            pair = counts.setdefault((record["model"], record["dataset"]), Counter())
            pair.update({int(depth): int(count) for depth, count in record["optimal_exits"].items()})
        figure, axes = _panels(counts, 2.1, "train at least one agent", share="y")
        rows: list[dict[str, Any]] = []
        for axis, (pair, found) in zip(axes, counts.items(), strict=True):
            total = sum(found.values())
            if not total:
                raise UserError(
                    f"No optimal exit was counted for {pair[0]} on {pair[1]}; train the agent for more steps."
                )
            depths = sorted(found)
            share = [100 * found[depth] / total for depth in depths]
            running = np.cumsum(share).tolist()
            places = range(len(depths))
            axis.bar(places, share, color=_BLUE, width=0.75)
            axis.plot(places, running, color=_FAINT, marker=".", linewidth=0.9, markersize=4)
            axis.set_xticks(places, [str(depth) for depth in depths])
            axis.set_ylim(0, 105)
            axis.yaxis.set_major_formatter(PercentFormatter(decimals=0))
            axis.set_title(_title(pair))
            rows += [
                {"model": pair[0], "dataset": pair[1], "exit": depth, "count": found[depth]}
                | {"share_percent": part, "running_percent": so_far}
                for depth, part, so_far in zip(depths, share, running, strict=True)
            ]
        _outer_labels(axes, "Optimal exit [layers run]", "Share of tokens")
        handles = [
            Patch(facecolor=_BLUE, label="this exit"),
            Line2D([], [], color=_FAINT, marker=".", linewidth=0.9, label="this or an earlier exit"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=2)
        _save(figure, pd.DataFrame(rows), stem, look)
    return figure


# --- Figs. 8-11 -------------------------------------------------------------------------------------


def pair_figures(evaluations: Sequence[Evaluation], style: Style, stem: str | Path) -> Figure:
    """Figs. 8-11: quality and resources of all methods, for one model and dataset a call.

    (a) Quality, 0..1. (b) Energy (J) and latency (s) per completion, throughput (tokens/s), mean depth
    (layers run per token), each with its change against `full`. (c) Quality against mean depth and against
    latency, with fixed exits for reference, which (a) and (b) leave out.

    Raises:
        UserError: if `full` is missing, or there is more than one pair.
    """
    with _styled(style) as look:
        pairs = group(evaluations)
        if len(pairs) > 1:
            raise UserError(
                f"A pair figure shows one model and dataset, not {len(pairs)}; draw one for each of them."
            )
        (pair, methods), *_ = pairs.items()
        full = require_full(methods)
        looks = _method_looks(methods, look)
        bars = {name: methods[name] for name in methods if parse_method(name).kind != "fixed"}
        metrics = {
            key: label for key, label in _QUALITY.items() if any(key in e.quality for e in bars.values())
        }
        heights = [2.2, 0.85 + 0.17 * len(bars), 2.2]
        figure = Figure(figsize=(PAGE, sum(heights) + 0.2), layout="constrained")
        figure.suptitle(f"{_title(pair)} ({full.samples} completions)", fontsize=look.size + 1)
        top, middle, bottom = figure.subfigures(3, 1, height_ratios=heights)
        note = "no KV cache" if full.provenance.kv == "none" else "with KV cache"
        change = f"(b) Resources, and change against full depth ({note})"
        for part, title in ((middle, change), (bottom, "(c) Quality against cost")):
            part.suptitle(title, x=0.01, ha="left", fontsize=look.size)
        rows = _quality_bars(top.subplots(), bars, metrics, looks)
        resources = ("joules", "seconds", "tokens_per_second", "layers")
        for axis, metric in zip(middle.subplots(1, 4, sharey=True), resources, strict=True):
            rows += _resource_bars(axis, metric, bars, full, looks, look)
        against = (("layers", "rougeL"), ("layers", "codebleu"), ("seconds", "rougeL"))
        for axis, (cost, metric) in zip(bottom.subplots(1, 3), against, strict=True):
            rows += _scatter(axis, cost, metric, methods, looks, look)
        patches = [looks[name].patch() for name in bars]
        widest = max(len(patch.get_label()) for patch in patches)
        columns = int(PAGE * 72 / (look.size * (0.55 * widest + 3.2)))
        top.legend(handles=patches, loc="outside upper center", ncols=max(1, columns))
        kinds = {_series(parse_method(name), look): looks[name] for name in methods}
        lines = [
            one.line(kind, "white" if kind == "fixed exits" else one.colour) for kind, one in kinds.items()
        ]
        bottom.legend(handles=lines, loc="outside lower center", ncols=len(lines))
        about = {"model": pair[0], "dataset": pair[1]}
        _save(figure, pd.DataFrame([about | row for row in rows]), stem, look)
    return figure


def _quality_bars(
    axis: Axes,
    methods: Mapping[str, Evaluation],
    metrics: Mapping[str, str],
    looks: Mapping[str, _MethodLook],
) -> list[dict[str, Any]]:
    width = 0.84 / len(methods)
    rows = []
    for place, (name, evaluation) in enumerate(methods.items()):
        for at, metric in enumerate(metrics):
            interval = evaluation.quality.get(metric)
            if interval is None:
                continue
            x = at + (place - (len(methods) - 1) / 2) * width
            _fill(axis.bar(x, interval.value, width)[0], looks[name].colour, looks[name].hatch)
            _error_bar(axis, x, interval)
            rows.append({"panel": "a", "method": name, "metric": metric} | _interval_row(interval))
    axis.set_xticks(range(len(metrics)), metrics.values())
    axis.set_xlim(-0.5, len(metrics) - 0.5)
    axis.tick_params("x", length=0)
    axis.set_ylabel("Quality [0..1]")
    # Not as title of the subfigure, which would lie over the legend.
    axis.set_title("(a) Quality", loc="left", x=-0.05)
    return rows


_RESOURCES = {
    "seconds": "Latency\n[s per completion]",
    "tokens_per_second": "Throughput\n[tokens per s]",
    "layers": "Mean depth\n[layers per token]",
}


def _resource_bars(
    axis: Axes,
    metric: str,
    methods: Mapping[str, Evaluation],
    full: Evaluation,
    looks: Mapping[str, _MethodLook],
    look: _Look,
) -> list[dict[str, Any]]:
    rows = []
    known = [evaluation.cost[metric].high for evaluation in methods.values() if metric in evaluation.cost]
    limit = 1.38 * max(known, default=1)
    for place, (name, evaluation) in enumerate(methods.items()):
        interval = evaluation.cost.get(metric)
        if interval is None:
            if known:
                axis.text(0, place, " not measured", va="center", fontsize=look.size - 1.5, color=_FAINT)
            continue
        _fill(axis.barh(place, interval.value, 0.78)[0], looks[name].colour, looks[name].hatch)
        _error_bar(axis, place, interval, horizontal=True)
        change = None
        if metric in full.cost:
            change = change_percent(interval.value, full.cost[metric].value)
        if change is not None and name != "full":
            end = max(interval.value, interval.high) + 0.02 * limit
            axis.text(end, place, signed_percent(change), va="center", fontsize=look.size - 1.5)
        rows.append(
            {"panel": "b", "method": name, "metric": metric}
            | _interval_row(interval)
            | {"change_percent": change}
            | {"energy_source": evaluation.energy_source if metric == "joules" else None}
        )
    if known:
        axis.set_xlim(0, limit)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_formatter("{x:g}")
    else:
        _not_measured(axis)
        axis.set_xticks([0], [" "])  # keeps the label level with the others
    axis.set_yticks(range(len(methods)), [looks[name].label for name in methods])
    axis.set_ylim(len(methods) - 0.45, -0.55)
    axis.tick_params("y", length=0)
    axis.grid(False, axis="y")
    label = _energy_label(methods.values(), "\n[J per completion]")
    axis.set_xlabel(label if metric == "joules" else _RESOURCES[metric])
    return rows


def _scatter(
    axis: Axes,
    cost: str,
    metric: str,
    methods: Mapping[str, Evaluation],
    looks: Mapping[str, _MethodLook],
    look: _Look,
) -> list[dict[str, Any]]:
    rows = []
    series: dict[str | None, list[tuple[float, float]]] = {}
    for name, evaluation in methods.items():
        across, up = evaluation.cost.get(cost), evaluation.quality.get(metric)
        if across is None or up is None:
            continue
        kind = parse_method(name)
        faint = kind.kind == "fixed"
        _cross(axis, across, up, _darker(looks[name].colour))
        axis.plot(
            across.value, up.value, marker=looks[name].marker, linestyle="none",
            markersize=7 if looks[name].marker == "*" else 4 if faint else 5,
            markerfacecolor="white" if faint else looks[name].colour, markeredgewidth=0.7,
            markeredgecolor=_darker(looks[name].colour), zorder=3,
        )  # fmt: skip
        if kind.kind != "base":  # full depth is the deepest fixed exit
            series.setdefault(kind.agent, []).append((across.value, up.value))
        rows.append(
            {"panel": "c", "method": name, "metric": metric, "against": cost}
            | {"x": across.value, "x_low": across.low, "x_high": across.high}
            | _interval_row(up)
        )
    for key, points in series.items():
        colour = look.agent_colour(key) if key else look.colours["fixed"]
        axis.plot(*zip(*sorted(points), strict=True), color=colour, linewidth=0.8, zorder=1, alpha=0.8)
    if not rows:
        _not_measured(axis, _QUALITY[metric])
    axis.set_xlabel(
        {"layers": "Mean depth [layers per token]", "seconds": "Latency [s per completion]"}[cost]
    )
    axis.set_ylabel(f"{_QUALITY[metric]} [0..1]")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=cost == "layers", steps=[1, 2, 4, 5, 8, 10]))
    axis.xaxis.set_major_formatter("{x:g}")
    return rows


# --- every exit rule --------------------------------------------------------------------------------

_FRONTIER_QUALITY = {
    "agreement": "Agreement with\nfull depth",
    "token_accuracy": "Token accuracy",
    "rougeL": "ROUGE-L",
    "codebleu": "CodeBLEU",
}
_FRONTIER_COST = {
    "layers": "Mean depth [layers per token]",
    "seconds": "Time [s per completion]",
    "joules": "Energy [J per completion]",
}
_RULE_COLOURS = (_BLUE, _VERMILION, _GREEN, _PURPLE, _SKY, _ORANGE, "#8C6D31", "#666666")
_RULE_MARKERS = ("o", "s", "v", "P", "X", "D", "h", "<")


def frontier(records: Sequence[Mapping[str, Any]], style: Style, stem: str | Path) -> Figure:
    """Every exit rule of one model and dataset: quality (0..1) against depth, time and measured energy.

    Bands are 95 % intervals over samples. The star is the full model with its KV cache; the oracle is a
    bound. Energy that is an estimate from CPU time would repeat the panel of time and is left out. The
    last row is along the full model's text, where nothing is timed; thin lines are a rule's other seeds.
    White markers are rules whose drafts the final layer verified, with all layers, to the full model's text.

    Args:
        records: one, as `greencode.frontier.record` gives it.

    Raises:
        UserError: if there is not exactly one.
    """
    if len(records) != 1:
        raise UserError(f"A frontier shows one model and dataset, not {len(records)}; draw one for each.")
    record = records[0]
    with _styled(style) as look:
        measured = record["energy_source"] in ("nvml", "rapl")
        costs = [name for name in _FRONTIER_COST if name != "joules" or measured]
        figure = Figure(figsize=(PAGE, 8.4), layout="constrained")
        figure.suptitle(
            f"{_title((record['model'], record['dataset']))} ({record['samples']} completions)",
            fontsize=look.size + 1,
        )
        axes = figure.subplots(
            len(_FRONTIER_QUALITY) + 1, len(costs), sharex="col", sharey="row", squeeze=False
        )
        *measured_axes, (forced, *unused) = axes
        by_rule: dict[str, list[Mapping[str, Any]]] = {}
        for point in record["points"]:
            by_rule.setdefault(point["rule"], []).append(point)
        looks = _rule_looks(by_rule, record["verified"])
        rows: list[dict[str, Any]] = []
        for line, quality in zip(measured_axes, _FRONTIER_QUALITY, strict=True):
            line[0].set_ylabel(f"{_FRONTIER_QUALITY[quality]} [0..1]")
            for axis, cost in zip(line, costs, strict=True):
                for rule, points in by_rule.items():
                    rows += _rule_line(axis, rule, points, cost, quality, looks[rule])
        forced.set_ylabel("Agreement along the\nfull model's text [0..1]")
        for rule, points in by_rule.items():
            rows += _rule_line(forced, rule, points, "forced_layers", "forced_agreement", looks[rule])
        rows += _seed_lines(forced, record["seeds"], looks)
        for axis in unused:
            axis.axis("off")
        for axis, cost in zip((forced, *measured_axes[-1][1:]), costs, strict=True):
            axis.tick_params(labelbottom=True)
            axis.set_xlabel(_FRONTIER_COST[cost])
            axis.set_xlim(left=0)
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=cost == "layers", steps=[1, 2, 4, 5, 8, 10]))
            axis.xaxis.set_major_formatter("{x:g}")
        handles = [
            Line2D([], [], label=_rule_label(rule, record["rules"]), **looks[rule]) for rule in by_rule
        ]
        if record["seeds"]:
            handles.append(Line2D([], [], color=_FAINT, linewidth=0.6, label="another seed of it"))
        unused[0].legend(handles=handles, loc="lower center", ncols=2)
        about = {"model": record["model"], "dataset": record["dataset"]}
        _save(figure, pd.DataFrame([about | row for row in rows]), stem, look)
    return figure


def _rule_looks(rules: Iterable[str], verified: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Colour, line and marker of each rule; a verified one has those of the rule that decides."""
    verified = verified or {}
    looks: dict[str, dict[str, Any]] = {
        "full": {"color": "black", "marker": "*", "markersize": 9, "linestyle": "none"},
        "oracle": {"color": "black", "marker": "d", "markersize": 5, "linestyle": "none"},
        "fixed": {"color": _FAINT, "marker": "^", "linestyle": ":", "markersize": 4},
    }
    others = [rule for rule in rules if rule not in looks and rule not in verified]
    for place, rule in enumerate(others):
        looks[rule] = {
            "color": _RULE_COLOURS[place % len(_RULE_COLOURS)],
            "marker": _RULE_MARKERS[place % len(_RULE_MARKERS)],
            "linestyle": ("-", "--")[place // len(_RULE_COLOURS) % 2],
            "markersize": 4,
        }
    for rule, decides in verified.items():
        looks[rule] = looks[decides] | {"markerfacecolor": "white", "markersize": 5}
    return looks


def _rule_label(rule: str, kinds: Mapping[str, str]) -> str:
    named = {"full": "full depth, cached", "fixed": "fixed exits", "oracle": "oracle (bound)"}
    if rule not in kinds:
        return named.get(rule, rule)
    kind = {"agent": "PPO", "stopping": "cost-to-go"}.get(kinds[rule], kinds[rule])
    return rule if kind == rule else f"{rule} ({kind})"


def _rule_line(
    axis: Axes,
    rule: str,
    points: Sequence[Mapping[str, Any]],
    cost: str,
    quality: str,
    look: Mapping[str, Any],
) -> list[dict[str, Any]]:
    known = [p for p in points if cost in p["metrics"] and quality in p["metrics"]]
    known.sort(key=lambda point: point["metrics"][cost]["value"])
    if not known:
        return []
    across = [point["metrics"][cost] for point in known]
    up = [point["metrics"][quality] for point in known]
    x, y = [one["value"] for one in across], [one["value"] for one in up]
    if len(known) > 1:
        band = [one["low"] for one in up], [one["high"] for one in up]
        axis.fill_between(x, *band, color=look["color"], alpha=0.07, linewidth=0)
    else:
        _cross(axis, Interval(**across[0]), Interval(**up[0]), look["color"])
    axis.plot(x, y, linewidth=1.0, zorder=3, **look)
    return [
        {"rule": rule, "method": point["method"], "share": point["share"], "cost": cost, "metric": quality}
        | {f"x_{end}" if end != "value" else "x": a[end] for end in ("value", "low", "high")}
        | {end: u[end] for end in ("value", "low", "high")}
        for point, a, u in zip(known, across, up, strict=True)
    ]


def _seed_lines(
    axis: Axes, seeds: Sequence[Mapping[str, Any]], looks: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A thin line for each seed of a rule but its first, whose line is the rule's own."""
    lines: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in seeds:
        lines.setdefault((row["rule"], row["seed"]), []).append(row)
    first = dict(reversed(lines))  # of each rule the seed that comes first
    rows = []
    for (rule, seed), points in lines.items():
        if seed == first[rule]:
            continue
        points = sorted(points, key=lambda point: point["forced_layers"])
        x, y = ([point[name] for point in points] for name in ("forced_layers", "forced_agreement"))
        axis.plot(x, y, linewidth=0.6, color=looks[rule]["color"], zorder=3)
        rows += [
            {"rule": rule, "seed": seed, "share": point["share"], "cost": "forced_layers"}
            | {"metric": "forced_agreement", "x": a, "value": b}
            for point, a, b in zip(points, x, y, strict=True)
        ]
    return rows


def fig12_calibration(records: Sequence[Mapping[str, Any]], style: Style, stem: str | Path) -> Figure:
    """Fig. 12 (not in the paper): what was promised on validation against what the test split gave.

    One panel for savings of layers, one for agreement with full depth; one point per rule, model and
    dataset, with its 95 % interval over test episodes. Above the diagonal a promise was kept. Targets that
    could not be promised are counted below the axis.

    Raises:
        UserError: if there is no record.
    """
    if not records:
        raise UserError("There is no frontier to show; run the target frontier for one model at least.")
    with _styled(style) as look:
        figure = Figure(figsize=(PAGE, 3.6), layout="constrained")
        looks = _rule_looks(dict.fromkeys(row["rule"] for r in records for row in r["calibration"]))
        kinds = {name: kind for record in records for name, kind in record["rules"].items()}
        rows: list[dict[str, Any]] = []
        for axis, wanted in zip(figure.subplots(1, 2), ("saving", "agreement"), strict=True):
            asked = [
                {"model": record["model"], "dataset": record["dataset"]} | row
                for record in records
                for row in record["calibration"]
                if row["wanted"] == wanted
            ]
            targets = sorted({row["target"] for row in asked})
            span = [0.0, 1.0] if wanted == "saving" else [min(targets, default=0.0) - 0.1, 1.0]
            axis.plot(span, span, color=_FAINT, linewidth=0.8, linestyle="--", zorder=1)
            step = (span[1] - span[0]) * 0.006
            order = list(looks)
            for row in asked:
                if row["threshold"] is None:
                    continue
                x = row["target"] + step * (order.index(row["rule"]) - len(order) / 2)
                one = Interval(row["obtained_value"], row["obtained_low"], row["obtained_high"])
                _error_bar(axis, x, one)
                axis.plot(x, one.value, zorder=3, **(looks[row["rule"]] | {"linestyle": "none"}))
            for target in targets:
                here = [row for row in asked if row["target"] == target]
                kept = sum(row["threshold"] is not None for row in here)
                axis.annotate(
                    f"{kept}/{len(here)}", (target, 0.02), xycoords=("data", "axes fraction"), ha="center",
                    fontsize=look.size - 2, color=_FAINT,
                )  # fmt: skip
            rows += asked
            what = "layers saved" if wanted == "saving" else "agreement with full depth"
            axis.set_xlabel(f"Promised: {what} [share]")
            axis.set_ylabel(f"Obtained on test: {what} [share]")
            axis.set_xlim(*([0, 0.6] if wanted == "saving" else span))
        handles = [
            Line2D([], [], label=_rule_label(rule, kinds), **(one | {"linestyle": "none"}))
            for rule, one in looks.items()
            if rule in kinds
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 6))
        _save(figure, pd.DataFrame(rows), stem, look)
    return figure


# --- published values beside measured ones ----------------------------------------------------------

_PUBLISHED = {"llama3.2-3b": ("Llama 3.2 3B", "o"), "opt-2.7b": ("OPT 2.7B", "s")}


def published_vs_measured(
    evaluations: Sequence[Evaluation], published: pd.DataFrame, style: Style, stem: str | Path
) -> Figure:
    """ROUGE-L against energy, both relative to the full model, as published and in this study.

    One row per dataset. Left, hollow: the paper's models, of another size, on other hardware and without
    KV cache, so what was saved compares with this study's only in kind. Right, filled: this study's agents
    and fixed exits. Intervals are of the method alone, divided by the full model's value.

    Args:
        published: see `greencode.tables.read_published`; shown for the dataset's language.

    Raises:
        UserError: if a pair lacks `full`.
    """
    with _styled(style) as look:
        pairs = group(evaluations)
        datasets = {dataset: next(iter(m.values())).language for (_, dataset), m in pairs.items()}
        count = len(datasets)
        figure = Figure(figsize=(PAGE, 2.45 * count + 0.75), layout="constrained")
        axes = figure.subplots(count, 2, sharex=True, sharey=True, squeeze=False)
        models = list(dict.fromkeys(model for model, _ in pairs))
        look.agents = sorted({m.agent for e in evaluations if (m := parse_method(e.method)).agent})
        rows: list[dict[str, Any]] = []
        for (left, right), (dataset, language) in zip(axes, datasets.items(), strict=True):
            rows += _published_points(left, dataset, language, published, look)
            here = {pair: methods for pair, methods in pairs.items() if pair[1] == dataset}
            rows += _measured_points(right, here, models, look)
            left.set_ylabel(f"{dataset}\nROUGE-L relative to full depth")
            for axis in (left, right):
                axis.axvline(1, color="#999999", linewidth=0.7, zorder=0)
                axis.axhline(1, color="#999999", linewidth=0.7, zorder=0)
                if axis.lines[2:]:  # more than the two guides
                    axis.legend(loc="lower right", handletextpad=0.3)
        kept = any(methods["full"].provenance.kv != "none" for methods in pairs.values())
        names = ", ".join(models)
        names = names if len(names) < 30 or len(models) == 1 else f"{len(models)} models"
        axes[0, 0].set_title("published: Llama 3.2 3B / OPT 2.7B,\nRTX 8000, no KV cache")
        axes[0, 1].set_title(f"this study: {names},\n{'KV cache' if kept else 'no KV cache'}")
        axes[0, 0].set_xlim(0, 1.06 * axes[0, 0].get_xlim()[1])
        axes[0, 0].set_ylim(bottom=0)
        axes[-1, 0].set_xlabel("Energy relative to full depth")
        axes[-1, 1].set_xlabel(_energy_label(evaluations, " relative to full depth"))
        figure.supxlabel(
            "Other models and another protocol: compare shapes, not values. Numbers are thresholds T.",
            fontsize=look.size - 1, color=_FAINT,
        )  # fmt: skip
        _save(figure, pd.DataFrame(rows), stem, look)
    return figure


def _published_points(
    axis: Axes, dataset: str, language: str, published: pd.DataFrame, look: _Look
) -> list[dict[str, Any]]:
    rouge, energy, depth = (
        published_metric(published, metric) for metric in ("rougeL", "mean_energy", "derived.layers_run_mean")
    )
    rows = []
    for place, (model, (name, marker)) in enumerate(_PUBLISHED.items()):
        full = (model, language, "finetuned", -1.0)
        if full not in rouge or full not in energy:
            continue
        points = []
        for key in sorted(key for key in rouge.index if key[:3] == (model, language, "gc") and key in energy):
            points.append((energy[key] / energy[full], rouge[key] / rouge[full], key[3]))
            rows.append(
                {"origin": "paper", "model": model, "dataset": dataset, "method": f"gc-T{key[3]:g}"}
                | {"threshold": key[3], "layers": depth.get(key)}
                | {"relative_energy": points[-1][0], "relative_rougeL": points[-1][1]}
                | {"energy_source": "nvml", "kv": "none"}
            )
        _threshold_line(axis, points, _SERIES[place], marker, name, look, hollow=True)
    if not rows:
        axis.text(0.5, 0.5, "nothing published", ha="center", transform=axis.transAxes, color=_FAINT)
    return rows


def _measured_points(
    axis: Axes, pairs: Mapping[Pair, Mapping[str, Evaluation]], models: Sequence[str], look: _Look
) -> list[dict[str, Any]]:
    rows = []
    for (model, dataset), methods in pairs.items():
        full = require_full(methods)
        series: dict[str | None, list[tuple[float, float, float | None]]] = {}
        for name, evaluation in methods.items():
            method = parse_method(name)
            energy, rouge = (_relative(evaluation, full, metric) for metric in ("joules", "rougeL"))
            if method.kind in ("base", "full") or energy is None or rouge is None:
                continue
            series.setdefault(method.agent, []).append((energy.value, rouge.value, evaluation.threshold))
            _cross(axis, energy, rouge, look.series_colour(model, method.agent, models))
            rows.append(
                {"origin": "this study", "model": model, "dataset": dataset, "method": name}
                | {"threshold": evaluation.threshold, "layers": evaluation.cost["layers"].value}
                | {"relative_energy": energy.value}
                | {"relative_energy_low": energy.low, "relative_energy_high": energy.high}
                | {"relative_rougeL": rouge.value}
                | {"relative_rougeL_low": rouge.low, "relative_rougeL_high": rouge.high}
                | {"energy_source": evaluation.energy_source, "kv": evaluation.provenance.kv}
            )
        for key, points in series.items():
            colour = look.series_colour(model, key, models)
            if key is None:
                ordered = zip(*sorted(point[:2] for point in points), strict=True)
                axis.plot(*ordered, "^:", color=colour, markersize=3)
                continue
            label = model if len(look.agents) == 1 else f"{model}, {key}"
            number = models.index(model) * len(look.agents) + look.agents.index(key)
            marker = _MARKERS[number % len(_MARKERS)]
            _threshold_line(axis, points, colour, marker, label, look)
    if any(parse_method(row["method"]).kind == "fixed" for row in rows):
        colour = _FAINT if len(models) > 1 else look.colours["fixed"]
        axis.plot([], [], "^:", color=colour, markersize=3, label="fixed exits")
    if not rows:
        _not_measured(axis, "Energy")
    return rows


def _relative(evaluation: Evaluation, full: Evaluation, metric: str) -> Interval | None:
    one, whole = _metric(evaluation, metric), _metric(full, metric)
    if one is None or whole is None or not whole.value:
        return None
    return Interval(one.value / whole.value, one.low / whole.value, one.high / whole.value)


def _threshold_line(
    axis: Axes,
    points: Sequence[tuple[float, float, float | None]],
    colour: str,
    marker: str,
    label: str,
    look: _Look,
    hollow: bool = False,
) -> None:
    x, y, thresholds = zip(*sorted(points), strict=True)
    axis.plot(
        x, y, color=colour, marker=marker, markersize=5, linewidth=0.8, label=label,
        markerfacecolor="white" if hollow else colour, markeredgewidth=1,
    )  # fmt: skip
    # The two ends tell which way the threshold runs; a label on each point would cover the others.
    up = (3, -4, 9, -10)[len(axis.get_legend_handles_labels()[0]) % 4 - 1]
    for at, aside, align in ((0, -5, "right"), (-1, 5, "left")):
        if thresholds[at] is not None:
            axis.annotate(
                f"{thresholds[at]:.3g}", (x[at], y[at]), (aside, up), textcoords="offset points", ha=align,
                va="center", fontsize=look.size - 2, color=_darker(colour),
            )  # fmt: skip


# --- the look ---------------------------------------------------------------------------------------


class _Look:
    """Colours, sizes and file formats of one figure."""

    def __init__(self, style: Style) -> None:
        palette = style.get("palette", STYLE["palette"])
        if isinstance(palette, str) and palette != "colorblind":
            raise UserError(
                f"Palette {palette!r} is unknown; choose 'colorblind' or give colours by method, e.g. fixed."
            )
        self.colours = PALETTE | (dict(palette) if isinstance(palette, Mapping) else {})
        for name, colour in self.colours.items():
            if not mpl.colors.is_color_like(colour):
                raise UserError(f"Palette colour {colour!r} of {name!r} is no colour; write e.g. '#0072B2'.")
        self.size = float(style.get("font_size", STYLE["font_size"]))
        self.dpi = int(style.get("dpi", STYLE["dpi"]))
        self.formats = list(style.get("formats", STYLE["formats"]))
        if unknown := set(self.formats) - set(_METADATA):
            raise UserError(f"Figure format {min(unknown)!r} is unknown; choose from pdf, png, svg.")
        self.agents: list[str] = []

    def agent_colour(self, agent: str) -> str:
        if agent in self.colours:
            return self.colours[agent]
        return _AGENTS[self.agents.index(agent) % len(_AGENTS)]

    def series_colour(self, model: str, agent: str | None, models: Sequence[str]) -> str:
        """Of the line of an agent, or of fixed exits (None): by model where there are several."""
        if len(models) > 1:
            return _SERIES[models.index(model) % len(_SERIES)]
        return self.agent_colour(agent) if agent else self.colours["fixed"]


class _MethodLook:
    """Colour, hatch, marker and label of one method; the same in all panels."""

    def __init__(self, colour: str, hatch: str | None, marker: str, label: str) -> None:
        self.colour, self.hatch, self.marker, self.label = colour, hatch, marker, label

    def patch(self) -> Patch:
        return _fill(Patch(label=self.label), self.colour, self.hatch)

    def line(self, label: str, inside: str) -> Line2D:
        return Line2D(
            [], [], color=_darker(self.colour), marker=self.marker, markerfacecolor=inside,
            markersize=7 if self.marker == "*" else 5, linestyle="none", label=label,
        )  # fmt: skip


def _method_looks(methods: Iterable[str], look: _Look) -> dict[str, _MethodLook]:
    """One look per method; an agent's thresholds run from light to dark."""
    parsed = [parse_method(name) for name in methods]
    look.agents = sorted({method.agent for method in parsed if method.agent})
    looks = {}
    for method in parsed:
        if method.kind == "agent":
            looks[method.name] = _agent_look(method, parsed, look)
        elif method.kind == "fixed":
            looks[method.name] = _MethodLook(look.colours["fixed"], None, "^", f"fixed {method.depth}")
        else:
            hatch, marker = {"base": ("////", "s"), "full": (None, "*")}[method.kind]
            label = {"base": "base", "full": "full depth"}[method.kind]
            looks[method.name] = _MethodLook(look.colours[method.kind], hatch, marker, label)
    return looks


def _series(method: Method, look: _Look) -> str:
    """What the methods of one kind are called together."""
    names = {"base": "base", "full": "full depth", "fixed": "fixed exits"}
    if method.kind in names:
        return names[method.kind]
    name = "GC" if len(look.agents) == 1 else method.agent or ""
    if method.wanted is not None:
        return f"{name} at a promise"
    return "GC (light to dark: rising T)" if len(look.agents) == 1 else name


def _agent_look(method: Method, among: Sequence[Method], look: _Look) -> _MethodLook:
    number = look.agents.index(method.agent)
    name = "GC" if len(look.agents) == 1 else method.agent
    colour = look.agent_colour(method.agent or "")
    if method.wanted is not None:
        hatch = {"saving": "++", "agreement": "oo"}.get(method.wanted, "**")
        return _MethodLook(colour, hatch, "d", f"{name}({method.wanted} ≥ {method.target:.3g})")
    thresholds = sorted(
        other.threshold or 0 for other in among if other.agent == method.agent and other.wanted is None
    )
    place = thresholds.index(method.threshold or 0) / max(1, len(thresholds) - 1)
    # From 75 % towards white to 55 % towards black.
    toward, share = (1.0, 0.75 - 1.5 * place) if place < 0.5 else (0.0, 1.1 * (place - 0.5))
    label = name if method.threshold is None else f"{name}(T={method.threshold:g})"
    return _MethodLook(
        to_hex(np.array(to_rgb(colour)) * (1 - share) + toward * share),
        (None, "....", "xxxx", "\\\\\\\\")[number % 4],
        _MARKERS[number % len(_MARKERS)],
        label,
    )


@contextlib.contextmanager
def _styled(style: Style) -> Iterator[_Look]:
    look = _Look(style)
    size = look.size
    settings = {
        "font.family": "DejaVu Sans",
        "font.size": size,
        "axes.titlesize": size,
        "axes.labelsize": size,
        "xtick.labelsize": size - 1,
        "ytick.labelsize": size - 1,
        "legend.fontsize": size - 1,
        "legend.frameon": False,
        "legend.handlelength": 1.6,
        "legend.columnspacing": 1.2,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#E5E5E5",
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.2,
        "hatch.linewidth": 0.5,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "pdf.fonttype": 42,
        "svg.hashsalt": "greencode",
        "savefig.bbox": None,
    }
    with mpl.rc_context():
        mpl.rcdefaults()  # a reader's own matplotlibrc must not change the figures
        mpl.rcParams.update(settings)
        yield look


def _save(figure: Figure, table: pd.DataFrame, stem: str | Path, look: _Look) -> None:
    stem = Path(stem)
    for kind in look.formats:
        with atomic(stem.with_name(f"{stem.name}.{kind}")) as temporary:
            figure.savefig(temporary, format=kind, dpi=look.dpi, metadata=_METADATA[kind])
    write_table(table, stem.with_name(f"{stem.name}.csv"))


def _panels(
    keys: Iterable[Any], height: float, remedy: str, share: str | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of one panel per key: one column's width for one panel, else two to a row."""
    count = len(list(keys))
    if not count:
        raise UserError(f"There is nothing to draw; {remedy}.")
    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(COLUMN if count == 1 else PAGE, height * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=share == "y", squeeze=False).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, list(axes[:count])


def _outer_labels(axes: Sequence[Axes], x: str, y: str) -> None:
    columns = min(2, len(axes))
    for place, axis in enumerate(axes):
        if place + columns >= len(axes):
            axis.set_xlabel(x)
        if place % columns == 0:
            axis.set_ylabel(y)


def _title(pair: Pair, between: str = ", ") -> str:
    return f"{pair[0]}{between}{pair[1]}"


def _energy_label(evaluations: Iterable[Evaluation], unit: str) -> str:
    sources = {e.energy_source for e in evaluations if "joules" in e.cost}
    if "estimate" not in sources:
        return f"Energy{unit}"
    return f"Energy (estimate){unit}" if len(sources) == 1 else f"Energy (partly an estimate){unit}"


def _metric(evaluation: Evaluation, metric: str) -> Interval | None:
    return evaluation.quality.get(metric) or evaluation.cost.get(metric)


def _interval_row(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _columns(points: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return list(points), list(points.values())


def _arms(interval: Interval) -> list[list[float]]:
    return [[max(0.0, interval.value - interval.low)], [max(0.0, interval.high - interval.value)]]


def _error_bar(axis: Axes, at: float, interval: Interval, horizontal: bool = False) -> None:
    where = {"x": at, "y": interval.value, "yerr": _arms(interval)}
    if horizontal:
        where = {"x": interval.value, "y": at, "xerr": _arms(interval)}
    bar = axis.errorbar(**where, fmt="none", ecolor="black", elinewidth=0.7, capsize=1.2, capthick=0.7)
    for line in (*bar.lines[1], *bar.lines[2]):  # visible on dark bars too
        line.set_path_effects([withStroke(linewidth=1.7, foreground="white")])


def _cross(axis: Axes, across: Interval, up: Interval, colour: Any) -> None:
    axis.errorbar(
        across.value, up.value, xerr=_arms(across), yerr=_arms(up),
        fmt="none", ecolor=colour, elinewidth=0.6, alpha=0.6, zorder=2,
    )  # fmt: skip


def _fill(patch: Any, colour: Any, hatch: str | None) -> Any:
    """Fill a bar or a legend's patch; outline and hatch keep it apart from others in grey print."""
    light = np.dot(to_rgb(colour), (0.3, 0.6, 0.1)) > 0.6
    patch.set(facecolor=colour, edgecolor="#222222", linewidth=0.4, hatch=hatch)
    patch.set_hatchcolor(_darker(colour) if light else "white")
    return patch


def _darker(colour: Any) -> tuple[float, ...]:
    return tuple(0.75 * channel for channel in to_rgb(colour))


def _not_measured(axis: Axes, what: str | None = None) -> None:
    text = f"{what}: not measured" if what else "not measured"
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=_FAINT)
