"""From raw records to rows: parsed, brought into a format, transformed, and every one that is not a row counted.

A row that cannot be used (not JSON, a wrong role, nothing in it) is left out, counted under a reason and named by
file and line; with data.strict it ends the run. One that a rule of the user's leaves out is counted apart.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_tpu import plain
from gemma_tpu.data import formats, transforms
from gemma_tpu.data.datafiles import DataFile, expand
from gemma_tpu.data.formats import Conversation, Message, Parsed, Preference, RowDropped, RowFault, Text
from gemma_tpu.data.records import Fault, Raw, records
from gemma_tpu.errors import UserError
from gemma_tpu.schema import FORMATS, TRANSFORMS, DataConfig

SHOWN = 5  # places named for each reason; a million bad lines must not be a million lines of report
LOOKED_AT = 50  # records that a file's format is looked for in
CHUNK_ROWS, CHUNK_BYTES = 256, 1 << 20  # what is handed to a process at a time


@dataclass
class Tally:
    """How often each reason occurred, where first, and what was wrong there."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, reason: str, place: str, detail: str = "", times: int = 1) -> None:
        self.counts[reason] += times
        places = self.places.setdefault(reason, [])
        if place and len(places) < SHOWN:
            places.append((place, plain.cut(detail, 300)))

    def merge(self, other: "Tally") -> None:
        self.counts += other.counts
        for reason, places in other.places.items():
            here = self.places.setdefault(reason, [])
            here += places[: SHOWN - len(here)]

    def total(self) -> int:
        return self.counts.total()

    def where(self, reason: str) -> str:
        """`a.jsonl:3, a.jsonl:9 and 12 more`."""
        shown = [place for place, _ in self.places.get(reason, []) if place]
        more = self.counts[reason] - len(shown)
        return ", ".join(shown) + (f" and {more:,} more" if more and shown else "")

    def details(self) -> list[str]:
        """`not JSON (12):` and its first places, each with what is wrong there."""
        lines = []
        for reason, count in self.counts.most_common():
            places = self.places[reason]
            lines.append(f"{reason.replace('_', ' ')} ({count:,}):")
            lines += [f"  {place}{f': {detail}' if detail else ''}" for place, detail in places]
            if count > len(places):
                lines.append(f"  … and {count - len(places):,} more")
        return lines


@dataclass
class Account:
    """Of everything that was read: how much, in which formats, and what of it is not used."""

    rows: int = 0
    refused: Tally = field(default_factory=Tally)  # cannot be used: fatal with data.strict
    dropped: Tally = field(default_factory=Tally)  # left out by a rule of the user's own
    said: Counter[str] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    answered: int = 0  # rows with an assistant turn

    def merge(self, other: "Account") -> None:
        self.rows += other.rows
        self.answered += other.answered
        self.refused.merge(other.refused)
        self.dropped.merge(other.dropped)
        self.said += other.said
        self.forms += other.forms

    def fault(self, fault: RowFault, place: str) -> None:
        tally = self.dropped if isinstance(fault, RowDropped) else self.refused
        tally.add(fault.reason, place, str(fault))

    def raise_refused(self) -> None:
        """One error for every row of every file that cannot be used."""
        if self.refused.counts:
            total = self.refused.total()
            raise UserError("\n".join([
                f"{total:,} of {self.rows:,} rows cannot be used; correct or remove them, or set data.strict: false "
                "to leave them out:", *self.refused.details()
            ]))  # fmt: skip

    def formats(self, asked: str) -> str:
        """`messages (detected)`, for the report."""
        names = " and ".join(self.forms) or "no rows"
        return f"{names} (detected)" if asked == "auto" else names

    def notes(self) -> list[str]:
        """What was read and not used, with counts."""
        return [f"{what}: {count:,}" for what, count in self.said.items()]


@dataclass(frozen=True)
class Place:
    """Where a row stands: the number of its file, and its line there (or its number, where files have no lines)."""

    file: int
    line: int
    text: str


Record = Raw | list[Raw]  # a list is a trajectory: one message a record


@dataclass(frozen=True)
class Chunk:
    """Some records of one format, in order."""

    form: str
    records: list[tuple[Place, Record]]


@dataclass(frozen=True)
class Row:
    """One usable row."""

    parsed: Parsed
    place: Place

    @property
    def messages(self) -> list[Message]:
        """All turns; of a preference those of the chosen side, of a text none."""
        if isinstance(self.parsed, Preference):
            return self.parsed.prompt + self.parsed.chosen
        return self.parsed.messages if isinstance(self.parsed, Conversation) else []

    @property
    def characters(self) -> int:
        if isinstance(self.parsed, Text):
            return len(self.parsed.text)
        return sum(len(m["content"]) + len(json.dumps(m.get("tool_calls", ""))) - 2 for m in self.messages)


class Converter:
    """A record into a row. Small enough to be sent to another process by its settings."""

    def __init__(self, columns: Mapping[str, str], names: Sequence[str]):
        self.columns = dict(columns)
        self.transforms = [(name, transforms.load(name)) for name in names]

    def rows(self, chunk: Chunk, account: Account) -> Iterator[Row]:
        for place, raw in chunk.records:
            account.rows += 1
            account.forms[chunk.form] += 1
            try:
                yield Row(self._parsed(raw, chunk.form, place, account), place)
            except RowFault as fault:
                account.fault(fault, place.text)

    def _parsed(self, raw: Record, form: str, place: Place, account: Account) -> Parsed:
        if isinstance(raw, list):
            record = {"messages": [parse(item) for item in raw]}
        else:
            record = formats.rename(parse(raw), self.columns, account.said)
        parsed = formats.read(record, form, account.said)
        if isinstance(parsed, Conversation):
            messages = self._transformed(_spoken(parsed.messages, account.said), place, account.said)
            _check_content(messages)
            account.answered += any(m["role"] == "assistant" for m in messages)
            return Conversation(messages, parsed.tools)
        if self.transforms:
            raise UserError(f"data.transform works on conversations, and {place.text} is of the format {form}")
        if isinstance(parsed, Preference):
            for side in (parsed.chosen, parsed.rejected):
                _check_content(_spoken(parsed.prompt, account.said) + side)
        elif not parsed.text.strip():
            raise RowFault("empty", "no text")
        return parsed

    def _transformed(self, messages: list[Message], place: Place, said: Counter[str]) -> list[Message]:
        for name, transform in self.transforms:
            before = Counter(m["role"] for m in messages)
            try:
                found = transform(messages)
            except (RowFault, UserError):
                raise
            except Exception as error:  # the user's own code, on a row that it did not expect
                told = f"{type(error).__name__}: {error}"
                raise UserError(f"data.transform {name} failed on {place.text}: {told}") from error
            if found is None:
                raise RowDropped(f"dropped_by_{name}", "")
            if not isinstance(found, list) or not all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str | dict)
                for m in found
            ):
                raise UserError(f"data.transform {name} must give a list of messages with role and content, or None; "
                                f"for {place.text} it gave {str(found)[:80]!r}")  # fmt: skip
            messages = found
            for role, count in (before - Counter(m["role"] for m in messages)).items():
                said[f"{role} turns left out by data.transform={name}"] += count
        return messages


class Reader:
    """Iterates the rows of a data section, first to last, without a tokenizer."""

    def __init__(self, section: DataConfig, path: str | Sequence[str] | None = None, limit: int | None = None):
        self.account = Account()
        self._section, self._limit = section, limit or section.limit
        self._files = files_of(section, path)

    def __iter__(self) -> Iterator[Row]:
        converter = Converter(self._section.columns, transforms.names_of(self._section.transform))
        for chunk in chunks(self._files, self._section, self._limit, self.account):
            yield from converter.rows(chunk, self.account)
        if self._section.strict:
            self.account.raise_refused()


def files_of(section: DataConfig, path: str | Sequence[str] | None = None) -> list[DataFile]:
    """The files of data.path (or of `path`), after the settings that concern them have been checked."""
    if section.format not in FORMATS:
        raise UserError(f"data.format is {section.format!r}: it must be one of {', '.join(FORMATS)}")
    for name in transforms.names_of(section.transform):
        if name not in TRANSFORMS:
            transforms.load(name)
    if section.limit is not None and section.limit < 1:
        raise UserError(f"data.limit is {section.limit}: it must be at least 1, or absent to read every row")
    formats.check_columns(section.columns)
    return expand(section.path if path is None else path, "data.path" if path is None else "data.validation")


def form_of(section: DataConfig) -> str:
    """The format of the first row, named or detected."""
    return next((chunk.form for chunk in chunks(files_of(section), section, 1, Account())), section.format)


def chunks(
    files: Sequence[DataFile], section: DataConfig, limit: int | None, account: Account, each: bool = False
) -> Iterator[Chunk]:
    """The records of all files in order, in chunks of one format each; blank lines are counted in `account`. The limit
    is one for all files, or with `each` one for every entry of data.path."""
    held: list[tuple[Place, Record]] = []
    form, size, left = "", 0, limit
    for number, file in enumerate(files):
        if each and number and file.origin != files[number - 1].origin:
            left = limit
        if left == 0:
            continue
        found, items = _formed(file, section, account)
        if held and found != form:
            yield Chunk(form, held)
            held, size = [], 0
        form = found
        for line, raw in items:
            if left == 0:
                break
            left = None if left is None else left - 1
            held.append((Place(number, line, f"{file.name}:{line}"), raw))
            size += len(raw) if isinstance(raw, bytes) else 2000
            if len(held) >= CHUNK_ROWS or size >= CHUNK_BYTES:
                yield Chunk(form, held)
                held, size = [], 0
    if held:
        yield Chunk(form, held)


def _formed(file: DataFile, section: DataConfig, account: Account) -> tuple[str, Iterable[tuple[int, Any]]]:
    """The file's format, named or found in its first records, and its records without blank lines."""
    items = _filled(records(file), account)
    form: str = section.format
    if form == "auto":
        head = list(itertools.islice(items, LOOKED_AT))
        items = itertools.chain(head, items)
        form = _detect(file, head, section.columns) if head else "messages"
    if form == "trajectory":
        turns = [raw for _, raw in items]
        return form, [(1, turns)] if turns else []
    return form, items


def _filled(items: Iterator[tuple[int, Raw]], account: Account) -> Iterator[tuple[int, Raw]]:
    for line, raw in items:
        if isinstance(raw, bytes) and not raw.strip():
            account.said["blank lines skipped"] += 1
        else:
            yield line, raw


def _detect(file: DataFile, head: list[tuple[int, Raw]], columns: Mapping[str, str]) -> str:
    faults = Tally()
    for line, raw in head:
        try:
            return formats.detect(formats.rename(parse(raw), columns, Counter()))
        except RowFault as fault:
            faults.add(fault.reason, f"{file.name}:{line}", str(fault))
    raise UserError("\n".join([
        f"{file.where}: none of the first {len(head):,} rows has a known format. Name the columns in data.columns, "
        "like {prompt: question, response: answer}, or the format in data.format:", *faults.details()
    ]))  # fmt: skip


def parse(raw: Raw) -> dict[str, Any]:
    """A record as a mapping."""
    if isinstance(raw, Fault):
        raise RowFault(raw.reason, raw.detail)
    if isinstance(raw, dict):
        return raw
    try:
        record = json.loads(raw.rstrip().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RowFault("not_UTF-8", f"byte {error.start} of the line is 0x{raw[error.start]:02x}") from None
    except json.JSONDecodeError as error:
        array = raw.lstrip()[:1] == b"["
        hint = "; a .jsonl file holds one JSON object a line, an array is a .json file" if array else ""
        raise RowFault("not_JSON", f"column {error.colno}: {error.msg}{hint}") from None
    except RecursionError:
        raise RowFault("not_JSON", "nested too deep") from None
    except ValueError as error:  # a number with thousands of digits
        raise RowFault("not_JSON", str(error)) from None
    if raw.count(b"{") + raw.count(b"[") > plain.DEPTH:  # counting costs nothing beside the parsing
        _check_depth(record)
    if not isinstance(record, dict):
        raise RowFault("not_JSON", f"it is a JSON {type(record).__name__}, not an object")
    return record


def _check_depth(record: object) -> None:
    """Whoever reads a row recurses into it, and templates do it in ways of their own."""
    try:
        for _ in plain.levels(record):
            pass
    except ValueError as error:
        raise RowFault("not_JSON", str(error)) from None


def _spoken(messages: list[Message], said: Counter[str]) -> list[Message]:
    spoken = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    if len(spoken) < len(messages):
        said["blank system turns left out"] += len(messages) - len(spoken)
    return spoken


def _check_content(messages: list[Message]) -> None:
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool" or message.get("tool_calls"):  # a tool may find nothing, and a call needs no words
            continue
        if isinstance(content, str) and not content.strip():
            raise RowFault("empty", f"{'an' if role[0] in 'aeiou' else 'a'} {role} turn without text")
    if not messages:
        raise RowFault("empty", "no messages")

