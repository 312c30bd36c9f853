"""What the cloud wants to be told to create a slice: bundled/clouds.yaml, under the user's own file."""

from collections.abc import Mapping
from dataclasses import dataclass

from gemma_tpu import overlay
from gemma_tpu.errors import UserError
from gemma_tpu.hardware.chips import Slice, Source

VARIABLE = "GEMMA_TPU_CLOUDS"
PER_HOST = 4  # chips of each machine of a slice of several


@dataclass(frozen=True)
class Machine:
    """A slice as the cloud has it."""

    slice: Slice
    runtime: str | None  # None: GKE alone
    accelerator: str  # v5litepod-8
    zones: tuple[str, ...]
    hosts: int
    machine: str  # type of each of its nodes on GKE
    label: str
    sources: Mapping[str, Source]

    @property
    def chips_per_host(self) -> int:
        return self.slice.chips // self.hosts

    @property
    def regions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(map(region_of, self.zones)))


def region_of(zone: str) -> str:
    return zone.rpartition("-")[0]


def machine_of(place: Slice) -> Machine:
    if place.slices > 1:
        raise UserError(
            f"{place.name}: launch creates one slice; create the {place.slices} by hand (one queued resource with "
            f"--node-count {place.slices}, or a JobSet with {place.slices} replicas) and run `gemma-tpu train` on "
            "every host of them"
        )
    tpus = overlay.load("clouds.yaml", VARIABLE, open_at=("tpus",))["tpus"]
    one = tpus.get(place.chip.name)
    if one is None:
        raise UserError(
            f"{place.name}: no cloud is known that rents it by these commands; launch knows {', '.join(tpus)}. For a "
            f"machine of your own, run `gemma-tpu train` on it"
        )
    if not one["zones"]:
        raise UserError(f"tpus.{place.chip.name}.zones: is empty; name a zone, there or with --zone")
    alone = one["single_host"].get(place.chips)
    return Machine(
        slice=place, runtime=one["runtime"], zones=tuple(one["zones"]),
        accelerator=f"{one['accelerator']}-{place.chips * place.chip.name_counts}",
        hosts=1 if alone else place.chips // PER_HOST, machine=alone or one["multi_host"], label=one["label"],
        sources={name: Source(str(source["from"]), str(source["date"])) for name, source in one["sources"].items()},
    )  # fmt: skip
