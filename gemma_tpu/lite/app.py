"""The routes of the small server: OpenAI's completions, chat and models; health and metrics."""

import asyncio
import contextlib
import json
import sys
import time
import traceback
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.errors import UserError
from gemma_tpu.lite import patience, requests
from gemma_tpu.lite.answers import Choice, Form, words_of
from gemma_tpu.lite.batch import MOST_STOPS, Ask, Failed, Scores
from gemma_tpu.lite.engine import Busy, Engine, NotReady
from gemma_tpu.lite.metrics import CONTENT_TYPE
from gemma_tpu.lite.requests import Limits, Refused, Request
from gemma_tpu.sampling.drawing import Settings

Kind = Literal["text", "chat"]
GONE = object()
ROUTES = "this server has POST /v1/completions and /v1/chat/completions, GET /v1/models, /health and /metrics"
NOT_READY = {
    "compiling": "the server is still compiling ({progress}); /health says when it is ready",
    "draining": "the server is shutting down", "stopped": "the server is shutting down",
    "failed": "the server's device has failed; restart it",
}  # fmt: skip


class Served:
    """A model behind an address: the engine, the tokenizer, and the name that clients ask for."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str, vocab: int, limits: Limits):
        self.engine, self.tokenizer, self.name, self.vocab, self.limits = engine, tokenizer, name, vocab, limits
        self.words, self.created = words_of(tokenizer), int(time.time())

    def ask_of(self, request: Request, prompt: Any, number: int) -> Ask:
        """A prompt as ids with its limit, or the rule that it breaks."""
        ids = self._ids(request, prompt)
        capacity, most = self.engine.device.capacity, request.max_tokens
        if most is None:
            most = max(1, capacity - len(ids))
        if len(ids) + most > capacity:
            raise Refused(
                f"prompt {number + 1} has {len(ids)} tokens, and with {most} new ones {len(ids) + most}: at most "
                f"{capacity} fit here (--max-len); shorten it, or ask for fewer",
                "messages" if request.kind == "chat" else "prompt", code="context_length_exceeded",
            )  # fmt: skip
        stops = list(request.stop_token_ids)
        stops += [] if request.ignore_eos else self.tokenizer.stop_ids
        if len(set(stops)) > MOST_STOPS:
            raise Refused(f"{len(set(stops))} stop tokens: at most {MOST_STOPS}", "stop_token_ids")
        scored = request.echo and request.logprobs is not None and len(ids) > 1
        return Ask(ids, Settings(max(1, most), **request.numbers), _unheard, request.n, most, sorted(set(stops)),
                   bool(request.logprobs), scored)  # fmt: skip

    def _ids(self, request: Request, prompt: Any) -> list[int]:
        if request.kind == "chat":
            try:
                return self.tokenizer.prompt(prompt, thinking=request.thinking)
            except UserError as error:
                raise Refused(str(error).removeprefix(f"{self.tokenizer.folder}: "), "messages") from None
        ids = self.tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt
        if not ids:
            raise Refused("an empty prompt cannot be continued by this model, which has no BOS token", "prompt")
        beyond = [token for token in ids if token >= self.vocab]
        if beyond:
            raise Refused(f"token id {beyond[0]}: this model's are below {self.vocab}", "prompt")
        return ids


def _unheard(_: Any) -> None:
    """Until somebody listens."""


class Answer(Response):
    """Asks the engine and sends what comes, whole or as a stream; whoever hangs up gives the slots back."""

    def __init__(self, served: Served, request: Request, asks: Sequence[Ask]):
        self._served, self._request, self._asks = served, request, asks
        self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._form = Form(request, served.name, served.words)
        self._choices = [
            Choice(place * request.n + sample, ask, request, served.tokenizer, served.words,
                   self._echoed(request.prompts[place]) if request.echo else None)
            for place, ask in enumerate(asks) for sample in range(request.n)
        ]  # fmt: skip
        self._scored = {place for place, ask in enumerate(asks) if ask.scored}  # the engine clears it once it is done

    def _echoed(self, prompt: Any) -> str:
        return prompt if isinstance(prompt, str) else self._served.tokenizer.decode(prompt)

    def submit(self) -> None:
        loop = asyncio.get_running_loop()
        for place, ask in enumerate(self._asks):
            def tell(event: Any, place: int = place, ask: Ask = ask) -> None:
                try:
                    loop.call_soon_threadsafe(self._events.put_nowait, (place, event))
                except RuntimeError:  # the loop has ended, and with it the client
                    ask.cancel()

            ask.tell = tell
        try:
            self._served.engine.submit(self._asks)
        except Busy as error:
            raise Refused(str(error), status=429, code="queue_full") from None
        except NotReady as error:
            raise not_ready(self._served.engine) from error

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        watch = asyncio.create_task(self._watch(receive))
        try:
            if self._request.stream:
                await self._stream(send)
            else:
                await self._whole(scope, receive, send)
        except ClientDisconnect:
            pass  # nobody is left to answer; what it asked for is taken back below
        finally:
            watch.cancel()
            left = [ask for ask in self._asks if not ask.over]
            if left:
                self._served.engine.cancel(left)
                self._served.engine.metrics.cancelled.inc(len(left))

    async def _watch(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait((0, GONE))

    async def _whole(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async for _ in self._heard():
                pass
            response: Response = JSONResponse(self._form.whole(self._choices))
        except Refused as error:
            response = refusal(error)
        await response(scope, receive, send)

    async def _stream(self, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def say(data: Any) -> None:
            text = data if isinstance(data, str) else json.dumps(data)
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        try:
            begun: set[int] = set()
            async for choice, text in self._heard():
                if choice.index not in begun:
                    begun.add(choice.index)
                    if (first := self._form.first(choice)) is not None:
                        await say(first)
                if (chunk := self._form.more(choice, text)) is not None:
                    await say(chunk)
            if self._request.include_usage:
                await say(self._form.last(self._choices))
            await say("[DONE]")
        except Refused as error:
            await say(error.body)
        await send({"type": "http.response.body", "body": b""})

    async def _heard(self) -> AsyncIterator[tuple[Choice, str]]:
        """(choice, its new text) as they come, until all have ended."""
        scores, each = set(self._scored), self._request.n
        of = [self._choices[place * each :][:each] for place in range(len(self._asks))]
        open_ = {place for place, choices in enumerate(of) if choices[0].finish is None}
        for place in set(range(len(of))) - open_ - scores:  # no new token is wanted, and nothing to score
            for choice in of[place]:
                yield choice, ""
        while open_ or scores:
            place, event = await self._events.get()
            if event is GONE:
                raise ClientDisconnect
            if isinstance(event, Failed):
                raise Refused(event.message, status=500)
            if isinstance(event, Scores):
                scores.discard(place)
                for choice in of[place]:
                    choice.scores = event
                    if choice.finish is not None:
                        yield choice, ""
            elif (choice := of[place][event.sample]).finish is None:
                text = choice.take(event)
                choice.ask.samples[event.sample].over |= choice.finish is not None
                if all(one.finish for one in of[place]):
                    open_.discard(place)
                    self._note(of[place])
                yield choice, text

    def _note(self, choices: Sequence[Choice]) -> None:
        ask, finish = choices[0].ask, choices[-1].finish
        assert finish is not None and ask.began is not None  # all have ended
        self._served.engine.metrics.answered(finish, ask.arrived, ask.began, ask.first, time.monotonic())


class _Nothing(Response):
    """There is nobody to answer."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        pass


def not_ready(engine: Engine) -> Refused:
    state = engine.state
    return Refused(NOT_READY[state].format(progress=engine.progress), status=503, code=state)


def refusal(error: Refused) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers)


class Routes:
    def __init__(self, served: Served):
        self._served, self._engine = served, served.engine

    async def health(self, _: Http) -> Response:
        state = self._engine.state
        told = {"status": "ok" if state == "ready" else state, "model": self._served.name}
        told |= {"progress": self._engine.progress} if state in ("compiling", "failed") else {}
        return JSONResponse(told, 200 if state == "ready" else 503)

    async def metrics(self, _: Http) -> Response:
        return Response(self._engine.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def models(self, _: Http) -> Response:
        one = {"id": self._served.name, "object": "model", "created": self._served.created, "owned_by": "gemma_tpu",
               "max_model_len": self._engine.device.capacity}  # fmt: skip
        return JSONResponse({"object": "list", "data": [one]})

    async def completions(self, http: Http) -> Response:
        return await self._answer(http, "text")

    async def chat(self, http: Http) -> Response:
        return await self._answer(http, "chat")

    async def _answer(self, http: Http, kind: Kind) -> Response:
        try:
            if self._engine.state != "ready":
                raise not_ready(self._engine)
            data = await self._body(http)
            # Long texts take seconds to encode: not on the loop that all streams share.
            request, asks = await anyio.to_thread.run_sync(self._read, kind, data)
            answer = Answer(self._served, request, asks)
            answer.submit()
            return answer
        except ClientDisconnect:  # before it had said all
            return _Nothing()
        except Refused as error:
            self._engine.metrics.rejected.labels(error.status).inc()
            return refusal(error)

    def _read(self, kind: Kind, data: bytes) -> tuple[Request, list[Ask]]:
        request = requests.parse(kind, data, self._served.limits, self._served.name)
        return request, [self._served.ask_of(request, one, number) for number, one in enumerate(request.prompts)]

    async def _body(self, http: Http) -> bytes:
        most, found = self._served.limits.body, bytearray()
        try:
            async with asyncio.timeout(patience.BODY_SECONDS):
                async for part in http.stream():
                    found += part
                    if len(found) > most:
                        raise Refused(f"the body has more than {most} bytes, which is the limit here", status=413)
        except TimeoutError:
            told = f"the body has not come within {patience.BODY_SECONDS:g} s, which is the limit here"
            raise Refused(told, status=408) from None
        return bytes(found)


def build(served: Served) -> Any:
    """The ASGI application. What is running when it shuts down is finished first: that is the web server's part."""
    routes = Routes(served)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        served.engine.drain()

    async def refused(_: Http, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refusal(Refused(f"{error.detail.lower()}: {ROUTES}", status=error.status_code))

    async def broken(_: Http, __: Exception) -> Response:  # and raised again, to the guard
        return refusal(Refused("an error inside the server; its terminal says which", status=500))

    app = Starlette(
        routes=[
            Route("/health", routes.health), Route("/metrics", routes.metrics), Route("/v1/models", routes.models),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
        ],
        exception_handlers={HTTPException: refused, Exception: broken}, lifespan=lifespan,
    )  # fmt: skip
    return _Guarded(app)


class _Guarded:
    """A bug costs one request: it has had its error object, here is one line, and a traceback is nowhere."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            try:
                await send(message)
            except Exception as error:  # the web server's own, for each state that a broken connection can be in
                raise ClientDisconnect from error

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._app(scope, receive, sent)
        except ClientDisconnect:
            pass  # there is nobody left to answer
        except Exception as error:
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
        reason = " ".join(str(error).split())[:200]
        print(f"error: a request failed: {type(error).__name__}: {reason} ({place})", file=sys.stderr, flush=True)
