"""A walk over the scheduled program: how long one step takes on a slice, and where the time goes.

Each instruction costs the larger of its operations over the peak and its bytes over the HBM bandwidth, times the
trips of the loops around it. Copies and collectives that are started and finished apart run beside what is
scheduled between; only the rest is waited for. Nothing here was measured: it is a bound with perfect kernels.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_tpu.compiled import hlo, links
from gemma_tpu.compiled.hlo import HOST, Computation, Instruction, Module
from gemma_tpu.compiled.timeline import Pending, Timeline
from gemma_tpu.compiled.traffic import FREE
from gemma_tpu.compiled.trips import trip_count
from gemma_tpu.compiled.work import Works, shapes_of
from gemma_tpu.hardware.chips import Slice

SCHEDULE = "*after_optimizations_after_buffer_assignment.txt"
GPU_SCHEDULE = "*gpu_after_optimizations.txt"
CODEGEN = "*after_codegen.txt"  # the same schedule after code generation, with the compiler's cycles
HOST_GBS = {"tpu": 16.0, "gpu": 25.0}  # one chip's share of the way to the host's memory; of GPUs PCIe 4.0 x16
HOST_LINK = "host"
SLICE_IDS = 100_000  # the compiler numbers the devices of several slices from 100000, from 200000 and so on
NETWORK_LINK = "network"  # to the other slices
# From the peak over what the matrix units do in a cycle: 4 of 128 x 128 (v5e), 8 (v5p), 4 of 256 x 256 a core.
CLOCK_GHZ = {"v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}
ASSUMPTIONS = (
    "each instruction takes the larger of FLOPs over peak and HBM bytes over bandwidth: products at the full peak "
    "whatever their shape, each operand read once, no time for vector work, for starting an instruction, or for VMEM",
    "float32 products take 1 pass of bf16 at the default precision, 3 at high, 6 at highest",
    "copies between HBM and VMEM run beside compute in the bandwidth that it leaves, one after another",
    "collectives on the links at the same time share each link equally; what they read and write in HBM beside "
    "compute is not counted",
    "of a loop the first turn and a second are walked; the second stands for all that follow",
)
GPU_ASSUMPTIONS = (
    "each instruction takes the larger of FLOPs over peak and bytes over the memory's bandwidth: products at the full "
    "dense peak of the datasheet, which none reaches, each operand read once from memory and nothing from a cache, no "
    "time for vector work or for starting a kernel",
    "float32 products take 1 pass at the default precision, 3 at high, 6 at highest",
    "collectives go through a switch, each GPU at its full rate in each direction; at the same time they share it; the "
    "cores that they take from compute are not counted",
    ASSUMPTIONS[-1],
)


@dataclass
class Cost:
    """What one source line costs, over all of the places and trips where it is executed."""

    name: str
    kind: str
    seconds: float = 0.0
    count: int = 0
    flops: float = 0.0
    bytes: float = 0.0  # in HBM; of a collective, over the links


@dataclass
class Walk:
    seconds: float
    by_kind: dict[str, float]  # seconds; they sum to `seconds`
    hidden_seconds: float  # of collectives, beside compute
    flops: float  # of one device, executed: what is recomputed counts
    hbm_bytes: float
    collective_bytes: float  # received over the links by one device
    costs: list[Cost]  # the largest first
    assumptions: list[str]
    unknown: list[str]
    cycles_seconds: float | None = None  # the same walk with the compiler's cycles, where the dump has them


def walk(files: Path | Sequence[Path], place: Slice, clock_ghz: float | None = None) -> Walk:
    """Walk the dump of one compiled step. `files` is the dump's folder or the texts of its modules."""
    main = schedule(files)
    module = hlo.load(main)
    clock = clock_ghz or CLOCK_GHZ.get(place.chip.name)
    works = Works(module, place, clock)
    grid = _grid(place, main)
    grid.keep_distinct(works.transfers())
    walker = Walker(module, place, works, grid)
    found = walker.walk()
    if walker.has_cycles:
        found.cycles_seconds = Walker(module, place, works, grid, by_cycles=True).walk().seconds
        found.assumptions.append(
            f"cycles: the compiler's estimates at {clock:g} GHz for what has one; kernels, copies and collectives "
            f"as in the roofline walk"
        )
    return found


def schedule(files: Path | Sequence[Path]) -> Path:
    """The text of the main module: with cycles if there is one, the largest where helper modules lie beside it."""
    if isinstance(files, Path):
        patterns = (CODEGEN, SCHEDULE, GPU_SCHEDULE)
        found = [files] if files.is_file() else next(filter(None, (list(files.glob(one)) for one in patterns)), [])
    else:
        found = list(files)
    if not found:
        raise FileNotFoundError(f"{files}: no {SCHEDULE} in it; compile with xla_dump_to and xla_dump_hlo_as_text")
    return max(found, key=lambda path: path.stat().st_size)


def _grid(place: Slice, main: Path) -> links.Grid | links.Switch:
    if place.chip.kind == "gpu":
        return links.Switch(place)
    return links.Grid(place.each, *physical(main))  # of several slices the program is that of one


def physical(main: Path) -> tuple[tuple[bool, ...] | None, tuple[int, ...] | None]:
    """Wrap-around links and the device of each partition, where the dump's other files tell them."""
    stem = re.sub(r"\.(after_codegen|after_optimizations_after_buffer_assignment)\.txt$", "", str(main))
    options, target = Path(f"{stem}.execution_options.txt"), Path(f"{stem}.target_arguments.txt")
    wrap = order = None
    if target.exists():
        found = re.search(r"\bwrap \{([^}]*)\}", target.read_text())
        wrap = tuple(bool(re.search(rf"\b{axis}: true", found[1])) for axis in "xyz") if found else None
    if options.exists():
        ids = map(int, re.findall(r"replica_device_ids: (\d+)", options.read_text()))
        order = tuple(one % SLICE_IDS for one in ids if one < 2 * SLICE_IDS) or None
    return wrap, order


def _rendezvous(each: Instruction) -> tuple[str, str]:
    """Of a send or recv between slices: the name that both carry, and what the slices do with the data."""
    found = [re.search(rf'{key}="([^"]*)"', each.attributes)
             for key in ("_xla_host_transfer_rendezvous", "_xla_megascale_transfer_type")]  # fmt: skip
    name, kind = (one[1] if one else "unnamed" for one in found)
    return name, kind


class Walker:
    """One walk over one module."""

    def __init__(
        self, module: Module, place: Slice, works: Works, grid: links.Grid | links.Switch, by_cycles: bool = False
    ):
        self.module, self.place, self.works, self.grid, self.by_cycles = module, place, works, grid, by_cycles
        self.time = Timeline()
        self.has_cycles = False
        self.by_kind: defaultdict[str, float] = defaultdict(float)
        self.hidden = self.flops = self.bytes = self.links = 0.0  # of the whole walk, as Walk has them
        self.costs: dict[tuple[str, str], Cost] = {}
        self.assumptions: dict[str, None] = {}
        self.unknown: Counter[str] = Counter()

    def walk(self) -> Walk:
        self._computation(self.module.entry, 1, {})
        chip = self.place.chip
        told = [
            f"peaks of one device of {self.place}: {chip.device_bf16_tflops:g} bf16 TFLOP/s, "
            f"{chip.device_hbm_gbs:g} GB/s HBM, {chip.link_gbs:g} GB/s one link, one direction",
            f"links: {self.grid.told}",
        ]
        assumed = GPU_ASSUMPTIONS if chip.kind == "gpu" else ASSUMPTIONS
        unknown = self.works.unknown + self.unknown
        return Walk(
            seconds=self.time.now,
            by_kind=dict(sorted(self.by_kind.items(), key=lambda one: -one[1])),
            hidden_seconds=self.hidden,
            flops=self.flops,
            hbm_bytes=self.bytes,
            collective_bytes=self.links,
            costs=sorted(self.costs.values(), key=lambda cost: -cost.seconds),
            assumptions=[*told, *assumed, *self.works.assumptions, *self.assumptions],
            unknown=[f"{name}: {count}" for name, count in unknown.items()],
        )

    # --- the order of things ---

    def _computation(self, here: Computation, times: int, carried: dict[int, str]) -> None:
        """Walk one computation. `carried`: by place in its tuple, what was started before and is finished inside."""
        for each in here.instructions:
            if each.opcode == "while":
                self._loop(each, here, times, carried)
            elif each.opcode in ("call", "conditional"):
                self._branches(each, times)
            elif self.place.slices > 1 and each.opcode in ("recv", "send-done"):
                pass  # the send and the recv-done are looked at
            elif self.place.slices > 1 and each.opcode == "send":
                self._send_across(each, here, times)
            elif self.place.slices > 1 and each.opcode == "recv-done":
                self._received_across(each, here, times)
            elif each.opcode.endswith("-done") or self.works.end(each) == "AsyncCollectiveDone":
                self._done(each, here, times, carried)
            elif each.opcode.endswith(("-start", "-update")) or self.works.end(each) == "AsyncCollectiveStart":
                self._start(each, here, times)
            elif each.opcode not in FREE:
                self._run(each, here, times)

    def _loop(self, loop: Instruction, here: Computation, times: int, carried: dict[int, str]) -> None:
        """The first turn, then a second one that stands for all others."""
        trips, assumed = trip_count(self.module, loop, here)
        if assumed:
            self.assumptions[assumed] = None
        if trips is None:
            self.unknown[f"trips of the loop {loop.name}, taken as 1"] += 1
            trips = 1
        body = self.module.called(loop, "body")
        first = self._carried(here, loop.operands[0], carried)
        if trips:
            self._computation(body, times, first)
        if trips > 1:
            before = self.time.now
            self._computation(body, times * (trips - 1), self._carried(body, body.root.name, first))
            self.time.skip((self.time.now - before) * (trips - 2))

    def _carried(self, here: Computation, name: str, carried: dict[int, str]) -> dict[int, str]:
        made = here.by_name.get(name)
        if made is None or made.opcode != "tuple":
            return {}
        return {place: self._origin(here, operand, carried) for place, operand in enumerate(made.operands)}

    def _origin(self, here: Computation, name: str, carried: dict[int, str]) -> str:
        """The instruction that started what `name` refers to, followed through tuples and loops."""
        made = here.by_name.get(name)
        while made is not None:
            name = made.name
            source = here.by_name.get(made.operands[0]) if made.operands else None
            if made.opcode == "get-tuple-element" and source is not None:
                place = made.index
                if source.opcode == "parameter":
                    return carried.get(place, name)
                if source.opcode == "while":
                    body = self.module.called(source, "body")
                    return self._carried(body, body.root.name, {}).get(place, name)
                made = here.by_name.get(source.operands[place]) if source.opcode == "tuple" else None
            elif made.opcode == "async-update" and source is not None and source.operands:
                made = source
            else:  # an async-update of an empty start included: its operands come, and it begins, only then
                return name
        return name

    def _branches(self, call: Instruction, times: int) -> None:
        """A call is walked in place; of a conditional the longest branch."""
        options = [self.module.computations[name] for name in call.called]
        if call.opcode == "conditional":
            self.assumptions["a conditional takes the branch with the most instructions every time"] = None
        self._computation(max(options, key=lambda one: len(one.instructions)), times, {})

    # --- what begins and ends apart ---

    def _start(self, each: Instruction, here: Computation, times: int) -> None:
        begun = each
        if each.opcode == "async-start" and not each.operands:
            return  # it begins with the async-update that brings its operands
        if each.opcode == "async-update":
            begun = here.by_name.get(each.operands[0], each)
            if begun.operands:
                return  # it began with its async-start
        found = self.works.collective(begun, here)
        key = f"channel {found[0].channel}" if found and self.works.end(each) else each.name
        if found:
            self._send(key, self.works.name(found[0]), self.works.transfer(*found), times)
        else:
            self._copy(key, begun, each, here, times)

    def _send(self, key: str, name: str, transfer: links.Transfer | None, times: int) -> None:
        if transfer is None:
            self.time.start(key, Pending(name, "collective", 0.0, 0.0, self.time.send({})))
            return
        loads = self.grid.loads(transfer)
        self.links += transfer.bytes * times
        alone = max(loads.values(), default=0.0)
        self.time.start(key, Pending(name, "collective", alone, transfer.bytes, self.time.send(loads)))

    def _send_across(self, each: Instruction, here: Computation, times: int) -> None:
        """A sum with the other slices begins with its send; the end of the recv of the same name waits for it."""
        key, kind = _rendezvous(each)
        if kind != "ALL_REDUCE":
            self.unknown[f"{kind} between slices, taken for an all-reduce"] += times
        count, chip = self.place.slices, self.place.chip
        moved = 2 * (count - 1) / count * sum(shape.bytes for shape in shapes_of(each, here))
        alone = moved * chip.devices / (self.place.network_gbs * 1e9)
        self.links += moved * times
        self.assumptions[
            f"the network between slices: {self.place.network_gbs:g} GB/s a chip ({chip.sources['network']}); a sum "
            "goes round the slices as a ring, and the way through the hosts costs nothing"
        ] = None
        made = Pending(f"sum over the slices, {key}", "network", alone, moved, self.time.send({NETWORK_LINK: alone}))
        self.time.start(key, made)

    def _received_across(self, each: Instruction, here: Computation, times: int) -> None:
        made = self.time.take(_rendezvous(here.by_name[each.operands[0]])[0])
        if made is None:
            self.unknown["recv-done whose send was not found"] += times
            return
        assert made.transfer is not None  # as _send_across made it
        waited = self.time.finish(made.transfer)
        self.hidden += max(0.0, made.alone - waited) * times
        self._add(made.name, "network", waited * times, times, 0.0, made.bytes)

    def _copy(self, key: str, begun: Instruction, each: Instruction, here: Computation, times: int) -> None:
        """A copy in the background: in the queue for HBM, or on the way to the host's memory."""
        moved = self.works.moved(begun, here) if begun is each or begun.called else 0.0
        self.bytes += moved * times
        name = self.works.name(each)
        host = HOST in {shape.space for shape in (*each.shapes, *shapes_of(each, here))}
        if host:
            speed = HOST_GBS[self.place.chip.kind]
            self.assumptions[f"host memory: {speed:g} GB/s a chip in one direction"] = None
            alone = moved / (speed * 1e9)
            made = Pending(name, "host", alone, moved, self.time.send({HOST_LINK: alone}))
        else:
            alone = moved / self.works.bandwidth
            made = Pending(name, "copy", alone, moved, ticket=self.time.copy(alone))
        self.time.start(key, made)
        self._add(name, "prefetch_exposed" if made.kind == "copy" else "host_exposed", 0.0, times, 0.0, moved)

    def _done(self, each: Instruction, here: Computation, times: int, carried: dict[int, str]) -> None:
        if self.works.end(each):
            found = self.works.collective(each, here)
            key = f"channel {found[0].channel}" if found else ""
        else:
            key = self._origin(here, each.operands[0], carried)
        made = self.time.take(key)
        if made is None:
            self.unknown[f"{each.opcode} whose start was not found"] += times
        elif made.transfer is None:  # a copy, in the queue
            waited = self.time.finish_copy(made.ticket)
            self._add(made.name, "prefetch_exposed", waited * times, 0, 0.0, 0.0)
        else:
            waited = self.time.finish(made.transfer)
            if made.kind == "host":
                self._add(made.name, "host_exposed", waited * times, 0, 0.0, 0.0)
            else:
                self.hidden += max(0.0, made.alone - waited) * times
                self._add(made.name, "collective_exposed", waited * times, times, 0.0, made.bytes)

    # --- what holds the core ---

    def _run(self, each: Instruction, here: Computation, times: int) -> None:
        work = self.works.of(each, here)
        seconds = max(work.compute, work.memory)
        if work.cycles is not None:
            self.has_cycles = True
            seconds = work.cycles if self.by_cycles else seconds
        self.flops += work.flops * times
        self.bytes += work.bytes * times
        name = self.works.name(each)
        if work.transfer is not None and not self._under_way(each, here):
            self.links += work.transfer.bytes * times
            waited = self.time.finish(self.time.send(self.grid.loads(work.transfer)))
            self._add(name, "collective_sync", max(waited, seconds) * times, times, work.flops, work.transfer.bytes)
            seconds = max(0.0, seconds - waited)
        elif seconds:
            self._add(name, work.kind, seconds * times, times, work.flops, work.bytes)
        self.time.run(seconds, min(work.memory, seconds))

    def _under_way(self, each: Instruction, here: Computation) -> bool:
        """Whether the collective in a fusion is a part of one that was started before: it only moves it on."""
        found = self.works.collective(each, here)
        return bool(found and self.time.pending.get(f"channel {found[0].channel}"))

    def _add(self, name: str, kind: str, seconds: float, times: int, flops: float, moved: float) -> None:
        """`seconds` of all trips; operations and bytes of one."""
        cost = self.costs.setdefault((name, kind), Cost(name, kind))
        cost.seconds += seconds
        cost.count += times
        cost.flops += flops * times
        cost.bytes += moved * times
        if seconds:
            self.by_kind[kind] += seconds
