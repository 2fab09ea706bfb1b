"""What HTTP costs: completions over the endpoint against the engine called directly, in turn, in one run.

    python -m benchmarks.serving [--quick] [--weights DIR] [--out results/benchmarks]

One process has the model, the whole endpoint behind a socket, its log included, and the direct calls: both
use the same weights in the same memory. The client is a process of its own, as an editor is. Both go from
prompt text to completion text, one request is under way at a time, and what HTTP adds is the median of the
differences between a request and the direct call beside it. Times are wall time.

`outside` is the part of a request, by the server's own account, in which the model's thread did not work on
it; it holds the reading of the prompt, which a direct call needs too, but not the noise of the model.
Written to `--out`: `serving.csv` and `serving.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn

from benchmarks.table import write_csv
from greencode import prompts, serve
from greencode.engine import Engine
from greencode.files import write_json
from greencode.policies import FixedExit
from greencode.progress import progress
from greencode.results import device_name, versions
from greencode.telemetry import log_as_json

NEW_TOKENS = 15
TARGET_MS = 3.0
LAYER = 8


@contextlib.contextmanager
def endpoint(settings: serve.Settings) -> Iterator[tuple[tuple[str, int], Engine]]:
    """The address of an endpoint that is ready, and its engine."""
    app = serve.assemble(settings)
    worker = app.state.service.worker
    server = uvicorn.Server(serve.http_config(settings, app))
    with serve.listen(settings.host, settings.port) as opened:
        thread = threading.Thread(target=server.run, args=([opened],))
        thread.start()
        try:
            while worker.state == "loading":
                time.sleep(0.01)
            if worker.state != "ready":
                raise SystemExit("The model cannot be loaded.")
            yield opened.getsockname()[:2], worker.served.engine
        finally:
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


@dataclass(frozen=True)
class Timed:
    """A completion, its seconds, and how many of them the model's thread worked on it."""

    text: str
    seconds: float
    model_seconds: float


def directly(engine: Engine, kind: str, policy: FixedExit | None) -> Callable[[str], Timed]:
    """Completes source without the endpoint."""
    kv, tokenizer = "full" if policy is None else "deferred", engine.tokenizer

    def completion(prompt: str) -> str:
        ids = tokenizer.backend_tokenizer.encode(prompt).ids
        tokens = [token.id for token in engine.stream(ids, NEW_TOKENS, policy, kv)]
        return tokenizer.decode(tokens, skip_special_tokens=True)

    def text_of(source: str) -> str:
        if kind == "tokens":
            return completion(source)
        read = prompts.read(source, "python")
        return read.writer.write(completion(read.text)) + read.writer.close()

    def complete(source: str) -> Timed:
        start = time.perf_counter()
        text = text_of(source)
        seconds = time.perf_counter() - start
        return Timed(text, seconds, seconds)

    return complete


class Client:
    """What runs in the client's process: one connection that is kept. It reads what it needs and no more, as
    editors' clients do in a compiled language; Python's own would add half a millisecond by itself."""

    connection: socket.socket

    @classmethod
    def connect(cls, host: str, port: int) -> None:
        cls.connection = socket.create_connection((host, port))
        cls.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @classmethod
    def ask(cls, body: dict[str, Any]) -> Timed:
        start = time.perf_counter()
        sent = json.dumps(body).encode()
        head = [
            "POST /generate HTTP/1.1", "host: localhost", "content-type: application/json",
            f"content-length: {len(sent)}", "", "",
        ]  # fmt: skip
        cls.connection.sendall("\r\n".join(head).encode() + sent)
        received = b""
        while b"\r\n\r\n" not in received:
            received += cls._receive()
        head, _, rest = received.partition(b"\r\n\r\n")
        status, *lines = head.split(b"\r\n")
        values = dict(line.split(b": ", 1) for line in lines)
        while len(rest) < int(values[b"content-length"]):
            rest += cls._receive()
        reply = json.loads(rest)
        seconds = time.perf_counter() - start
        if b" 200 " not in status:
            raise RuntimeError(f"The endpoint refused a request: {reply['error']}")
        return Timed(reply["generated_text"], seconds, float(values[b"x-inference-time"]) / 1000)

    @classmethod
    def _receive(cls) -> bytes:
        part = cls.connection.recv(1 << 16)
        if not part:
            raise RuntimeError("The endpoint closed the connection.")
        return part


def over_http(client: ProcessPoolExecutor, kind: str, policy: FixedExit | None) -> Callable[[str], Timed]:
    """Completes source by a request."""
    exits = {"exit_policy": "none"} if policy is None else {"exit_layer": policy.depth}
    parameters = {**exits, "prompt_format": kind, "max_new_tokens": NEW_TOKENS}
    return lambda source: client.submit(Client.ask, {"inputs": source, "parameters": parameters}).result()


@dataclass
class Pairs:
    """Seconds of direct calls and of requests for the same texts, pair by pair."""

    direct: list[float] = field(default_factory=list)
    http: list[float] = field(default_factory=list)
    http_model: list[float] = field(default_factory=list)

    def row(self, prompt: str, name: str) -> dict[str, Any]:
        """Quantiles in milliseconds, and whether the target is met."""
        direct, http_, model = (
            1000 * np.array(values) for values in (self.direct, self.http, self.http_model)
        )
        row = {"prompt": prompt, "exit": name}
        times = {"engine": direct, "http": http_, "overhead": http_ - direct, "outside": http_ - model}
        for what, values in times.items():
            for share, quantile in (("p50", 0.5), ("p99", 0.99)):
                row[f"{what}_{share}_ms"] = float(np.quantile(values, quantile))
        low, high = median_interval(http_ - direct)
        met = "yes" if row["overhead_p50_ms"] < TARGET_MS else "NO"
        return row | {"overhead_low_ms": low, "overhead_high_ms": high, "target_ms": TARGET_MS, "met": met}


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the median, by ranks."""
    ranked, half = np.sort(values), 0.98 * len(values) ** 0.5
    low = max(0, int(len(values) / 2 - half))
    return float(ranked[low]), float(ranked[len(values) - 1 - low])


def measure(
    direct: Callable[[str], Timed], over_http: Callable[[str], Timed], texts: list[str], rounds: int
) -> Pairs:
    """Both ways for every text and round, in turn and in changing order; the first round warms up.

    They must agree on every completion.
    """
    pairs = Pairs()
    for turn in progress(range(rounds + 1), "requests"):
        for number, text in enumerate(texts):
            if (turn + number) % 2:
                called, asked = direct(text), over_http(text)
            else:
                asked, called = over_http(text), direct(text)
            if called.text != asked.text:
                raise SystemExit(
                    f"The endpoint and the engine disagree: {asked.text!r} against {called.text!r}."
                )
            if turn:
                pairs.direct.append(called.seconds)
                pairs.http.append(asked.seconds)
                pairs.http_model.append(asked.model_seconds)
    return pairs


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests: shows that it runs, no more")
    parser.add_argument("--weights", type=Path, default=Path("resources/models/llama-code"))
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="folder to write to")
    options = parser.parse_args(arguments)
    rounds, texts = (2, sources(3)) if options.quick else (12, sources(10))

    start = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    flags = ["--weights", str(options.weights), "--language", "python", "--threads", "1", "--port", "0"]
    settings = serve.read_settings(flags)
    torch.set_num_threads(1)  # of this thread; the endpoint's sets its own
    rows, raw = [], {}
    spawn = multiprocessing.get_context("spawn")
    with (
        open(os.devnull, "w") as nowhere,
        endpoint(settings) as (address, engine),
        ProcessPoolExecutor(1, spawn, Client.connect, address) as client,
    ):
        log_as_json("info", nowhere)
        for kind in ("tokens", "source"):
            # As tokens, the same text that the model reads of the source.
            given = texts if kind == "source" else [prompts.read(text, "python").text for text in texts]
            for name, policy in (("full", None), (f"fixed-{LAYER}", FixedExit(LAYER))):
                pairs = measure(
                    directly(engine, kind, policy), over_http(client, kind, policy), given, rounds
                )
                rows.append(pairs.row(kind, name))
                raw[f"{kind} {name}"] = vars(pairs)
    about = {
        "start": start,
        "device": device_name("cpu"),
        "versions": versions(),
        "weights": str(options.weights),
        "requests": rounds * len(texts),
        "new_tokens": NEW_TOKENS,
    }
    write_csv(rows, options.out / "serving.csv")
    write_json(options.out / "serving.json", about | {"rows": rows, "seconds": raw})
    show(rows)
    missed = sum(row["met"] == "NO" for row in rows)
    print(f"{about['device']}; {about['requests']} requests each; {missed} targets missed", file=sys.stderr)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table, p50 / p99 in milliseconds."""
    print("prompt exit    engine         HTTP           outside       HTTP adds")
    for row in rows:
        cells = [f"{row[f'{what}_p50_ms']:6.2f} /{row[f'{what}_p99_ms']:7.2f}" for what in ("engine", "http")]
        cells += [f"{row['outside_p50_ms']:5.2f} /{row['outside_p99_ms']:5.2f}"]
        print(
            f"{row['prompt']:6} {row['exit']:7}",
            *cells,
            f" {row['overhead_p50_ms']:5.2f} ({row['overhead_low_ms']:.2f} to {row['overhead_high_ms']:.2f})"
            f" /{row['overhead_p99_ms']:6.2f} < {row['target_ms']:g} {row['met']}",
        )


if __name__ == "__main__":
    main()
