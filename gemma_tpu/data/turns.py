"""The turns of one conversation, from the shapes that people log into the one that chat templates read.

That is OpenAI's: role and content, `tool_calls` with arguments as an object, results as turns of the role tool. Also
read: content in parts, tool calls and results as content parts (Anthropic's shape, which agents log), ShareGPT's
from and value. Nothing that would be rendered is left out unseen: what is not read is counted or refused.
"""

import json
from collections import Counter
from typing import Any

from gemma_tpu import plain

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {
    "developer": "system", "human": "user", "model": "assistant", "gpt": "assistant", "function": "tool",
}  # fmt: skip
SHARE = ROLES | {"bot": "assistant", "chatgpt": "assistant", "observation": "tool", "function_call": "function_call"}
READ = {"role", "content", "weight", "tool_calls", "tool_call_id", "name", "reasoning", "reasoning_content"}
PLAIN = ("text", "input_text", "output_text")  # no set: a type from a file need not hash

Message = dict[str, Any]


class RowFault(Exception):
    """One row cannot be used. `reason` is the key that it is counted under, the text says what is wrong."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class RowDropped(RowFault):
    """The row is well formed, and a rule of the user's own leaves it out: never fatal, always counted."""


def read_turns(turns: list[Any], said: Counter[str]) -> list[Message]:
    """The messages of a conversation; a result of a tool stands after the call that it answers."""
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        messages += _read_turn(turn, f"message {index}", said)
    calls: dict[str, str] = {}
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            calls = {call.get("id", ""): call["function"]["name"] for call in message.get("tool_calls", [])}
        elif message["role"] != "tool":
            calls = {}
        elif not calls:  # templates render results with the calls before them, and this one not at all
            raise RowFault("orphan_tool_result", f"message {index} is a result of a tool, and no call stands before it")
        else:
            named = calls.get(message.get("tool_call_id", ""))
            message.setdefault("name", named or next(iter(calls.values())))
    return messages


def from_share(turns: list[Any], said: Counter[str]) -> list[Message]:
    """ShareGPT's turns as messages; both namings may be mixed."""
    found: list[Message] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or not ({"from", "role"} & turn.keys()):
            raise RowFault("wrong_format", f'turn {index} is not {{"from": …, "value": …}}')
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role not in SHARE:
            raise RowFault("wrong_role", f"turn {index} is from {role!r}, not one of {', '.join(SHARE)}")
        value = turn.get("value", turn.get("content"))
        message = {key: turn[key] for key in turn.keys() - {"from", "value", "role", "content"}}
        if SHARE[role] == "function_call":
            call = as_json(value, f"turn {index}") if isinstance(value, str) else value
            found.append(message | {"role": "assistant", "content": "",
                                    "tool_calls": call if isinstance(call, list) else [call]})  # fmt: skip
        else:
            found.append(message | {"role": SHARE[role], "content": value})
    return found


def text_of(content: object, what: str) -> str:
    """A string, or a list of parts that are all text (the shape that multimodal datasets use)."""
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") in PLAIN for p in content):
        parts = [p.get("text") for p in content]
        content = "".join(parts) if all(isinstance(p, str) for p in parts) else content
    if isinstance(content, list):
        kinds = {str(p.get("type")) if isinstance(p, dict) else type(p).__name__ for p in content}
        raise RowFault("not_text", f"the content of {what} has parts that are not text ({', '.join(sorted(kinds))})")
    if not isinstance(content, str):
        raise RowFault("wrong_format", f"the content of {what} is not text ({type(content).__name__})")
    if not _encodes(content):  # JSON can spell half a surrogate pair, and no tokenizer can encode it
        raise RowFault("not_UTF-8", f"the content of {what} holds half a surrogate pair")
    return content


def as_json(text: str, what: str) -> Any:
    try:
        found = json.loads(text)
        for _ in plain.levels(found):
            pass
    except RecursionError:
        raise RowFault("not_JSON", f"{what} is not JSON: nested too deep") from None
    except (ValueError, TypeError) as error:
        raise RowFault("not_JSON", f"{what} is not JSON: {error}") from None
    return found


def _read_turn(turn: object, what: str, said: Counter[str]) -> list[Message]:
    if isinstance(turn, dict) and "role" not in turn and isinstance(turn.get("message"), dict):
        turn = turn["message"]  # the envelope of an agent's log
    if not isinstance(turn, dict) or "role" not in turn or not {"content", "tool_calls"} & turn.keys():
        raise RowFault("wrong_format", f'{what} is not {{"role": …, "content": …}}')
    turn = {key: value for key, value in turn.items() if value is not None}  # Parquet fills missing keys with nulls
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RowFault("wrong_role", f"{what} has role {role!r}, not one of {', '.join(ROLES)}")
    for key in sorted(turn.keys() - READ, key=str):
        said[f"message key {key!r} not used, messages"] += 1
    message: Message = {"role": ROLES[role]}
    content = turn.get("content", "")
    if isinstance(content, list) and any(isinstance(p, dict) and p.get("type") not in PLAIN for p in content):
        return _parts(message | _extras(turn, message["role"], what, said), content, what)
    if message["role"] == "tool" and isinstance(content, dict):
        _check_encodes(content, what)
        message["content"] = content
    else:
        message["content"] = text_of(content, what)
    return [message | _extras(turn, message["role"], what, said)]


def _extras(turn: dict[Any, Any], role: str, what: str, said: Counter[str]) -> Message:
    """All but role and content."""
    extras: Message = {}
    if "weight" in turn:
        weight = turn["weight"]
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            raise RowFault("wrong_weight", f"{what} has weight {weight!r}: it must be 0 (not trained) or 1")
        if role == "assistant":
            extras["weight"] = int(weight)
        else:
            said[f"weight of a {role} message not used, messages"] += 1
    for key in ("reasoning", "reasoning_content"):
        if turn.get(key):
            extras["reasoning_content"] = text_of(turn[key], f"{what}'s {key}")
    if turn.get("tool_calls"):
        if role != "assistant":
            raise RowFault("wrong_tool_call", f"{what} has tool calls and the role {role}, not assistant")
        extras["tool_calls"] = [_call(call, what) for call in _list(turn["tool_calls"], what)]
    if role == "tool":
        for key in ("tool_call_id", "name"):
            if turn.get(key):
                extras[key] = text_of(turn[key], f"{what}'s {key}")
    elif "name" in turn:
        said["message key 'name' not used, messages"] += 1
    return extras


def _parts(message: Message, parts: list[Any], what: str) -> list[Message]:
    """Content in parts, with calls and results among them. Results go before the text of a turn: they answer the
    call in the turn before it."""
    texts, calls, thoughts, results = [], [], [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in PLAIN:
            texts.append(part)
        elif kind == "tool_use":
            calls.append(_call({"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")}, what))
        elif kind == "thinking":
            thoughts.append(text_of(part.get("thinking"), f"{what}'s thinking"))
        elif kind == "tool_result":
            found = text_of(part.get("content") or "", f"{what}'s tool result")
            results.append({"role": "tool", "content": found, "tool_call_id": str(part.get("tool_use_id"))})
        else:
            raise RowFault("not_text", f"{what} has a part of type {kind!r}: only text, calls and results are trained")
    content = text_of(texts, what)
    if (calls and message["role"] != "assistant") or (results and message["role"] not in ("user", "tool")):
        raise RowFault("wrong_role", f"{what} has the role {message['role']}, which makes no such tool part")
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return results if results and not content.strip() else [*results, message | {"content": content}]


def _call(call: object, what: str) -> dict[str, Any]:
    """One call with its arguments as an object: as text, templates would write JSON inside their own markers."""
    outer = call if isinstance(call, dict) else {}
    inner = outer.get("function", call)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise RowFault("wrong_tool_call", f"{what} has a tool call without a name")
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        arguments = as_json(arguments, f"{what}: the arguments of {inner['name']}") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowFault("wrong_tool_call", f"{what}: the arguments of {inner['name']} are not an object")
    _check_encodes([inner["name"], arguments], what)
    found: dict[str, Any] = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
    return found | ({"id": str(outer["id"])} if outer.get("id") else {})


def _list(value: object, what: str) -> list[Any]:
    value = as_json(value, what) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise RowFault("wrong_tool_call", f"{what}: tool_calls is not a list")
    return value


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_encodes(value: object, what: str) -> None:
    if not _encodes(json.dumps(value, ensure_ascii=False)):
        raise RowFault("not_UTF-8", f"{what} holds half a surrogate pair")
