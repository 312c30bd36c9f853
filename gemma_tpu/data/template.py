"""Whose text is whose in a rendered conversation, found from the chat template's own rendering.

Nothing of a template is re-implemented. The conversation is rendered once more as an outline, in which a short mark
stands for every text of the data: what is left between the marks is the template's alone, so no text that quotes a
turn or a tool call can be taken for one. The outline is cut where a prompt for the next answer would end, where a
stop token closes the answer, and around what tools responded. Then the real rendering must be the outline with the
texts in the places of their marks, to the letter, or the row is refused.

An outline depends on the shape of a conversation and not on its texts: rows of one shape are outlined once.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gemma_tpu.errors import UserError

Messages = list[dict[str, Any]]
Render = Callable[[Messages, bool], str]  # (messages, with the generation prompt?) -> text

ASSISTANT = ("assistant", "model")  # the templates of Gemma accept both names
REASONING = ("reasoning", "reasoning_content")
THOUGHT = ("<|channel>", "<channel|>")  # what opens and closes one, in Gemma 4


@dataclass(frozen=True)
class Words:
    """The special tokens that a rendering is cut at, as the checkpoint names them."""

    special: Mapping[str, int]  # text -> id, of all of them
    stops: Sequence[int]  # what ends a generation
    response: tuple[str, str] | None  # what opens and closes the response of a tool

    def stop_at(self, text: str) -> bool:
        """Does `text` begin with a stop token?"""
        found = self.pattern.match(text)
        return found is not None and self.special[found[0]] in self.stops

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(text) for text in sorted(self.special, key=len, reverse=True)) or r"(?!)")


@dataclass(frozen=True)
class Slot:
    """One text of the data: where it stands in the conversation, and what it is."""

    message: int
    key: str  # content, reasoning, tool_calls or tool_responses
    value: str


@dataclass(frozen=True)
class Atom:
    """A piece of an outline: the template's text, or the number of a slot."""

    text: str
    slot: int | None = None
    owner: int | None = None  # the assistant message that the model speaks here


@dataclass(frozen=True)
class Outline:
    atoms: tuple[Atom, ...]
    inserted: Mapping[int, tuple[int, str]]  # message -> (atom before which, what only the generation prompt has)
    wrong: Mapping[int, str]  # messages that may not be trained, each with the reason
    lost: int  # messages whose reasoning the template leaves out, as Gemma 4's does in earlier turns


# --- the conversation without its texts ---------------------------------------------------------------------------


def normal(messages: Messages) -> Messages:
    """The messages as templates take them: without weights, the arguments of a call as an object."""
    return [
        {key: _calls(value, i, messages) if key == "tool_calls" and value else value
         for key, value in message.items() if key != "weight"}
        for i, message in enumerate(messages)
    ]  # fmt: skip


def _calls(calls: Any, index: int, messages: Messages) -> list[dict[str, Any]]:
    shaped = isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(call.get("function"), dict)
        and isinstance(call["function"].get("name"), str) for call in calls
    )  # fmt: skip
    if not shaped:
        raise UserError(f"{place(messages, index)}: its tool_calls must be a list of "
                        '{"function": {"name": …, "arguments": {…}}}')  # fmt: skip
    found = []
    for call in calls:
        arguments = call["function"].get("arguments")
        if isinstance(arguments, str):  # the form in which OpenAI's API sends them
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise UserError(f"{place(messages, index)}: the arguments of {call['function']['name']} are not "
                                f"JSON: {error}") from error  # fmt: skip
        if not isinstance(arguments, dict | None):
            raise UserError(f"{place(messages, index)}: the arguments of {call['function']['name']} are "
                            f"{type(arguments).__name__}: they must be an object")  # fmt: skip
        found.append(call | {"function": call["function"] | {"arguments": arguments or {}}})
    return found


def hollow(messages: Messages) -> tuple[Messages, list[Slot], str]:
    """The messages with a mark for each text, the texts, and what begins a mark: nothing of the data has it."""
    mark = "[[text"
    everything = json.dumps(messages, default=str, ensure_ascii=False)
    while mark in everything:
        mark += "-"
    slots: list[Slot] = []

    def put(message: int, key: str, value: Any) -> Any:
        if isinstance(value, str):
            slots.append(Slot(message, key, value))
            return f"{mark}{len(slots) - 1}]]"
        if isinstance(value, dict):
            return {name: put(message, key, inner) for name, inner in value.items()}
        return [put(message, key, inner) for inner in value] if isinstance(value, list) else value

    return [_hollow_message(message, i, put) for i, message in enumerate(messages)], slots, mark


def _hollow_message(message: dict[str, Any], i: int, put: Callable[[int, str, Any], Any]) -> dict[str, Any]:
    out = dict(message)
    acts = message.get("tool_calls") or message.get("tool_responses")
    content = message.get("content")
    # Templates ask whether a turn that called a tool has a content too: a blank one must stay blank.
    if isinstance(content, str) and (content.strip() or not acts):
        out["content"] = put(i, "content", content)
    for key in REASONING:
        if isinstance(message.get(key), str) and message[key].strip():
            out[key] = put(i, "reasoning", message[key])
    if message.get("tool_calls"):
        out["tool_calls"] = [
            call | {"function": call["function"] | {
                "name": put(i, "tool_calls", call["function"]["name"]),
                "arguments": put(i, "tool_calls", call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]  # fmt: skip
    if isinstance(message.get("tool_responses"), list):
        out["tool_responses"] = [
            response | {"response": put(i, "tool_responses", response.get("response"))}
            if isinstance(response, dict) else response for response in message["tool_responses"]
        ]  # fmt: skip
    return out


# --- the outline --------------------------------------------------------------------------------------------------


def outline(messages: Messages, slots: Sequence[Slot], mark: str, render: Render, words: Words) -> Outline:
    """Whose text is whose in the rendering of hollow messages; a UserError if that is not certain."""
    literals, numbers = _split(render(messages, False), mark)
    lost = _check_rendered(messages, slots, numbers)
    answers = [i for i, message in enumerate(messages) if message["role"] in ASSISTANT]
    starts = {i: _start(messages, i, literals, numbers, mark, render, words) for i in answers}
    atoms = list(_atoms(literals, numbers, {start[:2] for start in starts.values()}, words))
    numbered = {at: n for n, (_, at) in reversed(list(enumerate(atoms)))}
    begins = {i: numbered.get(start[:2], len(atoms)) for i, start in starts.items()}
    owners: dict[int, int] = {}
    for i in answers:
        after = min((begins[j] for j in answers if j > i), default=len(atoms) + 1)
        owned = _Walk(messages, i, [atom for atom, _ in atoms], slots, words).owned(begins[i], after)
        owners |= dict.fromkeys(owned, i)
    inserted, wrong = {}, {}
    thinks = {slots[number].message for number in numbers if slots[number].key == "reasoning"}
    for i in answers:
        text = starts[i][2]
        if _unfinished(text) and i in lost:
            text = ""  # the thought that the prompt opens is one that the template left out
        inserted[i] = (begins[i], text)
        if reason := _misplaced(text, i in thinks):
            wrong[i] = f"{place(messages, i)}: {reason}"
    placed = tuple(Atom(atom.text, atom.slot, owners.get(n)) for n, (atom, _) in enumerate(atoms))
    return Outline(placed, inserted, wrong, len(lost))


def _split(text: str, mark: str) -> tuple[list[str], list[int]]:
    pieces = re.split(rf"{re.escape(mark)}(\d+)\]\]", text)
    return pieces[::2], [int(number) for number in pieces[1::2]]


def _check_rendered(messages: Messages, slots: Sequence[Slot], numbers: Sequence[int]) -> set[int]:
    """Nothing of the data may be missing but reasoning, which templates leave out of earlier turns: of which."""
    lost = set()
    for number, slot in enumerate(slots):
        count = numbers.count(number)
        answer = messages[slot.message]["role"] in ASSISTANT
        if slot.key == "content" and count != 1 and (answer or (not count and slot.value.strip())):
            raise UserError(f"{place(messages, slot.message)}: the chat template does not render its content exactly "
                            "once")  # fmt: skip
        if slot.key in ("tool_calls", "tool_responses") and not count:
            raise UserError(f"{place(messages, slot.message)}: the chat template does not render its {slot.key}; use a "
                            "template that does, or leave them out of the data")  # fmt: skip
        if slot.key == "reasoning" and not count:
            lost.add(slot.message)
    # Of `reasoning` and `reasoning_content` a template renders one.
    return lost - {slots[number].message for number in numbers if slots[number].key == "reasoning"}


def _start(
    messages: Messages, i: int, literals: Sequence[str], numbers: Sequence[int], mark: str, render: Render,
    words: Words,
) -> tuple[int, int, str]:  # fmt: skip
    """Where the prompt for answer i ends: in which literal, after how many characters; and what of the prompt the
    full rendering lacks there."""
    if i == 0:
        raise UserError(f"{place(messages, i)}: nothing comes before it that it could answer; add a user turn")
    before, seen = _split(render(messages[:i], True), mark)
    at = 0
    if seen:  # the same text may stand twice: the name of a function in its call and in its response
        same = [n for n, number in enumerate(numbers) if number == seen[-1]]
        if len(same) < seen.count(seen[-1]):
            raise UserError(f"{place(messages, i)}: the chat template renders what comes before it in another way "
                            "than in its prompt")  # fmt: skip
        at = same[seen.count(seen[-1]) - 1] + 1
    shared = _shared(before[-1], literals[at], words)
    inserted = before[-1][shared:]
    # A prompt that first closes the turn belongs to another rendering: here the turn goes on.
    return at, shared, "" if words.stop_at(inserted) else inserted


def _shared(a: str, b: str, words: Words) -> int:
    """Length of the common beginning, whole special tokens only."""
    length = common_prefix(a, b)
    for text in (a, b):
        for found in words.pattern.finditer(text):
            if found.start() < length < found.end():
                length = found.start()
    return length


def _atoms(
    literals: Sequence[str], numbers: Sequence[int], cuts: set[tuple[int, int]], words: Words
) -> Iterator[tuple[Atom, tuple[int, int]]]:
    """The outline in pieces, each with its place (literal, character): special tokens alone, cut at `cuts`."""
    for k, literal in enumerate(literals):
        borders = {0, len(literal)} | {at for which, at in cuts if which == k}
        borders |= {edge for found in words.pattern.finditer(literal) for edge in found.span()}
        ordered = sorted(borders)
        for start, end in zip(ordered, ordered[1:], strict=False):
            yield Atom(literal[start:end]), (k, start)
        if k < len(numbers):
            yield Atom("", numbers[k]), (k, len(literal))


class _Walk:
    """From the end of a prompt over the answer: what the model speaks, up to its stop token."""

    def __init__(self, messages: Messages, i: int, atoms: Sequence[Atom], slots: Sequence[Slot], words: Words):
        self.messages, self.i, self.atoms, self.slots, self.words = messages, i, atoms, slots, words
        self.where = place(messages, i)
        own = {n: slots[a.slot].key for n, a in enumerate(atoms) if a.slot is not None and slots[a.slot].message == i}
        self.last, self.contents = max(own, default=-1), [n for n, key in own.items() if key == "content"]
        self.found: list[int] = []
        self.pending: list[int] = []  # the template's words, the model's only if more of its turn follows

    def owned(self, start: int, after: int) -> list[int]:
        """Numbers of the atoms of the answer that begins at `start`; the next answer begins at `after`."""
        opens, closes = self.words.response or (None, None)
        if not all(start <= n < after for n in self.contents):
            raise UserError("the chat template does not render the answers one after the other")
        inside, last = False, ""  # inside a tool's response; the key of the last text
        for n in range(start, min(after, len(self.atoms))):
            atom = self.atoms[n]
            special = self.words.special.get(atom.text) if atom.slot is None else None
            if inside:
                inside = atom.text != closes or atom.slot is not None
                last = "" if inside else "response"
            elif special in self.words.stops and (atom.text != opens or last != "response"):
                self._take(n)  # of several responses in a row the model asks for the first alone
                if atom.text != opens:
                    return self.found
                inside = True
            elif special is not None and atom.text == opens:
                self._take()
                inside = True
            elif atom.slot is None:
                if last == "content" and n > self.last:
                    self._refuse_end(n)
                self.pending.append(n)
            elif self.slots[atom.slot].message == self.i:
                last = self._speak(n, self.slots[atom.slot].key, last)
            elif last == "response":  # the turn was over: these words open the next one
                return self.found
            else:
                self._refuse_end(self.pending[0] if self.pending else n)
        goes_on = after <= len(self.atoms) and last == "content"  # the next message, in the same turn
        if not (inside or last == "response" or goes_on):
            self._refuse_end(self.pending[0] if self.pending else len(self.atoms))
        return self.found

    def _speak(self, n: int, key: str, last: str) -> str:
        explained = last or self.messages[self.i].get("tool_calls")
        if key == "content" and self.pending and (not explained or last == "response"):
            text = "".join(self.atoms[at].text for at in self.pending)
            raise UserError(
                f"{self.where}: the chat template writes {short(text)} before the answer, which the generation "
                "prompt lacks: the model would learn to answer a prompt that serving never sends; use a template whose "
                "generation prompt ends where the answer begins"
            )
        self._take(n)
        return key

    def _take(self, *more: int) -> None:
        self.found += [*self.pending, *more]
        self.pending = []

    def _refuse_end(self, n: int) -> None:
        after = "".join(atom.text or "…" for atom in self.atoms[n:])
        named = {number: text for text, number in self.words.special.items()}
        stops = ", ".join(f"{named.get(number, '?')} ({number})" for number in self.words.stops)
        raise UserError(
            f"{self.where}: the chat template closes it with {short(after)}, which does not begin with a stop token "
            f"({stops or 'none known'}): the model would never learn to stop; put the id of the end-of-turn token into "
            "eos_token_id of the checkpoint's generation_config.json"
        )


def _unfinished(text: str) -> bool:
    opens, closes = THOUGHT
    return text.count(opens) > text.count(closes)


def _misplaced(inserted: str, thinks: bool) -> str | None:
    """What only the prompt has may stand before an answer, but not in the middle of a thought."""
    if inserted and thinks:
        return (f"it has reasoning, and with thinking off the generation prompt goes on with {short(inserted)}: turn "
                "thinking on, or leave the reasoning out")  # fmt: skip
    if _unfinished(inserted):
        return (f"with thinking on the generation prompt opens a thought ({short(inserted)}), and this answer has no "
                "reasoning: give it one, or turn thinking off")  # fmt: skip
    return None


# --- the outline and the real text --------------------------------------------------------------------------------


def fill(found: Outline, slots: Sequence[Slot], text: str, messages: Messages) -> list[str]:
    """What each atom is in `text`, the real rendering; a UserError where the template changed a text of the data."""
    texts, at = [], 0
    for n, atom in enumerate(found.atoms):
        if atom.slot is None:
            here = atom.text if text.startswith(atom.text, at) else None
        else:
            value = slots[atom.slot].value
            after = found.atoms[n + 1].text if n + 1 < len(found.atoms) else ""
            options = (value, value.strip())  # templates trim
            here = next((option for option in options if text.startswith(option + after, at)), None)
        if here is None:
            raise _rewritten(found, n, slots, text[at:], messages)
        texts.append(here)
        at += len(here)
    if at != len(text):
        raise _rewritten(found, len(texts), slots, text[at:], messages)
    return texts


def _rewritten(found: Outline, n: int, slots: Sequence[Slot], text: str, messages: Messages) -> UserError:
    number = next((atom.slot for atom in found.atoms[n::-1] if atom.slot is not None), 0)
    slot = slots[number]
    hint = " (a thought in it belongs into the message's `reasoning`)" if THOUGHT[0] in slot.value else ""
    return UserError(
        f"{place(messages, slot.message)}: its {slot.key} {short(slot.value)} is not what the chat template renders, "
        f"which is {short(text)}: the template rewrites it; change the data to what the template leaves alone{hint}"
    )


def place(messages: Messages, i: int) -> str:
    role = messages[i]["role"]
    name = "assistant turn" if role in ASSISTANT else f"{role} turn"
    return f"{name} {i + 1} of {len(messages)}"


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def short(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
