"""One YAML file is one run: the file, then `key=value` overrides, cast through the schema into a `Config`.

Everything wrong is reported at once: unknown keys, wrong types, values out of range, keys given twice, rules
between keys. In here a config is flat (`"optim.lr"` -> value): defaults, file and overrides are three layers.
"""

import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from gemma_tpu import plain
from gemma_tpu.assets import find
from gemma_tpu.errors import UserError
from gemma_tpu.schema import ALTERNATIVES, Config, Mismatch, cast, closest, conflicts, words

_TOP = get_type_hints(Config, include_extras=True)
SECTIONS: dict[str, type[Any]] = {
    name: kind for name, kind in _TOP.items() if isinstance(kind, type) and is_dataclass(kind)
}
KEYS: dict[str, Any] = {
    f"{name}.{key}" if name in SECTIONS else name: kind
    for name, top in _TOP.items()
    for key, kind in (get_type_hints(top, include_extras=True) if name in SECTIONS else {name: top}).items()
}
# What other trainers call these keys.
_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "max_grad_norm": "optim.clip",
    "gradient_accumulation_steps": "train.accumulation",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "output_dir": "run_dir",
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file (the user's, or a shipped one by name) under dotted `key=value` overrides."""
    file = find("configs", str(path))
    draft = _Draft(str(file))
    draft.add_file(_read(file))
    for override in overrides:
        draft.add_override(override)
    return draft.finish()


def from_dict(tree: Mapping[str, Any], source: str = "config") -> Config:
    """The config of a plain tree, as `to_dict` gives it (a checkpoint's, or one made in Python)."""
    draft = _Draft(source)
    draft.add_tree(tree, draft.file)
    return draft.finish()


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested data, every key resolved; `from_dict` of it is the same config."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    tree: dict[str, Any] = plain(asdict(config))
    return tree


def to_yaml(config: Config) -> str:
    """The resolved config as YAML text; `load` of it is the same config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def differences(a: Config, b: Config) -> list[str]:
    """`key: value in a -> value in b`, one for each key that differs, in the order of the schema."""
    flat_a, flat_b = _flat(a), _flat(b)
    return [
        f"{key}: {_show(flat_a[key])} -> {_show(flat_b[key])}" for key in KEYS if flat_a[key] != flat_b[key]
    ]


def _flat(config: Config) -> dict[str, Any]:
    return {key: reduce(getattr, key.split("."), config) for key in KEYS}


# --- layers ---


_OVERRIDE = sys.maxsize  # the "line" of what stands on the command line: its problems come last


class _Draft:
    """What the file and the overrides say so far, flat, with where each key was said and what is wrong."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.file: dict[str, Any] = {}
        self.overrides: dict[str, Any] = {}
        self.lines: dict[str, int] = {}
        self.problems: list[tuple[int, str]] = []

    def add_file(self, node: yaml.Node | None) -> None:
        if node is None:  # nothing but comments: the defaults
            return
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{self.source}: a config is a mapping of sections, like `model:` and `data:`")
        self.add_tree(self._mapping(node, ""), self.file)

    def add_override(self, text: str) -> None:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            self._problem(_OVERRIDE, f"{plain.shown(text)}: must be key=value, like optim.lr=1e-4")
            return
        try:
            node = _compose(value)
        except yaml.YAMLError as error:
            self._problem(_OVERRIDE, f"{plain.shown(text)}: the value is not valid YAML ({plain.reason(error)})")
            return
        self.lines[key] = _OVERRIDE
        parsed = None if node is None else self._value(node, key, _OVERRIDE)
        if key in KEYS:
            self.overrides[key] = parsed
        else:
            self.add_tree({key: parsed}, self.overrides)

    def add_tree(self, tree: Mapping[str, Any], layer: dict[str, Any]) -> None:
        """A nested tree into a flat layer. A section that is given and empty says nothing."""
        for name, value in tree.items():
            if name not in SECTIONS:
                self._add_leaf(str(name), value, layer, known=name in _TOP)
            elif isinstance(value, Mapping):
                for key, item in value.items():
                    dotted = f"{name}.{key}"
                    self._add_leaf(dotted, item, layer, known=dotted in KEYS)
            elif name == "mesh" and value == "auto":
                layer["mesh.auto"] = True
            elif value is not None:
                more = " or auto" if name == "mesh" else ""
                self._wrong(name, value, f"must be a section with keys of its own{more}")

    def _add_leaf(self, key: str, value: Any, layer: dict[str, Any], known: bool) -> None:
        if known:
            layer[key] = value
        else:
            self._wrong(key, value, _unknown(key))

    def finish(self) -> Config:
        """Layers merged, every value cast, every rule held; or one error with everything that is wrong."""
        defaults = _flat(Config())
        flat = _over(_over(defaults, self.file), self.overrides)
        named = self.file.keys() | self.overrides.keys()
        if "data.path" in named and "data.validation" not in named:
            flat["data.validation"] = None  # the bundled validation rows say nothing about other data
        wrong = set()
        for key, value in flat.items():
            try:
                flat[key] = cast(KEYS[key], value)
            except Mismatch:
                wrong.add(key)
                self._wrong(key, value, f"must be {words(KEYS[key])}{closest(KEYS[key], value)}")
                flat[key] = defaults[key]
        config = _build(flat)
        for keys, rule in conflicts(config):
            if not wrong.intersection(keys):
                self._problem(max(self.lines.get(key, 0) for key in keys), rule)
        if self.problems:
            count = f"{len(self.problems)} problem{'s' * (len(self.problems) > 1)}"
            lines = [text for _, text in sorted(self.problems, key=lambda problem: problem[0])]
            raise UserError(f"{self.source}: {count}\n  " + plain.first(lines, 20, "\n  "))
        return config

    def _problem(self, line: int, text: str) -> None:
        place = "override: " if line == _OVERRIDE else f"line {line}: " if line else ""
        self.problems.append((line, place + text))

    def _wrong(self, key: str, value: Any, rule: str) -> None:
        line = self.lines.get(key) or self.lines.get(key.partition(".")[0], 0)
        self._problem(line, f"{_name(key)} = {_show(value)}: {rule}")

    def _mapping(self, node: yaml.MappingNode, path: str, override: int = 0) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = override or key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(line, "a key must be a word, not a list or a mapping")
                continue
            key = key_node.value
            dotted = f"{path}.{key}" if path else key
            if key in seen:
                first = f", first on line {seen[key]}" if not override else ""
                self._problem(line, f"{_name(dotted)}: given twice{first}")
                continue
            seen[key] = self.lines[dotted] = line
            tree[key] = self._value(value_node, dotted, override)
        return tree

    def _value(self, node: yaml.Node, path: str, override: int = 0) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, override)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, path, override) for item in node.value]
        if plain.has_password(node.value):
            told = "is a URL with credentials in it, and a config stands in every report: leave them out"
            self._problem(override or node.start_mark.line + 1, f"{_name(path)}: {told}")
            return None
        if "\0" in node.value or not plain.encodes(node.value):
            self._problem(override or node.start_mark.line + 1, f"{_name(path)} = {_show(node.value)}: must be text "
                          "that a file's name can hold: no NUL, no half of a letter")  # fmt: skip
            return None
        return _SCALARS[node.tag](node.value)


def _over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """`upper` over `lower`; a key of one alternative switches the other off, unless `upper` names both."""
    merged = dict(lower)
    for left, right in ALTERNATIVES:
        for this, other in ((left, right), (right, left)):
            if any(upper.get(key) for key in this) and not any(key in upper for key in other):
                merged |= other
    return merged | dict(upper)


def _build(flat: Mapping[str, Any]) -> Config:
    sections: dict[str, Any] = {
        name: kind(**{f.name: flat[f"{name}.{f.name}"] for f in fields(kind)})
        for name, kind in SECTIONS.items()
    }
    return Config(**sections, **{name: flat[name] for name in _TOP if name not in SECTIONS})


def _unknown(key: str) -> str:
    """Names what may have been meant: the same last word elsewhere, or the nearest, in this section first."""
    if key in KEYS:
        return f"unknown key; write it inside its section, as `{key.replace('.', ': {')}: ...}}`"
    section, _, word = key.rpartition(".")
    siblings = [k for k in KEYS if k.rpartition(".")[0] == section] + ([] if section else list(SECTIONS))
    near = [k for k in KEYS if k.rpartition(".")[2] == word]
    if not near and word in _ELSEWHERE:
        near = [_ELSEWHERE[word]]
    for candidates in (siblings, list(KEYS)):
        words_here = {k.rpartition(".")[2] for k in candidates}
        closest_word = difflib.get_close_matches(word, sorted(words_here), 1)
        near = near or [k for k in candidates if k.rpartition(".")[2] in closest_word]
    if near:
        return f"unknown key; did you mean {' or '.join(near)}?"
    return f"unknown key; known here: {', '.join(siblings or SECTIONS)}"


def _name(key: str) -> str:
    return plain.cut(key if key and key.isprintable() else repr(key))


def _show(value: Any) -> str:
    """A value as YAML has it, cut to a length that leaves the message readable."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    shown = repr(list(value) if isinstance(value, tuple) else value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


# --- YAML -------------------------------------------------------------------------------------------------

# Fewer scalars than in YAML 1.1 are anything but text: `off` stays a word, a date stays a name. So whatever
# PyYAML writes unquoted as text is read as text here, and what it writes as a number is read as one.
_SCALARS: dict[str, Callable[[str], Any]] = {
    "tag:yaml.org,2002:null": lambda text: None,
    "tag:yaml.org,2002:bool": lambda text: text.lower() == "true",
    "tag:yaml.org,2002:int": int,
    "tag:yaml.org,2002:float": float,
    "tag:yaml.org,2002:str": str,
}


class _Loader(plain.Loader):
    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,17})", list("-+0123456789")),
    ("float", r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?", list("-+0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _compose(text: str) -> yaml.Node | None:
    return plain.compose(_Loader, text)


def _read(file: Path) -> yaml.Node | None:
    try:
        return _compose(plain.text(file))
    except yaml.YAMLError as error:
        raise UserError(f"{file}{plain.position(error)}: not valid YAML: {plain.reason(error)}") from None
