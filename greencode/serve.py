"""The endpoint's settings, its command line, and its start: `python -m greencode.serve`.

Settings come from flags and from environment variables (`GREENCODE_` and the flag's name), flags first.
What can be wrong is found before the port is opened; a fault is one sentence and exit code 1. The model is
loaded behind the open port; `/health` says when it is ready.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliImplicitFlag,
    NoDecode,
    SettingsConfigDict,
    SettingsError,
)

from greencode import config, models
from greencode.errors import UserError
from greencode.exits import check_exit_points, exit_points
from greencode.files import read_json, sha256
from greencode.hub import offline
from greencode.memory import keep_freed
from greencode.parameters import ExitPolicyName, ExitTarget
from greencode.promises import Calibration

if TYPE_CHECKING:
    from collections.abc import Callable

    import uvicorn
    from fastapi import FastAPI

    from greencode.worker import Served

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Settings(BaseSettings):
    """Settings of the endpoint; `python -m greencode.serve --help` lists them."""

    model_config = SettingsConfigDict(
        env_prefix="GREENCODE_",
        cli_prog_name="python -m greencode.serve",
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,
        protected_namespaces=(),
    )

    study: Path | None = Field(
        None, description="Configuration of a study that has run; its results are served."
    )
    model: str | None = Field(None, description="Model of the study; its first unless told.")
    dataset: str | None = Field(None, description="Dataset of the study; its first unless told.")
    agent: str | None = Field(None, description="Agent of the study; its first unless told.")
    weights: Path | None = Field(None, description="In place of a study: a fine-tuned model's folder.")
    policy: Path | None = Field(None, description="The agent of --weights, a policy.safetensors.")
    calibration: Path | None = Field(
        None, description="What that agent promises: the file that the study's rule calibrate writes."
    )
    exit_points: Annotated[tuple[int, ...] | None, NoDecode] = Field(
        None, description="Of --weights: depths with commas; the agent's own or the paper's rule unless told."
    )
    language: Literal["java", "python"] | None = Field(
        None, description="Of --weights: what it was trained on."
    )
    variant: Literal["raw", "norm"] = Field("raw", description="Of --weights: its tokens' variant.")
    literals: Path | None = Field(
        None, description="Of --weights, norm: manifest.json with the kept literals."
    )
    served_name: str | None = Field(None, description="The model's name for clients.")

    host: str = Field("127.0.0.1", description="Address to listen at.")
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free one.")
    api_key: SecretStr | None = Field(
        None, description="Bearer token that clients must send; better set in the environment."
    )
    cors_origins: list[str] = Field([], description="Origins of web pages that may ask.")

    exit_policy: ExitPolicyName | None = Field(
        None, description="Where a request names none: rl if there is an agent, else none."
    )
    exit_threshold: float = Field(0.9, ge=0, le=1, description="Of rl, where a request names none.")
    exit_target: str | None = Field(
        None, description="In place of --exit-threshold, what is promised: saving=0.4 or agreement=0.9."
    )
    exit_verify: CliImplicitFlag[bool] = Field(
        False, description="Where a request does not say: the final layer verifies what has left."
    )
    prompt_format: Literal["source", "tokens"] | None = Field(
        None, description="Where a request names none: source if the language is known, else tokens."
    )
    max_new_tokens: int = Field(15, ge=1, description="Where a request names none.")
    max_new_tokens_limit: int = Field(128, ge=1, description="A request may ask for at most.")
    max_input_tokens: int | None = Field(
        None, ge=1, description="Of a prompt; what the model's window leaves."
    )
    on_long_input: Literal["refuse", "truncate"] = Field(
        "refuse", description="A longer prompt is an error, or loses its beginning."
    )
    max_body_bytes: int = Field(1_000_000, ge=1000, description="Of a request.")
    max_concurrent_requests: int = Field(8, ge=1, description="Admitted at a time, waiting ones included.")
    request_timeout: float = Field(60.0, gt=0, description="Seconds for a request, waiting included.")
    drain_timeout: int = Field(30, ge=0, description="Seconds for running requests after SIGTERM.")

    device: str = Field("auto", description="Torch device; auto is cuda where there is one.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Of the weights.")
    threads: int | None = Field(
        None, ge=1, description="CPU threads of the model; the study's, else torch's."
    )
    cpu_watts: float | None = Field(
        None,
        ge=0,
        description="Power of a busy core, for an estimate where no energy is measured; 0 for none.",
    )
    agent_temperature: float = Field(1.0, gt=0, description="Of the agent's softmax.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Of the JSON log.")

    @model_validator(mode="before")
    @classmethod
    def _split(cls, values: Any) -> Any:
        points = values.get("exit_points")
        if isinstance(points, str):
            values["exit_points"] = tuple(part.strip() for part in points.split(","))
        return values

    @field_validator("exit_target")
    @classmethod
    def _is_target(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                ExitTarget.of_text(text)
            except ValueError:
                raise ValueError("write saving=0.4 or agreement=0.9, a share between 0 and 1") from None
        return text

    @property
    def names(self) -> list[str]:
        """What clients may call the model, the first for replies."""
        first = self.served_name or (f"{self.model}-{self.dataset}" if self.model else self.weights.name)
        return list(
            dict.fromkeys(filter(None, [first, self.model, self.dataset and f"{self.model}/{self.dataset}"]))
        )

    def default_policy(self, agent: bool) -> ExitPolicyName:
        """The exit policy where a request names none."""
        return self.exit_policy or ("rl" if agent else "none")

    @functools.cached_property
    def target(self) -> ExitTarget | None:
        """What is promised where a request asks for nothing else."""
        return ExitTarget.of_text(self.exit_target) if self.exit_target else None

    @functools.cached_property
    def threshold(self) -> float:
        """T where a request asks for none.

        Raises:
            UserError: if the target is not promised.
        """
        if self.target is None:
            return self.exit_threshold
        try:
            return self.target.promised(self.promises)
        except LookupError as error:
            raise UserError(f"--exit-target: {error}.") from None

    @functools.cached_property
    def promises(self) -> Calibration | None:
        """What the agent promises, if that is known."""
        return Calibration.load(self.calibration) if self.calibration else None

    @functools.cached_property
    def allow(self) -> dict[str, list[str]] | None:
        """The literals that the norm variant keeps."""
        return read_json(self.literals).get("literals") if self.literals else None


def read_settings(arguments: list[str] | None = None) -> Settings:
    """Settings from flags and environment, with a study's results found.

    Raises:
        UserError: an unknown flag or value, or a setting that does not fit the model.
    """
    try:
        settings = CliApp.run(Settings, cli_args=sys.argv[1:] if arguments is None else arguments)
    except ValidationError as error:
        fault = error.errors()[0]
        said = str(fault["msg"]).removeprefix("Value error, ")
        name = str(fault["loc"][0]) if fault["loc"] else "settings"
        flag = f"--{name.replace('_', '-')} (or GREENCODE_{name.upper()})"
        raise UserError(f"{flag}: {said}.") from None
    except SettingsError as error:
        raise UserError(f"{str(error).splitlines()[0]}; --help lists the flags.") from None
    settings = _of_study(settings) if settings.study else settings
    _check(settings)
    return settings


def _of_study(settings: Settings) -> Settings:
    """The settings completed by what a study's configuration says of its model and dataset."""
    if settings.weights or settings.policy:
        raise UserError(
            "Give either --study, with --model and --dataset, or --weights and --policy; not both."
        )
    try:
        written = yaml.safe_load(settings.study.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{settings.study} cannot be read ({str(error).splitlines()[0]}).") from None
    if not isinstance(written, dict):
        raise UserError(f"{settings.study} is not the configuration of a study.")
    study = config.complete(written)
    model = _chosen("model", settings.model, study["models"])
    dataset = _chosen("dataset", settings.dataset, study["datasets"])
    agent = _chosen("agent", settings.agent, study["agents"]) if study["agents"] else None
    results = Path("results")
    weights = results / "models" / model / dataset
    policy = results / "agents" / model / dataset / agent / "policy.safetensors" if agent else None
    promises = results / "calibration" / model / dataset / f"{agent}.json"
    for path in filter(None, [weights, policy]):
        if not path.exists():
            raise UserError(f"{path} does not exist; run the study first (`make figures`).")
    variant, generate = study["data"]["variant"], study["generate"]
    found = {
        "model": model,
        "dataset": dataset,
        "weights": weights,
        "policy": policy,
        "calibration": promises if promises.exists() else None,
        "exit_points": config.points_of(study["models"][model]),
        "language": study["datasets"][dataset]["language"],
        "variant": variant,
        "literals": results / "data" / dataset / "manifest.json" if variant == "norm" else None,
        "device": study["device"],
        "dtype": generate["dtype"],
        "threads": generate["threads"],
        "cpu_watts": generate["cpu_watts"],
        "agent_temperature": generate["temperature"],
    }
    own = {"device", "dtype", "threads", "cpu_watts", "agent_temperature"} & settings.model_fields_set
    return settings.model_copy(update={name: value for name, value in found.items() if name not in own})


def _chosen(kind: str, name: str | None, known: dict[str, Any]) -> str:
    if name is None:
        return next(iter(known))
    if name not in known:
        raise UserError(f"--{kind} {name} is not in the study; it has {', '.join(known)}.")
    return name


def _check(settings: Settings) -> None:
    """Find what does not fit before anything is loaded, and fill in what follows from the rest."""
    if settings.weights is None:
        raise UserError("Say what to serve: --study config/config.yaml, or --weights DIR and --policy FILE.")
    about = models.read_config(settings.weights)
    models.check_weights(settings.weights)
    layers = models.layer_count(about)
    points = settings.exit_points
    if settings.policy is not None:
        from greencode.policies import ExitPolicy

        points = ExitPolicy.load(settings.policy, models.fingerprint(settings.weights), points).exit_points
        _check_promises(settings)
    elif settings.calibration or settings.exit_target:
        raise UserError("--calibration and --exit-target need an agent; give --policy FILE.")
    elif settings.exit_policy == "rl":
        raise UserError("--exit-policy rl needs an agent; give --policy FILE or another exit policy.")
    settings.exit_points = check_exit_points(points, layers) if points else exit_points(layers)
    if settings.exit_policy == "fixed":
        raise UserError("--exit-policy fixed needs a depth, which only requests name; use rl or none.")
    if settings.prompt_format == "source" and settings.language is None:
        raise UserError("--prompt-format source needs --language java or python.")
    if settings.prompt_format is None:
        settings.prompt_format = "source" if settings.language else "tokens"
    window = about.get("max_position_embeddings")
    limit = settings.max_new_tokens_limit
    if settings.max_new_tokens > limit:
        raise UserError(
            f"--max-new-tokens {settings.max_new_tokens} is above --max-new-tokens-limit {limit}."
        )
    if window and settings.max_new_tokens >= window:
        raise UserError(f"--max-new-tokens {settings.max_new_tokens} leaves no room in the model's {window}.")
    _ = settings.allow


def _check_promises(settings: Settings) -> None:
    """Promises hold for one agent at one temperature."""
    known = settings.promises
    if known is not None and known.policy != sha256(settings.policy):
        raise UserError(f"{settings.calibration} is of another agent than {settings.policy}; calibrate it.")
    if known is not None and known.temperature != settings.agent_temperature:
        raise UserError(
            f"{settings.calibration} is for --agent-temperature {known.temperature:g}, not "
            f"{settings.agent_temperature:g}; calibrate the agent at that."
        )
    _ = settings.threshold


def load(settings: Settings) -> Served:
    """The model, its tokenizer and agent, and the meter of its device.

    Raises:
        UserError: what the checks before could not see.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers.utils.logging import disable_progress_bar

    from greencode.energy import Meter
    from greencode.engine import OBSERVATION, Engine
    from greencode.policies import ExitPolicy
    from greencode.tokenise import load_tokenizer
    from greencode.worker import Served

    disable_progress_bar()
    keep_freed()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = models.pick_device(settings.device)
    with offline():
        tokenizer = load_tokenizer(settings.weights)
        model = models.load(settings.weights, device, getattr(torch, settings.dtype))
    if not tokenizer.is_fast:
        raise UserError(f"{settings.weights} has no tokenizer.json; save it with a fast tokenizer.")
    # Requests are tokenised in several threads, which must not change the tokenizer; and `</s>` in a
    # prompt is text.
    fast = tokenizer.backend_tokenizer
    fast.no_truncation()
    fast.no_padding()
    fast.encode_special_tokens = True
    engine = Engine(model, settings.exit_points, tokenizer)
    fingerprint = models.fingerprint(settings.weights)
    agent = None
    if settings.policy:
        agent = ExitPolicy.load(settings.policy, fingerprint, engine.exit_points, OBSERVATION)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id]
    return Served(
        engine=engine,
        tokenizer=tokenizer,
        agent=agent,
        agent_temperature=settings.agent_temperature,
        meter=Meter.open(device, settings.cpu_watts or None),
        eos=frozenset(end for end in ends if end is not None),
        fingerprint=fingerprint,
    )


def assemble(settings: Settings, failed: Callable[[BaseException], None] = lambda error: None) -> FastAPI:
    """The application with its worker, which loads the model once the application starts.

    Args:
        failed: told, in the worker's thread, why the model could not be loaded.
    """
    from greencode.api import create_app
    from greencode.telemetry import Telemetry
    from greencode.worker import Worker

    telemetry, name, layers = Telemetry(), settings.names[0], settings.exit_points[-1]

    def ready(served: Served) -> None:
        # What is loaded stays: collections of garbage, some of them within a request, need not look at it.
        gc.collect()
        gc.freeze()
        telemetry.model.labels(name, served.fingerprint, str(layers)).set(1)
        log.info("ready", extra={"model": name, "layers": layers, "energy": served.meter.note})

    worker = Worker(
        name,
        lambda: load(settings),
        settings.max_concurrent_requests,
        finished=lambda outcome, order: telemetry.finished(outcome, order, layers),
        failed=failed,
        ready=ready,
    )
    return create_app(settings, worker, telemetry)


def http_config(settings: Settings, app: FastAPI) -> uvicorn.Config:
    """How the application is served."""
    import uvicorn

    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        timeout_graceful_shutdown=settings.drain_timeout,
        timeout_keep_alive=75,  # longer than editors keep an idle connection in their pools, mostly
    )


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; running requests are finished first.

    Raises:
        UserError: the port cannot be had, or the model not be loaded.
    """
    import uvicorn

    from greencode.telemetry import log_as_json
    from greencode.worker import bare

    log_as_json(settings.log_level)
    if settings.host not in LOOPBACK and settings.api_key is None:
        log.warning("open to the network without an API key; set GREENCODE_API_KEY")
    failure: list[BaseException] = []

    def failed(error: BaseException) -> None:
        failure.append(error)
        server.should_exit = True

    app = assemble(settings, failed)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            app.state.service.draining = True
            super().handle_exit(sig, frame)

    server = Server(http_config(settings, app))
    opened = listen(settings.host, settings.port)
    host, port = opened.getsockname()[:2]
    log.info("listening", extra={"url": f"http://{host}:{port}", "model": settings.names[0]})
    # uvicorn raises the signal again once it is done; for a server that was asked to end that is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[opened])
    for error in failure:
        if isinstance(error, UserError):
            raise error
        log.error("the model could not be loaded", extra=bare(error))
        name = settings.names[0]
        raise UserError(f"{name} could not be loaded: {type(error).__name__}; see the log.")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        UserError: the port cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        opened = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"{host}:{port} cannot be listened at ({_reason(error)}); choose another --port."
        ) from None
    # Connections inherit it. asyncio sets it only on sockets that it opened itself; without it a reply on a
    # connection that is kept waits 40 ms for the client's acknowledgement.
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return opened


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)


def main(arguments: list[str] | None = None) -> None:
    """Serve as the command line says; an error is one sentence and exit code 1."""
    try:
        run(read_settings(arguments))
    except UserError as error:
        print(f"serve: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
