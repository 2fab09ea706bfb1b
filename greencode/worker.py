"""One thread that owns the model: loads it, and completes one request at a time from a bounded queue.

Requests are admitted before they are prepared, so that a full server says so at once. A request holds its
slot until it is answered, given up or dropped from the queue. Whoever waits for a job runs on an event
loop; outcomes, and tokens if they are streamed, come there by `call_soon_threadsafe`.

The thread and the loop share the interpreter's lock: what either does while the other could go on makes a
client wait. So the thread does nothing but complete, and accounts are kept on the loop, after the reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from greencode.choices import Exit
from greencode.errors import UserError
from greencode.lexing import EOL
from greencode.parameters import ServiceError
from greencode.replies import Finish

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from greencode.energy import Energy, Meter
    from greencode.engine import Engine, Policy
    from greencode.engine import Token as EngineToken
    from greencode.policies import ExitPolicy
    from greencode.prompts import Writer

log = logging.getLogger(__name__)

State = Literal["loading", "ready", "failed", "stopped"]
RETRY = {"retry-after": "1"}


def shutting_down() -> ServiceError:
    """503: the server ends."""
    return ServiceError(503, "shutting_down", "The server is shutting down.", headers=RETRY)


@dataclass(frozen=True)
class Served:
    """A loaded model with what belongs to it.

    Attributes:
        engine: with exit points and device.
        tokenizer: a fast one.
        agent: None where there is none; then nothing leaves by `rl`.
        agent_temperature: of the agent's softmax.
        meter: of the device.
        eos: ids that end a completion.
        fingerprint: of the weights.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    agent: ExitPolicy | None
    agent_temperature: float
    meter: Meter
    eos: frozenset[int]
    fingerprint: str

    def policy(self, how: Exit) -> Policy | None:
        """The engine's policy for one request; None never leaves."""
        from greencode.policies import AgentExit, FixedExit

        if how.policy == "none":
            return None
        if how.policy == "fixed":
            return FixedExit(how.layer)
        device = str(self.engine.family.device)
        return AgentExit(self.agent, how.threshold, self.agent_temperature, device)


@dataclass(frozen=True)
class Order:
    """One completion to make.

    Attributes:
        context: token ids.
        new_tokens: at most this many; 0 for a place where there is nothing to complete.
        sampling: arguments of `greencode.engine.Sampling`; None is greedy.
        stop: texts that end the completion and are left out of it.
        single_line: end at the first line end after some code.
        writer: makes source of the completion's tokens; None leaves them as they are.
    """

    context: Sequence[int]
    new_tokens: int
    exit: Exit
    sampling: dict[str, Any] | None = None
    stop: tuple[str, ...] = ()
    single_line: bool = False
    writer: Writer | None = None


@dataclass(frozen=True)
class Piece:
    """A generated token: the text that it adds, and the layers run to decide it."""

    id: int
    text: str
    depth: int
    special: bool


@dataclass
class Outcome:
    """A finished completion; times are seconds. `cancelled` says why it was given up, if it was. Drafts are
    counted where they are verified."""

    pieces: list[Piece] = field(default_factory=list)
    finish: Finish = "length"
    layer_positions: int = 0
    checks: int = 0
    drafts: int | None = None
    drafts_accepted: int | None = None
    energy: Energy | None = None
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0
    cancelled: str | None = None

    @property
    def text(self) -> str:
        """The completion."""
        return "".join(piece.text for piece in self.pieces)


class _Text:
    """Text of a completion as its tokens come: decoded, as source, up to a stop text."""

    LOOK_BACK = 8  # tokens of the prompt that some tokenizers need to know about a leading blank

    def __init__(self, tokenizer: PreTrainedTokenizerBase, order: Order) -> None:
        self._decode = tokenizer.backend_tokenizer.decode
        self._ids = list(order.context[-self.LOOK_BACK :])
        self._decoded = len(self._decode(self._ids))
        self._writer = order.writer
        self._stop = order.stop
        self._line_end = ("\n" if order.writer else EOL) if order.single_line else None
        self._held = ""
        self._has_code = False
        self.stopped = False

    def add(self, token: int) -> str:
        """Text that is certain after one more token."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):  # half of a character
            return ""
        new, self._decoded = text[self._decoded :], len(text)
        return self._until_stop(self._writer.write(new) if self._writer else new)

    def close(self) -> str:
        """The rest, once no token follows."""
        if self.stopped:
            return ""
        text = self._decode(self._ids)[self._decoded :]
        if self._writer:
            text = self._writer.write(text) + self._writer.close()
        text = self._until_stop(text)
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _until_stop(self, new: str) -> str:
        self._held += new
        ends = [end for stop in self._stop if (end := self._held.find(stop)) >= 0]
        if self._line_end:
            blank = 0 if self._has_code else len(self._held) - len(self._held.lstrip())
            end = self._held.find(self._line_end, blank)
            if end >= 0 and (self._has_code or self._held[:end].strip()):
                ends.append(end)
        self.stopped = bool(ends)
        certain = min(ends) if ends else len(self._held) - self._begun_stop()
        text, self._held = self._held[:certain], self._held[certain:]
        self._has_code = self._has_code or bool(text.strip())
        return text

    def _begun_stop(self) -> int:
        """Length of the longest end of the text that begins a stop."""
        stops = (*self._stop, *filter(None, [self._line_end]))
        longest = max((len(stop) for stop in stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in stops):
                return size
        return 0


class Job:
    """An admitted request. `events` yields pieces if streamed, and ends with an `Outcome` or an error."""

    def __init__(self, worker: Worker, patience: float) -> None:
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        late = ServiceError(504, "timeout", f"Not done after {patience:g} seconds.")
        self._timer = self._loop.call_later(patience, self.fail, "timeout", late)
        self.admitted = time.perf_counter()
        self.order: Order | None = None
        self.streamed = False
        self.events: asyncio.Queue[Piece | Outcome | Exception] = asyncio.Queue()
        self.cancelled: str | None = None

    def submit(self, order: Order, streamed: bool = False) -> None:
        """Put into the queue."""
        self.order, self.streamed = order, streamed
        self._worker._enqueue(self)

    def cancel(self, reason: str) -> None:
        """Give up: a waiting job leaves the queue at once, a running one stops at its next token."""
        if self.cancelled is None:
            self.cancelled = reason
            self._worker._drop(self)

    def fail(self, reason: str, error: Exception) -> None:
        """Give up, with an error for whoever waits; call it on the loop."""
        self.events.put_nowait(error)
        self.cancel(reason)

    def deliver(self, event: Piece | Outcome | Exception) -> None:
        """Hand an event to the loop, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is gone, and whoever waited with it
            self._loop.call_soon_threadsafe(self._arrive, event)

    def finish(self, event: Outcome | ServiceError) -> None:
        """Free the slot and deliver the last event, unless that was done before."""
        if self._worker._release(self):
            self.deliver(event)

    def _arrive(self, event: Piece | Outcome | Exception) -> None:
        self.events.put_nowait(event)  # its reader runs next, and replies
        if isinstance(event, Piece):
            return
        self._timer.cancel()
        if isinstance(event, Outcome) and self.order is not None:
            self._loop.call_soon(self._worker._account, event, self.order)


class Worker:
    """The thread and its queue.

    Args:
        name: of the model, for messages.
        load: makes the model; runs in the thread.
        capacity: requests admitted at a time, the running one included.
        finished: told of every outcome, on the loop.
        failed: told, in the thread, why the model could not be loaded.
        ready: told, in the thread, of the model once it is loaded and warm, before it takes requests.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Served],
        capacity: int,
        finished: Callable[[Outcome, Order], None] = lambda outcome, order: None,
        failed: Callable[[BaseException], None] = lambda error: None,
        ready: Callable[[Served], None] = lambda served: None,
    ) -> None:
        self.name, self.capacity = name, capacity
        self._load, self._finished, self._failed, self._ready = load, finished, failed, ready
        self.state: State = "loading"
        self.served: Served | None = None
        self._admitted: set[Job] = set()
        self._queue: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    @property
    def in_flight(self) -> int:
        """Requests that hold a slot."""
        return len(self._admitted)

    @property
    def queued(self) -> int:
        """Requests that wait for the model."""
        return len(self._queue)

    def start(self) -> None:
        """Start the thread; `state` turns to `ready` or `failed`."""
        self._thread.start()

    def stop(self, patience: float = 5.0) -> None:
        """Give up all requests and end the thread; it is left behind after `patience` seconds."""
        with self._changed:
            self.state = "stopped"
            jobs = [*self._queue, *filter(None, [self._running])]
            self._changed.notify_all()
        for job in jobs:
            job.cancel("shutdown")
        if self._thread.is_alive():
            self._thread.join(patience)

    def check_ready(self) -> Served:
        """The loaded model.

        Raises:
            ServiceError: 503 while it is loading, cannot be loaded, or goes away.
        """
        if self.state == "loading":
            raise ServiceError(503, "loading", f"Model {self.name} is currently loading", headers=RETRY)
        if self.state == "stopped":
            raise shutting_down()
        if self.state == "failed" or self.served is None:
            raise ServiceError(503, "unhealthy", f"Model {self.name} could not be loaded; see the log.")
        return self.served

    def admit(self, patience: float) -> Job:
        """A slot for one request; call it on the loop that will wait.

        Args:
            patience: seconds until the request fails with 504, waiting included.

        Raises:
            ServiceError: 429 when full, 503 when not ready.
        """
        self.check_ready()
        with self._changed:
            if len(self._admitted) >= self.capacity:
                raise ServiceError(
                    429, "overloaded", "Model is overloaded: too many requests wait.", headers=RETRY
                )
            job = Job(self, patience)
            self._admitted.add(job)
        return job

    def _release(self, job: Job) -> bool:
        """Take a job's slot back, once."""
        with self._changed:
            held = job in self._admitted
            self._admitted.discard(job)
            return held

    def _enqueue(self, job: Job) -> None:
        with self._changed:
            if job.cancelled is None and self.state == "ready":
                self._queue.append(job)
                self._changed.notify()
                return
        job.finish(shutting_down())

    def _drop(self, job: Job) -> None:
        with self._changed:
            if job is self._running:
                return  # the thread sees it at the next token
            with contextlib.suppress(ValueError):
                self._queue.remove(job)
        job.finish(Outcome(cancelled=job.cancelled))

    def _account(self, outcome: Outcome, order: Order) -> None:
        """Tell of an outcome; a fault there is logged without the prompt."""
        try:
            self._finished(outcome, order)
        except Exception as error:
            log.error("accounting failed", extra=bare(error))

    def _run(self) -> None:
        try:
            served = self._load()
            self._warm_up(served)
            self._ready(served)
            self.served = served
        except BaseException as error:
            self.state = "failed"
            self._failed(error)
            return
        with self._changed:
            if self.state == "loading":
                self.state = "ready"
        while (job := self._next()) is not None:
            try:
                event: Outcome | ServiceError = self._complete(served, job)
            except UserError as error:
                event = ServiceError(422, "validation", str(error))
            except Exception as error:
                # Neither the message nor the locals of an error are logged: they may hold a prompt.
                log.error("generation failed", extra=bare(error))
                event = ServiceError(424, "generation", "The model failed on this request; see the log.")
            with self._changed:
                self._running = None
            job.finish(event)

    def _next(self) -> Job | None:
        """The next job, or None when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self.state == "stopped")
            if self.state == "stopped":
                return None
            self._running = self._queue.popleft()
            return self._running

    def _warm_up(self, served: Served) -> None:
        """Completions at full depth, that leave early, and verified: no request pays for first calls."""
        points = served.engine.exit_points
        exits = [Exit("none"), *(Exit("fixed", layer=points[0], verify=verify) for verify in (False, True))]
        if served.agent is not None:
            exits.append(Exit("rl", threshold=0.5))
        for how in exits:
            for _ in self._tokens(served, Order([0] * 16, 4, how)):
                pass

    @staticmethod
    def _tokens(served: Served, order: Order, account: Any = None) -> Iterator[Any]:
        from greencode.engine import Sampling

        policy = served.policy(order.exit)
        return served.engine.stream(
            order.context,
            order.new_tokens,
            policy,
            # A completion that cannot leave runs with the plain cache, as in the study.
            kv="full" if policy is None else "verified" if order.exit.verify else "deferred",
            sampling=None if order.sampling is None else Sampling(**order.sampling),
            eos=served.eos,
            into=account,
        )

    def _complete(self, served: Served, job: Job) -> Outcome:
        from greencode.engine import Completion

        order, outcome, account = job.order, Outcome(), Completion()
        start = time.perf_counter()
        outcome.queue_s = start - job.admitted
        if order.new_tokens:
            text, waiting = _Text(served.tokenizer, order), []
            # While the model runs, its weights fill the caches, and all else is slow. So text that nobody
            # reads yet is made at the end.
            at_once = job.streamed or order.stop or order.single_line
            with served.meter.window() as window:
                for token in self._tokens(served, order, account):
                    outcome.prefill_s = outcome.prefill_s or time.perf_counter() - start
                    waiting.append(token)
                    if at_once:
                        if self._add(served, order, outcome, text, waiting.pop()):
                            break
                        if job.streamed:
                            job.deliver(outcome.pieces[-1])
                    if job.cancelled:
                        break
                for token in waiting:
                    self._add(served, order, outcome, text, token)
            outcome.energy = window.energy
        else:
            outcome.finish = "eos_token"
        end = time.perf_counter()
        usage = account.usage
        outcome.layer_positions, outcome.checks = usage.layer_positions, usage.checks
        if order.exit.verify:
            outcome.drafts, outcome.drafts_accepted = usage.drafts, usage.accepted
        outcome.decode_s = end - start - outcome.prefill_s
        outcome.total_s = end - job.admitted
        outcome.cancelled = job.cancelled
        return outcome

    @staticmethod
    def _add(served: Served, order: Order, outcome: Outcome, text: _Text, token: EngineToken) -> bool:
        """Add a token's piece to the outcome; whether it is the last."""
        ends, full = token.id in served.eos, len(outcome.pieces) + 1 == order.new_tokens
        new = text.add(token.id)
        if ends or full:
            new += text.close()
        if text.stopped:
            outcome.finish = "stop_sequence"
        elif ends:
            outcome.finish = "eos_token"
        outcome.pieces.append(Piece(token.id, new, token.depth, ends))
        return ends or full or text.stopped


def bare(error: BaseException) -> dict[str, str]:
    """Kind and place of an error, for the log."""
    return {"error": type(error).__name__, "at": "".join(traceback.format_tb(error.__traceback__))}
