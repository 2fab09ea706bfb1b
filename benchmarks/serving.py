"""What HTTP costs: completions over the endpoint against the engine called directly, in turn, in one run.

    python -m benchmarks.serving [--quick] [--weights DIR] [--out results/benchmarks]

Both use one model in one process, from prompt text to completion text, so that neither finds the caches
colder than the other; the endpoint is the whole one, log included, behind a socket. Requests alternate and
one is under way at a time. Times are wall time. Written to `--out`: `serving.csv` and `serving.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import http.client
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import uvicorn

from greencode import prompts, serve
from greencode.api import create_app
from greencode.engine import Engine
from greencode.files import write_json
from greencode.policies import FixedExit
from greencode.progress import progress
from greencode.results import device_name, versions
from greencode.telemetry import Telemetry, log_as_json
from greencode.worker import Worker

NEW_TOKENS = 15
TARGET_MS = 3.0
LAYER = 8


@contextlib.contextmanager
def endpoint(settings: serve.Settings) -> Iterator[tuple[http.client.HTTPConnection, Engine]]:
    """A connection to an endpoint that is ready, and its engine."""
    telemetry = Telemetry()
    worker = Worker(
        "model",
        lambda: serve.load(settings),
        settings.max_concurrent_requests,
        finished=lambda outcome, order: telemetry.finished(outcome, order, settings.exit_points[-1]),
    )
    app = create_app(settings, worker, telemetry)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, server_header=False))
    with serve.listen(settings.host, 0) as opened:
        thread = threading.Thread(target=server.run, args=([opened],))
        thread.start()
        connection = http.client.HTTPConnection(*opened.getsockname()[:2])
        try:
            while worker.state == "loading":
                time.sleep(0.01)
            if worker.state != "ready":
                raise SystemExit("The model cannot be loaded.")
            yield connection, worker.served.engine
        finally:
            connection.close()
            server.should_exit = True
            thread.join()


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
        if "error" in reply:
            raise SystemExit(f"The endpoint refused a request: {reply['error']}")
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

    start = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    flags = ["--weights", str(arguments.weights), "--language", "python", "--threads", "1"]
    settings = serve.read_settings(flags)
    torch.set_num_threads(1)  # of this thread; the endpoint's sets its own
    rows, raw = [], {}
    with open(os.devnull, "w") as nowhere, endpoint(settings) as (connection, engine):
        log_as_json("info", nowhere)
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
