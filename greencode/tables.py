"""Tables I-IV of the paper and the tables of all results, as data frames and CSV files.

Times are seconds, energies joules, depths layers run, shares percent. What was not measured is an empty
cell, never 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from greencode.errors import UserError
from greencode.files import atomic
from greencode.results import Evaluation

Pair = tuple[str, str]

UNITS = {
    "seconds": "s/completion",
    "cpu_seconds": "s/completion",
    "joules": "J/completion",
    "joules_per_token": "J/token",
    "tokens_per_second": "token/s",
    "layers": "layers/token",
    "layers_skipped": "layers/token",
    "layer_positions": "layer x position/completion",
    "checks": "1/completion",
}
"""Cost metric -> unit; quality metrics are shares in 0..1."""

PAPER_DATASETS = (
    {"dataset": "JavaCorpus", "language": "java", "files_train": 12934, "files_validation": 7189,
     "files_test": 8268, "tokens_train": 15_800_000, "tokens_validation": 3_800_000,
     "tokens_test": 5_300_000},
    {"dataset": "PY150", "language": "python", "files_train": 100_000, "files_test": 50_000,
     "tokens_train": 76_300_000, "tokens_test": 37_200_000},
)  # fmt: skip
"""Table I as printed."""

PAPER_MODELS = (
    {"model": "OPT 2.7B", "family": "opt", "parameters": 2_700_000_000, "layers": 32},
    {"model": "Llama 3.2 3B", "family": "llama", "parameters": 3_000_000_000, "layers": 28},
)
"""Table II as printed; the numbers of layers are those of its text."""

PAPER_PPO = {
    "paper, setting 1": {
        "steps": 500_000, "batch size": 512, "buffer": 4096, "epochs": 6, "learning rate": 5e-5,
        "learning rate schedule": "linear", "discount": 0.99, "hidden layers": 2, "hidden units": 64,
    },
    "paper, setting 2": {
        "steps": 500_000, "batch size": 32, "buffer": 256, "epochs": 2, "learning rate": 1e-4,
        "learning rate schedule": "linear", "discount": 0.99, "hidden layers": 2, "hidden units": 32,
    },
}  # fmt: skip
"""The two settings that Table III reads as."""

_FIXED = re.compile(r"fixed-(\d+)")
_THRESHOLD = re.compile(r"(.+)-(T|saving|agreement|rougeL)(\d+(?:\.\d+)?(?:e-?\d+)?)")


@dataclass(frozen=True)
class Method:
    """What a method's name says.

    Attributes:
        kind: `base`, `full`, `fixed` or `agent` (any exit policy that is none of the others).
        agent: the agent's name, if it is one.
        threshold: T of an agent.
        depth: layers run by a fixed exit.
        wanted, target: what an agent at a calibrated threshold promises.
    """

    name: str
    kind: str
    agent: str | None = None
    threshold: float | None = None
    depth: int | None = None
    wanted: str | None = None
    target: float | None = None

    @property
    def order(self) -> tuple[int, str, str, float]:
        """Sort key: base, full, fixed by depth, agents by name, by threshold, and by promise."""
        rank = ("base", "full", "fixed", "agent").index(self.kind)
        return (
            rank,
            self.agent or "",
            self.wanted or "",
            float(self.depth or self.threshold or self.target or 0),
        )


def parse_method(name: str) -> Method:
    """Take a method's name apart: `base`, `full`, `fixed-8`, `frugal-T0.9`, `frugal-saving0.3`."""
    if name in ("base", "full"):
        return Method(name, name)
    if found := _FIXED.fullmatch(name):
        return Method(name, "fixed", depth=int(found[1]))
    if found := _THRESHOLD.fullmatch(name):
        agent, what, number = found[1], found[2], float(found[3])
        if what == "T":
            return Method(name, "agent", agent, threshold=number)
        return Method(name, "agent", agent, wanted=what, target=number)
    return Method(name, "agent", agent=name)


def group(evaluations: Iterable[Evaluation]) -> dict[Pair, dict[str, Evaluation]]:
    """Evaluations by (model, dataset), then by method in the order of figures and tables.

    Pairs keep the order in which they come.

    Raises:
        UserError: if there are none, or one method comes twice for a pair.
    """
    found: dict[Pair, dict[str, Evaluation]] = {}
    for evaluation in evaluations:
        methods = found.setdefault((evaluation.model, evaluation.dataset), {})
        if evaluation.method in methods:
            raise UserError(
                f"Two evaluations are of {evaluation.method} for {evaluation.model} on "
                f"{evaluation.dataset}; give each once."
            )
        methods[evaluation.method] = evaluation
    if not found:
        raise UserError("There are no evaluations to show; evaluate at least one model and dataset.")
    return {
        pair: {name: methods[name] for name in sorted(methods, key=lambda name: parse_method(name).order)}
        for pair, methods in found.items()
    }


def require_full(methods: Mapping[str, Evaluation]) -> Evaluation:
    """The fine-tuned model at full depth, against which savings are quoted.

    Raises:
        UserError: if it is not among the methods.
    """
    if "full" not in methods:
        one = next(iter(methods.values()))
        raise UserError(
            f"The method 'full' of {one.model} on {one.dataset} is missing; evaluate it too, for savings are "
            "quoted against it."
        )
    return methods["full"]


def change_percent(value: float, reference: float) -> float | None:
    """Change from `reference` to `value` in percent: -20 is a fifth less; None from 0."""
    return 100 * (value / reference - 1) if reference else None


def signed_percent(change: float) -> str:
    """A change for people: `−23 %`, `+4 %`, `±0 %`."""
    text = f"{change:+.0f} %".replace("-", "−")
    return "±0 %" if text[1:] == "0 %" else text


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write CSV atomically: the same table gives the same bytes, floats in full precision."""
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8")


def read_published(path: str | Path) -> pd.DataFrame:
    """The paper's values: model, dataset, method, threshold, metric, value.

    Raises:
        UserError: if the file is missing or something else.
    """
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as published values ({error}); restore the file.") from None
    if missing := {"model", "dataset", "method", "threshold", "metric", "value"} - set(table):
        raise UserError(f"{path} lacks the column {min(missing)!r} of published values; restore the file.")
    return table


def published_metric(published: pd.DataFrame, metric: str) -> pd.Series:
    """One metric of the paper by (model, dataset, method, threshold); the threshold is -1 where none is."""
    rows = published[published["metric"] == metric].fillna({"threshold": -1.0})
    return rows.set_index(["model", "dataset", "method", "threshold"])["value"]


# --- Tables I-IV ------------------------------------------------------------------------------------


def table1_datasets(manifests: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Table I: files and tokens per split of each dataset, the paper's two beside.

    Args:
        manifests: dataset name -> its data manifest.

    Raises:
        UserError: if a manifest has no splits.
    """
    rows: list[dict[str, Any]] = []
    for dataset, manifest in manifests.items():
        if not manifest.get("splits"):
            raise UserError(f"The manifest of dataset {dataset} has no splits; prepare the dataset again.")
        source = manifest.get("source", {})
        row = {
            "dataset": dataset,
            "language": manifest.get("language"),
            "origin": "this study",
            "source": source.get("kind") if isinstance(source, Mapping) else source,
            "variant": manifest.get("variant"),
        }
        for quantity in ("files", "tokens"):
            for split, counts in manifest["splits"].items():
                row[f"{quantity}_{split}"] = counts.get(quantity)
        rows.append(row)
    rows += [{"origin": "paper", "source": "CodeXGLUE"} | row for row in PAPER_DATASETS]
    return _whole(pd.DataFrame(rows), ("files_", "tokens_"))


def table2_models(models: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Table II: parameters, layers, hidden units and exit points of each model, the paper's two beside.

    Args:
        models: name, family, parameters, layers, hidden, exit_points of each.
    """
    rows = [
        {
            "model": model["name"],
            "origin": "this study",
            "family": model.get("family"),
            "parameters": model.get("parameters"),
            "layers": model["layers"],
            "hidden": model.get("hidden"),
            "exit_points": _listed(model.get("exit_points") or ()),
        }
        for model in models
    ]
    rows += [{"origin": "paper"} | row for row in PAPER_MODELS]
    return _whole(pd.DataFrame(rows), ("parameters", "layers", "hidden"))


def table3_ppo(learning: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Table III: hyperparameters of PPO and coefficients of the reward, the paper's two settings beside.

    One column per agent; where an agent differs between datasets or models, one for each of these.

    Args:
        learning: learning records of the agents, with model, dataset, agent, settings, reward.
    """
    columns: dict[str, dict[str, Any]] = {}
    for record in learning:
        alike = [other for other in learning if other["agent"] == record["agent"]]
        there = [other for other in alike if other["dataset"] == record["dataset"]]
        values = _hyperparameters(record)
        if all(_hyperparameters(other) == values for other in alike):
            label = record["agent"]
        elif all(_hyperparameters(other) == values for other in there):
            label = f"{record['agent']}, {record['dataset']}"
        else:
            label = f"{record['agent']}, {record['dataset']}, {record['model']}"
        columns[label] = values
    columns |= PAPER_PPO
    names = dict.fromkeys(name for values in columns.values() for name in values)
    rows = [
        {"hyperparameter": name} | {label: values.get(name) for label, values in columns.items()}
        for name in names
    ]
    return pd.DataFrame(rows, dtype=object)


def _hyperparameters(record: Mapping[str, Any]) -> dict[str, Any]:
    settings = dict(record.get("settings", {}))
    hidden = list(settings.pop("hidden", ()))
    values = {
        "steps": settings.pop("steps", None),
        "batch size": settings.pop("batch_size", None),
        "buffer": settings.pop("buffer", None),
        "epochs": settings.pop("epochs", None),
        "learning rate": settings.pop("learning_rate", None),
        "learning rate schedule": "linear",
        "discount": settings.pop("discount", None),
        "hidden layers": len(hidden) or None,
        "hidden units": hidden[0] if len(set(hidden)) == 1 else _listed(hidden),
    }
    settings.pop("threads", None)  # of the machine, not of the method
    values |= {name.replace("_", " "): value for name, value in settings.items()}
    values |= {f"reward {name}": value for name, value in record.get("reward", {}).items()}
    return {
        name: _listed(value) if isinstance(value, list | tuple) else value for name, value in values.items()
    }


def table4_overhead(
    evaluations: Sequence[Evaluation],
    overheads: Sequence[Mapping[str, Any]],
    published: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Table IV: what asking the agent costs, in percent of the full model and of GREEN-CODE itself.

    The time of a check was measured as CPU time, by difference; times the checks per completion at a
    threshold, it is set against the CPU time of a completion. `time_*` are these shares, with the 95 %
    interval of a check's time. Energy is an estimate from CPU time where `energy_source` says so, and has
    then the same share; elsewhere it is given only if the record has `joules_per_check`.

    Args:
        evaluations: `full` and the agents of each pair that has an overhead record.
        overheads: overhead records, one per model, dataset and agent.
        published: the paper's values; adds its Table IV.

    Raises:
        UserError: if `full` is missing, or an overhead record has no evaluation.
    """
    pairs = group(evaluations)
    rows: list[dict[str, Any]] = []
    for record in overheads:
        methods = pairs.get((record["model"], record["dataset"]), {})
        asked = [m for m in map(parse_method, methods) if m.agent == record["agent"]]
        if not asked:
            raise UserError(
                f"The overhead of agent {record['agent']} of {record['model']} on {record['dataset']} has no "
                "evaluations beside it; evaluate the agent at one threshold at least."
            )
        full = require_full(methods)
        rows += [_overhead_row(record, method, methods[method.name], full) for method in asked]
    if published is not None:
        rows += _published_overhead(published)
    return pd.DataFrame(rows)


def _overhead_row(
    record: Mapping[str, Any], method: Method, evaluation: Evaluation, full: Evaluation
) -> dict[str, Any]:
    checks = evaluation.cost["checks"].value
    row: dict[str, Any] = {
        "model": evaluation.model,
        "dataset": evaluation.dataset,
        "agent": method.agent,
        "threshold": evaluation.threshold,
        "origin": "this study",
        "checks_per_completion": checks,
        "seconds_per_check": record["seconds_per_check"],
    }
    for name, whole in (("full", full), ("gc", evaluation)):
        seconds = whole.cost.get("cpu_seconds", whole.cost["seconds"]).value
        for end in ("", "_low", "_high"):
            per_check = record.get(f"seconds_per_check{end}")
            row[f"time_percent_of_{name}{end}"] = (
                None if per_check is None or not seconds else 100 * checks * per_check / seconds
            )
        joules = whole.cost["joules"].value if "joules" in whole.cost else None
        if whole.energy_source == "estimate" and joules is not None:
            energy = row[f"time_percent_of_{name}"]
        elif joules and record.get("joules_per_check") is not None:
            energy = 100 * checks * record["joules_per_check"] / joules
        else:
            energy = None
        row[f"energy_percent_of_{name}"] = energy
    row["energy_source"] = evaluation.energy_source
    return row


def _published_overhead(published: pd.DataFrame) -> list[dict[str, Any]]:
    prefix = "paper.table4.overhead_pct_of_"
    rows: dict[tuple[str, str, float], dict[str, Any]] = {}
    for row in published[published["metric"].str.startswith(prefix)].itertuples():
        whole, quantity = row.metric.removeprefix(prefix).split(".")
        start = {"model": row.model, "dataset": row.dataset, "threshold": row.threshold, "origin": "paper"}
        found = rows.setdefault((row.model, row.dataset, row.threshold), start)
        found[f"{quantity}_percent_of_{whole}"] = row.value
    return list(rows.values())


# --- all results ------------------------------------------------------------------------------------


def all_results(evaluations: Sequence[Evaluation]) -> pd.DataFrame:
    """Every metric of every evaluation, one a line, with its 95 % interval and how it was made."""
    rows = []
    for (model, dataset), methods in group(evaluations).items():
        for name, evaluation in methods.items():
            method, made = parse_method(name), evaluation.provenance
            for kind in ("quality", "cost"):
                for metric, interval in getattr(evaluation, kind).items():
                    energy = metric.startswith("joules")
                    rows.append(
                        {
                            "model": model,
                            "dataset": dataset,
                            "language": evaluation.language,
                            "method": name,
                            "agent": method.agent,
                            "threshold": evaluation.threshold,
                            "samples": evaluation.samples,
                            "kind": kind,
                            "metric": metric,
                            "unit": UNITS.get(metric, "") if kind == "cost" else "share",
                            "value": interval.value,
                            "low": interval.low,
                            "high": interval.high,
                            "energy_source": evaluation.energy_source if energy else None,
                            "kv": made.kv,
                            "device": made.device,
                            "dtype": made.dtype,
                            "seed": made.seed,
                            "commit": made.commit,
                            "config_hash": made.config_hash,
                            "started": made.started,
                        }
                    )
    return pd.DataFrame(rows)


SUMMARY_QUALITY = ("rougeL", "codebleu", "token_accuracy")


def summary(evaluations: Sequence[Evaluation]) -> pd.DataFrame:
    """One line per model, dataset and method: quality with 95 % intervals, cost, saving against `full`.

    Savings are percent of what the fine-tuned model needs at full depth; negative where a method needs
    more. `kv` is the KV-cache mode, `none` in the paper's protocol.

    Raises:
        UserError: if a pair lacks `full`.
    """
    rows = []
    for (model, dataset), methods in group(evaluations).items():
        full = require_full(methods)
        for name, evaluation in methods.items():
            row: dict[str, Any] = {"model": model, "dataset": dataset, "method": name}
            row |= {"threshold": evaluation.threshold, "samples": evaluation.samples}
            row |= {"kv": evaluation.provenance.kv}
            for metric in SUMMARY_QUALITY:
                interval = evaluation.quality.get(metric)
                row[metric] = interval and interval.value
                row[f"{metric}_low"] = interval and interval.low
                row[f"{metric}_high"] = interval and interval.high
            for metric in ("layers", "seconds", "joules"):
                row[metric] = evaluation.cost[metric].value if metric in evaluation.cost else None
            row["energy_source"] = evaluation.energy_source if "joules" in evaluation.cost else None
            for metric in ("layers", "seconds", "joules"):
                known = metric in evaluation.cost and metric in full.cost
                change = known and change_percent(evaluation.cost[metric].value, full.cost[metric].value)
                row[f"{metric}_saved_percent"] = -change if known and change is not None else None
            rows.append(row)
    return pd.DataFrame(rows)


def summary_markdown(table: pd.DataFrame) -> str:
    """What `summary` returned as a Markdown table for people.

    Shares are followed by their 95 % interval, costs by the saving against `full`.
    """
    sources = sorted(set(table["energy_source"].dropna()))
    energy = "Energy, J (estimate)" if sources == ["estimate"] else "Energy, J"
    head = [
        "Model",
        "Dataset",
        "Method",
        "ROUGE-L",
        "CodeBLEU",
        "Token accuracy",
        "Layers",
        "Time, s",
        energy,
    ]
    lines = [head, ["---"] * 3 + ["---:"] * 6]
    for row in table.to_dict("records"):
        quality = [_with_interval(row, metric) for metric in SUMMARY_QUALITY]
        cost = [_with_saving(row, metric) for metric in ("layers", "seconds", "joules")]
        if len(sources) > 1 and row["energy_source"] == "estimate":
            cost[-1] += " (estimate)"
        lines.append([row["model"], row["dataset"], row["method"], *quality, *cost])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _with_interval(row: Mapping[str, Any], metric: str) -> str:
    if pd.isna(row[metric]):
        return "not measured"
    return f"{row[metric]:.3f} ({row[f'{metric}_low']:.3f}–{row[f'{metric}_high']:.3f})"


def _with_saving(row: Mapping[str, Any], metric: str) -> str:
    if pd.isna(row[metric]):
        return "not measured"
    text = f"{row[metric]:.3g}"
    saved = row[f"{metric}_saved_percent"]
    if row["method"] == "full" or pd.isna(saved):
        return text
    return f"{text} ({signed_percent(-saved)})"


# --- every exit rule --------------------------------------------------------------------------------


def frontier_table(records: Sequence[Mapping[str, Any]], part: str) -> pd.DataFrame:
    """One part of all frontiers (`points`, `summaries`, `tests`, `calibration`) as one table.

    A point has a column for each metric and two for its 95 % interval. Time is seconds per completion,
    energy joules per completion with its source, shares 0..1; `forced_*` is along the full model's text.
    """
    rows = []
    for record in records:
        about = {"model": record["model"], "dataset": record["dataset"]}
        for row in record[part]:
            flat = {key: value for key, value in row.items() if key != "metrics"}
            for metric, interval in row.get("metrics", {}).items():
                flat |= {f"{metric}{end}": interval[key] for end, key in _ENDS}
            if part == "points":
                flat |= {key: record[key] for key in ("samples", "kv", "device", "energy_source")}
            rows.append(about | flat)
    return pd.DataFrame(rows)


_ENDS = (("", "value"), ("_low", "low"), ("_high", "high"))


def frontier_seeds(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Depth and agreement of trained rules over their seeds: mean, standard deviation, lowest, highest.

    One line per model, dataset, rule and share of the layers, along the full model's text; none of a rule
    that has one seed only. The deviation is the sample's (n - 1).
    """
    metrics = ("forced_layers", "forced_agreement")
    where = ["model", "dataset", "rule", "share"]
    rows = [
        {"model": record["model"], "dataset": record["dataset"]} | row
        for record in records
        for row in record["seeds"]
    ]
    over = {f"{metric}_{how}": (metric, how) for metric in metrics for how in ("mean", "std", "min", "max")}
    table = pd.DataFrame(rows, columns=[*where, "seed", *metrics])
    return table.groupby(where, sort=False).agg(seeds=("seed", "count"), **over).reset_index()


def frontier_words(records: Sequence[Mapping[str, Any]]) -> str:
    """What the frontiers say, in sentences made from the numbers; Markdown."""
    text = ["# Which exit rule, at what threshold, and what it saves\n"]
    for record in records:
        text.append(f"\n## {record['model']} on {record['dataset']}\n")
        text += [f"- {sentence}\n" for sentence in _sentences(record)]
    text.append(
        "\nSavings are of time against the full model with its KV cache, measured side by side; intervals "
        "are 95 % over samples. Between its operating points a rule is taken to move on a straight line.\n"
    )
    return "".join(text)


def _sentences(record: Mapping[str, Any]) -> Iterable[str]:
    savings = {(row["rule"], row["quality"], row["summary"]): row for row in record["summaries"]}
    rules = [rule for rule in dict.fromkeys(row["rule"] for row in record["summaries"]) if rule != "oracle"]
    for quality, name in (("agreement", "agreement with full depth"), ("rougeL", "ROUGE-L")):
        at = {rule: savings[rule, quality, "saving at 95%"] for rule in rules}
        best = max(rules, key=lambda rule: at[rule]["value"])
        if at[best]["value"] <= 0:
            yield f"No rule keeps 95 % of the full model's {name} and saves time."
            continue
        yield (
            f"At 95 % of the full model's {name}, {best} saves most: {_percent(at[best])} of the time. "
            + "Others: "
            + ", ".join(
                f"{rule} {at[rule]['value']:.0%}"
                for rule in sorted(rules, key=lambda rule: -at[rule]["value"])
                if rule != best
            )
            + "."
        )
    volumes = {rule: savings[rule, "agreement", "hypervolume"] for rule in rules}
    order = sorted(rules, key=lambda rule: -volumes[rule]["value"])
    yield (
        "By the whole frontier of agreement against time (hypervolume): "
        + ", ".join(f"{rule} {volumes[rule]['value']:.3f}" for rule in order)
        + "; oracle "
        + f"{savings['oracle', 'agreement', 'hypervolume']['value']:.3f}."
    )
    yield from _verified_sentence(record)
    clear = [row for row in record["tests"] if row["metric"] == "agreement" and row["p_holm"] < 0.05]
    above: dict[str, dict[str, list[str]]] = {}
    for row in clear:
        winner, loser = (row["rule"], row["against"])[:: 1 if row["value"] > 0 else -1]
        if loser != "random":
            above.setdefault(winner, {}).setdefault(loser, []).append(f"{row['share']:.0%}")
    told = [
        f"{winner} above " + ", ".join(f"{loser} (at {' and '.join(at)})" for loser, at in losers.items())
        for winner, losers in above.items()
    ]
    yield (
        f"Differences in agreement at equal depth that chance hardly explains (Holm, 5 %, of "
        f"{len(record['tests'])} tests; shares of the layers in brackets; those with the random rule left "
        f"out): {'; '.join(told) if told else 'none'}."
    )
    given = [row for row in record["calibration"] if row["threshold"] is not None]
    shown = [row for row in given if "obtained_value" in row]
    held = sum(row["obtained_value"] >= row["target"] for row in shown)
    near = sum(row["obtained_value"] < row["target"] <= row["obtained_high"] for row in shown)
    files = record["calibration"][0]["files"] if record["calibration"] else 0
    yield (
        f"Of {len(record['calibration'])} promises asked for, {len(given)} could be given on {files} "
        f"validation files; {held} of {len(shown)} held on the test split, and {near} fell short by less "
        "than their interval."
    )
    yield from _seed_sentences(record)


def _verified_sentence(record: Mapping[str, Any]) -> Iterable[str]:
    """What is saved where the final layer verifies what leaves early."""
    told = []
    for point in record["points"]:
        if point["rule"] in record["verified"]:
            metrics = point["metrics"]
            told.append(
                f"{_percent(metrics['time_saved'])} by {record['verified'][point['rule']]} with drafts at "
                f"{point['share']:.0%} of the layers"
            )
            if "drafts_accepted" in metrics:  # undefined where no token left early
                told[-1] += f", {metrics['drafts_accepted']['value']:.0%} of them right"
    if told:
        yield (
            "Where the final layer verifies what leaves early, so that the text is the full model's, time is "
            f"saved as follows: {'; '.join(told)}."
        )


def _seed_sentences(record: Mapping[str, Any]) -> Iterable[str]:
    """How far apart the seeds of a rule are, against the rule that is nearest to their mean."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in record["seeds"]:
        found.setdefault(row["rule"], {}).setdefault(row["share"], []).append(row["forced_agreement"])
    for rule, shares in found.items():
        told, clear = [], 0
        for share, values in shares.items():
            low, high, mean = min(values), max(values), sum(values) / len(values)
            others = {
                point["rule"]: point["metrics"]["forced_agreement"]["value"]
                for point in record["points"]
                if point["share"] == share and point["rule"] in record["rules"] and point["rule"] != rule
            }
            span = f"{low:.3f} to {high:.3f} at {share:.0%}"
            if others:
                nearest = min(others, key=lambda other: abs(others[other] - mean))
                span += f" (nearest rule: {nearest}, {others[nearest]:.3f})"
            clear += not any(low <= value <= high for value in others.values())
            told.append(span)
        yield (
            f"Agreement of {rule} along the full model's text over {len(values)} seeds, by share of the "
            f"layers: {', '.join(told)}. At {clear} of {len(shares)} no other rule lies between the seeds."
        )


def _percent(row: Mapping[str, Any]) -> str:
    return f"{row['value']:.0%} ({row['low']:.0%} to {row['high']:.0%})"


def _listed(values: Iterable[Any]) -> str:
    return " ".join(map(str, values))


def _whole(table: pd.DataFrame, prefixes: tuple[str, ...]) -> pd.DataFrame:
    """Counts as whole numbers, also where some are missing."""
    return table.astype({name: "Int64" for name in table if name.startswith(prefixes)})
