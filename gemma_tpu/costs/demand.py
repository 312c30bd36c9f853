"""A workload file: what is to be trained or served, from which `choose` finds the accelerators; read and checked."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from gemma_tpu import plain
from gemma_tpu.assets import find
from gemma_tpu.errors import UserError

FOLDER = "configs/workloads"


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What both kinds of workload say."""

    kind: ClassVar[str]
    model: str
    shapes: str = "variable"
    custom_ops: str = "none"
    code: str = "this_project"
    changes: str = "rarely"
    where: str = "any"
    most_chips: int | None = None
    pay: str = "on-demand"


@dataclass(frozen=True, kw_only=True)
class Training(Demand):
    kind = "training"
    config: str = "gemma4_31b_v5p8_fast.yaml"
    tokens: float
    row_tokens: float
    max_seq_len: int = 4096
    packing: bool = True
    deadline_hours: float | None = None
    runs: int = 1


@dataclass(frozen=True, kw_only=True)
class Serving(Demand):
    kind = "serving"
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    kv_bytes: int = 2
    months: float = 1.0


KINDS: dict[str, type[Training] | type[Serving]] = {"training": Training, "serving": Serving}
COMMON = [one.name for one in fields(Demand)]
ALONE = {name: [one.name for one in fields(kind) if one.name not in COMMON] for name, kind in KINDS.items()}
NEEDED = {name: [one.name for one in fields(kind) if one.default is MISSING] for name, kind in KINDS.items()}
KEYS = ["kind", *ALONE["training"], *ALONE["serving"], *COMMON]
WORDS = {
    "kind": ("training", "serving"), "shapes": ("fixed", "bounded", "variable"),
    "custom_ops": ("none", "cuda", "pallas"), "code": ("this_project", "pytorch", "jax"),
    "changes": ("rarely", "often"), "where": ("any", "google-cloud", "on-premises"),
    "pay": ("on-demand", "spot", "own"),
}  # fmt: skip
WHOLE = ("max_seq_len", "prompt_tokens", "output_tokens", "runs", "most_chips")
NUMBERS = ("tokens", "row_tokens", "deadline_hours", "requests_per_s", "ttft_ms", "tpot_ms", "months")
OTHER: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("text", lambda value: isinstance(value, str) and value != ""),
    "config": ("the name of a config", lambda value: isinstance(value, str) and value != ""),
    "packing": ("true or false", lambda value: isinstance(value, bool)),
    "kv_bytes": ("1 or 2", lambda value: type(value) is int and value in (1, 2)),
}
DEFAULTS = {one.name: one.default for kind in KINDS.values() for one in fields(kind) if one.default is not MISSING}


def load(name: str) -> Training | Serving:
    """The workload of a file, the user's or a shipped one; or everything that is wrong with it."""
    path = find(FOLDER, name)
    tree = plain.yaml_file(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a workload is a mapping of keys like `kind: serving`; see {_shipped()}")
    given = {key: _number(value) if key in (*WHOLE, *NUMBERS) else value for key, value in tree.items()}
    problems = list(_problems(given))
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise UserError(f"{path}: {count}\n  " + plain.first(problems, between="\n  "))
    return of(given)


def of(given: Mapping[str, Any]) -> Training | Serving:
    """The workload that a checked mapping describes."""
    values: dict[str, Any] = {key: int(value) if key in WHOLE and value is not None else value
                              for key, value in given.items() if key != "kind"}  # fmt: skip
    return KINDS[given["kind"]](**values)


def _shipped() -> str:
    return ", ".join(f"{FOLDER}/{name}" for name in ("train_31b_codev.yaml", "serve_31b_chat.yaml"))


def _number(value: Any) -> Any:
    """PyYAML reads 9.2e6 as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _problems(given: dict[str, Any]) -> Iterator[str]:
    for key, value in given.items():
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, 1)
            meant = f"did you mean {near[0]}?" if near else f"known: {', '.join(KEYS)}"
            yield f"{plain.below('', key)}: unknown key; {meant}"
        elif problem := _problem(key, value):
            yield f"{key} = {plain.shown(value)}: {problem}"
    for key in ("kind", "model"):
        if key not in given:
            yield f"{key}: is missing"
    kind = given.get("kind")
    if kind not in WORDS["kind"]:
        return
    for key in NEEDED[kind]:
        if key not in COMMON and given.get(key) is None:
            yield f"{key}: a {kind} workload must say it"
    other = "serving" if kind == "training" else "training"
    for key in ALONE[other]:
        if key in given:
            yield f"{key}: is of {other}, and this workload is {kind}"
    if kind == "training" and not _problem("row_tokens", given.get("row_tokens")):
        most = given.get("max_seq_len", DEFAULTS["max_seq_len"])
        if isinstance(most, int | float) and (given.get("row_tokens") or 0) > most:
            yield f"row_tokens = {given['row_tokens']:g}: the mean row must not be longer than max_seq_len = {most:g}"
    if given.get("where") == "on-premises" and given.get("pay", "own") != "own":
        yield f"pay = {plain.shown(given['pay'])}: what stands on your premises is paid as `own`"
    if given.get("pay") == "own" and given.get("where", "any") == "google-cloud":
        yield "pay = 'own': nothing in Google Cloud is your own"


def _problem(key: str, value: Any) -> str | None:
    if value is None and DEFAULTS.get(key, 0) is None:
        return None
    if key in WORDS:
        near = difflib.get_close_matches(str(value), WORDS[key], 1)
        meant = f"; did you mean {near[0]}?" if near and value not in WORDS[key] else ""
        return None if value in WORDS[key] else f"must be {' or '.join(WORDS[key])}{meant}"
    if key in OTHER:
        return None if OTHER[key][1](value) else f"must be {OTHER[key][0]}"
    number = plain.number(value) and value > 0
    if key in WHOLE and number and value != int(value):
        number = False
    return None if number else f"must be {'a whole' if key in WHOLE else 'a'} number above 0"


def paths() -> list[Path]:
    """The shipped workloads."""
    return sorted(find(FOLDER, "serve_31b_chat.yaml").parent.glob("*.yaml"))
