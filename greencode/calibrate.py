"""From what is asked of a rule to its threshold, with a guarantee.

Two things can be asked: a share of the full model's layers to be saved, or a share of its tokens to be kept
(agreement). The threshold is chosen on validation files so that, with the stated confidence, the expected
value over new files of the same kind is at least what was asked (Learn then Test, Angelopoulos et al. 2021):
each candidate is tested by a p-value that holds for any distribution of files, in a fixed order, and the
last one before the first failure is taken. If already the first fails, the data cannot promise it.

What is promised is about the files' own distribution and the full model's own text, from which recorded
episodes are taken. Layers are counted, not joules.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass

import numpy as np

from greencode.episodes import Episodes
from greencode.errors import UserError
from greencode.policies import ExitPolicy
from greencode.rules import KINDS, TRAINED, Rule, replay

WANTED = ("saving", "agreement")


@dataclass(frozen=True)
class Calibrated:
    """The answer to one target.

    Attributes:
        wanted: `saving` or `agreement`.
        target: what was asked, in 0..1.
        confidence: of the promise.
        threshold: T, or None if it cannot be promised.
        saving, agreement: means over the calibration files at this threshold; None without one.
        files: independent files that the promise rests on.
        reason: why there is no threshold, or None.
    """

    wanted: str
    target: float
    confidence: float
    threshold: float | None
    saving: float | None
    agreement: float | None
    files: int
    reason: str | None = None


def bound_p_value(mean_loss: float, limit: float, count: int) -> float:
    """P-value of "the expected loss is above `limit`", for losses in 0..1 of independent units.

    The smaller of Hoeffding's and Bentkus' bounds; both hold for every distribution.
    """
    if mean_loss >= limit:
        return 1.0
    from scipy.stats import binom

    hoeffding = math.exp(-count * _divergence(mean_loss, limit))
    bentkus = math.e * float(binom.cdf(math.ceil(count * mean_loss), count, limit))
    return min(hoeffding, bentkus, 1.0)


def _divergence(a: float, b: float) -> float:
    """Kullback-Leibler divergence of two coins."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)


def candidates(rule: Rule, training: Episodes, count: int = 60) -> np.ndarray:
    """Thresholds to test, rising from 0 to 1, fixed before the calibration data are seen: quantiles of the
    rule's scores on training episodes. Few, for each is a test."""
    scores = np.quantile(rule.scores(training), np.linspace(0, 1, count), method="lower")
    return np.unique(np.concatenate([[0.0], scores.astype(np.float64).clip(0, 1), [1.0]]))


def outcomes(rule: Rule, episodes: Episodes, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of layers run and share of tokens kept, float64 [files, thresholds] each: files are the
    independent units, and one may have several episodes."""
    scores = rule.scores(episodes)
    _, files = np.unique(episodes.files, return_inverse=True)
    counts = np.bincount(files)
    full = episodes.exit_points[-1]
    depth, kept = [], []
    for threshold in thresholds:
        depths, agreement = replay(episodes, scores, threshold)
        depth.append(np.bincount(files, depths.mean(axis=1) / full) / counts)
        kept.append(np.bincount(files, agreement.mean(axis=1)) / counts)
    return np.stack(depth, axis=1), np.stack(kept, axis=1)


def calibrate(
    rule: Rule,
    training: Episodes,
    validation: Episodes,
    targets: list[tuple[str, float]],
    confidence: float = 0.9,
) -> list[Calibrated]:
    """A threshold for each target (`saving` or `agreement`, value in 0..1), each promised on its own.

    Args:
        training: fixes the candidates; must share no file with `validation`.
        validation: the calibration data.

    Raises:
        UserError: an unknown target, a value outside 0..1, or no episodes.
    """
    if not 0 < confidence < 1:
        raise UserError(f"Confidence {confidence} is not between 0 and 1; choose one, e.g. 0.9.")
    if not len(validation):
        raise UserError("There are no validation episodes to calibrate on; record more.")
    thresholds = candidates(rule, training)
    depth, kept = outcomes(rule, validation, thresholds)
    return [_choose(wanted, target, confidence, thresholds, depth, kept) for wanted, target in targets]


def _choose(
    wanted: str, target: float, confidence: float, thresholds: np.ndarray, depth: np.ndarray, kept: np.ndarray
) -> Calibrated:
    if wanted not in WANTED:
        raise UserError(f"Target {wanted!r} is unknown; ask for one of {', '.join(WANTED)}.")
    if not 0 < target < 1:
        raise UserError(f"Target {wanted} {target} is not between 0 and 1; ask for a share, e.g. 0.4.")
    files = len(depth)
    # Losses in 0..1, in the order of testing: from what surely meets the target towards what is wanted.
    if wanted == "agreement":
        losses, order = 1 - kept, np.arange(len(thresholds))[::-1]
    else:
        losses, order = depth, np.arange(len(thresholds))
    chosen = None
    for place in order:
        if bound_p_value(float(losses[:, place].mean()), 1 - target, files) > 1 - confidence:
            break
        chosen = place
    if chosen is None:
        best = float(1 - losses[:, order[0]].mean())
        reason = (
            f"a {wanted} of {target:.0%} cannot be promised with {confidence:.0%} confidence: the "
            f"{'most careful' if wanted == 'agreement' else 'boldest'} threshold gives {best:.1%} "
            f"on {files} files"
        )
        return Calibrated(wanted, target, confidence, None, None, None, files, reason)
    return Calibrated(
        wanted,
        target,
        confidence,
        float(thresholds[chosen]),
        float(1 - depth[:, chosen].mean()),
        float(kept[:, chosen].mean()),
        files,
    )


def main(arguments: list[str] | None = None) -> int:
    """`greencode calibrate`: one line of JSON with the threshold; 1 if the target cannot be promised."""
    parser = argparse.ArgumentParser(
        prog="greencode calibrate", description="The threshold that keeps a promise, from recorded episodes."
    )
    parser.add_argument("trajectories", help="folder with train.safetensors and validation.safetensors")
    parser.add_argument("--policy", help="policy.safetensors of an agent or another trained rule")
    parser.add_argument("--rule", choices=[kind for kind in KINDS if kind not in TRAINED])
    for wanted, meaning in (("saving", "share of layers to save"), ("agreement", "share of tokens to keep")):
        parser.add_argument(f"--{wanted}", type=float, metavar="SHARE", help=meaning)
    parser.add_argument("--confidence", type=float, default=0.9)
    given = parser.parse_args(arguments)
    targets = [(wanted, getattr(given, wanted)) for wanted in WANTED if getattr(given, wanted) is not None]
    try:
        if (given.policy is None) == (given.rule is None):
            raise UserError("Name either --policy, a trained rule's file, or --rule.")
        if not targets:
            raise UserError("Ask for --saving or --agreement, e.g. --saving 0.4.")
        training, validation = (
            Episodes.load(f"{given.trajectories}/{split}.safetensors") for split in ("train", "validation")
        )
        if given.policy:
            network = ExitPolicy.load(
                given.policy, validation.fingerprint, validation.exit_points, validation.observation
            )
            rule = Rule("policy", "agent", network)
        else:
            rule = Rule(given.rule, given.rule)
        found = calibrate(rule, training, validation, targets, given.confidence)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    for one in found:
        print(json.dumps({key: value for key, value in asdict(one).items() if value is not None}))
        if one.reason:
            print(f"{one.reason[0].upper()}{one.reason[1:]}.", file=sys.stderr)
    return int(any(one.threshold is None for one in found))


if __name__ == "__main__":
    sys.exit(main())
