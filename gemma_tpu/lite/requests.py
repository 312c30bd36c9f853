"""From the bytes of a request to what is asked, or to the one error that names all that is wrong with it."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gemma_tpu.lite import fields
from gemma_tpu.lite.fields import CHAT, TEXT, shown

ROLES = ("system", "developer", "user", "assistant")
# What clients send back with an answer of ours; null there.
ABSENT = {"refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content"}


class Refused(Exception):
    """A status and OpenAI's error object."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.status = status
        kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Limits:
    prompts: int = 128  # of a request
    samples: int = 128  # of a prompt
    body: int = 8 * 2**20  # bytes


@dataclass(frozen=True)
class Request:
    """What a request asks for. `logprobs`: how many alternatives beside each token; None: no log-probabilities."""

    kind: Literal["text", "chat"]
    prompts: Sequence[Any]  # texts, token ids or one conversation
    max_tokens: int | None  # None: what fits
    n: int
    numbers: Mapping[str, Any]  # of drawing.Settings
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool
    echo: bool
    logprobs: int | None
    thinking: bool


def parse(kind: Literal["text", "chat"], data: bytes, limits: Limits, model: str) -> Request:
    """Everything that is wrong is said at once."""
    body = _object(data)
    said, wrong = fields.read(body, TEXT if kind == "text" else CHAT)
    needed = "prompt" if kind == "text" else "messages"
    if body.get(needed) is None:
        wrong.append((needed, f"{needed} is missing: it must be {(TEXT if kind == 'text' else CHAT)[needed].rule}"))
    if not wrong:
        wrong = _conflicts(kind, said, limits)
    if wrong:
        raise Refused("; ".join(words for _, words in wrong), wrong[0][0])
    if said["model"] not in (None, model):
        raise Refused(f"model is {shown(said['model'])}: this server has {model} alone", "model", status=404,
                      code="model_not_found")  # fmt: skip
    return _request(kind, said)


def _object(data: bytes) -> dict[str, Any]:
    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no number in JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice in one object")
        return found

    try:
        body = json.loads(data, parse_constant=no_constant, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON: {error}" if str(error) else "the body is no JSON") from None
    if not isinstance(body, dict):
        raise Refused(f"the body is {shown(body)}: it must be a JSON object")
    return body


def _conflicts(kind: str, said: Mapping[str, Any], limits: Limits) -> list[tuple[str, str]]:
    wrong = []
    if said["n"] > limits.samples:
        wrong.append(("n", f"n is {said['n']}: at most {limits.samples} here"))
    if said["n"] > 1 and said["temperature"] == 0:
        wrong.append(("n", f"n is {said['n']} at temperature 0: all would be the same; set a temperature above 0"))
    if said["stream_options"] and not said["stream"]:
        wrong.append(("stream_options", "stream_options is given without stream: true"))
    if kind == "text":
        count = len(_prompts(said["prompt"]))
        if count > limits.prompts:
            wrong.append(("prompt", f"{count} prompts: at most {limits.prompts} in one request"))
        if said["max_tokens"] == 0 and not said["echo"]:
            wrong.append(("max_tokens", "max_tokens is 0 without echo: nothing would be answered"))
        return wrong
    if None not in (said["max_tokens"], said["max_completion_tokens"]) and (
        said["max_tokens"] != said["max_completion_tokens"]
    ):
        wrong.append(("max_tokens", f"max_tokens is {said['max_tokens']} and max_completion_tokens "
                      f"{said['max_completion_tokens']}: give one of them"))  # fmt: skip
    if said["top_logprobs"] and not said["logprobs"]:
        wrong.append(("top_logprobs", "top_logprobs is given without logprobs: true"))
    return wrong + _in_messages(said["messages"])


def _in_messages(messages: list[Any]) -> list[tuple[str, str]]:
    wrong = []
    for number, one in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(one, dict):
            wrong.append((place, f"{place} is {shown(one)}: it must be an object with role and content"))
            continue
        if one.get("role") not in ROLES:
            wrong.append((place, f"{place}: role is {shown(one.get('role'))}: it must be one of {', '.join(ROLES)}"))
        if _content(one.get("content")) is None:
            wrong.append((place, f"{place}: content is {shown(one.get('content'))}: it must be a string, or a list of "
                          'parts {"type": "text", "text": ...}; this server reads text alone'))  # fmt: skip
        more = [key for key, value in one.items() if key not in ("role", "content")
                and not (key in ABSENT and value in (None, [], ""))]  # fmt: skip
        if more:
            named = ", ".join(map(shown, more))
            wrong.append((place, f"{place}: {named}: a message here has role and content, and no more"))
    return wrong


def _content(content: Any) -> str | None:
    """The text of a message; None where it has anything else."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part["text"] for part in parts if isinstance(part, dict) and part.get("type") == "text"
             and isinstance(part.get("text"), str)]  # fmt: skip
    if not parts or len(texts) < len(parts):
        return None
    try:
        return "".join(texts).encode().decode()
    except UnicodeEncodeError:
        return None


def _prompts(prompt: Any) -> list[Any]:
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def _request(kind: Literal["text", "chat"], said: Mapping[str, Any]) -> Request:
    if kind == "text":
        prompts, most, logprobs = _prompts(said["prompt"]), said["max_tokens"], said["logprobs"]
    else:
        prompts = [[{"role": one["role"], "content": _content(one["content"])} for one in said["messages"]]]
        most = said["max_completion_tokens"] or said["max_tokens"]
        logprobs = said["top_logprobs"] if said["logprobs"] else None
    seed = secrets.randbits(32) if said["seed"] is None else said["seed"]
    numbers = {name: float(said[name]) for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
    stop = said["stop"]
    return Request(
        kind, prompts, most, said["n"], numbers | {"top_k": max(0, said["top_k"]), "seed": seed},
        (stop,) if isinstance(stop, str) else tuple(stop), tuple(said["stop_token_ids"]), said["ignore_eos"],
        said["stream"], bool((said["stream_options"] or {}).get("include_usage")), said.get("echo", False), logprobs,
        said.get("chat_template_kwargs", {}).get("enable_thinking", False),
    )  # fmt: skip
