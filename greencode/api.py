"""The HTTP application: routes, limits and errors around one `Worker`.

Every reply and every error is JSON that each client of its route can parse, the errors of limits and of
unknown paths included. A completion is given up as soon as its client is gone or its time is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from greencode import __version__, prompts
from greencode.choices import Exit, Exits, HeaderExit, choose_exit, choose_sampling
from greencode.parameters import (
    MAX_STOP,
    AnyRequest,
    CompletionRequest,
    Detail,
    EitherRequest,
    ExitPolicyName,
    ExitTarget,
    GenerateRequest,
    ServiceError,
    refused,
)
from greencode.replies import (
    TGI,
    Asked,
    CompletionResponse,
    Dialect,
    Done,
    ErrorReply,
    GenerateResponse,
    Ollama,
    OllamaResponse,
    OpenAI,
    OpenAIErrorReply,
    Token,
    error_body,
    error_event,
    ignored_header,
)
from greencode.telemetry import Telemetry
from greencode.worker import Job, Order, Outcome, Piece, Worker, bare, shutting_down

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from greencode.prompts import Writer
    from greencode.serve import Settings
    from greencode.worker import Served

log = logging.getLogger(__name__)

QUIET = ("/health", "/livez", "/ping", "/metrics")
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
READ_ON = 16  # times the limit of a body
AT_ONCE = 8000  # characters of a prompt
CHARACTERS_PER_TOKEN = 64  # far more than any code has, comments included


class ClientGone(Exception):
    """The client closed the connection before its reply."""


def target_of_header(text: str | None) -> ExitTarget | None:
    """The target that a header asks for."""
    if text is None:
        return None
    try:
        return ExitTarget.of_text(text)
    except ValueError:
        raise refused("x-exit-target", "write saving=0.4 or agreement=0.9") from None


async def header_exit(
    x_exit_threshold: Annotated[float | None, Header(ge=0, le=1, allow_inf_nan=False)] = None,
    x_exit_target: Annotated[str | None, Header(max_length=100)] = None,
    x_exit_policy: Annotated[ExitPolicyName | None, Header()] = None,
    x_exit_verify: Annotated[Literal["true", "false", "1", "0"] | None, Header()] = None,
) -> HeaderExit:
    """For clients whose bodies take no other parameters; the body goes first."""
    verify = None if x_exit_verify is None else x_exit_verify in ("true", "1")
    return HeaderExit(x_exit_threshold, target_of_header(x_exit_target), x_exit_policy, verify)


Headers = Annotated[HeaderExit, Depends(header_exit)]


class Service:
    """What the routes share: settings, the worker, and how a request becomes a reply."""

    def __init__(self, settings: Settings, worker: Worker, telemetry: Telemetry) -> None:
        self.settings, self.worker, self.telemetry = settings, worker, telemetry
        self.draining = False

    def check_ready(self) -> None:
        """Raises `ServiceError` 503 unless requests are taken."""
        if self.draining:
            raise shutting_down()
        self.worker.check_ready()

    async def answer(
        self, request: Request, body: AnyRequest, headers: HeaderExit, dialect: Dialect, stream: bool = False
    ) -> Response:
        """The reply to one request, in one piece or as a stream."""
        self.check_ready()
        job = self.worker.admit(self.settings.request_timeout)
        try:
            if len(body.prompt_text) > AT_ONCE:
                order, asked = await run_in_threadpool(self.prepare, body, headers)
            else:  # done before a thread wakes
                order, asked = self.prepare(body, headers)
            streamed = bool(stream or body.stream)
            watch = asyncio.create_task(_fail_when_gone(request, job))
            job.submit(order, streamed)
            # The status of a stream waits for its first event, so that failures before it have their own.
            try:
                first = _sound(await job.events.get())
            finally:
                watch.cancel()
            more = ignored_header(body.ignored + _unused(body, headers, order.exit, streamed))
            if streamed:
                frames = self._frames(request, job, asked, dialect, first)
                return _EventStream(frames, job, {**STREAM_HEADERS, **more})
            done = Done(asked, first)
            request.state.done = done
            return JSONResponse(dialect.reply(done), headers=done.headers() | more)
        except BaseException as error:
            job.cancel("shutdown" if isinstance(error, asyncio.CancelledError) else "error")
            raise

    def prepare(self, body: AnyRequest, headers: HeaderExit) -> tuple[Order, Asked]:
        """Check a request against the model, and make its prompt what the model reads.

        Raises:
            ServiceError: 422, naming the field.
        """
        settings, served = self.settings, self.worker.check_ready()
        how = choose_exit(body, headers, self.exits(served))
        window = served.engine.family.window or 2**31
        limit = min(settings.max_new_tokens_limit, window - 1)
        new_tokens = settings.max_new_tokens if body.max_new_tokens is None else body.max_new_tokens
        if new_tokens == 0 or new_tokens > limit:
            raise refused("max_new_tokens", f"it must be -1, or from 1 to {limit}")
        longest = min(settings.max_input_tokens or window, window - max(1, new_tokens))
        ids, dropped, writer, completable = self._read(body, longest)
        if new_tokens == -1:
            new_tokens = min(limit, window - len(ids))
        sampling = choose_sampling(body)
        order = Order(
            context=ids,
            new_tokens=new_tokens if completable else 0,
            exit=how,
            sampling=sampling,
            stop=body.stop_texts,
            single_line=bool(body.single_line),
            writer=writer,
        )
        asked = Asked(
            model=settings.names[0],
            layers=served.engine.family.depth,
            exit=how,
            prompt=body.prompt_text,
            prompt_tokens=len(ids),
            truncated=dropped,
            seed=sampling.get("seed") if sampling else None,
            full_text=bool(body.return_full_text),
            details=bool(body.details),
            include_usage=body.include_usage,
            prefill=_prefill(served.tokenizer, ids) if body.decoder_input_details else [],
            end_id=min(served.eos, default=0),
        )
        return order, asked

    def exits(self, served: Served) -> Exits:
        """The exits on offer."""
        settings, agent = self.settings, served.agent is not None
        default = Exit(
            settings.default_policy(agent),
            settings.threshold,
            target=settings.target,
            verify=settings.exit_verify,
        )
        return Exits(served.engine.exit_points, agent, default, settings.promises)

    def _read(self, body: AnyRequest, longest: int) -> tuple[list[int], int, Writer | None, bool]:
        """The prompt as the model reads it.

        Returns:
            At most `longest` ids, how many more there were, what makes source of the completion (None for
            nothing), and whether there can be one.
        """
        settings, prompt, field = self.settings, body.prompt_text, body.prompt_name
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise refused(field, "it holds half of a surrogate pair, which is no text") from None
        cuts = settings.on_long_input == "truncate"
        text, writer, completable = prompt, None, True
        if (body.prompt_format or settings.prompt_format) == "source":
            if settings.language is None:
                raise refused("prompt_format", "the model's language is not known here; send tokens")
            most = longest * CHARACTERS_PER_TOKEN
            if (cuts or body.truncate) and len(prompt) > most:
                prompt = prompt[-most:].partition("\n")[2] or prompt[-most:]
            read = prompts.read(prompt, settings.language, settings.variant, settings.allow)
            text, writer, completable = read.text, read.writer, read.completable
        all_ids = self.worker.served.tokenizer.backend_tokenizer.encode(text).ids
        ids = all_ids[-body.truncate :] if body.truncate else all_ids
        if cuts:
            ids = ids[-longest:]
        if len(ids) > longest:
            raise refused(field, f"it has {len(ids)} tokens, and {longest} are read; send less or truncate")
        return ids, len(all_ids) - len(ids), writer, completable and bool(ids)

    async def _frames(
        self, request: Request, job: Job, asked: Asked, dialect: Dialect, event: Piece | Outcome
    ) -> AsyncIterator[str]:
        """Events of a stream; one that fails ends with an error."""
        index = 0
        try:
            while isinstance(event, Piece):
                index += 1
                yield dialect.token(asked, index, event)
                event = _sound(await job.events.get())
            done = Done(asked, event)
            request.state.done = done
            for frame in dialect.last(done):
                yield frame
        except ServiceError as error:
            yield error_event(request.url.path, error, request.state.id)

    def info(self) -> dict[str, Any]:
        """`/info`, with the names of text-generation-inference's own."""
        settings, served = self.settings, self.worker.check_ready()
        family = served.engine.family
        longest = settings.max_input_tokens or (family.window or 2**31) - 1
        agent, default, promises = served.agent is not None, self.exits(served).default, settings.promises
        return {
            "model_id": settings.names[0],
            "model_sha": served.fingerprint,
            "model_dtype": str(family.dtype),
            "model_device_type": family.device.type,
            "max_concurrent_requests": settings.max_concurrent_requests,
            "max_best_of": 1,
            "max_stop_sequences": MAX_STOP,
            "max_input_tokens": longest,
            "max_total_tokens": family.window,
            "max_client_batch_size": 1,
            "version": __version__,
            "sha": None,
            "docker_label": None,
            "greencode": {
                "exit_policies": ["rl", "fixed", "none"] if agent else ["fixed", "none"],
                "default": {
                    "exit_policy": default.policy,
                    "exit_threshold": default.threshold if agent else None,
                    "exit_target": default.target,
                    "exit_verify": default.verify,
                    "max_new_tokens": settings.max_new_tokens,
                },
                "exit_targets": [asdict(one) for one in promises.given] if promises else [],
                "num_layers": family.depth,
                "exit_points": list(served.engine.exit_points),
                "prompt_format": settings.prompt_format,
                "language": settings.language,
                "energy_source": served.meter.source,
                "energy_note": served.meter.note,
            },
        }

    def check_name(self, name: str) -> None:
        """Raises `ServiceError` 404 unless the name is empty or one of the served model's."""
        if name.strip("/") not in ("", *self.settings.names):
            raise ServiceError(
                404, "not_found", f"No such model here; {', '.join(self.settings.names)} is served."
            )


def _sound(event: Piece | Outcome | Exception) -> Piece | Outcome:
    """An event of a job; an error is raised."""
    if isinstance(event, Exception):
        raise event
    if isinstance(event, Outcome) and event.cancelled:
        raise shutting_down()
    return event


def _unused(body: AnyRequest, headers: HeaderExit, how: Exit, streamed: bool) -> list[str]:
    """Names of known parameters that change nothing in this request."""
    agents = ("exit_threshold", "exit_target")
    useless = {"rl": (), "fixed": agents, "none": (*agents, "exit_verify")}[how.policy]
    prefill = streamed or not body.details or isinstance(body, CompletionRequest)
    return [
        *(n for n in useless if getattr(body, n) is not None or getattr(headers, n) is not None),
        *(["decoder_input_details"] if body.decoder_input_details and prefill else []),
    ]


def _account(done: Done) -> dict[str, Any]:
    """What the log says of a completion."""
    asked, outcome = done.asked, done.outcome
    return {
        "prompt_tokens": asked.prompt_tokens,
        "generated_tokens": done.count,
        "finish": outcome.finish,
        "exit_policy": asked.exit.policy,
        "exit_threshold": asked.exit.threshold,
        "exit_target": asked.exit.target and asked.exit.target.model_dump(exclude_none=True),
        "exit_verify": asked.exit.verify,
        "mean_exit_layer": done.mean_depth,
        "layers_skipped": done.layers_skipped,
        "drafts": outcome.drafts,
        "drafts_accepted": outcome.drafts_accepted,
        "joules": done.joules,
        "queue_s": outcome.queue_s,
        "prefill_s": outcome.prefill_s,
        "decode_s": outcome.decode_s,
    }


def _prefill(tokenizer: Any, ids: list[int]) -> list[Token]:
    special = set(tokenizer.all_special_ids)
    texts = [tokenizer.backend_tokenizer.decode([one], skip_special_tokens=False) for one in ids]
    return [Token(id=i, text=text, special=i in special) for i, text in zip(ids, texts, strict=True)]


async def _fail_when_gone(request: Request, job: Job) -> None:
    """Give the job up once its client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.fail("disconnect", ClientGone())


class _EventStream(StreamingResponse):
    """Server-sent events of a job, which is given up if they end early."""

    def __init__(self, frames: AsyncIterator[str], job: Job, headers: dict[str, str]) -> None:
        super().__init__(frames, media_type="text/event-stream", headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel("disconnect")


class Guard:
    """Outermost: request id, bearer token, limits of the body, errors as JSON, the log and the metrics.

    Plain ASGI, so that the client's disconnect reaches the handlers. A body is read here, up to its limit,
    before anything parses it.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        key = service.settings.api_key
        self._key = key.get_secret_value().encode() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        state = scope.setdefault("state", {})
        state["id"] = _request_id(headers.get("x-request-id", b"").decode("latin-1"))
        scope["path"] = "/" + scope["path"].lstrip("/")  # some clients join with two slashes

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", state["id"].encode())]
            await send(message)

        try:
            await self.app(scope, await self._admitted(scope, headers, receive), answered)
        except ServiceError as error:
            await _error_response(scope["path"], error, state["id"])(scope, receive, answered)
        except ClientGone:
            status = 499
        except Exception as error:
            log.error("request failed", extra={"id": state["id"], **bare(error)})
            if not status:
                failure = ServiceError(500, "internal", "The server failed on this request; see its log.")
                await _error_response(scope["path"], failure, state["id"])(scope, receive, answered)
        finally:
            self._record(scope, status or 499, time.perf_counter() - start)

    async def _admitted(self, scope: Scope, headers: dict[str, bytes], receive: Receive) -> Receive:
        """What the application receives from; `ServiceError` for what it shall not see."""
        post = scope["method"] == "POST"
        if self._key and (post or scope["path"].startswith("/v1")):
            scheme, _, token = headers.get("authorization", b"").partition(b" ")
            known = hmac.compare_digest(token.strip(), self._key)
            if scheme.lower() != b"bearer" or not known:
                raise ServiceError(
                    401,
                    "unauthorized",
                    "The bearer token is missing or wrong.",
                    headers={"www-authenticate": "Bearer"},
                )
        if not post:
            return receive
        media = headers.get("content-type", b"").partition(b";")[0].strip().lower()
        if media != b"application/json":
            raise ServiceError(415, "validation", "The content type must be application/json.")
        body = await self._body(headers, receive)
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay

    async def _body(self, headers: dict[str, bytes], receive: Receive) -> bytes:
        limit, parts = self.service.settings.max_body_bytes, []
        stated = headers.get("content-length", b"")
        size = int(stated) if stated.isdigit() and int(stated) > READ_ON * limit else 0
        more = size == 0
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size <= limit:
                parts.append(part)
            # What is somewhat too long is read to its end and dropped: most clients do not listen before.
            more = message.get("more_body", False) and size <= READ_ON * limit
        if size > limit:
            raise ServiceError(
                413,
                "payload_too_large",
                f"The body has more than {limit} bytes.",
                headers={"connection": "close"},
            )
        return b"".join(parts)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        # The template, not the path: a metric for each model name would be one too many.
        route = getattr(scope.get("route"), "path", "unmatched")
        self.service.telemetry.requests.labels(route, str(status)).inc()
        self.service.telemetry.duration.labels(route).observe(seconds)
        level = logging.DEBUG if route in QUIET else logging.INFO
        done = scope["state"].get("done")
        account = _account(done) if done else {}
        about = {"id": scope["state"]["id"], "method": scope["method"], "route": route, "status": status}
        log.log(level, "request", extra={**about, "seconds": seconds, **account})


_ID = re.compile(r"[\w.\-]{1,64}\Z", re.ASCII)


def _request_id(sent: str) -> str:
    return sent if _ID.match(sent) else uuid.uuid4().hex


def _error_response(path: str, error: ServiceError, request_id: str | None) -> JSONResponse:
    return JSONResponse(error_body(path, error, request_id), status_code=error.status, headers=error.headers)


_HTTP_KINDS = {404: "not_found", 405: "validation"}
_ERRORS = {
    400: "No JSON.",
    401: "The bearer token is missing or wrong.",
    404: "Another model.",
    413: "The body is too large.",
    415: "Not declared as JSON.",
    422: "A parameter is wrong.",
    424: "The model failed.",
    429: "Full; see Retry-After.",
    500: "A fault of the server.",
    503: "Loading or shutting down; see Retry-After.",
    504: "Past the deadline.",
}


def _responses(model: Any, error: Any) -> dict[int, dict[str, Any]]:
    """Documentation of a route's replies."""
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    events = {"text/event-stream": {"schema": event}}
    return {
        200: {"model": model, "description": "A completion, or its events.", "content": events},
        **{status: {"model": error, "description": text} for status, text in _ERRORS.items()},
    }


def create_app(settings: Settings, worker: Worker, telemetry: Telemetry) -> FastAPI:
    """The application; the worker starts and ends with it."""
    service = Service(settings, worker, telemetry)
    telemetry.watch(worker)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await run_in_threadpool(worker.stop)

    app = FastAPI(
        title="GREEN-CODE",
        version=__version__,
        summary="Code completion with early exit; the threshold is part of the request.",
        lifespan=lifespan,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.service = service
    app.add_middleware(Guard, service=service)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    _handle_errors(app)
    _add_completions(app, service)
    _add_status(app, service)
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ServiceError)
    async def known(request: Request, error: ServiceError) -> Response:
        return _error_response(request.url.path, error, request.state.id)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        faults = list(error.errors())
        if any(fault["type"] == "json_invalid" for fault in faults):
            detail = Detail(loc="body", msg="The body is not JSON.", type="json_invalid")
            broken = ServiceError(400, "validation", detail.msg, [detail])
            return _error_response(request.url.path, broken, request.state.id)
        return _error_response(request.url.path, ServiceError.invalid(faults), request.state.id)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        message = f"{error.detail}: {request.method} is not offered here; see /docs."
        if path.startswith("/v1/chat"):
            message = "Chat is not offered: the models complete code; use /v1/completions."
        fault = ServiceError(
            error.status_code,
            _HTTP_KINDS.get(error.status_code, "validation"),
            message if error.status_code in (404, 405) else str(error.detail),
            headers=dict(error.headers or {}),
        )
        return _error_response(path, fault, request.state.id)


def _add_completions(app: FastAPI, service: Service) -> None:
    """The routes that complete, each with and without a slash at its end."""

    async def root(request: Request, body: GenerateRequest, headers: Headers) -> Response:
        return await service.answer(request, body, headers, TGI(listed=True))

    async def generate(request: Request, body: GenerateRequest, headers: Headers) -> Response:
        return await service.answer(request, body, headers, TGI())

    async def generate_stream(request: Request, body: GenerateRequest, headers: Headers) -> Response:
        return await service.answer(request, body, headers, TGI(), stream=True)

    async def by_model(request: Request, body: GenerateRequest, headers: Headers, model_id: str) -> Response:
        service.check_name(model_id)
        return await service.answer(request, body, headers, TGI(listed=True))

    async def api_generate(request: Request, body: EitherRequest, headers: Headers) -> Response:
        return await service.answer(request, body, headers, Ollama())

    async def api_generate_by_model(
        request: Request, body: EitherRequest, headers: Headers, model_id: str
    ) -> Response:
        service.check_name(model_id)
        return await service.answer(request, body, headers, Ollama())

    async def completions(request: Request, body: CompletionRequest, headers: Headers) -> Response:
        return await service.answer(request, body, headers, OpenAI())

    tgi = _responses(GenerateResponse, ErrorReply)
    listed = _responses(list[GenerateResponse], ErrorReply)
    ollama = _responses(OllamaResponse, ErrorReply)
    openai = _responses(CompletionResponse, OpenAIErrorReply)
    for path, endpoint, responses in (
        ("/", root, listed),
        ("/generate", generate, tgi),
        ("/generate_stream", generate_stream, tgi),
        ("/models/{model_id:path}", by_model, listed),
        ("/api/generate", api_generate, ollama),
        ("/api/generate/models/{model_id:path}", api_generate_by_model, ollama),
        ("/v1/completions", completions, openai),
    ):
        app.post(path, responses=responses, name=endpoint.__name__)(endpoint)
        if path != "/" and not path.endswith("path}"):
            app.post(f"{path}/", include_in_schema=False)(endpoint)
    app.post("/models", include_in_schema=False)(root)
    app.post("/api/generate/models", include_in_schema=False)(api_generate)


def _add_status(app: FastAPI, service: Service) -> None:
    """The routes that report."""
    not_ready = {503: {"model": ErrorReply, "description": _ERRORS[503]}}

    @app.get("/health", responses=not_ready)
    @app.get("/ping", responses=not_ready, include_in_schema=False)
    async def health() -> dict[str, str]:
        """200 once the model is loaded and warm."""
        service.check_ready()
        return {"status": "ready"}

    @app.get("/livez")
    async def livez() -> dict[str, str]:
        """200 as long as the server answers."""
        return {"status": "alive"}

    @app.get("/info", responses=not_ready)
    async def info() -> dict[str, Any]:
        """The model, its exits, and the limits."""
        return service.info()

    @app.get("/v1/models", responses={401: {"model": OpenAIErrorReply, "description": _ERRORS[401]}})
    async def models() -> dict[str, Any]:
        """The names of the model."""
        about = {"object": "model", "created": 0, "owned_by": "greencode"}
        return {"object": "list", "data": [{"id": name, **about} for name in service.settings.names]}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.telemetry.exposition(), media_type="text/plain; version=0.0.4")


__all__ = ["Guard", "Service", "create_app"]
