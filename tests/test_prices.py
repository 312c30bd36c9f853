"""Price sets: layers, own hardware, and everything that is wrong with one said at once."""

import pytest

from gemma_tpu.errors import UserError
from gemma_tpu.hardware import chips, prices


def write(folder, text):
    file = folder / "mine.yaml"
    file.write_text(text)
    return str(file)


def test_every_bundled_figure_has_a_source_and_a_date():
    for name in prices.names():
        found = prices.load(name)
        sources = [one.source for table in (found.machines, found.owned, found.values) for one in table.values()]
        assert sources and all(one.text and one.date for one in sources)


def test_a_file_says_what_differs_and_the_rest_lies_below(tmp_path):
    file = write(tmp_path, "machines:\n  v6e-8: {usd_hour: 17.2, spot_usd_hour: [6, 8.5], from: us, date: 2026-11}\n")
    found, place = prices.load(file), chips.find("v6e-8")
    assert found.hour(place).usd == 17.2
    assert found.hour(place, "spot").low == 6 and found.hour(place, "spot").usd == 7.25
    assert "us, 2026-11" in found.hour(place).source
    assert found["engineering.usd_hour"] == prices.load()["engineering.usd_hour"]
    assert found.hour(chips.find("v5p-8")).usd == pytest.approx(16.80)  # hardware.yaml


def test_a_value_of_the_command_line_wins_and_says_so():
    found = prices.load(overrides=["engineering.usd_hour=140"])
    assert found["engineering.usd_hour"] == 140 and "the command line" in found.told("engineering.usd_hour")[0]


def test_own_hardware_is_capital_upkeep_and_power_over_the_hours_that_are_used():
    settings = {"years": 4, "utilisation": 0.5, "upkeep_per_year": 0.1, "idle_power": 0.2, "usd_kwh": 0.2, "pue": 1.5}
    found = prices.load(overrides=[f"own.{key}={value}" for key, value in settings.items()])
    one, hours_a_year = found.owned["h100"], 365 * 24
    capital = one.usd / (4 * hours_a_year * 0.5) + 0.1 * one.usd / (hours_a_year * 0.5)
    power = one.watts / 1000 * 1.5 * 0.2 * (0.5 + 0.5 * 0.2) / 0.5
    assert found.hour(chips.find("h100x8"), "own").usd == pytest.approx(8 * (capital + power))


def test_what_has_no_price_is_refused_with_what_to_do():
    found = prices.load()
    with pytest.raises(UserError, match="tpu7x-8: no on-demand price is known; put machines.tpu7x-8.usd_hour"):
        found.hour(chips.find("tpu7x-8"))
    with pytest.raises(UserError, match="TPUs are rented, not sold"):
        found.hour(chips.find("v6e-8"), "own")


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    file = write(tmp_path, """
machine: {}
machines:
  v6e-9: {usd_hour: 1, from: a, date: b}
  v6e-8: {usd: 1, from: a}
  v5p-8: {usd_hour: -1, spot_usd_hour: [2, 1], from: a, date: b}
own:
  v5e: {usd: 1, watts: 1, from: a, date: b}
  h10: {usd: 1, watts: 1, from: a, date: b}
values:
  engineering.usd_hours: {value: 1, from: a, date: b}
  own.utilisation: {value: 1.5, from: a, date: b}
  own.pue: {value: 0.5, from: a, date: b}
  own.years: {value: 0, from: a, date: b}
  own.usd_kwh: {value: null, from: a, date: b}
""")
    with pytest.raises(UserError) as error:
        prices.load(file)
    for words in (
        "machine: unknown key; did you mean machines?", "'v6e-9' is no slice", "machines.v6e-8.usd: unknown key",
        "machines.v6e-8.usd_hour: is missing", "machines.v6e-8.date: is missing; a figure without its source",
        "machines.v5p-8.usd_hour: -1 must be", "[2, 1] must be [lowest, highest]", "own.v5e: TPUs are rented",
        "own.h10: unknown chip; did you mean h100?", "did you mean engineering.usd_hour?",
        "own.utilisation: 1.5 must be a share", "own.pue: 0.5 must be at least 1", "own.years: 0 must be a number",
        "own.usd_kwh: None must be a number",
    ):  # fmt: skip
        assert words in str(error.value)


@pytest.mark.parametrize(("text", "words"), [
    ("engineering.usd_hour", "must be key=value"), ("engineering.usd_hour=much", "'much' must be a number"),
    ("engineering.rate=1", "unknown; did you mean"),
])  # fmt: skip
def test_a_wrong_override_says_its_rule(text, words):
    with pytest.raises(UserError, match=words):
        prices.load(overrides=[text])


def test_a_name_that_is_no_set_is_met_with_the_nearest():
    with pytest.raises(UserError, match="did you mean paper-2026-05"):
        prices.load("paper-2026-5")


def test_layers_that_go_round_are_refused(tmp_path):
    file = write(tmp_path, f"over: {tmp_path / 'mine.yaml'}\n")
    with pytest.raises(UserError, match="goes round in a circle"):
        prices.load(file)


def test_a_set_that_stands_on_nothing_must_hold_every_value(tmp_path):
    file = write(tmp_path, "over: null\nvalues: {own.pue: {value: 1.2, from: a, date: b}}\n")
    with pytest.raises(UserError, match="lacks the values compile.tpu_minutes, .*over: catalogue") as error:
        prices.load(file)
    assert "own.utilisation" in str(error.value) and "own.pue" not in str(error.value)
