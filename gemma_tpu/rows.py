"""Reading a dataset: JSONL lines become lists of chat messages, and no line that does not goes missing.

A malformed line (not JSON, not UTF-8, a wrong role or shape) is refused: all of them are gathered and named
as file:line in one error. A line that is well formed and holds nothing to train on is dropped and counted.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemma_tpu.assets import resolve
from gemma_tpu.errors import UserError

FORMATS = ("auto", "messages", "prompt")
TRANSFORMS = (None, "codev_r1")
RESPONSES = ("response", "completion")
ROLES = {r: r for r in ("system", "user", "assistant")} | {"developer": "system", "model": "assistant"}
SHOWN = 5  # places named for each reason; a million bad lines must not be a million lines of report

Message = dict[str, str]


class RowFault(Exception):
    """One line cannot be used. `reason` is the key that it is counted under, the text says what is wrong."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class RowDropped(RowFault):
    """The line is well formed and has no content: it is left out and counted, the rest of the data stands."""


@dataclass
class Tally:
    """How often each reason occurred, and where first."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] += 1
        if self.counts[reason] <= SHOWN:
            self.places.setdefault(reason, []).append(place)

    def total(self) -> int:
        return self.counts.total()

    def where(self, reason: str) -> str:
        """`a.jsonl:3, a.jsonl:9 and 12 more`."""
        shown = self.places[reason]
        more = self.counts[reason] - len(shown)
        return ", ".join(shown) + (f" and {more:,} more" if more else "")


@dataclass(frozen=True)
class Row:
    """One usable line: its messages (roles system, user, assistant only) and the place it came from."""

    messages: list[Message]
    file: int
    line: int


class Reader:
    """Iterates the rows of some files, first to last, and keeps account of everything that is not a row."""

    def __init__(self, paths: list[Path], format: str, transform: str | None, limit: int | None = None):
        self.paths, self.format, self.transform, self.limit = paths, format, transform, limit
        self.rows = 0
        self.dropped, self.refused = Tally(), Tally()
        self._forms: Counter[str] = Counter()
        self._said: Counter[str] = Counter()
        _check_choice("data.format", format, FORMATS)
        _check_choice("data.transform", transform, TRANSFORMS)
        if limit is not None and limit < 1:
            raise UserError(f"data.limit is {limit}: it must be at least 1, or absent to read every row")
        _check_files(paths)

    def __iter__(self) -> Iterator[Row]:
        forms: dict[int, str] = {}
        for file, line, raw in self._lines():
            try:
                record = _parse(raw)
                form = forms.get(file) or (_detect(record) if self.format == "auto" else self.format)
                forms[file] = form
                self._forms[form] += 1
                messages = self._messages(record, form)
            except RowDropped as fault:
                self.dropped.add(fault.reason, self.place(file, line))
            except RowFault as fault:
                self.refuse(fault.reason, file, line, str(fault))
            else:
                if not self.refused.counts:  # after a refusal only the search for further offenders goes on
                    yield Row(messages, file, line)

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        for file, path in enumerate(self.paths):
            with path.open("rb") as stream:  # bytes: a bad encoding must be nameable by its line
                for line, raw in enumerate(stream, start=1):
                    if self.rows == self.limit:
                        return
                    if not raw.strip():
                        self._said["blank lines skipped"] += 1
                        continue
                    self.rows += 1
                    yield file, line, raw

    def place(self, file: int, line: int) -> str:
        return f"{self.paths[file].name}:{line}"

    def refuse(self, reason: str, file: int, line: int, detail: str) -> None:
        self.refused.add(reason, f"  {self.paths[file]}:{line}: {detail}")

    def raise_refused(self) -> None:
        """One error for every malformed line of every file."""
        if not self.refused.counts:
            return
        total = self.refused.total()
        parts = [f"{total:,} of {self.rows:,} rows cannot be used; correct or remove these lines:"]
        for reason, count in self.refused.counts.most_common():
            places = self.refused.places[reason]
            parts += [f"{reason.replace('_', ' ')} ({count:,}):", *places]
            if count > len(places):
                parts.append(f"  … and {count - len(places):,} more")
        raise UserError("\n".join(parts))

    @property
    def formats(self) -> str:
        """`messages (detected)`, for the report."""
        names = " and ".join(self._forms) or "no rows"
        return f"{names} (detected)" if self.format == "auto" else names

    def notes(self) -> list[str]:
        """What was read and not used, with counts."""
        return [f"{what}: {count:,}" for what, count in self._said.items()]

    def _messages(self, record: dict, form: str) -> list[Message]:
        used = ("messages",) if form == "messages" else ("system", "prompt", *RESPONSES)
        for column in record.keys() - set(used):
            self._said[f"column {column!r} not used, rows"] += 1
        raw = _turns(record) if form == "messages" else _columns(record)
        messages = [self._message(turn, index) for index, turn in enumerate(raw)]
        spoken = [m for m in messages if m["role"] != "system" or m["content"].strip()]
        self._count("blank system turns left out", len(messages) - len(spoken))
        if self.transform == "codev_r1":
            answered = codev_r1(spoken)
            self._count("system turns left out by data.transform=codev_r1", len(spoken) - len(answered))
            spoken = answered
        for message in spoken:
            if not message["content"].strip():
                raise RowDropped("empty", f"a {message['role']} turn without text")
        if not spoken:
            raise RowDropped("empty", "no messages")
        return spoken

    def _message(self, turn: object, index: int) -> Message:
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            raise RowFault("wrong_format", f'message {index} is not {{"role": …, "content": …}}')
        if not isinstance(turn["role"], str) or turn["role"] not in ROLES:
            known = ", ".join(ROLES)
            raise RowFault("wrong_role", f"message {index} has role {turn['role']!r}, not one of {known}")
        for key in turn.keys() - {"role", "content"}:
            self._said[f"message key {key!r} not used, messages"] += 1
        return {"role": ROLES[turn["role"]], "content": _text(turn["content"], f"message {index}")}

    def _count(self, what: str, number: int) -> None:
        if number:
            self._said[what] += number


def paths_of(path: str | Sequence[str]) -> list[Path]:
    """data.path, one file or a list of them."""
    return [resolve(p) for p in ([path] if isinstance(path, str) else path)]


THINK = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
FENCE = re.compile(r"```([\w+-]*)[ \t]*\r?\n.*?```", re.DOTALL)
VERILOG = ("", "v", "sv", "verilog", "systemverilog")  # what stands behind the fence; often nothing does


def codev_r1(messages: list[Message]) -> list[Message]:
    """CodeV-R1 rows as the paper trains on them: user and assistant turns, answers without reasoning."""
    turns = [m for m in messages if m["role"] != "system"]
    return [{**m, "content": codev_answer(m["content"])} if m["role"] == "assistant" else m for m in turns]


def codev_answer(text: str) -> str:
    """The last complete <answer> block after the reasoning, else the last complete Verilog fence."""
    # Where the generation prompt took the opening tag along, all before a stray </think> is reasoning too.
    said = THINK.sub("", text).rpartition("</think>")[2]
    fences = [m.group() for m in FENCE.finditer(said) if m.group(1).lower() in VERILOG]
    found = ANSWER.findall(said) or fences
    if not found:
        raise RowDropped("no_answer", "no complete <answer> block and no Verilog fence after the reasoning")
    return found[-1].strip()


def _parse(raw: bytes) -> dict:
    try:
        record = json.loads(raw.rstrip().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RowFault("not_UTF-8", f"byte {error.start} of the line is 0x{raw[error.start]:02x}") from None
    except json.JSONDecodeError as error:
        hint = "; a file holds one JSON object a line, not one array" if raw.lstrip()[:1] == b"[" else ""
        raise RowFault("not_JSON", f"column {error.colno}: {error.msg}{hint}") from None
    if not isinstance(record, dict):
        raise RowFault("not_JSON", f"the line is a JSON {type(record).__name__}, not an object")
    return record


def _detect(record: dict) -> str:
    if "messages" in record:
        return "messages"
    if "prompt" in record:
        return "prompt"
    keys = ", ".join(record) or "none"
    raise RowFault("wrong_format", f"needs 'messages', or 'prompt' with a response or completion; has {keys}")


def _turns(record: dict) -> list:
    turns = record.get("messages")
    if not isinstance(turns, list):
        raise RowFault("wrong_format", "'messages' is missing or not a list")
    return turns


def _columns(record: dict) -> list[Message]:
    answers = [name for name in RESPONSES if name in record]
    if "prompt" not in record or len(answers) != 1:
        keys = ", ".join(record)
        raise RowFault("wrong_format", f"needs 'prompt' and one of 'response', 'completion'; has {keys}")
    turns = [("system", "system")] if record.get("system") is not None else []
    turns += [("prompt", "user"), (answers[0], "assistant")]
    return [{"role": role, "content": _text(record[column], repr(column))} for column, role in turns]


def _text(content: object, what: str) -> str:
    """A string, or a list of parts that are all text (the shape that multimodal datasets use)."""
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        parts = [p.get("text") for p in content]
        content = "".join(parts) if all(isinstance(p, str) for p in parts) else content
    if not isinstance(content, str):
        raise RowFault("wrong_format", f"the content of {what} is not text ({type(content).__name__})")
    try:
        content.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, and no tokenizer can encode it
        raise RowFault("not_UTF-8", f"the content of {what} holds half a surrogate pair") from None
    return content


def _check_choice(key: str, value: str | None, choices: tuple) -> None:
    if value not in choices:
        raise UserError(f"{key} is {value!r}: it must be one of {', '.join(map(str, choices))}")


def _check_files(paths: list[Path]) -> None:
    if not paths:
        raise UserError("data.path is an empty list: name at least one JSONL file")
    wrong = [f"  {p}: {'a folder' if p.is_dir() else 'no such file'}" for p in paths if not p.is_file()]
    if wrong:
        raise UserError("\n".join(["data.path must name JSONL files:", *wrong]))
