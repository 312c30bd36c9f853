"""The paper's tables of cost by our own arithmetic, and every figure of it that cannot stand."""

import math

import pytest

from gemma_tpu.costs import paper
from gemma_tpu.costs.paper import shown

FOUND = {one.id: one for one in paper.discrepancies()}
CELLS = [
    (table, what, kind, one) for table, rows in paper.tables() for what, _, cells in rows
    for kind, one in zip(("TPU", "GPU", "ratio"), cells, strict=True) if one is not None
]  # fmt: skip
# The cells that the paper has wrong; all others come out as printed.
WRONG = {"6.10", "12.68", "2.08", "4.27", "4.13", "4.95"}


@pytest.mark.parametrize(("table", "what", "kind", "cell"), CELLS, ids=[f"{c[0][6:9]}-{c[1]}-{c[2]}" for c in CELLS])
def test_every_cell_comes_out_as_printed_or_is_known_to_be_wrong(table, what, kind, cell):
    printed = shown(cell.printed, cell.digits)
    assert cell.agrees == (printed not in WRONG), f"{table}, {what}, {kind}: {printed}, computed {cell.value}"


def test_all_three_tables_are_there():
    assert [name[:9] for name, _ in paper.tables()] == ["Table 5.4", "Table 8.6", "Table 9: "]
    assert len(CELLS) == 8 + 3 + 10 + 10


@pytest.mark.parametrize("name", FOUND)
def test_a_discrepancy_is_what_is_computed_and_not_what_is_printed(name):
    one = FOUND[name]
    assert shown(one.value, one.digits) == shown(one.computed, one.digits)
    assert shown(one.value, one.digits) != shown(one.printed, one.digits)
    assert one.place and one.why


# Each of the figures once more from the bare measurements, past our own code.
@pytest.mark.parametrize(("name", "value"), [
    ("train-million-tpu", 16.80 / (763 * 3600) * 1e6), ("train-million-gpu", 22.12 / (486 * 3600) * 1e6),
    ("train-million-ratio", (22.12 / 486) / (16.80 / 763)), ("serve-million-tpu-short", 21.52 / (1403 * 3600) * 1e6),
    ("serve-million-tpu-long", 21.52 / (1206 * 3600) * 1e6), ("serve-million-gpu-short", 22.12 / (1490 * 3600) * 1e6),
    ("day-ratio", (22.12 * 5.39 + 24 * 22.12) / (16.80 * 3.34 + 24 * 21.52)), ("steps-625", 10_000 / 625),
    ("rows-in-steps", 10_000 // 8), ("none-passed-tpu", 156 - 0.7949 * 156), ("none-passed-gpu", 156 - 0.8141 * 156),
    ("pass5-tpu", 1 - 50 / 156), ("pass5-gpu", 1 - 39 / 156), ("loss-masks", math.exp(2.258 - 0.072)),
    ("saturation-tpu", 1404 / 512), ("saturation-gpu", 1387 / 512), ("seconds-per-sample", 5.39 * 3600 / 9959),
    ("tokens-trained", 5.39 * 486 / (3.34 * 763)),
])  # fmt: skip
def test_it_follows_from_the_measurements_alone(name, value):
    assert FOUND[name].value == pytest.approx(value, rel=1e-3)


def test_182_is_one_hour_of_serving():
    assert shown(paper.values()["total.1.ratio"], 2) == "1.82"


def test_only_the_length_that_drops_37_rows_takes_1244_steps():
    assert (10_000 - 4 - 37) // 8 == 1244 and (10_000 - 4) // 8 == 1249
    assert FOUND["sequence-length"].value == 3072


def test_4_13_comes_of_rounding_twice():
    assert shown(22.12 / 5.364, 2) == "4.12" and shown(22.12 / 5.36, 2) == "4.13"


def test_the_masks_of_the_two_losses_take_different_tokens(tmp_path):
    """What the paper compares: the mean over the answer and the mean over the whole row, of the same rows."""
    from gemma_tpu.config import load
    from gemma_tpu.data.corpus import prepare
    from gemma_tpu.data.tokenizer import Tokenizer
    from gemma_tpu.tiny.checkpoint import write_tiny

    tokenizer = Tokenizer(str(write_tiny(tmp_path / "tiny")))
    given = ["data.cache=null", "data.limit=40"]
    counts = {mask: prepare(load("tiny_cpu.yaml", [*given, f"data.train_on={mask}"]).data, tokenizer).target_tokens
              for mask in ("assistant", "all")}  # fmt: skip
    assert counts["assistant"] < 0.8 * counts["all"]


def test_pass_at_1_is_a_whole_number_of_samples():
    assert paper.values()["passed.tpu"] == pytest.approx(500, abs=0.05)
    assert paper.values()["passed.gpu"] == pytest.approx(544, abs=0.05)


def test_measured_servers_stay_below_the_bound():
    for kind in paper.KINDS:
        for point in paper.data()["measured"]["serving"]["points"]:
            assert 0.1 < paper.serving(kind, point["prompt"]).of_bound < 1
        assert 0.1 < paper.reached(kind) < 1
