"""What HTTP costs: completions over the endpoint against the engine called directly, in turn, in one run.

    python -m benchmarks.serving [--quick] [--weights DIR] [--out results/benchmarks]

The endpoint runs in a process of its own, as it does for an editor; the engine runs here, over the same
model with the same settings, from prompt text to completion text. Requests alternate and one is under way at
a time, so that a busy machine slows both alike. Times are wall time. Written to `--out`: `serving.csv` and
`serving.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch

from greencode import prompts
from greencode.engine import Engine
from greencode.files import write_json
from greencode.models import load
from greencode.policies import FixedExit
from greencode.progress import progress
from greencode.results import device_name, versions
from greencode.tokenise import load_tokenizer

NEW_TOKENS = 15
TARGET_MS = 3.0
LAYER = 8


@contextlib.contextmanager
def endpoint(weights: Path) -> Iterator[http.client.HTTPConnection]:
    """A connection to an endpoint that is ready."""
    command = [
        sys.executable, "-m", "greencode.serve", "--weights", str(weights), "--language", "python",
        "--port", "0", "--threads", "1", "--log-level", "info",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            url = urlsplit(json.loads(server.stderr.readline())["url"])
            for line in server.stderr:
                if '"ready"' in line:
                    break
            # From here on the log must not fill its pipe.
            drain = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
            yield http.client.HTTPConnection(url.hostname, url.port)
        finally:
            server.terminate()
            server.wait()
            drain.wait()


def sources(count: int, characters: int = 1500) -> list[str]:
    """Python source before a cursor at the end of a line of code: beginnings of this library's own files."""
    found = []
    for path in sorted(Path("greencode").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        ends = (at for at in range(characters, len(text)) if text[at] == "\n")
        cuts = (text[:end] for end in ends if prompts.read(text[:end], "python").completable)
        found += [cut for cut in [next(cuts, "")] if cut]
    return found[:count]


def directly(engine: Engine, kind: str, policy: FixedExit | None) -> Callable[[str], str]:
    """Completes source without the endpoint."""
    kv = "full" if policy is None else "deferred"
    encode = engine.tokenizer.backend_tokenizer.encode

    def complete(source: str) -> str:
        if kind == "tokens":
            return engine.complete(encode(source).ids, NEW_TOKENS, policy, kv=kv).text
        read = prompts.read(source, "python")
        text = engine.complete(encode(read.text).ids, NEW_TOKENS, policy, kv=kv).text
        return read.writer.write(text) + read.writer.close()

    return complete


def over_http(
    connection: http.client.HTTPConnection, kind: str, policy: FixedExit | None
) -> Callable[[str], str]:
    """Completes source by a request."""
    exits = {"exit_policy": "none"} if policy is None else {"exit_layer": policy.depth}
    parameters = {**exits, "prompt_format": kind, "max_new_tokens": NEW_TOKENS}

    def complete(source: str) -> str:
        body = json.dumps({"inputs": source, "parameters": parameters})
        connection.request("POST", "/generate", body, {"content-type": "application/json"})
        reply = json.loads(connection.getresponse().read())
        return reply["generated_text"]

    return complete


def measure(ways: dict[str, Callable[[str], str]], texts: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way for every text and round, in turn and in changing order; the first round warms up.

    The ways must agree on every completion.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in progress(range(rounds + 1), "requests"):
        for number, text in enumerate(texts):
            names = list(ways) if (turn + number) % 2 else list(ways)[::-1]
            answers = set()
            for name in names:
                start = time.perf_counter()
                answers.add(ways[name](text))
                if turn:
                    seconds[name].append(time.perf_counter() - start)
            if len(answers) > 1:
                raise SystemExit(f"The endpoint and the engine disagree on a completion: {answers}.")
    return seconds


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few requests: shows that it runs, no more")
    parser.add_argument("--weights", type=Path, default=Path("resources/models/llama-code"))
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="folder to write to")
    arguments = parser.parse_args()
    rounds, texts = (2, sources(3)) if arguments.quick else (12, sources(10))

    torch.set_num_threads(1)
    start = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    tokenizer = load_tokenizer(arguments.weights)
    engine = Engine(load(arguments.weights), tokenizer=tokenizer)
    rows, raw = [], {}
    with endpoint(arguments.weights) as connection:
        for kind in ("tokens", "source"):
            # As tokens, the same text that the model reads of the source.
            given = texts if kind == "source" else [prompts.read(text, "python").text for text in texts]
            for name, policy in (("full", None), (f"fixed-{LAYER}", FixedExit(LAYER))):
                ways = {"engine": directly(engine, kind, policy), "http": over_http(connection, kind, policy)}
                seconds = measure(ways, given, rounds)
                raw[f"{kind} {name}"] = seconds
                direct, http_ = (1000 * np.array(seconds[way]) for way in ("engine", "http"))
                extra = float(np.median(http_ - direct))
                rows.append(
                    {
                        "prompt": kind,
                        "exit": name,
                        "engine_p50_ms": float(np.median(direct)),
                        "engine_p99_ms": float(np.quantile(direct, 0.99)),
                        "http_p50_ms": float(np.median(http_)),
                        "http_p99_ms": float(np.quantile(http_, 0.99)),
                        "ratio_p50": float(np.median(http_) / np.median(direct)),
                        "overhead_p50_ms": extra,
                        "target_ms": TARGET_MS,
                        "met": "yes" if extra < TARGET_MS else "NO",
                    }
                )
    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / "serving.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    about = {
        "start": start,
        "device": device_name("cpu"),
        "versions": versions(),
        "weights": str(arguments.weights),
        "requests": rounds * len(texts),
        "new_tokens": NEW_TOKENS,
    }
    write_json(arguments.out / "serving.json", about | {"rows": rows, "seconds": raw})
    print("prompt  exit     engine p50  p99   http p50  p99   ratio  overhead p50, ms")
    for row in rows:
        print(
            f"{row['prompt']:7} {row['exit']:8} {row['engine_p50_ms']:9.1f} {row['engine_p99_ms']:6.1f} "
            f"{row['http_p50_ms']:8.1f} {row['http_p99_ms']:6.1f} {row['ratio_p50']:6.3f} "
            f"{row['overhead_p50_ms']:7.2f} < {TARGET_MS:g} {row['met']}"
        )
    missed = sum(row["met"] == "NO" for row in rows)
    print(f"{about['device']}; {about['requests']} requests each; {missed} targets missed", file=sys.stderr)


if __name__ == "__main__":
    main()
