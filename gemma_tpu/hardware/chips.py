"""Chips, slices and what they cost: bundled/hardware.yaml as data, under the user's own file.

GEMMA_TPU_HARDWARE names a YAML file of the same form that is merged over the bundled one, key by key. Every
figure carries its source and date; what the user's file changes has that file as its source.
"""

import difflib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from gemma_tpu import plain
from gemma_tpu.assets import resolve
from gemma_tpu.errors import UserError
from gemma_tpu.hardware import gpus

VARIABLE = "GEMMA_TPU_HARDWARE"


@dataclass(frozen=True)
class Source:
    text: str
    date: str  # ISO, or "unknown"

    def __str__(self) -> str:
        date = "date unknown" if self.date == "unknown" else self.date
        return f"{self.text}, {date}" if date else self.text


@dataclass(frozen=True)
class Chip:
    """Figures of one whole chip; the `device_` ones of one JAX device, of which a chip may have two."""

    name: str
    kind: str  # "tpu" or "gpu"
    device_kind: str  # what JAX calls its devices; of a GPU, a word of it
    bf16_tflops: float
    int8_tflops: float | None
    hbm_gib: float  # what a program may use
    hbm_gbs: float  # 10^9 bytes a second
    links: int
    link_gbs: float  # one link, one direction
    devices: int
    name_counts: int
    aliases: tuple[str, ...]
    slices: tuple[str, ...]
    usd: float | None  # an hour on demand; None: not known
    spot_usd: tuple[float, float] | None  # lowest, highest
    sources: Mapping[str, Source]  # "speeds", "memory", "prices", "network"
    network_gbs: float | None = None  # to chips of other slices; None: not known

    @property
    def device_bf16_tflops(self) -> float:
        return self.bf16_tflops / self.devices

    @property
    def device_hbm_gib(self) -> float:
        return self.hbm_gib / self.devices

    @property
    def device_hbm_gbs(self) -> float:
        return self.hbm_gbs / self.devices

    @property
    def source(self) -> str:
        return str(self.sources["speeds"])

    def slice(self, topology: str) -> "Slice":
        chips = math.prod(map(int, topology.split("x")))
        joint = "-" if self.kind == "tpu" else "x"
        return Slice(f"{self.name}{joint}{chips * self.name_counts}", self, chips, topology)


@dataclass(frozen=True)
class Slice:
    """Some chips of one kind joined by links: what a run rents. Of several such slices (2xv5p-8) all are one place:
    what they exchange goes over the data-centre network."""

    name: str  # v5p-8
    chip: Chip
    chips: int  # of all slices
    topology: str  # 2x2x1, of each slice; of GPUs, their number
    slices: int = 1

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def compiler_name(self) -> str | None:
        """What to ask the compiler for: each of several, or a machine's GPUs; None for what it cannot be told of."""
        if self.chip.kind == "gpu" and not gpus.known(self.chip.name):
            return None
        return f"{self.chip.name}:{self.topology}"

    @property
    def usd(self) -> float | None:
        """An hour of the slice on demand."""
        return None if self.chip.usd is None else self.chip.usd * self.chips

    @property
    def spot_usd(self) -> tuple[float, float] | None:
        if self.chip.spot_usd is None:
            return None
        low, high = self.chip.spot_usd
        return low * self.chips, high * self.chips

    @property
    def each(self) -> "Slice":
        """One of them."""
        return self if self.slices == 1 else self.chip.slice(self.topology)

    @property
    def network_gbs(self) -> float:
        """From one of its chips to those of other slices."""
        assert self.chip.network_gbs is not None  # nobody gets several slices of a chip of which it is not known
        return self.chip.network_gbs

    def times(self, count: int) -> "Slice":
        """So many of this slice over the data-centre network."""
        if count == 1:
            return self
        return replace(self, name=f"{count}x{self.name}", chips=count * self.chips, slices=count)

    def __str__(self) -> str:
        many = "chip" if self.chips == 1 else "chips"
        shape = f", {self.topology}" if self.chip.kind == "tpu" else ""
        shape += " each" if self.slices > 1 else ""
        return f"{self.name} ({self.chips} {many}{shape})"


def chips() -> dict[str, Chip]:
    """Every chip by name, under the user's file if there is one."""
    return _chips(os.environ.get(VARIABLE, ""))


def slices() -> list[Slice]:
    return [chip.slice(topology) for chip in chips().values() for topology in chip.slices]


def names() -> list[str]:
    return [one.name for one in slices()]


def find(name: str) -> Slice:
    """The slice of this name: v5p-8, the cloud's v5litepod-8, or the compiler's v5p:2x2x1; 2xv5p-8 is two of them."""
    wanted = name.strip().lower()
    several = re.fullmatch(r"(\d+)x([a-z].*)", wanted)
    if several:
        return _several(name, int(several[1]), find(several[2]))
    known: dict[str, Slice] = {}
    for one in slices():
        known[one.name.lower()] = one
        if one.compiler_name:
            known[one.compiler_name.lower()] = one
        for alias in one.chip.aliases:
            known[one.name.lower().replace(one.chip.name.lower(), alias.lower(), 1)] = one
    if wanted not in known:
        raise UserError(_unknown(name, wanted))
    return known[wanted]


def _several(name: str, count: int, place: Slice) -> Slice:
    if place.chip.kind != "tpu":
        raise UserError(f"{name!r}: several slices are for TPUs; of {place.chip.name} the most is one machine")
    if count == 0:
        raise UserError(f"{name!r}: no slice at all; Nx{place.name} is N slices of it, from 1")
    if count > 1 and place.chip.network_gbs is None:
        raise UserError(
            f"{name!r}: chips.{place.chip.name}.network_gbs is not known, the 10^9 bytes a second from one chip to "
            f"other slices; give it in a file that {VARIABLE} names"
        )
    return place.times(count)


def of_devices(device_kind: str, count: int, slices: int = 1) -> Slice | None:
    """The slice, or the several, that so many devices of this kind are; None for a CPU or a chip that is not in the
    table."""
    if slices > 1:
        one = of_devices(device_kind, count // slices)
        return one and one.times(slices)
    words = re.split(r"[\s-]+", device_kind)
    for chip in chips().values():
        if device_kind == chip.device_kind or chip.kind == "gpu" and chip.device_kind in words:
            number = max(1, count // chip.devices)
            listed = [one for one in map(chip.slice, chip.slices) if one.chips == number]
            return listed[0] if listed else chip.slice(str(number))
    return None


def _unknown(name: str, wanted: str) -> str:
    every = slices()
    counted = re.fullmatch(r"(.*)[-:x](\d{1,9})", wanted, re.DOTALL)
    chip, count = (counted[1], int(counted[2])) if counted else (wanted, 0)
    same = [one for one in every if chip in (one.chip.name.lower(), *one.chip.aliases)]
    if same:
        near = sorted(same, key=lambda one: abs(one.chips * one.chip.name_counts - count))[:3]
        rule = _rule(near[0].chip)
    else:
        close = difflib.get_close_matches(wanted, [one.name.lower() for one in every], 3, 0.5)
        near = [one for one in every if one.name.lower() in close]
        rule = "; ".join(_rule(one) for one in chips().values() if one.kind == "tpu")
    nearest = f"; nearest: {', '.join(map(str, near))}" if near else ""
    everything = "" if near else f"; there are: {', '.join(names())}"
    return f"{plain.shown(name)} is no slice that is known{nearest}{everything}\n{rule}"


def _rule(chip: Chip) -> str:
    """What N means in the names of this chip's slices, by an example."""
    if chip.kind == "gpu":
        return f"{chip.name}xN is N GPUs in one machine"
    every = [chip.slice(topology) for topology in chip.slices]
    example = next((one for one in every if one.chips >= 4), every[-1])
    counted = "chips" if chip.name_counts == 1 else f"cores, {chip.name_counts} to a chip"
    return f"{chip.name}-N: N counts {counted}; {example.name} is {example.chips} chips, {example.topology}"


# --- the files ---


def _positive(value: Any) -> bool:
    return plain.number(value) and value > 0


def _price(value: Any) -> bool:
    return value is None or _positive(value)


def _range(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_positive, value))
                             and value[0] <= value[1])  # fmt: skip


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and one for one in value)


def _topologies(value: Any) -> bool:
    form = r"[1-9]\d{0,4}(x[1-9]\d{0,4}){0,3}"
    return _words(value) and bool(value) and all(re.fullmatch(form, one) for one in value)


# What a key of a chip must be: words for the error, and the check.
_NUMBER, _WHOLE = "a number above 0", "an integer of at least 1"
_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # what a value must be, in words and as a check
    "kind": ("tpu or gpu", lambda value: value in ("tpu", "gpu")),
    "device_kind": ("text", lambda value: isinstance(value, str) and value != ""),
    **{key: (_NUMBER, _positive) for key in ("bf16_tflops", "hbm_gib", "hbm_gbs", "link_gbs")},
    **{key: (f"{_NUMBER}, or null", _price) for key in ("int8_tflops", "network_gbs")},
    **{key: (_WHOLE, _whole) for key in ("links", "devices", "name_counts")},
    "aliases": ("a list of text", _words),
    "slices": ('a list of topologies like "2x2x1" (of GPUs, of counts like "8")', _topologies),
    "usd": (f"{_NUMBER}, or null", _price),
    "spot_usd": ("[lowest, highest], or null", _range),
    "sources": ("a mapping", lambda value: isinstance(value, dict)),
}
_GROUPS = {
    "memory": ("hbm_gib",),
    "prices": ("usd", "spot_usd"),
    "speeds": ("bf16_tflops", "int8_tflops", "hbm_gbs", "links", "link_gbs"),
    "network": ("network_gbs",),
}


@cache
def _chips(override: str) -> dict[str, Chip]:
    table = plain.yaml_file(resolve("bundled:hardware.yaml"))["chips"]
    if override:
        table = _merged(table, plain.yaml_file(Path(override).expanduser(), f"{VARIABLE}={override}"), override)
    return {name: _chip(name, values) for name, values in table.items()}


def _chip(name: str, values: Mapping[str, Any]) -> Chip:
    lists = {key: tuple(values[key] or ()) or None for key in ("aliases", "slices", "spot_usd")}
    sources = {group: Source(str(one["from"]), str(one["date"])) for group, one in values["sources"].items()}
    return Chip(name=name, **{**values, **lists, "aliases": tuple(values["aliases"]), "sources": sources})


def _merged(table: Mapping[str, Any], given: Any, file: str) -> dict[str, Any]:
    """The bundled table under the user's; everything that is wrong with the user's, at once."""
    problems = list(_problems(table, given))
    if problems:
        raise UserError(f"{VARIABLE}={file}: these entries are wrong:\n  " + plain.first(problems, between="\n  "))
    merged = {name: dict(values) for name, values in table.items()}
    for name, changes in given["chips"].items():
        chip = merged.setdefault(name, {"sources": {}})
        touched = [group for group, keys in _GROUPS.items() if set(keys) & set(changes)]
        own = {group: {"from": file, "date": ""} for group in touched}
        sources = {**chip["sources"], **own, **changes.get("sources", {})}
        merged[name] = {**chip, **changes, "sources": sources}
    return merged


def _problems(table: Mapping[str, Any], given: Any) -> Iterator[str]:
    if not isinstance(given, dict) or not isinstance(given.get("chips"), dict):
        yield "the file must be a mapping with the key `chips`, like the bundled hardware.yaml"
        return
    for key in given:
        if key != "chips":
            yield f"{plain.below('', key)}: unknown key; the only one at the top is chips"
    for name, changes in given["chips"].items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,40}", name):
            yield f"chips: {plain.shown(name)} is no name of a chip: letters, digits, - and _ alone"
            continue
        if not isinstance(changes, dict):
            yield f"chips.{name}: must be a mapping of keys like usd"
            continue
        yield from _chip_problems(name, changes)
        missing = [key for key in _KEYS if key not in changes and key not in ("sources", "network_gbs")]
        if name not in table and missing:
            known = ", ".join(table)
            yield f"chips.{name}: a new chip (known: {known}) needs every key; missing: {', '.join(missing)}"


def _chip_problems(name: str, changes: Mapping[str, Any]) -> Iterator[str]:
    for key, value in changes.items():
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, 1)
            yield f"{plain.below(f'chips.{name}', key)}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
        elif not _KEYS[key][1](value):
            yield f"chips.{name}.{key}: {plain.shown(value)} must be {_KEYS[key][0]}"
        elif key == "sources":
            for group, source in value.items():
                if group not in _GROUPS:
                    yield f"{plain.below(f'chips.{name}.sources', group)}: unknown; it is one of {', '.join(_GROUPS)}"
                elif not isinstance(source, dict) or set(source) != {"from", "date"}:
                    yield f"chips.{name}.sources.{group}: must be {{from: …, date: …}}"
