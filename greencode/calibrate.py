"""From what is asked of a rule to its threshold, with a guarantee.

Two things can be asked: a share of the full model's layers to be saved, or a share of its tokens to be kept
(agreement). The threshold is chosen on validation files so that, with the stated confidence, the expected
value over new files of the same kind is at least what was asked (Learn then Test, Angelopoulos et al. 2021):
each candidate is tested by a p-value that holds for any distribution of files, in a fixed order, and the
last one before the first failure is taken. If already the first fails, the data cannot promise it.

The p-value is the wealth of a gambler who bets file by file that the value is above what was asked
(Waudby-Smith and Ramdas 2024). Unlike the bounds of Hoeffding and Bentkus it profits from files that are
alike, as these are: from 58 to 77 files it promises 2 to 10 points more.

What is promised is about the files' own distribution and the full model's own text, from which recorded
episodes are taken. Layers are counted, not joules.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from greencode.episodes import Episodes
from greencode.errors import UserError
from greencode.files import read_json, write_json
from greencode.policies import ExitPolicy
from greencode.results import Provenance
from greencode.rules import KINDS, TRAINED, Rule, replay

WANTED = ("saving", "agreement")
BOLDEST = 0.9  # share of the wealth that one bet may lose


@dataclass(frozen=True)
class Promise:
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


@dataclass(frozen=True)
class Calibration:
    """What a rule promises, as one file.

    Attributes:
        rule: its name in the study.
        fingerprint: of the model.
        policy: SHA-256 of the rule's network; None for a rule without one.
        temperature: of the network's softmax; thresholds hold for no other.
        promises: one for each target.
    """

    rule: str
    fingerprint: str
    policy: str | None
    temperature: float
    promises: tuple[Promise, ...]

    @property
    def given(self) -> list[Promise]:
        """The promises that have a threshold."""
        return [one for one in self.promises if one.threshold is not None]

    def find(self, wanted: str, target: float) -> Promise | None:
        """The mildest promise that is at least what is asked; None if there is none."""
        strong = [one for one in self.given if one.wanted == wanted and one.target >= target - 1e-9]
        return min(strong, key=lambda one: one.target, default=None)

    def most(self, wanted: str) -> float | None:
        """The strongest promise of a kind; None if there is none."""
        return max((one.target for one in self.given if one.wanted == wanted), default=None)

    def save(self, path: str | Path, provenance: Provenance) -> None:
        """Write as JSON."""
        write_json(path, asdict(self) | {"provenance": asdict(provenance)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote; a broken file is a `UserError`."""
        record = read_json(path)
        try:
            record.pop("provenance")
            promises = tuple(Promise(**one) for one in record.pop("promises"))
            return cls(**record, promises=promises)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a calibration ({error}); run `calibrate` again.") from None


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


def outcomes(rule: Rule, episodes: Episodes, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of layers run and share of tokens kept, float64 [files, thresholds] each: files are the
    independent units, and one may have several episodes. They come in random order, always the same."""
    scores = rule.scores(episodes)
    names, files = np.unique(episodes.files, return_inverse=True)
    files = np.random.default_rng(0).permutation(len(names))[files]
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
    targets: Sequence[tuple[str, float]],
    confidence: float = 0.9,
) -> list[Promise]:
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
) -> Promise:
    if wanted not in WANTED:
        raise UserError(f"Target {wanted!r} is unknown; ask for one of {', '.join(WANTED)}.")
    if not 0 < target < 1:
        raise UserError(f"Target {wanted} {target} is not between 0 and 1; ask for a share, e.g. 0.4.")
    files = len(depth)
    # Values in 0..1, in the order of testing: from what surely meets the target towards what is wanted.
    if wanted == "agreement":
        values, order = kept, np.arange(len(thresholds))[::-1]
    else:
        values, order = 1 - depth, np.arange(len(thresholds))
    alpha = 1 - confidence
    chosen = None
    for place in order:
        if p_value(values[:, place], target, alpha) > alpha:
            break
        chosen = place
    if chosen is None:
        best = float(values[:, order[0]].mean())
        reason = (
            f"a {wanted} of {target:.0%} cannot be promised with {confidence:.0%} confidence: the "
            f"{'most careful' if wanted == 'agreement' else 'boldest'} threshold gives {best:.1%} "
            f"on {files} files"
        )
        return Promise(wanted, target, confidence, None, None, None, files, reason)
    return Promise(
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
    parser.add_argument("--temperature", type=float, default=1.0, help="of a trained rule's softmax")
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
            rule = Rule("policy", "agent", network, temperature=given.temperature)
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
