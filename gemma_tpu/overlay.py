"""Data that ships with the package under a file of the user's: only the keys that differ, everything wrong at once.

The bundled file is the schema: the user's may change what it has, and add entries where the bundled one lists things
by name (`open_at`). What it changes without saying where from has the user's file as its source.
"""

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_tpu import plain
from gemma_tpu.assets import resolve
from gemma_tpu.errors import UserError


def load(bundled: str, variable: str, open_at: tuple[str, ...] = ()) -> dict[str, Any]:
    """The bundled YAML under the file that the environment variable names, if it names one."""
    table: dict[str, Any] = plain.yaml_file(resolve(f"bundled:{bundled}"))
    name = os.environ.get(variable)
    if not name:
        return table
    given = plain.yaml_file(Path(name).expanduser(), f"{variable}={name}")
    problems = list(_problems(table, given, "", open_at))
    if problems:
        raise UserError(f"{variable}={name}: these entries are wrong:\n  " + plain.first(problems, between="\n  "))
    merged: dict[str, Any] = _over(table, given, name)
    return merged


def _problems(table: Any, given: Any, path: str, open_at: tuple[str, ...]) -> Iterator[str]:
    """What of `given` is not like `table`; below a path of `open_at` new names take the first entry's form."""
    if isinstance(table, Mapping):
        if not isinstance(given, Mapping):
            yield f"{path or 'the file'}: must be a mapping of {', '.join(map(str, list(table)[:6]))}"
            return
        for key, value in given.items():
            here = plain.below(path, key)
            if key in table:
                yield from _problems(table[key], value, here, open_at)
            elif path in open_at:
                form = next(iter(table.values()))
                yield from _problems(form, value, here, open_at)
                nested = isinstance(form, Mapping) and isinstance(value, Mapping)
                missing = [name for name in form if name not in value] if nested else []
                if missing:
                    yield f"{here}: is new and needs every key; missing: {', '.join(map(str, missing))}"
            else:
                near = difflib.get_close_matches(str(key), map(str, table), 1)
                told = f"did you mean {near[0]}?" if near else f"known: {', '.join(map(str, table))}"
                yield f"{here}: unknown key; {told}"
    elif isinstance(table, list):
        kind = type(table[0]) if table else str
        if not isinstance(given, list) or not all(isinstance(one, kind) for one in given):
            yield f"{path}: {plain.shown(given)} must be a list" + (f" like {table}" if table else " of texts")
    elif table is not None and given is not None and not isinstance(given, _kinds(table)):
        yield f"{path}: {plain.shown(given)} must be like {table!r}"
    elif table is None and isinstance(given, dict | list) or isinstance(given, float) and not plain.number(given):
        yield f"{path}: {plain.shown(given)} must be text or a number"


def _kinds(value: Any) -> type | tuple[type, ...]:
    return (int, float) if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


def _over(table: Any, given: Any, file: str) -> Any:
    """`given` over `table`; entries with sources get the user's file as the source of what it changes."""
    if not isinstance(table, Mapping) or not isinstance(given, Mapping):
        return given
    merged = dict(table)
    for key, value in given.items():
        merged[key] = _over(table.get(key), value, file)
    if "sources" in table and "sources" not in given:
        own = {"from": file, "date": ""}
        merged["sources"] = {**table["sources"], **{key: own for key in given if key in table["sources"]}}
    elif "source" in table and "source" not in given:
        merged["source"] = {"from": file, "date": ""}
    return merged
