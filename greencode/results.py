"""The result records that stages hand to one another, and how each number was made.

Depths are layers run, 1..N. Times are seconds, energies joules. A quantity that was not measured is
None, never 0.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from greencode.errors import UserError
from greencode.files import open_text, read_json, write_json, write_text

PACKAGES = (
    "torch", "transformers", "datasets", "gymnasium", "stable-baselines3", "zeus", "codebleu",
    "rouge-score", "snakemake", "numpy",
)  # fmt: skip


def config_hash(config: Any) -> str:
    """Twelve hex digits that name a configuration, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def git_commit() -> str | None:
    """Commit of the code that runs, with "+" if it was edited since; None outside a repository."""
    here = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        edited = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if edited else "")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    """A device with the name of its hardware, as far as the system tells: `cpu (Intel ...)`."""
    if device.startswith("cuda"):
        import torch

        return f"{device} ({torch.cuda.get_device_name(device)})"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            names = [line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")]
        return f"{device} ({names[0]})"
    except (OSError, IndexError):
        return f"{device} ({platform.processor() or platform.machine()})"


@dataclass(frozen=True)
class Provenance:
    """How a result was made: enough to judge it, and to make it again."""

    config_hash: str
    started: str
    commit: str | None
    versions: dict[str, str]
    device: str | None = None
    dtype: str | None = None
    kv: str | None = None
    threads: int | None = None
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def now(cls, settings: dict[str, Any], **where: Any) -> Provenance:
        """Provenance of a run that begins now with these settings."""
        return cls(
            config_hash=config_hash(settings),
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            commit=git_commit(),
            versions=versions(),
            settings=settings,
            **where,
        )


@dataclass(frozen=True)
class Completion:
    """One sample's completion.

    Attributes:
        id: the file's id in the test split.
        context_tokens: number of tokens in the context.
        tokens: generated token ids.
        reference: the file's own next token ids.
        text, reference_text: both decoded.
        depths: layers run for each generated token.
        seconds: wall time of the completion.
        cpu_seconds: CPU time of the process during it.
        joules: energy, or None where nothing measures or estimates it. A window of the meter covers
            several samples; each sample has the share of its time.
        layer_positions: layers x positions run in all, deferred work and context included.
        checks: policy evaluations.
        drafts, accepted: tokens that left early and were verified by the final layer, and those that it
            said too.
    """

    id: int
    context_tokens: int
    tokens: list[int]
    reference: list[int]
    text: str
    reference_text: str
    depths: list[int]
    seconds: float
    cpu_seconds: float
    joules: float | None
    layer_positions: int
    checks: int
    drafts: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Generation:
    """All completions of one method on one model and dataset.

    Attributes:
        method: `base`, `full`, `fixed-8`, `agent-T0.9`, ...
        layers: N.
        exit_points: depths at which leaving is allowed, ending at N.
        energy_source: `nvml`, `rapl`, `estimate`, or None.
        energy_note: one sentence on how joules were obtained.
        threshold: T of a rule; None for a method without one.
    """

    model: str
    dataset: str
    language: str
    method: str
    layers: int
    exit_points: list[int]
    energy_source: str | None
    energy_note: str
    provenance: Provenance
    completions: list[Completion]
    threshold: float | None = None

    def write(self, path: str | Path) -> None:
        """Write JSON Lines: a head line, then one line per completion."""
        write_generations([self], path)

    @classmethod
    def read(cls, path: str | Path) -> Generation:
        """Read what `write` wrote; a broken file is a `UserError`."""
        found = read_generations(path)
        if len(found) != 1:
            raise UserError(
                f"{path} is not a generations file "
                f"(of one method; it has {len(found)}); delete it and run again."
            )
        return found[0]


def write_generations(generations: Iterable[Generation], path: str | Path) -> None:
    """Write several methods' completions into one file: JSON Lines, each method's head and completions."""
    lines = []
    for generation in generations:
        head = asdict(generation)
        lines += [head, *head.pop("completions")]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_generations(path: str | Path) -> list[Generation]:
    """Read what `write_generations` wrote; a broken file is a `UserError`."""
    found: list[Generation] = []
    try:
        with open_text(path) as stream:
            for line in map(json.loads, stream):
                if "method" in line:
                    provenance = Provenance(**line.pop("provenance"))
                    found.append(Generation(provenance=provenance, completions=[], **line))
                else:
                    found[-1].completions.append(Completion(**line))
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is not a generations file ({error}); delete it and run again.") from None
    return found


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % bootstrap interval over samples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """Scores of one method on one model and dataset.

    Attributes:
        quality: metric name -> interval; see `greencode.metrics.QUALITY`.
        cost: `seconds`, `cpu_seconds`, `joules` (absent where not measured) and `layers` per sample
            or token, `tokens_per_second`, `layers_skipped`; each with its interval.
        depth_counts: generated tokens per depth.
        threshold: T of a rule; None for a method without one.
    """

    model: str
    dataset: str
    language: str
    method: str
    layers: int
    exit_points: list[int]
    samples: int
    quality: dict[str, Interval]
    cost: dict[str, Interval]
    depth_counts: dict[int, int]
    energy_source: str | None
    energy_note: str
    provenance: Provenance
    threshold: float | None = None

    def write(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: str | Path) -> Evaluation:
        """Read what `write` wrote; a broken file is a `UserError`."""
        record = read_json(path)
        try:
            for part in ("quality", "cost"):
                record[part] = {name: Interval(**value) for name, value in record[part].items()}
            record["depth_counts"] = {int(d): n for d, n in record["depth_counts"].items()}
            record["provenance"] = Provenance(**record["provenance"])
            return cls(**record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not an evaluation file ({error}); delete it and run again.") from None
