"""The HTTP application: routes, limits, who may ask, and what happens when a client leaves."""

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from ..distributed.groups import replica
from ..errors import LlamaError, NonFiniteError
from . import responses
from .answers import Answer, Model, merged
from .metrics import Metrics
from .protocol import ApiError, Job, ServedModel, parse_chat, parse_completion, server_ending

MAX_BODY = 1 << 20  # bytes
MAX_DISCARDED = 128 << 20  # bytes of a refused request's body that are read, so that its client gets to reading the answer
BODY_SECONDS = 30.0  # within which a client must have sent its request's body
CLOSING_SECONDS = 5.0  # within which a client must take the error that ends a stream
RETRY_SECONDS = 1  # after which a client may ask again if the queue is full
CLIENT_LEFT = 499  # the status in the metrics of a request whose client has left; as in nginx
INTERNAL = "internal error; the server's log has the cause"
OPEN_PATHS = ("/", "/health")  # they need no key
PATHS = (*OPEN_PATHS, "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions")

T = TypeVar("T")
log = logging.getLogger("llama.server")


@dataclass(frozen=True)
class Settings:
    """What the flags of `serve` decide.

    model_name: the name that requests may give. api_key: the key that requests must have, or None. hosts: the names under which
    browsers may reach the server; None for any. max_queue: answers that may wait for a row. timeout: seconds for a response.
    max_connections: connections that may be open.
    """

    model_name: str
    api_key: str | None = None
    hosts: Collection[str] | None = None
    max_queue: int = 64
    timeout: float = 600.0
    max_connections: int = 1000


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


def error_response(error: ApiError) -> Response:
    return JsonResponse(error.body(), error.status, error.headers)


class Body:
    """The body of a request, as it arrives."""

    def __init__(self, headers: Headers, receive: Receive) -> None:
        self.source, self.ended, self.deadline = receive, False, time.monotonic() + BODY_SECONDS
        length = headers.get("content-length", "")
        self.declared = int(length) if length.isdigit() else 0
        self.withheld = "expect" in headers  # the client sends the body when it is asked for it

    async def receive(self) -> Message:
        self.withheld = False
        message = await self.source()
        self.ended |= message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def discard(self) -> bool:
        """Read the rest, since most clients read no answer before they have sent it all. Return False if too much is left."""
        if self.ended or self.withheld or self.declared > MAX_DISCARDED:
            return self.ended

        async def read() -> None:
            size = 0
            while not self.ended and size <= MAX_DISCARDED:
                size += len((await self.receive()).get("body", b""))

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), self.deadline - time.monotonic())
        return self.ended


class App:
    """The ASGI application: check host and key, then route."""

    def __init__(self, llama: Model, settings: Settings) -> None:
        self.llama, self.settings = llama, settings
        params = llama.model.params
        rows = params.max_batch_size * replica()[1]
        max_answers = rows + settings.max_queue
        self.served = ServedModel(settings.model_name, llama.tokenizer, llama.chat_format, params.max_seq_len, max_answers)
        self.metrics = Metrics(rows)
        page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        self.page = page, {"Content-Security-Policy": content_security_policy(page), "X-Frame-Options": "DENY"}
        self.routes = Starlette(
            routes=[
                Route("/", self._show_page),
                Route("/health", self._show_health),
                Route("/metrics", self._show_metrics),
                Route("/v1/models", self._list_models),
                Route("/v1/models/{name:path}", self._show_model),
                Route("/v1/chat/completions", partial(self._respond, parse=parse_chat), methods=["POST"]),
                Route("/v1/completions", partial(self._respond, parse=parse_completion), methods=["POST"]),
            ],
            exception_handlers={ApiError: _respond_to_error, HTTPException: _respond_to_error, Exception: _respond_to_error},
        )

        self.routes.router.redirect_slashes = False  # a redirect would name the host of the request's header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"] if scope["path"] in PATHS else "other"

        body, started = Body(Request(scope).headers, receive), False

        async def send_counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = [(b"x-content-type-options", b"nosniff")]
                if not await body.discard():
                    headers.append((b"connection", b"close"))
                self.metrics.requests[path, message["status"]] += 1
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        try:
            self._check_sender(Request(scope), path)
        except ApiError as e:
            await error_response(e)(scope, body.receive, send_counted)
            return
        try:
            await self.routes(scope, body.receive, send_counted)
        except asyncio.CancelledError:  # uvicorn cancels what is left when the server's grace is over
            body.deadline = 0.0
            if not started:
                await error_response(server_ending())(scope, body.receive, send_counted)

    def _check_sender(self, request: Request, path: str) -> None:
        """Raise ApiError if the request has a wrong key, or comes from a page whose name was redirected to this server."""
        hosts, key = self.settings.hosts, self.settings.api_key
        host = re.sub(r":\d*$", "", request.headers.get("host", "")).lower()
        if hosts is not None and host not in hosts:
            raise ApiError(
                421, f"the host {host[:100]!r} is not one of this server's; start it with --allowed_host", code="wrong_host"
            )
        if key is None or path in OPEN_PATHS:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), key.encode()):
            message = "this server needs its API key, in the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", WWW_Authenticate="Bearer")

    async def _show_page(self, request: Request) -> Response:
        return Response(self.page[0], headers=self.page[1], media_type="text/html")

    async def _show_health(self, request: Request) -> Response:
        return JsonResponse({"status": "ok"})

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _list_models(self, request: Request) -> Response:
        return JsonResponse({"object": "list", "data": [self._model_card()]})

    def _model_card(self) -> dict[str, Any]:
        return {"id": self.settings.model_name, "object": "model", "created": 0, "owned_by": "llama"}

    async def _show_model(self, request: Request) -> Response:
        if request.path_params["name"] != self.settings.model_name:
            raise ApiError(404, f"this server has only the model {self.settings.model_name!r}", "model", "model_not_found")
        return JsonResponse(self._model_card())

    async def _respond(self, request: Request, parse: Callable[[bytes, ServedModel], Job]) -> Response:
        """Answer a request for text. Refuse it before any computation if it is wrong or if too many are waiting."""
        answers: list[Answer] = []
        response: Response | None = None
        try:
            raw = await _read_body(request)
            job = await asyncio.to_thread(parse, raw, self.served)  # encoding a long prompt must not delay other requests
            self._check_room(job.n_answers)
            for index in range(job.n_answers):
                answers.append(Answer(self.llama, job, index, self.metrics))  # noqa: PERF401
            if job.stream:
                response = EventStream(job, answers, self.settings.timeout)
            else:
                whole = await _while_connected(request.receive, _collect(job, answers), self.settings.timeout)
                response = JsonResponse(whole)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_LEFT)
        except LlamaError as e:
            raise _internal_error(e) from e
        finally:
            if not isinstance(response, EventStream):
                end_all(answers)
        return response

    def _check_room(self, n_answers: int) -> None:
        """Raise ApiError unless so many more answers may run or wait."""
        in_flight, room = self.metrics.in_flight, self.served.max_answers
        if in_flight + n_answers > room:
            message = f"{in_flight} answers are running or waiting, and {room} is the limit; ask again later"
            raise ApiError(429, message, code="queue_full", Retry_After=str(RETRY_SECONDS))


def end_all(answers: list[Answer]) -> None:
    for answer in answers:
        answer.end()


class EventStream(Response):
    """Answer a job by server-sent events, as the tokens come."""

    def __init__(self, job: Job, answers: list[Answer], timeout: float) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.job, self.answers, self.timeout = job, answers, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_bytes(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await _while_connected(receive, self._send_events(send_bytes), self.timeout)
                end = responses.DONE
            except ClientDisconnect:
                return
            except asyncio.CancelledError:
                end = responses.event(server_ending().body())
            except Exception as e:
                end = responses.event(_internal_error(e).body())
            with contextlib.suppress(asyncio.TimeoutError):  # a client that reads nothing; the connection is then closed
                await asyncio.wait_for(send_bytes(end, more=False), CLOSING_SECONDS)
        finally:
            end_all(self.answers)

    async def _send_events(self, send_bytes: Callable[[bytes], Awaitable[None]]) -> None:
        job, head = self.job, responses.head(self.job, stream=True)
        choices = [responses.Choice(job, answer) for answer in self.answers]
        no_usage = {"usage": None} if job.include_usage else {}
        for choice in choices if job.is_chat else []:
            await send_bytes(responses.event({**head, "choices": [choice.first_chunk()], **no_usage}))
        async with contextlib.aclosing(merged(self.answers)) as pieces:
            async for answer, piece in pieces:
                choice = choices[answer.index]
                part = choice.chunk(piece) if piece else choice.last_chunk()
                await send_bytes(responses.event({**head, "choices": [part], **no_usage}))
        if job.include_usage:
            await send_bytes(responses.event({**head, "choices": [], "usage": responses.usage(job, self.answers)}))


async def _collect(job: Job, answers: list[Answer]) -> dict[str, Any]:
    """Generate all answers of a job. Return the whole response."""
    choices = [responses.Choice(job, answer) for answer in answers]
    async with contextlib.aclosing(merged(answers)) as pieces:
        async for answer, piece in pieces:
            if piece:
                choices[answer.index].add(piece)
    return {
        **responses.head(job, stream=False),
        "choices": [choice.whole() for choice in choices],
        "usage": responses.usage(job, answers),
    }


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, T], timeout: float) -> T:
    """Do the work and return its result, but end it if the client leaves (ClientDisconnect) or the time is over (ApiError)."""

    async def until_the_client_leaves() -> None:
        while True:  # asked anew each second: uvicorn stops reading, and so sees no end, after a pipelined request
            with contextlib.suppress(asyncio.TimeoutError):
                if (await asyncio.wait_for(receive(), 1.0))["type"] == "http.disconnect":
                    return

    task, leaving = asyncio.create_task(work), asyncio.create_task(until_the_client_leaves())
    try:
        await asyncio.wait({task, leaving}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if leaving.done():
            raise ClientDisconnect
        raise ApiError(504, f"the answer took longer than this server's limit of {timeout:g} seconds", code="timeout")
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _read_body(request: Request) -> bytes:
    """Return the body of a request. Raise ApiError if it is too large or too slow, or not declared as JSON."""
    # A page of another origin can send other types than JSON without asking first.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type is {kind[:60]!r}; it must be application/json")
    too_large = ApiError(413, f"the body has more than {MAX_BODY} bytes; shorten it", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > MAX_BODY:
        raise too_large
    body = bytearray()

    async def read() -> None:
        async for part in request.stream():
            body.extend(part)
            if len(body) > MAX_BODY:
                raise too_large

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} seconds") from None
    return bytes(body)


async def _respond_to_error(request: Request, e: Exception) -> Response:
    if isinstance(e, HTTPException):
        text = {404: "there is nothing here", 405: "this path takes another method"}.get(e.status_code, str(e.detail))
        e = ApiError(e.status_code, f"{text}; this server has {', '.join(PATHS)}", **dict(e.headers or {}))
    return error_response(e if isinstance(e, ApiError) else ApiError(500, INTERNAL))  # the server logs the traceback


def _internal_error(e: Exception) -> ApiError:
    """Return the error for a failure of an answer, and log it. Only what a client can understand is told in detail."""
    if isinstance(e, ApiError):
        return e
    log.error("an answer has failed", exc_info=e)
    return ApiError(500, str(e) if isinstance(e, NonFiniteError) else INTERNAL)


def content_security_policy(page: str) -> str:
    """Return a policy under which a page may run its own inline script and style, and talk to this server only."""

    def sources(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)

    return (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
