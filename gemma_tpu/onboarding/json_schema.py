"""The config's JSON Schema, for editors that complete and check YAML: made from schema.py's own types and rules.

What a key is for is what configs/tiny_cpu.yaml says of it. Rules between keys, and what needs the model or the data,
`validate` alone knows.
"""

import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from gemma_tpu import assets, schema
from gemma_tpu.config import KEYS, SECTIONS, to_dict
from gemma_tpu.schema import Config

Node = dict[str, Any]
DRAFT = "https://json-schema.org/draft/2020-12/schema"
NUMBER = {"type": "string", "pattern": r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"}  # 1e-4 in YAML 1.1
TEXT = {"minLength": 1, "pattern": r"^\S(.*\S)?$"}
# Each rule of schema.py, as JSON Schema has it. A rule that is not here has no such form beyond its type's.
RULES: dict[Any, Node] = {
    schema.Text: TEXT, schema.Transform: TEXT, schema.Pattern: TEXT, schema.Regex: TEXT,
    schema.Texts: {"minItems": 1}, schema.Transforms: {"minItems": 1}, schema.Weights: {"minItems": 1},
    schema.Kept: {"minItems": 1, "uniqueItems": True},
    schema.Positive: {"minimum": 1}, schema.Count: {"minimum": 0}, schema.Length: {"minimum": 2},
    schema.Seed: {"minimum": 0, "maximum": 2**32 - 1}, schema.Above0: {"exclusiveMinimum": 0},
    schema.From0: {"minimum": 0}, schema.Below1: {"minimum": 0, "exclusiveMaximum": 1},
    schema.Share: {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    schema.Ratio: {"exclusiveMinimum": 0, "maximum": 1},
}  # fmt: skip
_PLAIN = {str: "string", bool: "boolean", int: "integer", types.NoneType: "null"}


def make() -> Node:
    told, defaults = descriptions(), to_dict(Config())
    top: dict[str, Node] = {}
    for key, kind in KEYS.items():
        section, _, name = key.rpartition(".")
        node = of(kind) | ({"description": told[key]} if key in told else {})
        node["default"] = defaults[section][name] if section else defaults[name]
        if not section:
            top[name] = node
        else:
            top.setdefault(section, {"type": ["object", "null"], "additionalProperties": False, "properties": {}})
            top[section]["properties"][name] = node
    top["mesh"] = {"anyOf": [{"const": "auto"}, top["mesh"]], "description": told.get("mesh", "")}
    return {
        "$schema": DRAFT, "title": "A run of gemma-tpu", "type": "object", "additionalProperties": False,
        "properties": top,
    }  # fmt: skip


def of(kind: Any) -> Node:
    """One type as a schema."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _ruled(of(args[0]), RULES.get(kind, {}))
    if origin in (Union, types.UnionType):
        return {"anyOf": [of(member) for member in args]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple:
        return {"type": "array", "items": of(args[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": of(args[1])}
    if kind is float:
        return {"anyOf": [{"type": "number"}, NUMBER]}
    return {"type": _PLAIN[kind]}


def _ruled(node: Node, rule: Node) -> Node:
    """A number may be written as text; its bounds are those of the number."""
    if "anyOf" in node and node["anyOf"][0] == {"type": "number"}:
        return {"anyOf": [{"type": "number"} | rule, NUMBER]}
    return node | rule


def descriptions() -> dict[str, str]:
    """What the comments of configs/tiny_cpu.yaml say of each key: behind it, or in the lines above it."""
    found, section, above = {}, "", []
    for line in assets.find("configs", "tiny_cpu.yaml").read_text().splitlines():
        if remark := re.match(r"\s*#\s?(.*)", line):
            above.append(remark[1])
            continue
        if key := re.match(r"(\s*)(\w+):(?:\s+(?:'[^']*'|\"[^\"]*\"|[^#]*?))?(?:\s+#\s?(.*))?$", line):
            section = "" if not key[1] else section
            name = f"{section}.{key[2]}" if section else key[2]
            told = " ".join(above) if key[1] and above else ""
            if both := " ".join(filter(None, [told, key[3] or ""])):
                found[name] = both
            section = key[2] if not key[1] and key[2] in SECTIONS else section
        above = []
    return found
