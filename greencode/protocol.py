"""What clients send and what they accept: one model of a request, one reply per dialect.

Three dialects share their parameters: that of text-generation-inference and the Hugging Face clients
(`inputs`, `generated_text`), OpenAI's completions, and a reply that Ollama's clients read too. Editors
merge their defaults into every body and ignore the status, so parameters may stand in several places, and
every error is a JSON object that each client can parse.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from greencode.worker import Outcome, Piece

ExitPolicyName = Literal["rl", "fixed", "none"]

ALIASES = {
    "RL_agent_thresh": "exit_threshold",
    "num_predict": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
}
ENVELOPE = frozenset(("inputs", "prompt", "model", "stream", "stream_options", "parameters", "options"))
SILENT = frozenset(("user", "use_cache", "wait_for_model", "model", "stream_options"))

MAX_STOP = 4
COLDEST = 0.01  # a lower temperature is greedy in all but rounding, and overflows

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
StopText = Annotated[str, Field(min_length=1, max_length=100)]


class ServiceError(Exception):
    """A request that is refused or fails, with all that a client is told about it.

    Attributes:
        status: HTTP status.
        kind: `error_type` of the reply.
        message: one sentence; never a prompt.
        loc, code: name of the faulty field, and what is wrong with it.
        headers: of the reply.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        loc: str = "",
        code: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message
        self.details = [Detail(loc=loc or "body", msg=message, type=code or kind)]
        self.headers = headers or {}

    @classmethod
    def invalid(cls, faults: Iterable[dict[str, Any]]) -> ServiceError:
        """From pydantic's errors; their inputs are left out."""
        found = [
            Detail(loc=_place(fault["loc"]), msg=str(fault["msg"]), type=str(fault["type"]))
            for fault in faults
        ]
        # A field that takes several types has a fault for each of them.
        by_place = {detail.loc: detail for detail in reversed(found)}
        details = list(reversed(by_place.values()))
        error = cls(422, "validation", "; ".join(f"{one.loc}: {one.msg}" for one in details[:3]))
        error.details = details
        return error


def _place(loc: tuple[int | str, ...]) -> str:
    """The name of the faulty field; llm-ls reads a scalar only."""
    names = [str(part) for part in loc if part not in ("body", "header", "query", "path")]
    return names[0] if names else "body"


class Detail(BaseModel):
    """One fault of a request."""

    loc: str
    msg: str
    type: str


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


class Parameters(BaseModel):
    """Parameters of one completion; null is the same as absent. Unknown ones are ignored and listed."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    exit_threshold: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="T: a token leaves where the agent's P(exit) > T. Alias: RL_agent_thresh."
    )
    exit_policy: ExitPolicyName | None = Field(
        None, description="Who decides on leaving: the agent (rl), exit_layer (fixed), nobody (none)."
    )
    exit_layer: Annotated[Whole, Field(ge=1)] | None = Field(
        None, description="Depth at which every token leaves; one of the exit points in /info."
    )
    max_new_tokens: Annotated[Whole, Field(ge=-1)] | None = Field(
        None,
        description="Tokens at most; -1 is up to the server's limit. Aliases: num_predict, max_tokens, "
        "n_predict.",
    )
    do_sample: Flag | None = Field(None, description="False is greedy whatever else is given.")
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = Field(
        None, description=f"Below {COLDEST} is greedy."
    )
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=0, le=2**31)] | None = Field(None, description="0 is all.")
    repetition_penalty: Annotated[Number, Field(ge=0.1, le=10)] | None = Field(
        None, description="Alias: repeat_penalty."
    )
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOP)] | None = Field(
        None, description="Texts that end the completion, and are left out of it. Alias: stop_sequences."
    )
    single_line: Flag | None = Field(None, description="End at the first line end after some code.")
    truncate: Annotated[Whole, Field(ge=1)] | None = Field(
        None, description="Read the last so many tokens of the prompt only."
    )
    prompt_format: Literal["source", "tokens"] | None = Field(
        None, description="Whether prompt and completion are source, or CodeXGLUE tokens joined by blanks."
    )
    return_full_text: Flag | None = Field(None, description="Put the prompt before the completion.")
    details: Flag | None = Field(None, description="Report tokens, depths, energy and times.")
    decoder_input_details: Flag | None = Field(None, description="List the prompt's tokens too.")

    # Known, and without effect at these values only: anything else is refused, never ignored.
    n: Annotated[Whole, Field(ge=1, le=1)] | None = None
    best_of: Annotated[Whole, Field(ge=1, le=1)] | None = None
    typical_p: Annotated[Number, Field(ge=1, le=1)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    top_n_tokens: Annotated[Whole, Field(ge=0, le=0)] | None = None
    watermark: Literal[False] | None = None
    echo: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    grammar: None = None
    adapter_id: None = None


class _Request(Parameters):
    """A body with its parameters brought together."""

    stream: Flag | None = None
    parameters: Parameters | None = Field(None, description="As at the top level, which wins.")
    options: Parameters | None = Field(None, description="As at the top level; these win.")

    @model_validator(mode="before")
    @classmethod
    def _bring_together(cls, body: Any) -> Any:
        """`options` before the top level before `parameters`; an alias before the name that it stands for.

        Editors put defaults under the plain names, so a user's own alias has to win.
        """
        if not isinstance(body, dict):
            return body
        flat: dict[str, Any] = {}
        for name in ("parameters", None, "options"):
            part = body if name is None else body.get(name)
            if isinstance(part, dict):
                flat |= _canonical(part, nested=name is not None)
        for name in ("parameters", "options"):
            if not isinstance(body.get(name), dict | None):
                flat[name] = body[name]  # for the type error
        return flat

    @property
    def prompt_name(self) -> str:
        """The field that holds the prompt."""
        raise NotImplementedError

    @property
    def prompt_text(self) -> str:
        """The prompt."""
        prompt = getattr(self, self.prompt_name)
        return prompt if isinstance(prompt, str) else prompt[0]

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its numbers of tokens."""
        return False

    @property
    def ignored(self) -> list[str]:
        """Names of the parameters that were sent and mean nothing here."""
        return [name for name in self.model_extra or {} if name not in SILENT]


def _canonical(part: dict[str, Any], nested: bool) -> dict[str, Any]:
    """A block's values under their own names, without nulls."""
    given = {name: value for name, value in part.items() if value is not None}
    for name in ENVELOPE if nested else ("parameters", "options"):
        given.pop(name, None)
    aliased = {ALIASES[name]: given.pop(name) for name in reversed(ALIASES) if name in given}
    return given | aliased


Text = Annotated[str, Field(min_length=1)]
OneText = Text | Annotated[list[Text], Field(min_length=1, max_length=1)]


class GenerateRequest(_Request):
    """As text-generation-inference takes it."""

    inputs: OneText = Field(description="The prompt; a list holds one.")

    @property
    def prompt_name(self) -> str:
        return "inputs"


class StreamOptions(BaseModel):
    """OpenAI's options of a stream."""

    include_usage: bool | None = None


class CompletionRequest(_Request):
    """As OpenAI's completions take it."""

    prompt: OneText = Field(description="The prompt; a list holds one.")
    model: str | None = Field(None, description="Not checked: one model is served.")
    stream_options: StreamOptions | None = None

    @property
    def prompt_name(self) -> str:
        return "prompt"

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class EitherRequest(_Request):
    """With `inputs` or `prompt`, as the clients of `/api/generate` send it."""

    inputs: OneText | None = None
    prompt: OneText | None = None
    model: str | None = None

    @model_validator(mode="after")
    def _has_prompt(self) -> EitherRequest:
        if self.inputs is None and self.prompt is None:
            raise ValueError("inputs or prompt is missing")
        return self

    @property
    def prompt_name(self) -> str:
        return "prompt" if self.inputs is None else "inputs"


@dataclass(frozen=True)
class Exit:
    """How tokens leave: a policy, with the threshold of `rl` or the depth of `fixed`."""

    policy: ExitPolicyName
    threshold: float | None = None
    layer: int | None = None


def choose_exit(
    request: _Request,
    header_threshold: float | None,
    header_policy: str | None,
    default: Exit,
    agent: bool,
    exit_points: tuple[int, ...],
) -> Exit:
    """The exit that a request asks for; its body goes before the headers, and these before `default`.

    A threshold without a policy asks for the agent, a depth for a fixed exit.

    Args:
        default: the server's; its threshold holds for `rl` wherever none is given.
        agent: whether there is one.

    Raises:
        ServiceError: 422, contradictory, or nothing that this server has.
    """
    layer, threshold = request.exit_layer, request.exit_threshold
    implied = "fixed" if layer is not None else "rl" if threshold is not None else None
    if request.exit_policy is None and layer is not None and threshold is not None:
        raise refused("exit_policy", "exit_threshold and exit_layer exclude each other; name one policy")
    header_implied = "rl" if header_threshold is not None else None
    policy = request.exit_policy or implied or header_policy or header_implied or default.policy
    if policy == "rl":
        if not agent:
            raise refused("exit_policy", "this server has no agent; use fixed or none")
        for given in (threshold, header_threshold, default.threshold):
            if given is not None:
                threshold = given
                break
    if policy != "fixed":
        if layer is not None:
            raise refused("exit_layer", "it needs exit_policy fixed")
        return Exit(policy, threshold if policy == "rl" else None)
    if layer is None:
        raise refused("exit_layer", "exit_policy fixed needs it")
    if layer not in exit_points:
        raise refused("exit_layer", f"it must be one of the exit points {list(exit_points)}")
    return Exit("fixed", layer=layer)


def refused(loc: str, message: str) -> ServiceError:
    """422: one sentence on one field."""
    return ServiceError.invalid([{"loc": (loc,), "msg": message, "type": "value_error"}])


def choose_sampling(request: Parameters) -> dict[str, Any] | None:
    """Arguments of `greencode.engine.Sampling` without a seed; None is plain greedy.

    Greedy unless asked to sample, or a temperature other than 0 and 1, a top_p or a top_k is given.
    """
    heat = request.temperature
    asked = heat not in (None, 0, 1) or request.top_p not in (None, 1) or bool(request.top_k)
    sample = asked if request.do_sample is None else request.do_sample
    penalty = request.repetition_penalty or 1.0
    if not sample or (heat is not None and heat < COLDEST):
        return None if penalty == 1 else {"repetition_penalty": penalty}
    return {
        "temperature": 1.0 if heat is None else heat,
        "top_k": request.top_k or None,
        "top_p": request.top_p,
        "repetition_penalty": penalty,
    }


def stops(request: Parameters) -> tuple[str, ...]:
    """Stop texts of a request."""
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


# --- replies ---------------------------------------------------------------------------------------------


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
    exit_layer: int | None = Field(description="Of the policy fixed.")
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

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[Token]
    tokens: list[Token]
    input_length: int
    truncated: int = Field(description="Tokens of the prompt that were not read.")


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
class Answer:
    """A request together with what replies need to know of it."""

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

    def text(self, outcome: Outcome) -> str:
        """The completion, after the prompt if that was asked for."""
        return (self.prompt if self.full_text else "") + outcome.text

    def account(self, outcome: Outcome) -> Account:
        """Depths, energy and times; reckoned once."""
        if outcome.account is None:
            outcome.account = self._reckon(outcome)
        return outcome.account

    def _reckon(self, outcome: Outcome) -> Account:
        depths = [piece.depth for piece in outcome.pieces]
        count, run = len(depths), sum(depths)
        energy, seconds = outcome.energy, outcome.prefill_s + outcome.decode_s
        joules = energy.joules if energy else None
        source = energy.source if energy and joules is not None else None
        return Account(
            early_exit=EarlyExit(
                policy=self.exit.policy,
                threshold=self.exit.threshold,
                exit_layer=self.exit.layer,
                num_layers=self.layers,
                exit_layers=depths,
                layers_executed=run,
                layers_skipped=self.layers * count - run,
                mean_exit_layer=run / count if count else None,
                skipped_fraction=1 - run / (self.layers * count) if count else None,
                layer_positions=outcome.layer_positions,
                checks=outcome.checks,
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

    def all_details(self, outcome: Outcome) -> Details:
        """`details` of a reply in one piece."""
        return Details(
            finish_reason=outcome.finish,
            generated_tokens=len(outcome.pieces),
            seed=self.seed,
            prefill=self.prefill,
            tokens=[token_of(piece) for piece in outcome.pieces],
            input_length=self.prompt_tokens,
            truncated=self.truncated,
            **dict(self.account(outcome)),
        )

    def headers(self, outcome: Outcome) -> dict[str, str]:
        """Headers of a reply in one piece; times are milliseconds, as in text-generation-inference."""
        account = self.account(outcome)
        exits, timing = account.early_exit, account.timing
        count = len(outcome.pieces)
        inference = timing.prefill_s + timing.decode_s
        values = {
            "x-prompt-tokens": self.prompt_tokens,
            "x-generated-tokens": count,
            "x-total-time": _milliseconds(timing.total_s),
            "x-queue-time": _milliseconds(timing.queue_s),
            "x-inference-time": _milliseconds(inference),
            "x-time-per-token": _milliseconds(inference / count) if count else None,
            "x-exit-policy": exits.policy,
            "x-exit-threshold": exits.threshold,
            "x-mean-exit-layer": None if exits.mean_exit_layer is None else round(exits.mean_exit_layer, 3),
            "x-layers-skipped": exits.layers_skipped,
            "x-energy-joules": account.energy.joules,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 3)


def token_of(piece: Piece) -> Token:
    """A generated token; one that carries text must not be skipped by clients as special."""
    return Token(
        id=piece.id, text=piece.text, special=piece.special and not piece.text, exit_layer=piece.depth
    )


def _frame(data: Any) -> str:
    """A server-sent event of one line."""
    return f"data: {json.dumps(data, allow_nan=False)}\n\n"


class TGI:
    """text-generation-inference: `{"generated_text": ...}`, alone or in a list of one."""

    def __init__(self, listed: bool = False) -> None:
        self.listed = listed

    def reply(self, answer: Answer, outcome: Outcome) -> Any:
        """The whole reply."""
        response = GenerateResponse(
            generated_text=answer.text(outcome),
            details=answer.all_details(outcome) if answer.details else None,
        ).model_dump()
        if response["details"] is None:
            del response["details"]
        return [response] if self.listed else response

    def token(self, answer: Answer, index: int, piece: Piece) -> str:
        """The event of a token before the last."""
        token = token_of(piece).model_dump()
        return _frame({"index": index, "token": token, "generated_text": None, "details": None})

    def last(self, answer: Answer, outcome: Outcome) -> Iterator[str]:
        """The events from the last token on. A completion of no tokens has one without text."""
        details = {
            "finish_reason": outcome.finish,
            "generated_tokens": len(outcome.pieces),
            "input_length": answer.prompt_tokens,
            "seed": answer.seed,
            "truncated": answer.truncated,
            **answer.account(outcome).model_dump(),
        }
        token = (
            token_of(outcome.pieces[-1]) if outcome.pieces else Token(id=answer.end_id, text="", special=True)
        )
        yield _frame(
            {
                "index": max(1, len(outcome.pieces)),
                "token": token.model_dump(),
                "generated_text": answer.text(outcome),
                "details": details,
            }
        )


class Ollama(TGI):
    """`/api/generate`: readable for clients of Ollama and of the paper's endpoint alike."""

    def reply(self, answer: Answer, outcome: Outcome) -> Any:
        text = answer.text(outcome)
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(answer.created))
        response = OllamaResponse(
            generated_text=text,
            response=text,
            details=answer.all_details(outcome) if answer.details else None,
            model=answer.model,
            created_at=created,
            done_reason=_openai_reason(outcome),
            prompt_eval_count=answer.prompt_tokens,
            eval_count=len(outcome.pieces),
        ).model_dump()
        if response["details"] is None:
            del response["details"]
        return response


class OpenAI:
    """OpenAI's completions, with the account under `greencode`."""

    def reply(self, answer: Answer, outcome: Outcome) -> Any:
        """The whole reply."""
        choice = Choice(text=answer.text(outcome), finish_reason=_openai_reason(outcome))
        return self._object(
            answer, [choice], usage=_usage(answer, outcome), greencode=answer.account(outcome)
        )

    def token(self, answer: Answer, index: int, piece: Piece) -> str:
        """The event of a token before the last."""
        first = answer.prompt if answer.full_text and index == 1 else ""
        return _frame(self._object(answer, [Choice(text=first + piece.text, finish_reason=None)]))

    def last(self, answer: Answer, outcome: Outcome) -> Iterator[str]:
        """The events from the last token on."""
        text = outcome.pieces[-1].text if outcome.pieces else ""
        if answer.full_text and len(outcome.pieces) <= 1:
            text = answer.prompt + text
        choice = Choice(text=text, finish_reason=_openai_reason(outcome))
        yield _frame(self._object(answer, [choice], greencode=answer.account(outcome)))
        if answer.include_usage:
            yield _frame(self._object(answer, [], usage=_usage(answer, outcome)))
        yield "data: [DONE]\n\n"

    @staticmethod
    def _object(answer: Answer, choices: list[Choice], **more: Any) -> dict[str, Any]:
        response = CompletionResponse(
            id=answer.id, created=answer.created, model=answer.model, choices=choices, **more
        ).model_dump()
        return {name: value for name, value in response.items() if value is not None}


def _openai_reason(outcome: Outcome) -> str:
    return "length" if outcome.finish == "length" else "stop"


def _usage(answer: Answer, outcome: Outcome) -> Usage:
    count = len(outcome.pieces)
    return Usage(
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=count,
        total_tokens=answer.prompt_tokens + count,
    )


Dialect = TGI | OpenAI


def error_frame(path: str, error: ServiceError, request_id: str | None) -> str:
    """The event of an error after a stream has begun."""
    return _frame(error_body(path, error, request_id))


_HEADER_SAFE = re.compile(r"[\w.\-]{1,64}\Z", re.ASCII)


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """`X-Ignored-Parameters`; names that do not belong in a header are left out."""
    safe = sorted(name for name in names if _HEADER_SAFE.match(name))[:20]
    return {"x-ignored-parameters": ", ".join(safe)} if safe else {}
