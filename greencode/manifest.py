"""results/manifest.json: how the files of a study were made, what they cost, whether they are the same.

The frontier, a target of its own, has results/frontier_manifest.json.

`python -m greencode.manifest verify` recomputes the hashes. Paths are relative to the study's folder where
they lie in it. Times are seconds, energies joules; what was not measured is None, never 0.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greencode.errors import UserError
from greencode.files import read_json, sha256
from greencode.results import config_hash, device_name, git_commit, versions

if TYPE_CHECKING:
    import pandas as pd

MANIFEST = "results/manifest.json"
FRONTIER = "results/frontier_manifest.json"
# Ember, Global Electricity Review 2025; the schema's default.
WORLD_INTENSITY = 473.0
JOULES_PER_KWH = 3.6e6


def build(
    study: Mapping[str, Any],
    outputs: Iterable[str],
    sources: Iterable[str],
    configs: Iterable[str],
    costs: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest of a finished study, in whose folder this runs.

    Args:
        study: the completed configuration.
        outputs: files that its jobs made; a model's folder is recorded whole, config and tokenizer included.
        sources: files from outside that it read.
        configs: its configuration files.
        costs: what `costs_of` returned.
    """
    outputs = set(outputs)
    records = [name for name in outputs if name.endswith(".json")]
    folders = {Path(name).parent for name in outputs if name.endswith(("/model.safetensors", "/info.json"))}
    outputs |= {str(file) for folder in folders for file in folder.glob("[!.]*") if file.is_file()}
    commit = git_commit()
    data = {name: read_json(f"results/data/{name}/manifest.json")["source"] for name in study["datasets"]}
    models = {name: read_json(f"results/models/{name}/base/info.json") for name in study["models"]}
    return {
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": study,
        "config_hash": config_hash(study),
        "code": {"commit": commit and commit.rstrip("+"), "edited": commit and commit.endswith("+")},
        "versions": _versions(records),
        "machine": device_name("cpu"),
        "datasets": data,
        "models": {
            name: info["source"] | {"fingerprint": info["fingerprint"]} for name, info in models.items()
        },
        "inputs": _recorded({*sources, *configs}),
        "outputs": _recorded(outputs),
        **costs,
    }


def _recorded(paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    here = Path.cwd()
    found = {}
    for path in sorted(map(Path, paths)):
        name = path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path
        found[name.as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return found


def _versions(records: Iterable[str]) -> dict[str, str]:
    """Versions of Python and packages, of this process and of every result; several if they differ."""
    found = [versions()]
    for path in records:
        record = read_json(path)
        made = record.get("provenance") if isinstance(record, dict) else None
        while isinstance(made, dict):
            found.append(made["versions"])
            made = made["settings"].get("generation")  # what an evaluation is of
    names = sorted({name for one in found for name in one})
    return {name: ", ".join(sorted({one[name] for one in found if name in one})) for name in names}


def costs_of(outputs: Iterable[str], cpu_watts: float | None, intensity: float) -> dict[str, Any]:
    """Seconds, memory, energy and emissions of the jobs that made these files, by rule and in all.

    Each job has left its own beside its log (`greencode.job`). The energy of one on a CPU that nothing
    measured is estimated; that of one on a GPU is not.

    Args:
        outputs: jobs count whose outputs are all among them.
        cpu_watts: power of one busy core, for the estimate; None for no estimate.
        intensity: g CO2e per kWh.
    """
    outputs = set(outputs)
    rules: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(Path("logs").rglob("*.json")):
        if any(part.startswith(".") for part in path.parts):
            continue
        job = read_json(path)
        if set(job["output"]) <= outputs:
            outputs -= set(job["output"])
            if job["joules"] is None and cpu_watts and not job["on_gpu"]:
                job |= {"joules": cpu_watts * job["cpu_seconds"], "energy_source": "estimate"}
            rules.setdefault(job["rule"], []).append(job)
    jobs = [job for several in rules.values() for job in several]
    # Of those that are known: the note names the others.
    joules = sum(known) if (known := [job["joules"] for job in jobs if job["joules"] is not None]) else None
    kwh = None if joules is None else joules / JOULES_PER_KWH
    return {
        "rules": {rule: _sum(several) for rule, several in rules.items()},
        "total": _sum(jobs)
        | {
            "joules": joules,
            "kwh": kwh,
            "energy_note": _energy_note(jobs, len(outputs), cpu_watts),
            "grams_co2e": None if kwh is None else kwh * intensity,
            "co2e_note": f"An estimate: energy x {intensity:g} g/kWh ({_origin(intensity)}).",
        },
    }


def _sum(jobs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several jobs as one; a sum is None if a part of it is unknown."""

    def add(name: str) -> float | None:
        values = [job[name] for job in jobs]
        return None if None in values else round(sum(values), 2)

    memory = [job["memory_mb"] for job in jobs if job["memory_mb"] is not None]
    sources = {job["energy_source"] for job in jobs if job["joules"] is not None}
    return {
        "jobs": len(jobs),
        "seconds": add("seconds"),
        "cpu_seconds": add("cpu_seconds"),
        "memory_mb": max(memory, default=None),
        "joules": add("joules"),
        "energy_source": ", ".join(sorted(sources)) or None,
    }


def _energy_note(jobs: Sequence[Mapping[str, Any]], unknown: int, cpu_watts: float | None) -> str:
    """How the joules were obtained, and what they leave out; `unknown` files have no job on record."""
    said, known = [], [job for job in jobs if job["joules"] is not None]
    for source in sorted({job["energy_source"] for job in known}):
        joules = sum(job["joules"] for job in known if job["energy_source"] == source)
        how = (
            f"An estimate, {cpu_watts or 0:g} W x CPU seconds"
            if source == "estimate"
            else f"Measured by {source}"
        )
        said.append(f"{how}: {joules:.4g} J.")
    if missing := sorted({job["rule"] for job in jobs if job["joules"] is None}):
        said.append(f"Not measured: {', '.join(missing)}.")
    if unknown:
        said.append(f"Not on record: the jobs of {unknown} files.")
    said.append("Not counted: Snakemake itself, and attempts that were interrupted.")
    return " ".join(said)


def _origin(intensity: float) -> str:
    if intensity == WORLD_INTENSITY:
        return "the world's average of 2024, Ember, Global Electricity Review 2025"
    return "the configuration's carbon_intensity"


def cost_table(costs: Mapping[str, Any]) -> pd.DataFrame:
    """What `costs_of` found, one line per rule, most CPU seconds first, and the total."""
    import pandas as pd

    rules = sorted(costs["rules"].items(), key=lambda item: -item[1]["cpu_seconds"])
    columns = ["jobs", "seconds", "cpu_seconds", "memory_mb", "joules", "energy_source"]
    rows = [{"rule": rule, **{name: cost[name] for name in columns}} for rule, cost in rules]
    total = costs["total"]
    rows.append({"rule": "total", **{name: total[name] for name in (*columns, "grams_co2e")}})
    return pd.DataFrame(rows)


def verify(path: str | Path = MANIFEST) -> tuple[int, list[str], list[str]]:
    """Compare a study's files with its manifest: how many there are, which differ, which are missing.

    Raises:
        UserError: no manifest, or something else.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; it comes with the figures of a study.")
    manifest = read_json(path)
    try:
        files = {
            name: (one["bytes"], one["sha256"])
            for name, one in (manifest["inputs"] | manifest["outputs"]).items()
        }
    except (TypeError, KeyError):
        raise UserError(f"{path} is not a manifest; delete it and draw the figures again.") from None
    differ, missing = [], []
    for name, (size, digest) in files.items():
        file = path.parent.parent / name
        if not file.is_file():
            missing.append(name)
        elif file.stat().st_size != size or sha256(file) != digest:
            differ.append(name)
    return len(files), differ, missing


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m greencode.manifest", description=__doc__)
    parser.add_argument("command", choices=["verify"], help="compare the files with their recorded hashes")
    parser.add_argument("manifest", nargs="*", help=f"default: those there are of {MANIFEST} and {FRONTIER}")
    given = parser.parse_args(arguments).manifest
    paths = given or [path for path in (MANIFEST, FRONTIER) if Path(path).exists()] or [MANIFEST]
    return max([_told(path) for path in paths])


def _told(path: str) -> int:
    """Verify one manifest and say in one line what was found; gives the exit code."""
    try:
        number, differ, missing = verify(path)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    if not differ + missing:
        print(f"All {number} files are as recorded in {path}.")
        return 0
    parts = [
        f"{len(names)} {what} ({', '.join(names)})"
        for what, names in (("differ", differ), ("missing", missing))
        if names
    ]
    print(f"Of {number} files in {path}: {'; '.join(parts)}.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
