"""Every benchmark that needs no GPU, as ratios measured in one run: one table.

    python -m benchmarks [--quick] [--out results/benchmarks]

The large models have random weights, so that anyone can repeat it; the bundled ones are those of the default
study. CPU time of one thread, medians; the repeats of everything compared are interleaved, so that a busy
machine slows all alike. Written to `--out`: `benchmarks.csv` (the table), `benchmarks.json` (all seconds,
floors, versions) and `engine.png`. Takes about half an hour; docs/performance.md explains the rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import agent, engine, table
from greencode.files import write_json
from greencode.results import device_name, versions


def main() -> None:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that it runs, no more")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="folder to write to")
    parser.add_argument("--repeats", type=int, help="of each measurement; 5 unless told, 1 if quick")
    arguments = parser.parse_args()
    context, repeats = (64, 1) if arguments.quick else (512, 5)
    repeats = arguments.repeats or repeats

    torch.set_num_threads(1)
    start = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    machine = engine.Machine.measure()
    rows, results = [], {}
    for name, config in engine.shapes(arguments.quick).items():
        found, results[name] = engine.measure(name, config, context, repeats, machine)
        rows += found
    bundled = [path.parent for path in sorted(Path("resources/models").glob("*/config.json"))]
    for directory in bundled:
        rows += engine.bundled_rows(directory, context, repeats)
    rows += agent.measure(bundled[0], arguments.quick)

    about = {
        "start": start,
        "device": device_name("cpu"),
        "versions": versions(),
        "threads": 1,
        "dtype": "float32",
        "context_tokens": context,
        "new_tokens": engine.NEW_TOKENS,
        "repeats": repeats,
        "machine": asdict(machine),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    table.write(rows, arguments.out / "benchmarks.csv")
    write_json(
        arguments.out / "benchmarks.json", about | {"rows": [asdict(row) for row in rows], "models": results}
    )
    engine.draw(results, arguments.out / "engine.png")

    table.show(rows)
    print(
        f"\nThis machine, one thread: {machine.flops / 1e9:.0f} GFLOP/s, {machine.bytes / 1e9:.1f} GB/s. "
        "Floor: every pass of a layer at the slower of the two."
    )
    for name, result in results.items():
        work = result["floor"]
        print(
            f"{name}: {work['context_gflop']:.0f} GFLOP for the context of {context} tokens, then "
            f"{work['token_gflop']:.2f} GFLOP and {work['token_mbytes']:.0f} MB per token."
        )
    print(f"{about['device']}; " + ", ".join(f"{key} {value}" for key, value in about["versions"].items()))
    print(f"{sum(row.met == 'NO' for row in rows)} targets missed", file=sys.stderr)


if __name__ == "__main__":
    main()
