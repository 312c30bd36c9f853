"""The fields of an OpenAI request, each with its default and its rule. What is not here is refused by its name.

A field that this server cannot honour is accepted only with the value that asks for nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_STOP_STRINGS = 16
MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Field:
    default: Any
    good: Callable[[Any], bool]
    rule: str


def _whole(least: int, most: float = math.inf) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and least <= x <= most


def _number(least: float, most: float = math.inf, *, above: bool = False) -> Callable[[Any], bool]:
    def good(x: Any) -> bool:
        if not isinstance(x, int | float) or isinstance(x, bool) or abs(x) > 1e30 or x != x:
            return False
        return (least < x if above else least <= x) and x <= most

    return good


def _flag(x: Any) -> bool:
    return isinstance(x, bool)


def _text(x: Any) -> bool:
    return isinstance(x, str) and _encodes(x)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can write and UTF-8 cannot
        return False
    return True


def _stop(x: Any) -> bool:
    texts = [x] if isinstance(x, str) else x
    return isinstance(texts, list) and len(texts) <= MOST_STOP_STRINGS and all(_text(one) and one for one in texts)


def _ids(most: int) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, list) and len(x) <= most and all(_whole(0, 2**31 - 1)(one) for one in x)


def _stream_options(x: Any) -> bool:
    return isinstance(x, dict) and set(x) <= {"include_usage"} and all(map(_flag, x.values()))


def _template_options(x: Any) -> bool:
    return isinstance(x, dict) and set(x) <= {"enable_thinking"} and all(map(_flag, x.values()))


def _prompt(x: Any) -> bool:
    one = [x] if isinstance(x, str) or _tokens(x) else x
    return isinstance(one, list) and bool(one) and (all(map(_text, one)) or all(map(_tokens, one)))


def _tokens(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and all(_whole(0)(one) for one in x)


def _messages(x: Any) -> bool:
    return isinstance(x, list) and bool(x)


COMMON = {
    "model": Field(None, _text, "a string, one of /v1/models"),
    "n": Field(1, _whole(1), "an integer of at least 1"),
    "temperature": Field(1.0, _number(0), "a number of at least 0 (0: greedy)"),
    "top_p": Field(1.0, _number(0, 1, above=True), "a number above 0 and at most 1"),
    "top_k": Field(0, _whole(-1), "an integer of at least 1; 0 or -1 for all tokens"),
    "min_p": Field(0.0, _number(0, 1), "a number from 0 to 1"),
    "repetition_penalty": Field(1.0, _number(0, above=True), "a number above 0 (1: none)"),
    "seed": Field(None, _whole(0, 2**63 - 1), "an integer from 0 to 9223372036854775807"),
    "stop": Field((), _stop, f"a string that is not empty, or a list of at most {MOST_STOP_STRINGS} of them"),
    "stop_token_ids": Field((), _ids(8), "a list of at most 8 token ids"),
    "ignore_eos": Field(False, _flag, "true or false"),
    "stream": Field(False, _flag, "true or false"),
    "stream_options": Field(None, _stream_options, 'an object with no key but "include_usage": true or false'),
    "user": Field("", _text, "a string (it names who asks, and changes nothing)"),
}  # fmt: skip
TEXT = COMMON | {
    "prompt": Field(None, _prompt, "a string, a list of strings, a list of token ids, or a list of such lists"),
    "max_tokens": Field(16, _whole(0), "an integer of at least 0 (0 only with echo)"),
    "logprobs": Field(None, _whole(0, MOST_LOGPROBS), f"an integer from 0 to {MOST_LOGPROBS}"),
    "echo": Field(False, _flag, "true or false"),
}  # fmt: skip
CHAT = COMMON | {
    "messages": Field(None, _messages, "a list of at least one message"),
    "max_tokens": Field(None, _whole(1), "an integer of at least 1"),
    "max_completion_tokens": Field(None, _whole(1), "an integer of at least 1"),
    "logprobs": Field(False, _flag, "true or false"),
    "top_logprobs": Field(0, _whole(0, MOST_LOGPROBS), f"an integer from 0 to {MOST_LOGPROBS}"),
    "chat_template_kwargs": Field({}, _template_options, 'an object with no key but "enable_thinking": true or false'),
}  # fmt: skip

# Known to OpenAI or vLLM and not to this server: the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "suffix": ("",), "tools": ([],),
    "tool_choice": ("none",), "parallel_tool_calls": (True, False), "functions": ([],), "function_call": ("none",),
    "response_format": ({"type": "text"},), "min_tokens": (0,), "prompt_logprobs": (), "best_of": (1,),
    "use_beam_search": (False,), "length_penalty": (1,), "reasoning_effort": ("none",), "modalities": (["text"],),
    "store": (False,), "metadata": ({},), "service_tier": ("auto", "default"),
    "add_generation_prompt": (True,), "skip_special_tokens": (False,), "include_stop_str_in_output": (False,),
}  # fmt: skip


def read(body: Mapping[str, Any], fields: Mapping[str, Field]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """(every field with its value or its default, what is wrong: (field, words)). null is a field left out."""
    given = {name: value for name, value in body.items() if value is not None}
    wrong = []
    for name, value in given.items():
        if name in fields:
            if not fields[name].good(value):
                wrong.append((name, f"{name} is {shown(value)}: it must be {fields[name].rule}"))
        elif name in NEUTRAL:
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in NEUTRAL[name]):
                wrong.append((name, f"{name} is {shown(value)}: this server has no {name}; leave it out"))
        else:
            wrong.append((name, f"{shown(name)} is no field that is known here; known are {', '.join(sorted(fields))}"))
    return {name: given.get(name, field.default) for name, field in fields.items()}, wrong


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
