"""The device mesh, and the one table that says which mesh axis each tensor dim is split over.

Every weight and activation names its dims by what they mean ("heads", "mlp", "vocab"); RULES maps these logical
axes to mesh axes. Nothing is ever split unevenly: heads are checked before anything is allocated, and `fix_specs`
holds every spec against the rank of its tensor and the size of its mesh axes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gemma_tpu.errors import UserError
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.hardware import torus
from gemma_tpu.schema import MeshConfig

AnyMesh = Mesh | AbstractMesh  # of devices, or of nothing but their number (of a slice that is planned)
AXES = ("data", "fsdp", "expert", "tp")

# logical axis -> mesh axes. A dim whose logical axis is not listed is never split.
RULES: dict[str, tuple[str, ...]] = {
    # weights
    "embed": ("fsdp",),
    "heads": ("tp",),
    "kv_heads": ("tp",),
    "mlp": ("tp",),
    "experts": ("expert", "fsdp", "tp"),  # whole experts that never move: tokens come to them
    "embed_blocks": ("fsdp",),  # blocks of a quantised weight along such a dim
    "mlp_blocks": ("tp",),
    "vocab": ("fsdp", "tp"),  # the head never moves: hidden states come to it
    "rank": ("fsdp",),  # of an adapter tensor that has no other dim for fsdp
    "per_layer_vocab": ("fsdp", "tp"),  # its other dim holds every layer side by side: splitting it would mix them
    # activations: rows over data and fsdp, and the residual stream over tp along the sequence between the matmuls
    "batch": ("data", "fsdp"),
    "seq": ("tp",),
    "act_heads": ("tp",),
    "act_kv_heads": ("tp",),
    "act_mlp": ("tp",),
}

LARGE_BYTES = 16 * 2**20  # an indivisible tensor above this is an error, below it is replicated and said


def build(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all four axes; their product must be the device count."""
    devices = list(jax.devices()) if devices is None else list(devices)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    check_product(dict(zip(AXES, shape, strict=True)), len(devices))
    check_slices(dict(zip(AXES, shape, strict=True)), torus.slices(devices))
    placed = torus.arrange(devices, shape) if devices[0].platform == "tpu" else np.array(devices).reshape(shape)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 4)


def slice_count() -> int:
    """TPU slices that this run's devices are of."""
    return torus.slices(jax.devices())


def check_product(sizes: Mapping[str, int], device_count: int) -> None:
    product = math.prod(sizes.values())
    if product != device_count:
        named = " x ".join(f"{axis}={n}" for axis, n in sizes.items() if n != 1 or axis in ("fsdp", "tp"))
        raise UserError(
            f"mesh: {named} = {product}, but there are {device_count} devices; the product must equal the device "
            f"count. Valid (fsdp, tp) here: {', '.join(map(str, factor_pairs(device_count)))}"
        )


def check_slices(sizes: Mapping[str, int], slices: int) -> None:
    """Only the data axis, which moves the gradients of what trains, may cross the network between slices."""
    data = sizes.get("data", 1)
    if data % slices:
        raise UserError(
            f"mesh.data={data} on {slices} slices: it must be a multiple of {slices}, because nothing but the data "
            f"axis may cross the network between slices; set mesh.data={slices} and divide the others"
        )


def factor_pairs(count: int) -> list[tuple[int, int]]:
    return [(count // tp, tp) for tp in range(1, count + 1) if count % tp == 0]


@dataclass(frozen=True)
class HeadRow:
    name: str
    heads: int
    layers: int
    per_device: float

    @property
    def divides(self) -> bool:
        return self.per_device == int(self.per_device)


def head_table(arch: Architecture, tp: int) -> list[HeadRow]:
    """Query, local KV and global KV heads, each against the tensor-parallel degree."""
    rows = [HeadRow("query heads", arch.heads, len(arch.layers), arch.heads / tp)]
    for kind in ("local", "global"):
        for count in sorted({layer.kv_heads for layer in arch.layers if layer.kind == kind}):
            layers = sum(layer.kind == kind and layer.kv_heads == count for layer in arch.layers)
            rows.append(HeadRow(f"{kind} KV heads", count, layers, count / tp))
    return rows


def format_heads(rows: list[HeadRow], tp: int, replicate_kv: bool) -> str:
    lines = [f"{'heads':<16}{'count':>6}{'layers':>8}   tp={tp}"]
    for row in rows:
        if row.divides:
            verdict = f"{int(row.per_device)} per device"
        elif replicate_kv and row.name != "query heads":
            verdict = "replicated (mesh.replicate_kv)"
        else:
            verdict = f"{row.per_device:g} per device: does not divide"
        lines.append(f"{row.name:<16}{row.heads:>6}{row.layers:>8}   {verdict}")
    return "\n".join(lines)


def tp_choices(arch: Architecture, replicate_kv: bool, limit: int) -> list[int]:
    return [tp for tp in range(1, limit + 1) if not _offenders(head_table(arch, tp), replicate_kv)]


def _offenders(rows: list[HeadRow], replicate_kv: bool) -> list[HeadRow]:
    return [row for row in rows if not row.divides and not (replicate_kv and row.name != "query heads")]


def check_heads(arch: Architecture, tp: int, replicate_kv: bool = False) -> str:
    """Refuse a tp degree that leaves a fraction of a head on a device; returns the table for the log."""
    rows = head_table(arch, tp)
    table = format_heads(rows, tp, replicate_kv)
    bad = _offenders(rows, replicate_kv)
    if bad:
        named = ", ".join(f"{row.heads} {row.name}" for row in bad)
        choices = ", ".join(map(str, tp_choices(arch, replicate_kv, arch.heads)))
        more = "" if replicate_kv else _replication_hint(arch, tp)
        raise UserError(f"mesh.tp={tp} does not divide the {named}\n{table}\nvalid tp: {choices}{more}")
    return table


def _replication_hint(arch: Architecture, tp: int) -> str:
    if _offenders(head_table(arch, tp), replicate_kv=True):
        return ""
    return f"; or mesh.replicate_kv=true, which copies the KV heads to every device and allows tp={tp}"


def choose(
    arch: Architecture, device_count: int, rows: int, replicate_kv: bool, slices: int = 1
) -> dict[str, int]:
    """`mesh: auto`: data over the slices; in each as much fsdp as the rows of a micro-batch can feed, the rest tp,
    heads permitting."""
    for fsdp, tp in factor_pairs(device_count // slices):
        if rows % (slices * fsdp) == 0 and not _offenders(head_table(arch, tp), replicate_kv):
            return {"data": slices, "fsdp": fsdp, "expert": 1, "tp": tp}
    over = f"{slices} slices x fsdp" if slices > 1 else "fsdp"
    raise UserError(
        f"mesh: auto finds no mesh for {device_count} devices: {rows} rows per micro-batch must divide by {over}, and "
        f"tp must be one of {tp_choices(arch, replicate_kv, arch.heads)}; change train.batch_size"
    )


def sizes(
    section: MeshConfig, arch: Architecture, device_count: int, rows: int, slices: int = 1
) -> dict[str, int]:
    """The mesh that a config asks for, checked against the devices, the heads and the rows of a micro-batch."""
    if section.auto:
        chosen = choose(arch, device_count, rows, section.replicate_kv, slices)
        check_experts(arch, chosen)
        return chosen
    chosen = {axis: getattr(section, axis) for axis in AXES}
    check_experts(arch, chosen)
    check_product(chosen, device_count)
    check_slices(chosen, slices)
    check_heads(arch, section.tp, section.replicate_kv)
    check_rows(rows, chosen)
    return chosen


def check_experts(arch: Architecture, sizes: Mapping[str, int]) -> None:
    """Every device keeps whole experts, as many as any other."""
    counts = sorted({layer.experts.count for layer in arch.layers if layer.experts is not None})
    if sizes.get("expert", 1) > 1 and not counts:
        raise UserError(f"mesh.expert is {sizes['expert']}, and this model has no experts; set it to 1")
    split = {axis: sizes[axis] for axis in RULES["experts"] if sizes.get(axis, 1) > 1}
    product = math.prod(split.values())
    for count in counts:
        if count % product:
            named = " x ".join(f"mesh.{axis}={n}" for axis, n in split.items())
            named += f" = {product}" if len(split) > 1 else ""
            choices = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            raise UserError(
                f"{named} does not divide the {count} experts; valid: {choices} (mesh.data leaves them as they are)"
            )


def check_rows(rows: int, sizes: Mapping[str, int]) -> None:
    share = sizes.get("data", 1) * sizes.get("fsdp", 1)
    if rows % share:
        raise UserError(
            f"train.batch_size / train.accumulation = {rows} rows per micro-batch, which data x fsdp = {share} does "
            f"not divide; use a multiple of {share}, or a smaller fsdp with more tp"
        )


def spec_for(
    axes: Sequence[str | None], mesh: AnyMesh, shape: Sequence[int] | None = None
) -> PartitionSpec:
    """The PartitionSpec of a tensor whose dims have these logical axes; axes of size 1 are left out.

    With `shape`, a dim that does not divide is left whole: for activations only, where a batch of one
    prompt is no mistake. Weights go through `fix_specs`, which says so or refuses.
    """
    entries: list[str | tuple[str, ...] | None] = []
    for dim, axis in enumerate(axes):
        names = tuple(name for name in RULES.get(axis or "", ()) if mesh.shape[name] > 1)
        if shape is not None and shape[dim] % math.prod(mesh.shape[name] for name in names):
            names = ()
        entries.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*entries)


def split_of(axis: str, size: int) -> str | tuple[str, ...] | None:
    """The mesh axes that an activation's dim of this size is split over, as a PartitionSpec has them."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else spec_for((axis,), mesh, (size,))[0]


def platform() -> str:
    """Of the devices that the program being traced is for: those of the mesh that is set, which need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """Of those devices: "NVIDIA H100 80GB HBM3"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return str((jax.devices()[0] if device is None else device).device_kind)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to the mesh that is set; without one (a single device) this is the identity."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    x = jax.lax.with_sharding_constraint(x, spec_for(axes, mesh, x.shape))
    return x


def gathered(w: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """A small weight with its fsdp split undone: one gather for all of a layer's is faster than a ring for each."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return w
    whole = PartitionSpec(*(None if entry == "fsdp" else entry for entry in spec_for(axes, mesh, w.shape)))
    w = jax.lax.with_sharding_constraint(w, whole)
    return w


@dataclass(frozen=True)
class Tensor:
    """What `fix_specs` needs to know of one tensor."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    itemsize: int


@dataclass(frozen=True)
class Fix:
    name: str
    before: PartitionSpec
    after: PartitionSpec
    reason: str


def format_fixes(fixes: Sequence[Fix]) -> list[str]:
    """One line for each reason, with the first tensor that it concerns and how many more."""
    by_reason: dict[str, list[Fix]] = {}
    for fix in fixes:
        by_reason.setdefault(fix.reason.partition(": replicated")[0], []).append(fix)
    lines = []
    for found in by_reason.values():
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        lines.append(f"sharding of {found[0].name}{more}: {found[0].before} -> {found[0].after} ({found[0].reason})")
    return lines


def fix_specs(
    tensors: Sequence[Tensor], specs: Mapping[str, PartitionSpec], mesh: AnyMesh, whole: frozenset[str] = frozenset()
) -> tuple[dict[str, PartitionSpec], list[Fix]]:
    """Hold every spec against its tensor's rank and the mesh; returns the good specs and what was changed.

    A spec of the wrong rank is derived again from the tensor's own axes. A dim that does not divide is left whole,
    with a row that says so, if the tensor is small or its logical axis is in `whole` (the user asked for it);
    a large one is an error, all of them listed at once.
    """
    fixed: dict[str, PartitionSpec] = {}
    rows: list[Fix] = []
    errors: list[str] = []
    for tensor in tensors:
        spec = specs[tensor.name]
        if len(spec) != len(tensor.shape):
            derived = spec_for(tensor.axes, mesh)
            rows.append(Fix(tensor.name, spec, derived, f"rank {len(spec)}, the tensor has rank {len(tensor.shape)}"))
            spec = derived
        spec = _whole_where_indivisible(tensor, spec, mesh, whole, rows, errors)
        fixed[tensor.name] = spec
    if errors:
        raise UserError("these tensors cannot be split over the mesh:\n  " + "\n  ".join(errors))
    return fixed, rows


def _whole_where_indivisible(
    tensor: Tensor, spec: PartitionSpec, mesh: AnyMesh, whole: frozenset[str], rows: list[Fix], errors: list[str]
) -> PartitionSpec:
    entries = list(spec)
    for dim, entry in enumerate(spec):
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        parts = math.prod(mesh.shape[name] for name in names)
        if tensor.shape[dim] % parts == 0:
            continue
        size = math.prod(tensor.shape) * tensor.itemsize
        told = f"dim {dim} = {tensor.shape[dim]} does not divide by {'x'.join(names)} = {parts}"
        if size > LARGE_BYTES and tensor.axes[dim] not in whole:
            errors.append(f"{tensor.name} {tensor.shape}, {size / 2**20:.0f} MiB: {told}")
            continue
        entries[dim] = None
        rows.append(Fix(tensor.name, spec, PartitionSpec(*entries), f"{told}: replicated, {size / 2**20:.2f} MiB"))
    return PartitionSpec(*entries)


def shardings(mesh: AnyMesh, specs: Mapping[str, PartitionSpec]) -> dict[str, NamedSharding]:
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
