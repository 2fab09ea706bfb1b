"""Timing in one run, and the one table that `python -m benchmarks` prints and writes."""

from __future__ import annotations

import csv
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greencode.files import atomic
from greencode.progress import progress


@dataclass(frozen=True)
class Row:
    """One comparison: ours against a peer, measured in the same run.

    Attributes:
        subject: the model.
        what, peer: what is compared with what.
        ratio: ours / peer, of seconds unless `what` says otherwise.
        most, least: what the ratio must not exceed, or must reach; a row with neither is for information.
        seconds, peer_seconds: CPU time of one thread, medians.
        floor_seconds: the least time that the same work could take here (`Machine`), or None.
    """

    subject: str
    what: str
    peer: str
    ratio: float
    most: float | None = None
    least: float | None = None
    seconds: float | None = None
    peer_seconds: float | None = None
    floor_seconds: float | None = None

    @property
    def target(self) -> str:
        """The target in words."""
        if self.most is not None:
            return f"<= {self.most:.3g}"
        return "" if self.least is None else f">= {self.least:.3g}"

    @property
    def met(self) -> str:
        """Whether the target is reached."""
        if self.most is None and self.least is None:
            return ""
        met = self.ratio <= self.most if self.most is not None else self.ratio >= self.least
        return "yes" if met else "NO"


def compare(
    subject: str, what: str, peer: str, seconds: float, peer_seconds: float, **rest: float | None
) -> Row:
    """A row of two times."""
    return Row(
        subject, what, peer, seconds / peer_seconds, seconds=seconds, peer_seconds=peer_seconds, **rest
    )


def cpu_seconds(action: Callable[[], Any]) -> float:
    """CPU time of this process that `action` takes."""
    start = time.process_time()
    action()
    return time.process_time() - start


def interleaved(actions: dict[str, Callable[[], Any]], repeats: int, label: str) -> dict[str, list[float]]:
    """Seconds of each action, `repeats` times; all once before any a second time, in an order that
    changes, after a warm-up of the first two.
    """
    for name in list(actions)[:2]:
        actions[name]()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    order, shuffle = list(actions), random.Random(0).shuffle
    for _ in progress(range(repeats), label):
        shuffle(order)
        for name in order:
            seconds[name].append(cpu_seconds(actions[name]))
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The median of each list."""
    return {name: statistics.median(values) for name, values in seconds.items()}


COLUMNS = ("subject", "what", "peer", "ratio", "target", "met", "seconds", "peer_seconds", "floor_seconds")


def write(rows: list[Row], path: Path) -> None:
    """Write the table as CSV."""
    write_csv([{column: getattr(row, column) for column in COLUMNS} for row in rows], path)


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows of equal keys as CSV, whole or not at all; floats with six digits, None as nothing."""
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row.values()])


def show(rows: list[Row]) -> None:
    """Print the table."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    cells = [("", "ours", "peer", "ratio", "target", "met", "ours [s]", "peer [s]", "floor [s]")] + [
        (
            row.subject, row.what, row.peer, number(row.ratio), row.target, row.met, number(row.seconds),
            number(row.peer_seconds), number(row.floor_seconds),
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    for line in cells:
        texts = [cell.ljust(width) for cell, width in zip(line[:3], widths, strict=False)]
        numbers = [cell.rjust(width) for cell, width in zip(line[3:], widths[3:], strict=True)]
        print("  ".join(texts + numbers).rstrip())
