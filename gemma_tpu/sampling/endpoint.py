"""An OpenAI-compatible server (vLLM, say) in the place of a model: many requests at once, asked again where one
fails, every answer written as it comes.

Texts go to /completions, conversations to /chat/completions, where the server's own template applies. What OpenAI's
own interface lacks (top_k, min_p, repetition_penalty) is sent only where it is used: vLLM knows it, others refuse it.
"""

import contextlib
import hashlib
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TextIO

from gemma_tpu import plain
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.sampling.asking import Asked, Wanted, Written, check_stop, cut
from gemma_tpu.storage import retry

CONCURRENCY = 16
TIMEOUT = 600.0
DEFAULTS = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class Endpoint:
    """Writes like a Writer. `key` is OPENAI_API_KEY if nothing is given; `model` the server's only one."""

    def __init__(
        self, url: str, *, model: str | None = None, key: str | None = None, concurrency: int = CONCURRENCY,
        timeout: float = TIMEOUT, attempts: int = retry.ATTEMPTS,
    ):  # fmt: skip
        self.url = api(url)
        if concurrency < 1:
            raise UserError(f"concurrency is {concurrency}: it must be at least 1")
        self._key = os.environ.get("OPENAI_API_KEY") if key is None else key
        self._concurrency, self._timeout, self._attempts = concurrency, timeout, attempts
        self.model = model or self._only_model()

    def _only_model(self) -> str:
        found = self._ask("/models")
        if next(plain.faults(found, {"data": [{"id": str}]}), None) is not None:
            raise UserError(f"{self.url}/models: not the answer of an OpenAI-compatible server")
        listed: list[str] = [one["id"] for one in found["data"]]
        if len(listed) != 1:
            named = plain.first(map(plain.cut, listed)) or "none"
            raise UserError(f"{self.url} serves {named}: say which model to ask (--model NAME)")
        return listed[0]

    def write(
        self, asked: Sequence[Asked], settings: Wanted, *, stop: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None, on_done: Callable[[int, Written], None] | None = None,
        resume: str | Path | None = None,
    ) -> list[Written]:  # fmt: skip
        """A completion of each, in order; `resume` names a file of those that came before, and gets the others.

        With `on_text`, answers are shown when they are whole.
        """
        check_stop(stop)
        bodies = [self._body(one, settings, stop) for one in asked]
        with _Kept(resume) as kept:
            found: dict[int, Written] = {i: kept.found[key] for i, body in enumerate(bodies)
                                        if (key := _fingerprint(self.url, body)) in kept.found}  # fmt: skip
            lock = threading.Lock()

            def one(number: int) -> None:
                path = "/completions" if "prompt" in bodies[number] else "/chat/completions"
                made = _read(self._ask(path, bodies[number]), stop)
                with lock:  # callers need not be safe against themselves
                    found[number] = made
                    kept.add(_fingerprint(self.url, bodies[number]), made)
                    if on_text is not None:
                        on_text(number, made["text"])
                    if on_done is not None:
                        on_done(number, made)

            self._all([number for number in range(len(asked)) if number not in found], one)
        return [found[number] for number in range(len(asked))]

    def _all(self, numbers: Sequence[int], one: Callable[[int], None]) -> None:
        """All of them; after the first failure no other is begun, and what is on its way is still kept."""
        over = threading.Event()

        def unless_over(number: int) -> None:
            if over.is_set():
                return
            try:
                one(number)
            except BaseException:
                over.set()
                raise

        with ThreadPoolExecutor(self._concurrency) as pool:
            jobs = [pool.submit(unless_over, number) for number in numbers]
            try:
                wait(jobs, return_when=FIRST_EXCEPTION)
            except BaseException:  # Ctrl-C, say
                over.set()
                raise
        for job in jobs:
            job.result()

    def _body(self, one: Asked, settings: Wanted, stop: Sequence[str]) -> dict[str, Any]:
        text = isinstance(one.prompt, str)
        seed = zlib.crc32(f"{settings.seed}/{one.sample}".encode()) >> 1  # samples of a prompt differ, and again do not
        body: dict[str, Any] = {
            "model": self.model, "prompt" if text else "messages": one.prompt, "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature, "top_p": settings.top_p, "seed": seed,
        }  # fmt: skip
        body |= {name: getattr(settings, name) for name, off in DEFAULTS.items() if getattr(settings, name) != off}
        body |= {"stop": list(stop)} if stop else {}
        return body | ({"logprobs": 0} if text else {"logprobs": True})

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return retry.persist(lambda: self._once(path, body), f"{self.url}{path}", self._attempts, lambda: None)

    def _once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                if retry.may_pass(error):
                    raise
                raise UserError(f"{self.url}{path}: {error.code}: {_reason(error)}") from None
        except http.client.IncompleteRead as error:
            raise ConnectionError("the answer ended early") from error
        try:
            found = plain.json_value(text)
        except ValueError:
            raise RunError(f"{self.url}{path}: the answer is no JSON: {reason(text)[:80]!r}") from None
        if not isinstance(found, dict):
            raise RunError(f"{self.url}{path}: the answer is no JSON object: {reason(text)[:80]!r}")
        return found


def api(url: str) -> str:
    """Where the API of a server begins, its /v1 given or not."""
    if plain.has_password(url):
        raise UserError("the URL of the endpoint holds a name and a password, which would stand in every result: leave "
                        "them out, and give a key by OPENAI_API_KEY")  # fmt: skip
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{plain.cut(url)}: an endpoint is a URL that begins with http:// or https://")
    if "?" in url or "#" in url:
        raise UserError(f"{url.partition('?')[0].partition('#')[0]}: an endpoint is a URL without ? and # and what "
                        "follows them; give a key by OPENAI_API_KEY")  # fmt: skip
    base = url.rstrip("/")
    return base if base.endswith("/v1") else f"{base}/v1"


def _reason(error: urllib.error.HTTPError) -> str:
    hint = "; set OPENAI_API_KEY to a key of this server" if error.code in (401, 403) else ""
    return f"{reason(error.read()) or error.reason}{hint}"


def reason(data: bytes) -> str:
    """What a server says about an error; should it repeat the key that it was asked with, without that."""
    text = data.decode(errors="replace")
    with contextlib.suppress(ValueError, AttributeError):
        said = plain.json_value(text)
        said = said.get("error", said)
        text = str(said.get("message", text)) if isinstance(said, dict) else str(said)
    return without_key(" ".join(text.split()))[:300]


def without_key(text: str) -> str:
    key = os.environ.get("OPENAI_API_KEY")
    return text.replace(key, "…") if key else text


def _read(answer: dict[str, Any], stop: Sequence[str]) -> Written:
    """A completion as a model here gives it. `tokens` is null: servers give text, and few the ids."""
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        given = choice.get("logprobs") or {}
        listed = given.get("token_logprobs") or [one["logprob"] for one in given.get("content") or []]
        if not isinstance(text or "", str) or not all(map(plain.number, listed)):
            raise TypeError
        # Some servers leave the stop string in.
        return {"text": cut(text or "", stop)[0], "tokens": None, "finish_reason": choice.get("finish_reason"),
                "logprobs": listed or None}  # fmt: skip
    except (KeyError, IndexError, TypeError, AttributeError):
        shown = without_key(json.dumps(answer))[:200]
        raise RunError(f"the answer is not that of an OpenAI-compatible server: {shown}") from None


def _fingerprint(url: str, body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).hexdigest()


class _Kept:
    """Answers on disk, one line each, by what was asked: the same question is not asked twice, another is."""

    def __init__(self, path: str | Path | None):
        self._path = None if path is None else Path(path)
        self._file: TextIO | None = None
        self.found: dict[str, Written] = {}
        self._end = 0
        if self._path is not None and self._path.exists():
            self._load(self._path)

    def _load(self, path: Path) -> None:
        text = path.read_bytes()
        self._end = text.rfind(b"\n") + 1  # the last run may have been cut off while it wrote a line
        for number, line in enumerate(text[: self._end].splitlines(), 1):
            try:
                one = json.loads(line)
                self.found[one.pop("asked")] = one
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{path}, line {number}: no answer that was kept here; name another file") from None
        if text and not self.found:
            raise UserError(f"{path}: holds no answer that was kept here; name another file")

    def __enter__(self) -> "_Kept":
        if self._path is not None:
            self._file = self._path.open("a", encoding="utf-8")
            self._file.truncate(self._end)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, asked: str, made: Written) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"asked": asked, **made}) + "\n")
            self._file.flush()
