"""What an exit rule promises at which threshold: the record of a calibration (`greencode.calibrate`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from greencode.errors import UserError
from greencode.files import read_json, write_json
from greencode.results import Provenance

WANTED = {"saving": "a saving", "agreement": "an agreement", "rougeL": "a ROUGE-L"}
"""What can be promised, with its name in sentences."""


@dataclass(frozen=True)
class Promise:
    """The answer to one target.

    Attributes:
        wanted: `saving`, `agreement` or `rougeL`.
        target: what was asked, in 0..1.
        confidence: of the promise.
        threshold: T, or None if it cannot be promised.
        saving, agreement: means over the calibration files at this threshold; None without one.
        files: independent files that the promise rests on.
        reason: why there is no threshold, or None.
        rougeL: share of the full model's mean ROUGE-L at this threshold, where that was asked.
    """

    wanted: str
    target: float
    confidence: float
    threshold: float | None
    saving: float | None
    agreement: float | None
    files: int
    reason: str | None = None
    rougeL: float | None = None


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
