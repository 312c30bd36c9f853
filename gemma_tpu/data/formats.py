"""What a row of data looks like in the formats that people have, and how each becomes a conversation.

messages    {"messages": [{"role", "content", "tool_calls", "weight", ...}]}, optionally "tools"
sharegpt    {"conversations": [{"from": "human", "value": ...}]}
prompt      {"prompt": ..., "response" or "completion": ..., "system": ...}
alpaca      {"instruction": ..., "input": ..., "output": ...}
text        {"text": ...}: every token is trained
trajectory  one message a line: the file is one row
preference  {"chosen": ..., "rejected": ..., "prompt": ...}

Everything here is a function of one record. What a record has and no format reads is counted in `said`; a record
that cannot be read raises RowFault.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_tpu.data.turns import Message, RowDropped, RowFault, as_json, from_share, read_turns, text_of
from gemma_tpu.errors import UserError

__all__ = ["Conversation", "Message", "Preference", "RowDropped", "RowFault", "Text", "detect", "read"]

TURNS = ("messages", "trajectory", "conversations", "conversation")  # columns that hold a list of turns
RESPONSES = ("response", "completion")
USED = {
    "messages": {*TURNS, "tools"},
    "sharegpt": {"conversations", "conversation", "system", "tools"},
    "prompt": {"system", "prompt", "tools", *RESPONSES},
    "alpaca": {"system", "history", "instruction", "input", "output"},
    "text": {"text"},
    "trajectory": {"messages", "tools"},
    "preference": {"prompt", "chosen", "rejected", "system", "tools"},
}
COLUMNS = sorted(set().union(*USED.values()))  # what data.columns can give


Record = dict[str, Any]
Tool = dict[str, Any]  # a declaration of a function, as chat templates read it


@dataclass(frozen=True)
class Conversation:
    """Turns for the chat template. Roles: system, user, assistant, tool."""

    messages: list[Message]
    tools: list[Tool] | None = None


@dataclass(frozen=True)
class Text:
    """A document that is trained whole."""

    text: str


@dataclass(frozen=True)
class Preference:
    """The same conversation with two ends."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[Tool] | None = None


Parsed = Conversation | Text | Preference


def detect(record: Mapping[str, Any]) -> str:
    """The format of a record by its columns; RowFault where none fits."""
    for column in TURNS:
        if column in record:
            turns = _maybe_json(record[column])
            first = turns[0] if isinstance(turns, list) and turns else {}
            return "sharegpt" if isinstance(first, dict) and "from" in first and "role" not in first else "messages"
    if "chosen" in record and "rejected" in record:
        return "preference"
    if "instruction" in record and "output" in record:
        return "alpaca"
    if "prompt" in record:
        return "prompt"
    if "text" in record:
        return "text"
    if is_turn(record):
        return "trajectory"
    keys = ", ".join(map(str, record)) or "none"
    raise RowFault("wrong_format", "needs messages, conversations, prompt with response or completion, instruction "
                                   f"with output, chosen with rejected, or text; has {keys}")  # fmt: skip


def is_turn(record: object) -> bool:
    """Whether this is one message by itself, plain or in the envelope that agents log."""
    if not isinstance(record, Mapping):
        return False
    inner = record.get("message")
    return ("role" in record and ("content" in record or "tool_calls" in record)) or (
        isinstance(inner, Mapping) and "role" in inner
    )


def check_columns(columns: Mapping[str, str]) -> None:
    wrong = [name for name in columns if name not in COLUMNS]
    if wrong:
        raise UserError(f"data.columns gives {', '.join(wrong)}, which no format reads; the columns that formats read: "
                        f"{', '.join(COLUMNS)}")  # fmt: skip


def rename(record: dict[str, Any], columns: Mapping[str, str], said: Counter[str]) -> dict[str, Any]:
    """The record with its columns under our names; one that has such a name without being meant is not used."""
    ours = {name: our for our, name in columns.items() if name in record}
    for taken in sorted(record.keys() & set(ours.values()) - ours.keys()):
        said[f"column {taken!r} not used, rows"] += 1
    return {ours.get(name, name): value for name, value in record.items()
            if name in ours or name not in ours.values()}  # fmt: skip


def read(record: dict[str, Any], form: str, said: Counter[str]) -> Parsed:
    """The record as `form` has it."""
    for column in sorted(record.keys() - USED[form], key=str):
        if record[column] is not None:
            said[f"column {column!r} not used, rows"] += 1
    if form == "text":
        return Text(text_of(_column(record, "text"), "'text'"))
    if form == "preference":
        return _preference(record, said)
    tools = _tools(record.get("tools"))
    if form in ("messages", "trajectory"):
        return Conversation(read_turns(_turns(record, TURNS), said), tools)
    if form == "sharegpt":
        return _sharegpt(record, tools, said)
    return _pairs(record, form, tools, said)


def _sharegpt(record: Record, tools: list[Tool] | None, said: Counter[str]) -> Conversation:
    turns = _turns(record, ("conversations", "conversation"))
    system = [_turn("system", record["system"], "'system'")] if record.get("system") else []
    return Conversation(system + read_turns(from_share(turns, said), said), tools)


def _pairs(record: Record, form: str, tools: list[Tool] | None, said: Counter[str]) -> Conversation:
    """Columns: one question and its answer, with Alpaca's earlier pairs where there are any."""
    messages = [_turn("system", record["system"], "'system'")] if record.get("system") is not None else []
    if form == "alpaca":
        history = record.get("history") or []
        for pair in history if isinstance(history, list | tuple) else [history]:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise RowFault("wrong_format", "'history' is not a list of [question, answer]")
            messages += [_turn("user", pair[0], "'history'"), _turn("assistant", pair[1], "'history'")]
        question = text_of(_column(record, "instruction"), "'instruction'")
        extra = text_of(record["input"], "'input'") if record.get("input") is not None else ""
        messages.append({"role": "user", "content": f"{question}\n\n{extra}" if extra.strip() else question})
        return Conversation([*messages, _turn("assistant", _column(record, "output"), "'output'")], tools)
    answers = [name for name in RESPONSES if record.get(name) is not None]
    if record.get("prompt") is None or len(answers) != 1:
        raise RowFault("wrong_format", f"needs 'prompt' and one of 'response', 'completion'; has {', '.join(record)}")
    for column, role in (("prompt", "user"), (answers[0], "assistant")):
        messages += _side(record[column], role, column, said)
    return Conversation(messages, tools)


def _preference(record: Record, said: Counter[str]) -> Preference:
    system = [_turn("system", record["system"], "'system'")] if record.get("system") is not None else []
    given = record.get("prompt")
    prompt = [] if given is None else _side(given, "user", "prompt", said)
    chosen, rejected = (_side(_column(record, name), "assistant", name, said) for name in ("chosen", "rejected"))
    shared = 0
    if not prompt:  # both sides hold the whole conversation: what they share is the prompt
        shortest = min(len(chosen), len(rejected)) - 1
        while shared < shortest and chosen[shared] == rejected[shared]:
            shared += 1
        prompt = chosen[:shared]
    chosen, rejected = chosen[shared:], rejected[shared:]
    if not prompt:
        raise RowFault("wrong_format", "no prompt: neither a column 'prompt' nor turns that both answers begin with")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side or side[-1]["role"] != "assistant":
            raise RowFault("wrong_role", f"{name!r} does not end with an assistant turn")
        if not any(message["content"].strip() or message.get("tool_calls") for message in side):
            raise RowFault("empty", f"{name!r} is empty")
    if chosen == rejected:
        raise RowFault("no_difference", "'chosen' and 'rejected' are the same")
    return Preference(system + prompt, chosen, rejected, _tools(record.get("tools")))


def _side(value: object, role: str, column: str, said: Counter[str]) -> list[Message]:
    """A column that holds either one turn's text or a list of turns."""
    if isinstance(value, list) and value and all(is_turn(turn) for turn in value):
        return read_turns(value, said)
    return [_turn(role, value, repr(column))]


def _turn(role: str, value: object, what: str) -> Message:
    return {"role": role, "content": text_of(value, what)}


def _turns(record: Record, columns: tuple[str, ...]) -> list[Any]:
    found = next((column for column in columns if record.get(column) is not None), columns[0])
    turns = _maybe_json(record.get(found))
    if not isinstance(turns, list):
        raise RowFault("wrong_format", f"{found!r} is missing or not a list")
    return turns


def _tools(value: object) -> list[Tool] | None:
    """Declarations of functions, as a list or as its JSON text (Parquet has no free-form columns)."""
    tools = _maybe_json(value)
    if tools is None or tools == [] or tools == "":
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowFault("wrong_tools", "'tools' is not a list of function declarations")
    functions = [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools]
    if not all(isinstance(function.get("name"), str) for function in functions):
        raise RowFault("wrong_tools", "a declaration in 'tools' has no name")
    # Templates write the description of every tool, and fail without one.
    return [{"type": "function", "function": {"description": "", **function}} for function in functions]


def _maybe_json(value: object) -> object:
    """CSV and many Parquet files keep lists as JSON text."""
    return as_json(value, "a column") if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value


def _column(record: Record, name: str) -> object:
    if record.get(name) is None:
        raise RowFault("wrong_format", f"{name!r} is missing; has {', '.join(record) or 'nothing'}")
    return record[name]
