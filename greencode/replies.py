"""What clients accept: one reply and one error per dialect, in one piece or as events.

The dialects are that of text-generation-inference and the Hugging Face clients (`generated_text`), OpenAI's
completions, and a reply that Ollama's clients read too. llm-ls, which completes in editors, never looks at
the status: every error is a JSON object that each client of its route can parse.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from greencode.choices import Exit
from greencode.parameters import Detail, ExitPolicyName, ExitTarget, ServiceError

if TYPE_CHECKING:
    from greencode.worker import Outcome, Piece

Finish = Literal["length", "eos_token", "stop_sequence"]


class ErrorReply(BaseModel):
    """An error outside `/v1`."""

    error: str
    error_type: str
    detail: list[Detail]
    request_id: str | None = None


class OpenAIFault(BaseModel):
    """What OpenAI's clients look for."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIErrorReply(BaseModel):
    """An error under `/v1`."""

    error: OpenAIFault
    error_type: str
    detail: list[Detail]
    request_id: str | None = None


def error_body(path: str, error: ServiceError, request_id: str | None = None) -> dict[str, Any]:
    """The JSON of an error in the dialect of a path. llm-ls reads `error` as text, or else `detail`."""
    about = {"error_type": error.kind, "detail": error.details, "request_id": request_id}
    if path.startswith("/v1"):
        first = error.details[0]
        fault = OpenAIFault(
            message=error.message,
            type="invalid_request_error" if error.status < 500 else "server_error",
            param=None if first.loc == "body" else first.loc,
            code=error.kind,
        )
        return OpenAIErrorReply(error=fault, **about).model_dump()
    return ErrorReply(error=error.message, **about).model_dump()


def error_event(path: str, error: ServiceError, request_id: str | None) -> str:
    """The event of an error after a stream has begun."""
    return _event(error_body(path, error, request_id))


class Token(BaseModel):
    """A token; of a completion with the layers run to decide it."""

    id: int
    text: str = Field(description="What it adds to the completion; of a prompt its own text.")
    logprob: float | None = Field(None, description="Not computed.")
    special: bool = False
    exit_layer: int | None = None


class EarlyExit(BaseModel):
    """Depths of one completion."""

    policy: ExitPolicyName
    threshold: float | None
    target: ExitTarget | None = Field(description="What the threshold was chosen for.")
    exit_layer: int | None = Field(description="Of the policy fixed.")
    verify: bool = Field(description="Whether the final layer confirmed or replaced what had left.")
    num_layers: int
    exit_layers: list[int] = Field(description="Layers run to decide each token.")
    layers_executed: int = Field(description="Their sum.")
    layers_skipped: int = Field(description="num_layers for each token, less layers_executed.")
    mean_exit_layer: float | None
    skipped_fraction: float | None
    layer_positions: int = Field(
        description="Layers x positions run in all: the prompt and work that was put off included."
    )
    checks: int = Field(description="Times that the policy was asked.")
    drafts: int | None = Field(description="Tokens that left and were verified; null without that.")
    drafts_accepted: int | None = Field(description="Those of them that the final layer said too.")


class EnergyUse(BaseModel):
    """Energy of one completion; null where nothing measures it."""

    joules: float | None
    joules_per_token: float | None
    source: Literal["nvml", "rapl", "estimate"] | None
    shared: bool = Field(description="Whether the counter also sees other programs.")


class Timing(BaseModel):
    """Seconds of one completion."""

    queue_s: float
    prefill_s: float = Field(description="To the first token.")
    decode_s: float
    total_s: float
    tokens_per_s: float | None


class Account(BaseModel):
    """What a completion cost."""

    early_exit: EarlyExit
    energy: EnergyUse
    timing: Timing


class Details(Account):
    """`details` of a reply."""

    finish_reason: Finish
    generated_tokens: int
    seed: int | None
    prefill: list[Token]
    tokens: list[Token]
    input_length: int
    truncated: int = Field(
        description="Tokens of the prompt that were not read; at least, where a very long one was cut first."
    )


class GenerateResponse(BaseModel):
    """A completion."""

    generated_text: str
    details: Details | None = None


class OllamaResponse(GenerateResponse):
    """A completion for clients of `/api/generate`."""

    response: str
    status: int = 200
    model: str
    created_at: str
    done: bool = True
    done_reason: Literal["stop", "length"]
    prompt_eval_count: int
    eval_count: int


class Choice(BaseModel):
    """The completion."""

    index: int = 0
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: None = None


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(BaseModel):
    """A completion as OpenAI's clients read it, with its account."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None
    greencode: Account | None = None


@dataclass(frozen=True)
class Asked:
    """What replies need to know of their request.

    Attributes:
        model: its name for clients.
        layers: N.
        prompt: as sent.
        prompt_tokens, truncated: tokens of it that are read, and that are not.
        full_text, details, include_usage: what the client wants to have.
        prefill: the prompt's tokens, if the client wants them.
        end_id: of a token that ends completions.
    """

    model: str
    layers: int
    exit: Exit
    prompt: str
    prompt_tokens: int
    truncated: int
    seed: int | None
    full_text: bool = False
    details: bool = False
    include_usage: bool = False
    prefill: list[Token] = field(default_factory=list)
    end_id: int = 0
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass
class Done:
    """A request with its outcome."""

    asked: Asked
    outcome: Outcome

    @property
    def count(self) -> int:
        """Generated tokens."""
        return len(self.outcome.pieces)

    @property
    def text(self) -> str:
        """The completion, after the prompt if that was asked for."""
        return (self.asked.prompt if self.asked.full_text else "") + self.outcome.text

    @property
    def depths(self) -> list[int]:
        """Layers run to decide each token."""
        return [piece.depth for piece in self.outcome.pieces]

    @property
    def mean_depth(self) -> float | None:
        """Of the tokens, if there are any."""
        return sum(self.depths) / self.count if self.count else None

    @property
    def layers_skipped(self) -> int:
        """Of all layers, over all tokens."""
        return self.asked.layers * self.count - sum(self.depths)

    @property
    def joules(self) -> float | None:
        """Energy, where something measures or estimates it."""
        return self.outcome.energy.joules if self.outcome.energy else None

    def account(self) -> Account:
        """Depths, energy and times."""
        asked, outcome, count, joules = self.asked, self.outcome, self.count, self.joules
        run = sum(self.depths)
        seconds = outcome.prefill_s + outcome.decode_s
        source = outcome.energy.source if joules is not None else None
        return Account(
            early_exit=EarlyExit(
                policy=asked.exit.policy,
                threshold=asked.exit.threshold,
                target=asked.exit.target,
                exit_layer=asked.exit.layer,
                verify=asked.exit.verify,
                num_layers=asked.layers,
                exit_layers=self.depths,
                layers_executed=run,
                layers_skipped=self.layers_skipped,
                mean_exit_layer=self.mean_depth,
                skipped_fraction=1 - run / (asked.layers * count) if count else None,
                layer_positions=outcome.layer_positions,
                checks=outcome.checks,
                drafts=outcome.drafts,
                drafts_accepted=outcome.drafts_accepted,
            ),
            energy=EnergyUse(
                joules=joules,
                joules_per_token=joules / count if count and joules is not None else None,
                source=source,
                shared=source in ("nvml", "rapl"),
            ),
            timing=Timing(
                queue_s=outcome.queue_s,
                prefill_s=outcome.prefill_s,
                decode_s=outcome.decode_s,
                total_s=outcome.total_s,
                tokens_per_s=count / seconds if seconds > 0 else None,
            ),
        )

    def details(self) -> Details:
        """`details` of a reply in one piece."""
        return Details(
            finish_reason=self.outcome.finish,
            generated_tokens=self.count,
            seed=self.asked.seed,
            prefill=self.asked.prefill,
            tokens=[_token(piece) for piece in self.outcome.pieces],
            input_length=self.asked.prompt_tokens,
            truncated=self.asked.truncated,
            **dict(self.account()),
        )

    def headers(self) -> dict[str, str]:
        """Headers of a reply in one piece; times are milliseconds, as in text-generation-inference."""
        # Not from `account`: whoever asks for no details does not wait until they are put together.
        asked, outcome, depth = self.asked, self.outcome, self.mean_depth
        inference = outcome.prefill_s + outcome.decode_s
        values = {
            "x-prompt-tokens": asked.prompt_tokens,
            "x-generated-tokens": self.count,
            "x-total-time": _milliseconds(outcome.total_s),
            "x-queue-time": _milliseconds(outcome.queue_s),
            "x-inference-time": _milliseconds(inference),
            "x-time-per-token": _milliseconds(inference / self.count) if self.count else None,
            "x-exit-policy": asked.exit.policy,
            "x-exit-threshold": asked.exit.threshold,
            "x-exit-verify": str(asked.exit.verify).lower(),
            "x-mean-exit-layer": None if depth is None else round(depth, 3),
            "x-layers-skipped": self.layers_skipped,
            "x-energy-joules": self.joules,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _token(piece: Piece) -> Token:
    """A generated token; one that carries text must not be skipped by clients as special."""
    return Token(
        id=piece.id, text=piece.text, special=piece.special and not piece.text, exit_layer=piece.depth
    )


def _event(data: Any) -> str:
    """A server-sent event of one line."""
    return f"data: {json.dumps(data, allow_nan=False)}\n\n"


class TGI:
    """text-generation-inference: `{"generated_text": ...}`, alone or in a list of one."""

    def __init__(self, listed: bool = False) -> None:
        self.listed = listed

    def reply(self, done: Done) -> Any:
        """The whole reply."""
        response = self._object(done)
        return [response] if self.listed else response

    def _object(self, done: Done) -> dict[str, Any]:
        details = {"details": done.details().model_dump()} if done.asked.details else {}
        return {"generated_text": done.text, **details}

    def token(self, asked: Asked, index: int, piece: Piece) -> str:
        """The event of a token before the last."""
        token = _token(piece).model_dump()
        return _event({"index": index, "token": token, "generated_text": None, "details": None})

    def last(self, done: Done) -> Iterator[str]:
        """The events from the last token on. A completion of no tokens has one without text."""
        asked, pieces = done.asked, done.outcome.pieces
        token = _token(pieces[-1]) if pieces else Token(id=asked.end_id, text="", special=True)
        details = {
            "finish_reason": done.outcome.finish,
            "generated_tokens": done.count,
            "input_length": asked.prompt_tokens,
            "seed": asked.seed,
            "truncated": asked.truncated,
            **done.account().model_dump(),
        }
        yield _event(
            {
                "index": max(1, done.count),
                "token": token.model_dump(),
                "generated_text": done.text,
                "details": details,
            }
        )


class Ollama(TGI):
    """`/api/generate`: readable for clients of Ollama and of the paper's endpoint alike."""

    def _object(self, done: Done) -> dict[str, Any]:
        asked = done.asked
        response = OllamaResponse(
            generated_text=done.text,
            response=done.text,
            model=asked.model,
            created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(asked.created)),
            done_reason=_openai_reason(done),
            prompt_eval_count=asked.prompt_tokens,
            eval_count=done.count,
        )
        return response.model_dump(exclude={"details"}) | super()._object(done)


class OpenAI:
    """OpenAI's completions, with the account under `greencode`."""

    def reply(self, done: Done) -> Any:
        """The whole reply."""
        choice = Choice(text=done.text, finish_reason=_openai_reason(done))
        return self._object(done.asked, [choice], usage=_usage(done), greencode=done.account())

    def token(self, asked: Asked, index: int, piece: Piece) -> str:
        """The event of a token before the last."""
        before = asked.prompt if asked.full_text and index == 1 else ""
        return _event(self._object(asked, [Choice(text=before + piece.text, finish_reason=None)]))

    def last(self, done: Done) -> Iterator[str]:
        """The events from the last token on."""
        asked = done.asked
        before = asked.prompt if asked.full_text and done.count <= 1 else ""
        text = done.outcome.pieces[-1].text if done.count else ""
        choice = Choice(text=before + text, finish_reason=_openai_reason(done))
        yield _event(self._object(asked, [choice], greencode=done.account()))
        if asked.include_usage:
            yield _event(self._object(asked, [], usage=_usage(done)))
        yield "data: [DONE]\n\n"

    @staticmethod
    def _object(asked: Asked, choices: list[Choice], **more: Any) -> dict[str, Any]:
        response = CompletionResponse(
            id=asked.id, created=asked.created, model=asked.model, choices=choices, **more
        ).model_dump()
        return {name: value for name, value in response.items() if value is not None}


def _openai_reason(done: Done) -> Literal["stop", "length"]:
    return "length" if done.outcome.finish == "length" else "stop"


def _usage(done: Done) -> Usage:
    read, made = done.asked.prompt_tokens, done.count
    return Usage(prompt_tokens=read, completion_tokens=made, total_tokens=read + made)


Dialect = TGI | OpenAI

_HEADER_SAFE = re.compile(r"[\w.\-]{1,64}\Z", re.ASCII)


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """`X-Ignored-Parameters`; names that do not belong in a header are left out."""
    safe = sorted(name for name in names if _HEADER_SAFE.match(name))[:20]
    return {"x-ignored-parameters": ", ".join(safe)} if safe else {}
