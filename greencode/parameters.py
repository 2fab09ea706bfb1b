"""What clients send: the parameters of one completion, wherever in a body they stand.

Editors merge their defaults into every body, so a parameter may stand in `options`, at the top level and in
`parameters`, under its own name and under others. The three kinds of body differ in the prompt's name only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from greencode.promises import WANTED, Calibration

ExitPolicyName = Literal["rl", "fixed", "none"]

# Of several in one object the first here wins.
ALIASES = {
    "RL_agent_thresh": "exit_threshold",
    "num_predict": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
}
BLOCKS = ("parameters", "options")
TOP_LEVEL = frozenset(("inputs", "prompt", "model", "stream", "stream_options", *BLOCKS))
# llm-ls writes `parameters.parameters` by mistake; the others mean nothing to a completion.
SILENT = frozenset(
    ("user", "use_cache", "wait_for_model", "model", "stream_options", "parameters.parameters")
)

MAX_STOP = 4
COLDEST = 0.01  # a lower temperature is greedy in all but rounding, and overflows

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
StopText = Annotated[str, Field(min_length=1, max_length=100)]


class Detail(BaseModel):
    """One fault of a request."""

    loc: str
    msg: str
    type: str


class ServiceError(Exception):
    """A request that is refused or fails, with all that a client is told about it.

    Attributes:
        status: HTTP status.
        kind: `error_type` of the reply.
        message: one sentence; never a prompt.
        details: the faulty fields, and what is wrong with them; `body` where it is none of them.
        headers: of the reply.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        details: list[Detail] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message
        self.details = details or [Detail(loc="body", msg=message, type=kind)]
        self.headers = headers or {}

    @classmethod
    def invalid(cls, faults: Iterable[dict[str, Any]]) -> ServiceError:
        """422 from pydantic's errors; their inputs are left out."""
        details: dict[str, Detail] = {}
        for fault in faults:
            # A field that takes several types has a fault for each of them; the first says enough.
            loc = _place(fault["loc"])
            details.setdefault(loc, Detail(loc=loc, msg=str(fault["msg"]), type=str(fault["type"])))
        found = list(details.values())
        return cls(422, "validation", "; ".join(f"{one.loc}: {one.msg}" for one in found[:3]), found)


def _place(loc: tuple[int | str, ...]) -> str:
    """The name of the faulty field; llm-ls reads a scalar only."""
    names = [str(part) for part in loc if part not in ("body", "header", "path")]
    return names[0] if names else "body"


def refused(loc: str, message: str) -> ServiceError:
    """422: one sentence on one field."""
    return ServiceError.invalid([{"loc": (loc,), "msg": message, "type": "value_error"}])


class ExitTarget(BaseModel):
    """What leaving early shall save or keep: one of these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    saving: Annotated[Number, Field(gt=0, lt=1)] | None = Field(None, description="Share of the layers.")
    agreement: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None, description="Share of the full model's tokens."
    )
    rougeL: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None, description="Share of the full model's ROUGE-L."
    )

    @model_validator(mode="after")
    def _is_one(self) -> ExitTarget:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise PydanticCustomError("value_error", "ask for one of saving, agreement and rougeL")
        return self

    @classmethod
    def of_text(cls, text: str) -> ExitTarget:
        """From `saving=0.4`, as headers and flags have it; anything else is a `ValueError`."""
        wanted, _, share = text.partition("=")
        return cls.model_validate({wanted.strip(): float(share)})

    @property
    def asked(self) -> tuple[str, float]:
        """What is wanted, and its share."""
        [asked] = self.model_dump(exclude_none=True).items()
        return asked

    def promised(self, calibration: Calibration | None) -> float:
        """The threshold that promises it.

        Raises:
            LookupError: a phrase, if nothing does.
        """
        if calibration is None:
            raise LookupError("the agent of this server is not calibrated; send exit_threshold")
        wanted, share = self.asked
        promise = calibration.find(wanted, share)
        if promise is None:
            most = calibration.most(wanted)
            limit = "none of any size is" if most is None else f"at most {most:g} is"
            raise LookupError(f"{WANTED[wanted]} of {share:g} is not promised by the agent; {limit}")
        return promise.threshold


class Parameters(BaseModel):
    """Parameters of one completion; null is the same as absent. Unknown ones are ignored and listed."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    exit_threshold: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="T: a token leaves where the agent's P(exit) > T. Alias: RL_agent_thresh."
    )
    exit_target: ExitTarget | None = Field(
        None,
        description="In place of exit_threshold: what shall be saved or kept. The threshold is the one that "
        "promises it, see /info.",
    )
    exit_policy: ExitPolicyName | None = Field(
        None, description="Who decides on leaving: the agent (rl), exit_layer (fixed), nobody (none)."
    )
    exit_layer: Annotated[Whole, Field(ge=1)] | None = Field(
        None, description="Depth at which every token leaves; one of the exit points in /info."
    )
    exit_verify: Flag | None = Field(
        None,
        description="A token that leaves is a draft, which the final layer confirms or replaces: the text is "
        "the full model's. No layer is saved, but time where drafts are often right.",
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
    decoder_input_details: Flag | None = Field(
        None, description="Among the details of a reply in one piece, list the prompt's tokens too."
    )

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

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """`stop`, one or many."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class _Body(Parameters):
    """A body, with its parameters brought together at the top level."""

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
        top = {name: value for name, value in body.items() if name not in BLOCKS}
        flat: dict[str, Any] = {}
        for name, block in {
            "parameters": body.get("parameters"),
            "": top,
            "options": body.get("options"),
        }.items():
            if isinstance(block, dict):
                flat |= _canonical(block, name)
            elif block is not None:
                flat[name] = block  # for the type error
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


def _canonical(block: dict[str, Any], within: str) -> dict[str, Any]:
    """A block's values under their own names, without nulls; out of place ones as `within.name`."""
    given = {
        f"{within}.{name}" if within and name in TOP_LEVEL else name: value
        for name, value in block.items()
        if value is not None
    }
    aliased = {ALIASES[name]: given.pop(name) for name in reversed(ALIASES) if name in given}
    return given | aliased


Text = Annotated[str, Field(min_length=1)]
OneText = Text | Annotated[list[Text], Field(min_length=1, max_length=1)]


class GenerateRequest(_Body):
    """As text-generation-inference takes it."""

    inputs: OneText = Field(description="The prompt; a list holds one.")

    @property
    def prompt_name(self) -> str:
        return "inputs"


class StreamOptions(BaseModel):
    """OpenAI's options of a stream."""

    include_usage: bool | None = None


class CompletionRequest(_Body):
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


class EitherRequest(_Body):
    """With `inputs` or `prompt`, as the clients of `/api/generate` send it."""

    inputs: OneText | None = None
    prompt: OneText | None = None
    model: str | None = None

    @model_validator(mode="after")
    def _has_prompt(self) -> EitherRequest:
        if self.inputs is None and self.prompt is None:
            raise PydanticCustomError("missing", "inputs or prompt is required")
        return self

    @property
    def prompt_name(self) -> str:
        return "prompt" if self.inputs is None else "inputs"


AnyRequest = GenerateRequest | CompletionRequest | EitherRequest
