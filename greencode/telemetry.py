"""Metrics for Prometheus, and logs as JSON lines; neither holds a prompt, a completion or a token."""

from __future__ import annotations

import collections
import logging
import sys
from typing import TYPE_CHECKING, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

if TYPE_CHECKING:
    from greencode.worker import Order, Outcome, Worker

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Telemetry:
    """The metrics of one server. Counters may be raised from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def make(kind, name, text, labels=(), **more):
            return kind(f"greencode_{name}", text, labels, registry=self.registry, **more)

        self.requests = make(Counter, "requests", "Requests by route template.", ("route", "status"))
        self.duration = make(
            Histogram, "request_duration_seconds", "Whole requests.", ("route",), buckets=SECONDS
        )
        self.queue = make(Histogram, "queue_seconds", "From admission to the model.", buckets=SECONDS)
        self.first = make(
            Histogram, "time_to_first_token_seconds", "From the model to the first token.", buckets=SECONDS
        )
        self.token = make(
            Histogram, "time_per_output_token_seconds", "After the first token.", buckets=TOKEN_SECONDS
        )
        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens read.")
        self.generated = make(Counter, "generated_tokens", "Tokens generated.")
        self.depths = make(Counter, "exit_layer", "Generated tokens by depth.", ("layer",))
        self.executed = make(Counter, "layers_executed", "Layers run to decide tokens.")
        self.skipped = make(Counter, "layers_skipped", "Layers above the exits.")
        self.drafts = make(Counter, "drafts", "Tokens that left and were verified.")
        self.accepted = make(Counter, "drafts_accepted", "Those of them that the final layer said too.")
        self.joules = make(Counter, "energy_joules", "Energy of generation.", ("source",))
        self.cancelled = make(Counter, "requests_cancelled", "Requests given up.", ("reason",))
        self.in_flight = make(Gauge, "in_flight", "Requests admitted.")
        self.waiting = make(Gauge, "queue_depth", "Requests that wait for the model.")
        self.model = make(Gauge, "model_info", "The model served.", ("model", "fingerprint", "layers"))

    def watch(self, worker: Worker) -> None:
        """Read the gauges from a worker."""
        self.in_flight.set_function(lambda: worker.in_flight)
        self.waiting.set_function(lambda: worker.queued)

    def finished(self, outcome: Outcome, order: Order, layers: int) -> None:
        """Account for a completion, a cancelled one as far as it went.

        Args:
            layers: N.
        """
        if outcome.cancelled:
            self.cancelled.labels(outcome.cancelled).inc()
        if not outcome.pieces:
            return
        depths = [piece.depth for piece in outcome.pieces]
        self.queue.observe(outcome.queue_s)
        self.first.observe(outcome.prefill_s)
        if len(depths) > 1:
            self.token.observe(outcome.decode_s / (len(depths) - 1))
        self.prompt_tokens.inc(len(order.context))
        self.generated.inc(len(depths))
        for depth, count in collections.Counter(depths).items():
            self.depths.labels(depth).inc(count)
        self.executed.inc(sum(depths))
        self.skipped.inc(layers * len(depths) - sum(depths))
        self.drafts.inc(outcome.drafts or 0)
        self.accepted.inc(outcome.drafts_accepted or 0)
        energy = outcome.energy
        if energy is not None and energy.joules is not None and energy.joules > 0:
            self.joules.labels(energy.source).inc(energy.joules)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def log_as_json(level: str, stream: TextIO | None = None) -> None:
    """One JSON object per line on stderr, for this library and uvicorn; the access log is our own."""
    handler = logging.StreamHandler(stream or sys.stderr)
    names = {"levelname": "level", "asctime": "time", "name": "logger"}
    hidden = [*RESERVED_ATTRS, "color_message"]
    handler.setFormatter(
        JsonFormatter(
            "%(asctime)s %(levelname)s %(name)s %(message)s", rename_fields=names, reserved_attrs=hidden
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    logging.getLogger("uvicorn.access").disabled = True
