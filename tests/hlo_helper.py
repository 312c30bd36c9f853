"""Hand-written HLO for the tests of the walk, and a slice with round figures to check it against by hand."""

from gemma_tpu.compiled.hlo import Module, parse
from gemma_tpu.hardware.chips import Chip, Slice

TERA, GIGA = 1e12, 1e9


def place(topology: str = "1x1", devices: int = 1, int8_tflops: float | None = 200.0) -> Slice:
    """A chip of 100 TFLOP/s, 1000 GB/s HBM and links of 10 GB/s."""
    chip = Chip(
        name="t", kind="tpu", bf16_tflops=100.0, int8_tflops=int8_tflops, hbm_gib=16.0, hbm_gbs=1000.0, links=4,
        link_gbs=10.0, devices=devices, name_counts=1, aliases=(), slices=(topology,), usd=None, spot_usd=None,
        sources={}, device_kind="t",
    )  # fmt: skip
    return chip.slice(topology)


def module(*computations: str, partitions: int = 1) -> Module:
    return parse(text(*computations, partitions=partitions))


def text(*computations: str, partitions: int = 1) -> str:
    """A module of these computations; the last is the entry."""
    head = f"HloModule jit_step, is_scheduled=true, num_partitions={partitions}"
    *others, entry = (one.strip("\n") for one in computations)
    return "\n\n".join((head, *others, f"ENTRY {entry}")) + "\n"
