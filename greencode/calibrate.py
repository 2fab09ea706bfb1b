"""From what is asked of a rule to its threshold, with a guarantee.

Three things can be asked: a share of the full model's layers to be saved, a share of its tokens to be kept
(agreement), or a share of its ROUGE-L. The threshold is chosen on validation files so that, with the stated
confidence, the expected value over new files of the same kind is at least what was asked (Learn then Test,
Angelopoulos et al. 2021): each candidate is tested by a p-value that holds for any distribution of files, in
a fixed order, and the last one before the first failure is taken. If already the first fails, the data cannot
promise it.

The p-value is the wealth of a gambler who bets file by file that the value is above what was asked
(Waudby-Smith and Ramdas 2024). Unlike the bounds of Hoeffding and Bentkus it profits from files that are
alike, as these are: from 58 to 77 files an agent saves 7 to 10 points less beyond what was
asked (docs/frontier.md).

What is promised is about the files' own distribution. Layers and agreement are those along the full model's
text, as episodes are recorded; ROUGE-L is of what the rule writes by itself (`greencode.rollouts`). Layers
are counted, not joules.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from greencode.episodes import Episodes
from greencode.errors import UserError
from greencode.policies import ExitPolicy
from greencode.promises import WANTED, Promise
from greencode.rules import KINDS, TRAINED, Rule, replay

BOLDEST = 0.9  # share of the wealth that one bet may lose


def p_value(values: np.ndarray, level: float, alpha: float) -> float:
    """P-value of "the expected value is below `level`", for values in 0..1 of independent units.

    It holds for every distribution, by Ville's inequality; it is smallest where the values lie close
    together above `level`.

    Args:
        values: [units], in an order that does not depend on them.
        alpha: what the p-value is going to be compared with, which decides how bold the bets are.
    """
    if not len(values) or values.mean() < level:  # early luck would do, but who would believe it
        return 1.0
    units = np.arange(1, len(values) + 1)
    mean = (0.5 + np.cumsum(values)) / (1 + units)
    variance = (0.25 + np.cumsum((values - mean) ** 2)) / (1 + units)
    known = np.concatenate([[0.25], variance[:-1]])  # before each bet
    stakes = np.minimum(np.sqrt(2 * math.log(1 / alpha) / (len(values) * known)), BOLDEST / level)
    wealth = np.cumsum(np.log1p(stakes * (values - level)))
    return min(1.0, math.exp(-wealth.max()))


def candidates(rule: Rule, training: Episodes, count: int = 60) -> np.ndarray:
    """Thresholds to test, rising from 0 to 1, fixed before the calibration data are seen: quantiles of the
    rule's scores on training episodes. Few, for each is a test."""
    scores = np.quantile(rule.scores(training), np.linspace(0, 1, count), method="lower")
    return np.unique(np.concatenate([[0.0], scores.astype(np.float64).clip(0, 1), [1.0]]))


class Texts(Protocol):
    """ROUGE-L of a rule's own text on the calibration episodes; see `greencode.rollouts.Rollouts`."""

    full: np.ndarray
    """Of the full model's text, float64 [episodes]."""

    def rouge(self, threshold: float) -> np.ndarray:
        """Of the rule's at a threshold, float64 [episodes]."""
        ...


class _Files:
    """Means over the episodes of each file, files being the independent units; in random order, always the
    same."""

    def __init__(self, episodes: Episodes) -> None:
        names, files = np.unique(episodes.files, return_inverse=True)
        self._files = np.random.default_rng(0).permutation(len(names))[files]
        self.count = len(names)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Of values [episodes], [files]."""
        return np.bincount(self._files, values) / np.bincount(self._files)


def outcomes(rule: Rule, episodes: Episodes, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of layers run and share of tokens kept, float64 [files, thresholds] each."""
    scores, files = rule.scores(episodes), _Files(episodes)
    full = episodes.exit_points[-1]
    depth, kept = [], []
    for threshold in thresholds:
        depths, agreement = replay(episodes, scores, threshold)
        depth.append(files.mean(depths.mean(axis=1) / full))
        kept.append(files.mean(agreement.mean(axis=1)))
    return np.stack(depth, axis=1), np.stack(kept, axis=1)


def calibrate(
    rule: Rule,
    training: Episodes,
    validation: Episodes,
    targets: Sequence[tuple[str, float]],
    confidence: float = 0.9,
    texts: Texts | None = None,
) -> list[Promise]:
    """A threshold for each target (one of `WANTED`, value in 0..1), each promised on its own.

    Args:
        training: fixes the candidates; must share no file with `validation`.
        validation: the calibration data.
        texts: of the rule on `validation`, where ROUGE-L is asked for. Each candidate costs a completion of
            every episode there, so one in five is tried, and none after the first failure.

    Raises:
        UserError: an unknown target, a value outside 0..1, or no episodes.
    """
    if not 0 < confidence < 1:
        raise UserError(f"Confidence {confidence} is not between 0 and 1; choose one, e.g. 0.9.")
    if not len(validation):
        raise UserError("There are no validation episodes to calibrate on; record more.")
    for wanted, target in targets:
        if wanted not in WANTED:
            raise UserError(f"Target {wanted!r} is unknown; ask for one of {', '.join(WANTED)}.")
        if not 0 < target < 1:
            raise UserError(f"Target {wanted} {target} is not between 0 and 1; ask for a share, e.g. 0.4.")
    thresholds = candidates(rule, training)
    data = _Data(thresholds, *outcomes(rule, validation, thresholds), _Files(validation), texts)
    return [_choose(wanted, target, confidence, data) for wanted, target in targets]


@dataclass(frozen=True)
class _Data:
    """Outcomes of every candidate on the calibration files."""

    thresholds: np.ndarray
    depth: np.ndarray
    kept: np.ndarray
    files: _Files
    texts: Texts | None

    def order(self, wanted: str) -> range:
        """Candidates from what surely meets a target towards what is hoped for."""
        rising = range(len(self.thresholds))
        return {"saving": rising, "agreement": rising[::-1], "rougeL": rising[::-5]}[wanted]

    def values(self, wanted: str, target: float, place: int) -> tuple[np.ndarray, float]:
        """Values in 0..1 of each file at a candidate, and the level that their expectation shall reach."""
        if wanted == "saving":
            return 1 - self.depth[:, place], target
        if wanted == "agreement":
            return self.kept[:, place], target
        if self.texts is None:
            raise UserError("ROUGE-L is promised from texts; give the model and the validation files too.")
        # Above 0 where the rule's ROUGE-L is more than the target's share of the full model's; into 0..1.
        above = self.texts.rouge(float(self.thresholds[place])) - target * self.texts.full
        return self.files.mean((above + target) / (1 + target)), target / (1 + target)


def _choose(wanted: str, target: float, confidence: float, data: _Data) -> Promise:
    alpha, count, chosen = 1 - confidence, data.files.count, None
    for place in data.order(wanted):
        if p_value(*data.values(wanted, target, place), alpha) > alpha:
            break
        chosen = place
    if chosen is None:
        values, level = data.values(wanted, target, data.order(wanted)[0])
        first = "boldest" if wanted == "saving" else "most careful"
        reason = (
            f"{WANTED[wanted]} of {target:.0%} cannot be promised with {confidence:.0%} confidence: "
            f"on {count} files the {first} threshold is {values.mean() - level:+.1%} from it"
        )
        return Promise(wanted, target, confidence, None, None, None, count, reason)
    threshold = float(data.thresholds[chosen])
    rouge = None
    if wanted == "rougeL":
        rouge = float(data.texts.rouge(threshold).mean() / data.texts.full.mean())
    return Promise(
        wanted,
        target,
        confidence,
        threshold,
        float(1 - data.depth[:, chosen].mean()),
        float(data.kept[:, chosen].mean()),
        count,
        rougeL=rouge,
    )


def main(arguments: list[str] | None = None) -> int:
    """`greencode calibrate`: one line of JSON with the threshold; 1 if the target cannot be promised."""
    parser = argparse.ArgumentParser(
        prog="greencode calibrate", description="The threshold that keeps a promise, from recorded episodes."
    )
    parser.add_argument("trajectories", help="folder with train.safetensors and validation.safetensors")
    parser.add_argument("--policy", help="policy.safetensors of an agent or another trained rule")
    parser.add_argument("--rule", choices=[kind for kind in KINDS if kind not in TRAINED])
    for wanted, meaning in (
        ("saving", "share of layers to save"),
        ("agreement", "share of tokens to keep"),
        ("rougeL", "share of ROUGE-L to keep; needs --policy, --weights and --files"),
    ):
        parser.add_argument(f"--{wanted}", type=float, metavar="SHARE", help=meaning)
    parser.add_argument("--confidence", type=float, default=0.9)
    parser.add_argument("--temperature", type=float, default=1.0, help="of a trained rule's softmax")
    parser.add_argument("--weights", help="folder of the episodes' model")
    parser.add_argument("--files", help="validation.jsonl.gz that the episodes were recorded from")
    given = parser.parse_args(arguments)
    try:
        found = _asked(given)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    for one in found:
        print(json.dumps({key: value for key, value in asdict(one).items() if value is not None}))
        if one.reason:
            print(f"{one.reason[0].upper()}{one.reason[1:]}.", file=sys.stderr)
    return int(any(one.threshold is None for one in found))


def _asked(given: argparse.Namespace) -> list[Promise]:
    """The promises that a command line asks for."""
    targets = [(wanted, getattr(given, wanted)) for wanted in WANTED if getattr(given, wanted) is not None]
    if (given.policy is None) == (given.rule is None):
        raise UserError("Name either --policy, a trained rule's file, or --rule.")
    if not targets:
        raise UserError("Ask for --saving, --agreement or --rougeL, e.g. --saving 0.4.")
    if given.rougeL is not None and None in (given.policy, given.weights, given.files):
        raise UserError(
            "--rougeL needs --policy, --weights and --files: the rule's own text is written anew."
        )
    training, validation = (
        Episodes.load(f"{given.trajectories}/{split}.safetensors") for split in ("train", "validation")
    )
    if given.rule:
        return calibrate(Rule(given.rule, given.rule), training, validation, targets, given.confidence)
    of = (validation.fingerprint, validation.exit_points, validation.observation)
    rule = Rule("policy", "agent", ExitPolicy.load(given.policy, *of), temperature=given.temperature)
    texts = None
    if given.rougeL is not None:
        from greencode.rollouts import Rollouts

        texts = Rollouts.of_split(rule, validation, given.weights, given.files)
    return calibrate(rule, training, validation, targets, given.confidence, texts)


if __name__ == "__main__":
    sys.exit(main())
