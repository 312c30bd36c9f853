"""Plain data out of files that others wrote: their text, JSON, YAML, and the form that they must have.

Whatever a file holds, the answer is plain data or one UserError that names it. No tag and no alias is followed (an
alias can stand for more than a memory holds), no key is taken twice, and nothing gets in that would break whoever reads
on: no nesting deeper than readers recurse, no half of a letter, no integer that is too large for a float.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from gemma_tpu.errors import UserError

DEPTH = 64
LARGEST = 1 << 128
YAML_LARGEST = 1 << 18  # characters: the reader takes a second for each 100 KB
LONG = 80  # characters of a value that a message shows
MANY = 20  # problems of one file that a message shows


def text(path: Path, name: str = "") -> str:
    """The text of a file; `name` is what messages call it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{name or path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name or path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


# --- JSON ---


def json_file(path: Path) -> Any:
    return from_json(text(path), str(path))


def from_json(raw: str | bytes | bytearray, name: str) -> Any:
    try:
        return json_value(raw)
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON: {error}") from None


def json_value(raw: str | bytes | bytearray) -> Any:
    """The value, or a ValueError that says what is wrong, for those who read many of them from one file."""
    try:
        tree = json.loads(raw if isinstance(raw, str) else raw.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deep") from None
    return _checked(tree)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"keys given twice: {first(map(shown, twice))}")
    return made


def _checked(tree: Any) -> Any:
    for level in levels(tree):
        for value in level:
            if isinstance(value, str) and not encodes(value):
                raise ValueError(f"{shown(value)} holds half of a letter (a lone surrogate)")
            if isinstance(value, int) and abs(value) >= LARGEST:
                raise ValueError(f"a number of {len(str(value))} digits is too large")
    return tree


def levels(tree: Any) -> Iterator[list[Any]]:
    """The values of each depth, keys of mappings included; a ValueError where there are too many depths."""
    level = [tree]
    for _ in range(DEPTH):
        yield level
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.keys()
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        if not inner:
            return
        level = inner
    raise ValueError("nested too deep")


def encodes(value: str) -> bool:
    """JSON and YAML can spell half of a letter, which no file and no screen can hold."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- YAML ---


class Loader(yaml.SafeLoader):
    """Plain data only; a date stays the text that it is written as."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML's stubs leave it open
        if isinstance(event, yaml.AliasEvent) or event.anchor or getattr(event, "tag", None):
            problem = "aliases (*), anchors (&) and tags (!) have no use here; quote a value that starts so"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{shown(key.value)} is given twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


def yaml_file(path: Path, name: str = "") -> Any:
    return from_yaml(text(path, name), name or str(path))


def from_yaml(raw: str, name: str) -> Any:
    try:
        node = compose(Loader, raw)
        return None if node is None else _checked(Loader("").construct_document(node))
    except yaml.YAMLError as error:
        raise UserError(f"{name}{position(error)}: not valid YAML: {reason(error)}") from None
    except (ValueError, OverflowError) as error:  # from a scalar: 0x, a number with thousands of digits
        told = cut(" ".join(str(error).split()), 200)
        raise UserError(f"{name}: not valid YAML: {told}") from None


def compose(loader: type[Loader], raw: str) -> yaml.Node | None:
    """The one document of a text as a tree of nodes, or a YAMLError."""
    if len(raw) > YAML_LARGEST:
        raise yaml.YAMLError(f"{len(raw):,} characters are no settings; at most {YAML_LARGEST:,} are read")
    try:
        return loader(raw).get_single_node()
    except RecursionError:
        raise yaml.YAMLError("nested too deep") from None
    except (ValueError, OverflowError) as error:  # on an escape like "\UFFFFFFFF"
        raise yaml.YAMLError(str(error)) from None


def reason(error: yaml.YAMLError) -> str:
    found = getattr(error, "problem", None) or getattr(error, "context", None) or str(error)
    return " ".join(found.split())


def position(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return f":{mark.line + 1}:{mark.column + 1}" if mark else ""


def largest(tree: Any) -> float:
    """The largest number in it, by its size."""
    found = (value for level in levels(tree) for value in level if type(value) is int or number(value))
    return max(map(abs, found), default=0)


# --- forms ---

_WORDS: dict[object, str] = {float: "a number", int: "a whole number", str: "text", bool: "true or false", None: "null",
          dict: "a mapping", list: "a list"}  # fmt: skip


def require(value: Any, form: Any, name: str) -> Any:
    """`value`, or a UserError with every place in it that has another form."""
    problems = list(faults(value, form))
    if problems:
        raise UserError(f"{name}: {first(problems, 5, '; ')}")
    return value


def faults(value: Any, form: Any, at: str = "") -> Iterator[str]:
    """Where `value` is not of the form: a type (float: any finite number), None, a tuple of alternatives, [form] for a
    list, {str: form} for a mapping of any names, or {key: form} with the keys that must be there ("key?": may be)."""
    if isinstance(form, dict) and isinstance(value, dict):
        if str in form:
            for key, item in value.items():
                yield from faults(item, form[str], below(at, key))
            return
        for key, inner in form.items():
            name = key.removesuffix("?")
            if name in value:
                yield from faults(value[name], inner, below(at, name))
            elif name == key:
                yield f"{below(at, key)} is missing"
    elif isinstance(form, list) and isinstance(value, list):
        for number, item in enumerate(value):
            yield from faults(item, form[0], f"{at}[{number}]")
    elif isinstance(form, tuple):
        tried = [list(faults(value, one, at)) for one in form]
        if all(tried):
            same = [found for found, one in zip(tried, form, strict=True) if type(one) is type(value)]
            yield from same[0] if same else [f"{at or 'it'} is {shown(value)}: it must be {words(form)}"]
    elif not _is(value, form):
        yield f"{at or 'it'} is {shown(value)}: it must be {words(form)}"


def words(form: Any) -> str:
    if isinstance(form, tuple):
        return " or ".join(map(words, form))
    return _WORDS[type(form) if isinstance(form, dict | list) else form]


def _is(value: Any, form: Any) -> bool:
    if form is float:
        return number(value)
    return form is object or (value is None if form is None else isinstance(form, type) and type(value) is form)


def number(value: Any) -> bool:
    """A finite number, and no truth value."""
    return type(value) is int and abs(value) < LARGEST or type(value) is float and math.isfinite(value)


def below(at: str, key: Any) -> str:
    name = str(key)
    name = name if re.fullmatch(r"[\w.-]{1,60}", name) else shown(name)
    return f"{at}.{name}" if at else name


# --- messages ---


def has_password(text: str) -> bool:
    """Whether it is a URL with credentials, scheme://name:password@host, which must not be repeated anywhere."""
    return re.search(r"\w://[^/\s?#]*@", text) is not None


def shown(value: Any) -> str:
    """A value for a message: on one line, and not too long."""
    return cut(repr(value))


def cut(words: str, most: int = LONG) -> str:
    return words if len(words) <= most else f"{words[: most - 1]}…"


def first(problems: Iterable[str], most: int = MANY, between: str = ", ") -> str:
    """The first of them and how many more there are."""
    found = list(problems)
    more = f"{between}… and {len(found) - most:,} more" if len(found) > most else ""
    return between.join(found[:most]) + more
