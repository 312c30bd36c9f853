"""Price sets as data: an hour of a slice, hardware of one's own, storage, engineers; each with its source and date.

A set is a file in bundled/prices/ or the user's own; it lies over another (`over:`), and all over hardware.yaml.
"""

import difflib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_tpu import plain
from gemma_tpu.assets import resolve
from gemma_tpu.errors import UserError
from gemma_tpu.hardware import chips
from gemma_tpu.hardware.chips import Slice, Source

DEFAULT = "catalogue-2026-11"
FOLDER = "bundled:prices"
WAYS = ("on-demand", "spot", "own")
SECTIONS = ("over", "machines", "own", "values")
MACHINE = {"usd_hour": True, "spot_usd_hour": False, "from": True, "date": True}  # key: must be there
OWN = {"usd": True, "watts": True, "from": True, "date": True}
VALUE = {"value": True, "from": True, "date": True}
SHARES = ("own.utilisation", "own.upkeep_per_year", "own.idle_power")
MAY_BE_ZERO = ("spot.preemptions_per_hour", "spot.save_seconds", "spot.restart_minutes", "own.upkeep_per_year",
               "own.idle_power", "own.usd_kwh", "storage.usd_gb_month", "engineering.usd_hour",
               "porting.tpu_hours", "compile.tpu_minutes")  # fmt: skip


@dataclass(frozen=True)
class Value:
    value: float
    source: Source


@dataclass(frozen=True)
class Machine:
    usd_hour: float
    spot: tuple[float, float] | None
    source: Source


@dataclass(frozen=True)
class Owned:
    usd: float  # of one chip with its share of the server
    watts: float
    source: Source


@dataclass(frozen=True)
class Hour:
    """What an hour of a slice costs, and by whose word. A spot price is a range; elsewhere both ends are equal."""

    low: float
    high: float
    way: str
    source: str

    @property
    def usd(self) -> float:
        return (self.low + self.high) / 2


@dataclass(frozen=True)
class Prices:
    name: str
    machines: Mapping[str, Machine]
    owned: Mapping[str, Owned]
    values: Mapping[str, Value]

    def __getitem__(self, name: str) -> float:
        return self.values[name].value

    def hour(self, place: Slice, way: str = "on-demand") -> Hour:
        """Without preemptions: what they add is of the run, not of the hour."""
        found = {"on-demand": self._on_demand, "spot": self._spot, "own": self._own}[way](place)
        if found is None:
            raise UserError(self._unknown(place, way))
        return found

    def knows(self, place: Slice, way: str) -> bool:
        return {"on-demand": self._on_demand, "spot": self._spot, "own": self._own}[way](place) is not None

    def _on_demand(self, place: Slice) -> Hour | None:
        if place.name in self.machines:
            one = self.machines[place.name]
            return Hour(one.usd_hour, one.usd_hour, "on-demand", str(one.source))
        if place.usd is None:
            return None
        return Hour(place.usd, place.usd, "on-demand", str(place.chip.sources["prices"]))

    def _spot(self, place: Slice) -> Hour | None:
        one = self.machines.get(place.name)
        if one is not None and one.spot is not None:
            return Hour(*one.spot, "spot", str(one.source))
        return place.spot_usd and Hour(*place.spot_usd, "spot", str(place.chip.sources["prices"]))

    def _own(self, place: Slice) -> Hour | None:
        """An hour of paid work: capital and upkeep over the hours that are used, and power, idle hours included."""
        one = self.owned.get(place.chip.name)
        if one is None:
            return None
        used = self["own.utilisation"]
        capital = one.usd * (1 / self["own.years"] + self["own.upkeep_per_year"]) / (365 * 24)
        power = one.watts / 1000 * self["own.pue"] * self["own.usd_kwh"] * (used + (1 - used) * self["own.idle_power"])
        usd = place.chips * (capital + power) / used
        told = (f"{one.source}; over {self['own.years']:g} years, used {used:.0%} of the time, power at "
                f"${self['own.usd_kwh']:g} a kWh")  # fmt: skip
        return Hour(usd, usd, "own", told)

    def _unknown(self, place: Slice, way: str) -> str:
        if way == "own" and place.chip.kind == "tpu":
            return f"{place.name}: TPUs are rented, not sold: there is no hardware of one's own to reckon with"
        key = {"on-demand": f"machines.{place.name}.usd_hour", "spot": f"machines.{place.name}.spot_usd_hour",
               "own": f"own.{place.chip.name}"}[way]  # fmt: skip
        return f"{place.name}: no {way} price is known; put {key}, from and date into a file and give it as --prices"

    def sources(self, places: Sequence[Slice], way: str) -> list[str]:
        """Where the figures come from that a cost was made of: the slices of one source in one line."""
        found: dict[str, list[str]] = {}
        for place in places:
            if self.knows(place, way):
                found.setdefault(self.hour(place, way).source, []).append(place.name)
        return [f"{', '.join(dict.fromkeys(names))}, {way}: {source}" for source, names in found.items()]

    def told(self, *names: str) -> list[str]:
        return [f"{name} {self[name]:g}: {self.values[name].source}" for name in names]


# --- the files ---


def names() -> list[str]:
    return sorted(path.stem for path in resolve(FOLDER).glob("*.yaml"))


def load(name: str = DEFAULT, overrides: Sequence[str] = ()) -> Prices:
    """The set of that name or file, over the one that it names, under `key=value` overrides of its values."""
    layers = [_read(name)]
    while layers[-1][1].get("over"):
        layers.append(_read(str(layers[-1][1]["over"])))
        if len(layers) > 8:
            chain = " over ".join(one[0] for one in layers)
            raise UserError(f"--prices {name}: `over` goes round in a circle: {chain}")
    merged: dict[str, dict[str, Any]] = {"machines": {}, "own": {}, "values": {}}
    for _, tree in reversed(layers):
        for section in merged:
            merged[section] |= tree.get(section) or {}
    missing = [] if name == DEFAULT else sorted(load().values.keys() - merged["values"].keys())
    if missing:
        raise UserError(
            f"--prices {name}: lies over no other set, and lacks the values {plain.first(missing)}; "
            f"add them, or let it lie over {DEFAULT} (over: {DEFAULT})"
        )
    found = Prices(
        name, {chips.find(key).name: _machine(one) for key, one in merged["machines"].items()},
        {key: Owned(float(one["usd"]), float(one["watts"]), _source(one)) for key, one in merged["own"].items()},
        {key: Value(float(one["value"]), _source(one)) for key, one in merged["values"].items()},
    )  # fmt: skip
    return _overridden(found, overrides)


def _machine(one: Mapping[str, Any]) -> Machine:
    spot = one.get("spot_usd_hour")
    return Machine(float(one["usd_hour"]), None if spot is None else (float(spot[0]), float(spot[1])), _source(one))


def _source(one: Mapping[str, Any]) -> Source:
    return Source(str(one["from"]), str(one["date"]))


def _overridden(found: Prices, overrides: Sequence[str]) -> Prices:
    values, problems = dict(found.values), []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            problems.append(f"{text!r}: must be key=value, like engineering.usd_hour=140")
            continue
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        wrong = list(_value_problems(key, {"value": number, "from": "the command line", "date": ""}, values))
        problems += [one.replace(": nan ", f": {value!r} ") for one in wrong]
        if not wrong:
            values[key] = Value(number, Source("the command line", ""))
    if problems:
        raise UserError("these values are wrong:\n  " + "\n  ".join(problems))
    return replace(found, values=values)


def _read(name: str) -> tuple[str, dict[str, Any]]:
    bundled = resolve(f"{FOLDER}/{name}.yaml")
    path = bundled if name in names() else Path(os.path.expanduser(name))
    if not os.path.isfile(path):  # unlike Path's, no error where the name is too long for one
        near = difflib.get_close_matches(name, names(), 1, 0.4)
        meant = f"; did you mean {near[0]}?" if near else ""
        known = ", ".join(names())
        raise UserError(f"--prices {plain.cut(name, 200)}: no such file, and no bundled set ({known}){meant}")
    tree = plain.yaml_file(path, f"--prices {path}")
    if isinstance(tree, dict) and "over" not in tree and path != bundled:
        tree["over"] = DEFAULT  # a file of the user's says what differs, and no more
    problems = list(_problems(tree, bundled == path))
    if problems:
        raise UserError(f"--prices {path}: these entries are wrong:\n  " + plain.first(problems, between="\n  "))
    return name, tree


# --- what is wrong with one ---


def _problems(tree: Any, bundled: bool) -> Iterator[str]:
    if not isinstance(tree, dict):
        yield f"the file must be a mapping with some of the keys {', '.join(SECTIONS)}"
        return
    for key, section in tree.items():
        if key not in SECTIONS:
            yield f"{plain.below('', key)}: unknown key{_near(key, SECTIONS)}"
        elif key == "over" and not isinstance(section, str | None):
            yield f"over: {plain.shown(section)} must be the name of a price set or a file"
        elif key != "over" and not isinstance(section or {}, dict):
            yield f"{key}: must be a mapping"
    known = {} if bundled else load().values
    for name, one in _entries(tree, "machines"):
        try:
            chips.find(str(name))
        except UserError as error:
            yield f"{plain.below('machines', name)}: {str(error).splitlines()[0]}"
        yield from _entry_problems(plain.below("machines", name), one, MACHINE, ("usd_hour",))
        spot = one.get("spot_usd_hour") if isinstance(one, dict) else None
        ends = spot if isinstance(spot, list) and len(spot) == 2 and all(map(_positive, spot)) else None
        if spot is not None and (ends is None or ends[0] > ends[1]):
            named = plain.below("machines", name)
            yield f"{named}.spot_usd_hour: {plain.shown(spot)} must be [lowest, highest], numbers above 0"
    for name, one in _entries(tree, "own"):
        if name not in chips.chips():
            yield f"{plain.below('own', name)}: unknown chip{_near(name, chips.chips())}"
        elif chips.chips()[name].kind == "tpu":
            yield f"own.{name}: TPUs are rented, not sold"
        yield from _entry_problems(plain.below("own", name), one, OWN, ("usd", "watts"))
    for name, one in _entries(tree, "values"):
        yield from _value_problems(name, one, known)


def _entries(tree: Mapping[str, Any], section: str) -> list[tuple[str, Any]]:
    found = tree.get(section) or {}
    return list(found.items()) if isinstance(found, dict) else []


def _entry_problems(name: str, one: Any, keys: Mapping[str, bool], numbers: Sequence[str]) -> Iterator[str]:
    if not isinstance(one, dict):
        yield f"{name}: must be a mapping like {{{', '.join(f'{key}: …' for key, must in keys.items() if must)}}}"
        return
    for key in one:
        if key not in keys:
            yield f"{plain.below(name, key)}: unknown key{_near(key, keys)}"
    for key, must in keys.items():
        if must and key not in one:
            why = "; a figure without its source cannot be checked" if key in ("from", "date") else ""
            yield f"{name}.{key}: is missing{why}"
    for key in numbers:
        if key in one and not _positive(one[key]):
            yield f"{name}.{key}: {plain.shown(one[key])} must be a number above 0"


def _value_problems(name: str, one: Any, known: Mapping[str, Value]) -> Iterator[str]:
    if known and name not in known:
        yield f"{plain.below('', name)}: unknown{_near(name, known)}"
        return
    yield from _entry_problems(f"values.{name}", one, VALUE, ())
    if not isinstance(one, dict) or "value" not in one:
        return
    value = one["value"]
    if not _positive(value) and not (name in MAY_BE_ZERO and value == 0 and type(value) in (int, float)):
        yield f"{name}: {plain.shown(value)} must be a number {'of at least' if name in MAY_BE_ZERO else 'above'} 0"
    elif name in SHARES and value > 1:
        yield f"{name}: {value!r} must be a share, from 0 to 1"
    elif name == "own.pue" and value < 1:
        yield f"{name}: {value!r} must be at least 1: a hall draws no less than its machines"


def _positive(value: Any) -> bool:
    return plain.number(value) and value > 0


def _near(name: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(name), [str(one) for one in known], 1, 0.5)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(map(str, known))}"
