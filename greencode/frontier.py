"""Every exit rule on one frontier: quality against depth, measured time and energy.

Rules are compared where they run equally deep: on validation episodes each rule's threshold is chosen for
given shares of the model's layers, and what it then does on the test split is shown, measured side by side
with the full model. Beside what a rule answers when its own text goes on (free-running) stands what it
answers along the full model's text (teacher-forced), as it was trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from greencode import metrics
from greencode.episodes import Episodes
from greencode.errors import UserError
from greencode.evaluate import cost
from greencode.policies import ExitPolicy
from greencode.promises import Promise
from greencode.results import Generation, Interval
from greencode.rules import Rule, operating_points, replay

MEANS = ("agreement", "token_accuracy", "rougeL")
QUALITY = (*MEANS, "codebleu")
"""The frontier's qualities: `agreement` is the share of positions with the full model's token. CodeBLEU is
one of the whole corpus, the others are means over samples."""

COSTS = ("layers", "seconds", "joules", "drafts_accepted")


def teacher_forced(
    episodes: Episodes, scores: np.ndarray, threshold: float, seed: int = 0, resamples: int = 1000
) -> dict[str, Interval]:
    """Mean depth and agreement along the full model's text, with 95 % intervals over episodes."""
    depths, agreement = replay(episodes, scores, threshold)
    statistics = {
        "forced_layers": metrics.mean(depths.mean(axis=1)),
        "forced_agreement": metrics.mean(agreement.mean(axis=1)),
    }
    return metrics.intervals(statistics, seed, resamples)


def seeds(
    rules: Sequence[Rule],
    others: Mapping[str, Sequence[ExitPolicy]],
    validation: Episodes,
    episodes: Episodes,
    chosen: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Depth and agreement along the full model's text of every seed that a rule was trained with.

    Each seed's thresholds are its own, chosen for equal depth on validation as those of `chosen` were. So
    it is told how far trainings come apart, and not what a threshold of one means to another.

    Args:
        others: rule -> the networks of its other seeds; a rule that is not there gives no rows.
        episodes: of the test samples.
        chosen: the rules' operating points, whose shares of the layers are taken.

    Returns:
        Rows of rule, seed, share, threshold, forced_layers, forced_agreement; the seed in use first.
    """
    rows = []
    for rule in (rule for rule in rules if rule.name in others):
        shares = [point["share"] for point in chosen if point["rule"] == rule.name]
        for network in (rule.network, *others[rule.name]):
            one = replace(rule, network=network)
            scores = one.scores(episodes)
            for point in operating_points([one], validation, shares):
                depths, agreement = replay(episodes, scores, point["threshold"])
                rows.append(
                    {"rule": rule.name, "seed": network.training["settings"]["seed"]}
                    | {name: point[name] for name in ("share", "threshold")}
                    | {"forced_layers": float(depths.mean()), "forced_agreement": float(agreement.mean())}
                )
    return rows


def agreements(generation: Generation, full: Generation) -> list[float]:
    """Of each sample: the share of the full model's tokens that stand at the same place.

    Raises:
        UserError: if the two are not of the same samples.
    """
    if [one.id for one in generation.completions] != [one.id for one in full.completions]:
        raise UserError(
            f"{generation.method} and {full.method} completed different samples; generate them together."
        )
    return metrics.token_accuracy(
        [one.tokens for one in generation.completions], [one.tokens for one in full.completions]
    )


def measure(
    generation: Generation,
    full: Generation,
    samples: Mapping[str, np.ndarray],
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Interval]:
    """Quality and cost of one method, each with its 95 % interval over samples.

    Besides `QUALITY` and the costs: `time_saved`, the share of the full model's time on the same samples
    that the method did not take, and `layers_saved`; negative where it takes more.

    Args:
        samples: what `per_sample` returned for it.
    """
    done, reference = generation.completions, full.completions
    scores = {name: metrics.mean(samples[name]) for name in MEANS}
    scores |= metrics.statistics(
        [one.text for one in done],
        [one.reference_text for one in done],
        generation.language,
        metrics=[name for name in QUALITY if name not in MEANS],
    )
    for name, of in (("time_saved", lambda one: one.seconds), ("layers_saved", lambda one: sum(one.depths))):
        ours, theirs = [of(one) for one in done], [of(one) for one in reference]
        scores[name] = metrics.ratio(np.subtract(theirs, ours), theirs)
    found = metrics.intervals(scores, seed, resamples)
    return found | {
        name: interval
        for name, interval in cost(done, generation.layers, seed, resamples).items()
        if name in COSTS
    }


# --- summaries --------------------------------------------------------------------------------------

LEVELS = (0.99, 0.95, 0.9)
"""Shares of the full model's quality at which a saving is quoted."""


def per_sample(generation: Generation, full: Generation) -> dict[str, np.ndarray]:
    """What resampling needs of a method: each sample's qualities that are means, and seconds."""
    done = generation.completions
    return {
        "agreement": np.array(agreements(generation, full)),
        "token_accuracy": np.array(
            metrics.token_accuracy([one.tokens for one in done], [one.reference for one in done])
        ),
        "rougeL": np.array(metrics.rouge_l([one.text for one in done], [one.reference_text for one in done])),
        "seconds": np.array([one.seconds for one in done]),
    }


def saving_at(points: Sequence[tuple[float, float]], level: float) -> float:
    """The largest saving of time at a share `level` of the full model's quality.

    Args:
        points: (saving, quality), both relative to the full model, of a rule's operating points. Between
            neighbours, and from the most careful one to the full model at (0, 1), the rule is taken to
            move on a straight line.
    """
    line = sorted([(0.0, 1.0), *points])
    best = 0.0
    for (saving, quality), (further, worse) in itertools.pairwise(line):
        if worse >= level:
            best = max(best, further)
        elif quality >= level:
            best = max(best, saving + (further - saving) * (quality - level) / (quality - worse))
    return best


def hypervolume(points: Sequence[tuple[float, float]]) -> float:
    """Area under the best quality at each saving of time, from (0, 0) to (1, 1).

    Args:
        points: (saving, quality), both relative to the full model, which counts as (0, 1); a point
            dominates what saves less and is worse. Quality above the full model's counts as 1.
    """
    area, reached = 0.0, 0.0
    for saving, quality in sorted([(0.0, 1.0), *points], reverse=True):
        quality = min(quality, 1.0)
        if quality > reached and saving > 0:
            area += saving * (quality - reached)
            reached = quality
    return area


def summaries(
    samples: Mapping[str, Mapping[str, np.ndarray]],
    points: Mapping[str, Sequence[str]],
    seed: int = 0,
    resamples: int = 1000,
) -> list[dict[str, Any]]:
    """Saving of time at `LEVELS` of the full model's quality and hypervolume, of each rule and quality.

    Args:
        samples: method -> what `per_sample` returned; `full` among them.
        points: rule -> its methods.

    Returns:
        Rows of rule, quality, summary, value, low, high: 95 % percentile intervals over samples, in which
        all methods share the resamples.
    """
    count = len(samples["full"]["seconds"])
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples) / count
    draws = np.concatenate([np.full((1, count), 1 / count), draws])  # the corpus itself first
    means = {
        method: {name: draws @ values for name, values in known.items()} for method, known in samples.items()
    }
    rows = []
    for rule, methods in points.items():
        saved = [1 - means[method]["seconds"] / means["full"]["seconds"] for method in methods]
        for quality in MEANS:
            full = np.maximum(means["full"][quality], 1e-12)
            kept = [means[method][quality] / full for method in methods]
            clouds = [
                [(s[draw], q[draw]) for s, q in zip(saved, kept, strict=True)] for draw in range(len(draws))
            ]
            kinds = {f"saving at {level:.0%}": level for level in LEVELS} | {"hypervolume": None}
            for kind, level in kinds.items():
                values = [
                    hypervolume(cloud) if level is None else saving_at(cloud, level) for cloud in clouds
                ]
                low, high = np.percentile(values[1:], [2.5, 97.5])
                rows.append(
                    {"rule": rule, "quality": quality, "summary": kind}
                    | asdict(Interval(float(values[0]), float(low), float(high)))
                )
    return rows


def sign_flip_p(differences: np.ndarray, seed: int = 0, flips: int = 10_000) -> float:
    """Two-sided p-value of "the differences are symmetric around 0", by random flips of their signs."""
    observed = abs(differences.sum())
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(flips, len(differences)))
    beyond = np.abs(signs @ differences) >= observed - 1e-12
    return float((1 + beyond.sum()) / (1 + flips))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979)."""
    order = np.argsort(p_values)
    corrected, running = np.empty(len(p_values)), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = running
    return corrected.tolist()


def comparisons(
    samples: Mapping[str, Mapping[str, np.ndarray]],
    shares: Mapping[str, Mapping[float, str]],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Each two rules at each share of the layers: mean difference in agreement and in time on the same
    samples, with a sign-flip test of each, corrected (Holm) for all tests in the table.

    Args:
        samples: method -> what `per_sample` returned.
        shares: rule -> share of the layers -> method.
    """
    rows = []
    for (a, of_a), (b, of_b) in itertools.combinations(shares.items(), 2):
        for share in sorted(set(of_a) & set(of_b)):
            for name in ("agreement", "seconds"):
                difference = samples[of_a[share]][name] - samples[of_b[share]][name]
                interval = metrics.intervals({"difference": metrics.mean(difference)}, seed)["difference"]
                rows.append(
                    {"rule": a, "against": b, "share": share, "metric": name}
                    | asdict(interval)
                    | {"p": sign_flip_p(difference, seed)}
                )
    for row, corrected in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = corrected
    return rows


# --- one model and dataset --------------------------------------------------------------------------


def record(
    generations: Mapping[str, Generation],
    episodes: Episodes,
    rules: Sequence[Rule],
    chosen: Sequence[Mapping[str, Any]],
    promises: Mapping[str, Sequence[Promise]],
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Any]:
    """All that tables and figures need of one model and dataset, as JSON values.

    Args:
        generations: method -> completions of the same samples, `full`, fixed exits, `oracle` and the
            rules' operating points.
        episodes: of these samples, along the full model's text.
        chosen: the rules' operating points, as `rules.operating_points` and `rules.verified_points` returned
            them.
        promises: of each rule.

    Returns:
        `points` (one per method: its quality and cost), `summaries`, `tests`, `calibration`, and what they
        are of.
    """
    full = generations["full"]
    scores = {rule.name: rule.scores(episodes) for rule in rules}
    samples = {name: per_sample(generation, full) for name, generation in generations.items()}
    points = [
        point | {"metrics": {name: asdict(interval) for name, interval in found.items()}}
        for point, found in _points(generations, samples, episodes, scores, chosen, seed, resamples)
    ]
    of_rule: dict[str, dict[float, str]] = {}
    for point in points:
        if point["rule"] != "full":
            of_rule.setdefault(point["rule"], {})[point["share"]] = point["method"]
    compared = {rule: shares for rule, shares in of_rule.items() if rule in scores}
    return {
        "model": full.model,
        "dataset": full.dataset,
        "layers": full.layers,
        "samples": len(full.completions),
        "kv": full.provenance.kv,
        "device": full.provenance.device,
        "energy_source": full.energy_source,
        "rules": {rule.name: rule.kind for rule in rules},
        "verified": {point["rule"]: point["policy"] for point in chosen if point["kv"] == "verified"},
        "points": points,
        "summaries": summaries(
            samples, {rule: list(shares.values()) for rule, shares in of_rule.items()}, seed, resamples
        ),
        "tests": comparisons(samples, compared, seed),
        "calibration": _obtained(episodes, scores, promises, seed, resamples),
    }


def _points(generations, samples, episodes, scores, chosen, seed, resamples):
    """Each method's name, rule, share and threshold, with everything measured of it."""
    layers = episodes.exit_points[-1]
    exits = np.array(episodes.exit_points[:-1])
    shape = episodes.observations.shape[:3]
    rows = [({"method": "full", "rule": "full", "share": 1.0}, np.zeros(shape), 1.0)]
    for depth in exits:
        row = {"method": f"fixed-{depth}", "rule": "fixed", "share": float(depth / layers)}
        rows.append((row, np.broadcast_to(exits >= depth, shape).astype(float), 0.5))
    right = episodes.tokens[..., :-1] == episodes.tokens[..., -1:]
    rows.append(({"method": "oracle", "rule": "oracle", "share": None}, right.astype(float), 0.5))
    rows += [
        (
            {key: point[key] for key in ("method", "rule", "share", "threshold")},
            scores[point["policy"]],
            # Along its own text, the full model's, a verified rule answers at full depth.
            1.0 if point["kv"] == "verified" else point["threshold"],
        )
        for point in chosen
    ]
    for row, scored, threshold in rows:
        name = row["method"]
        found = measure(generations[name], generations["full"], samples[name], seed, resamples)
        yield row, found | teacher_forced(episodes, scored, threshold, seed, resamples)


def _obtained(episodes, scores, promises, seed, resamples) -> list[dict[str, Any]]:
    """What each promised threshold gives on the test split, along the full model's text."""
    asked = [(name, one) for name in scores for one in promises[name]]
    rows = []
    for rule, one in asked:
        row = {"rule": rule} | asdict(one)
        if one.threshold is not None and one.wanted != "rougeL":  # that is of text which is not written here
            found = teacher_forced(episodes, scores[rule], one.threshold, seed, resamples)
            depth = found["forced_layers"]
            share = {end: value / episodes.exit_points[-1] for end, value in asdict(depth).items()}
            saving = Interval(1 - share["value"], 1 - share["high"], 1 - share["low"])
            obtained = {"saving": saving, "agreement": found["forced_agreement"]}[one.wanted]
            row |= {f"obtained_{end}": value for end, value in asdict(obtained).items()}
        rows.append(row)
    return rows
