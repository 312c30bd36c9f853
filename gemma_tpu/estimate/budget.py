"""Memory of one device by category, without compiling: what a train step keeps, and for how long.

What is placed (weights, adapters, moments) is exact: the model's own variables in the shardings that
`loading.place` gives them. What lives in between is the arithmetic of the layer's shapes; how much of it
lives at once is the compiler's choice, and the constants in `Fit` hold what it was seen to choose.

Nothing here imports JAX until it is asked for a number.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gemma_tpu.errors import UserError
from gemma_tpu.gemma.variants import Architecture, Layer
from gemma_tpu.hardware.chips import Slice
from gemma_tpu.step.job import LANES, Job, Variable, moments, placed

GIB = 2**30


@dataclass(frozen=True)
class Fit:
    """How much lives at once, fitted to the peaks of libtpu 0.0.51's compiler (in tests/test_budget.py)."""

    gradients: float = 0.73  # of what trains
    layers_gathered: float = 2.12  # of a layer's whole weights, while fsdp's ring brings the next
    recomputed: float = 1.9  # of a layer's activations that are not kept
    logits: float = 1.11  # of a chunk's float32 logits
    attention_relaid: float = 0.71  # of the attention weights: copies in the layout that their matmul prefers
    experts_relaid: float = 0.04  # of the routed experts' weights, likewise
    retiled: float = 1.3  # of all weights in place of these copies, on the chips below


FIT = Fit()
# Matmuls of tpu7x want bfloat16 in tiles of 16 rows. Arguments come in tiles of 8, the default, so that the compiler
# keeps a second copy of every frozen weight beside the first.
RETILES = ("tpu7x",)


@dataclass(frozen=True)
class Memory:
    """GiB of one device at the step's peak, by category, against what a program may use."""

    weights: float  # of the base; in full fine-tuning they are what trains
    lora: float
    moments: float
    gradients: float
    saved: Mapping[str, float]  # kept for the backward pass, by name; "residual" is the input of each layer
    gathered: float  # weights put together from fsdp's shards, of the layers in flight
    relaid: float  # copies of weights in another layout
    recomputed: float  # activations of the layer whose backward pass runs
    logits: float
    limit: float

    @property
    def total(self) -> float:
        return sum(gib for _, gib in self.rows())

    @property
    def headroom(self) -> float:
        return self.limit - self.total

    @property
    def fits(self) -> bool:
        return self.headroom >= 0

    def rows(self) -> list[tuple[str, float]]:
        """(category, GiB), from the bottom of the stack to its top."""
        state = [(name, getattr(self, name)) for name in ("weights", "lora", "moments", "gradients")]
        kept = [(f"saved {name}", gib) for name, gib in self.saved.items()]
        passing = [(name, getattr(self, name)) for name in ("gathered", "relaid", "recomputed", "logits")]
        return [*state, *kept, *passing]


# --- what lives in between ---


def saved(arch: Architecture, job: Job) -> dict[str, float]:
    """GiB that one micro-batch's forward pass keeps for its backward pass, by name, over all layers."""
    found = {"residual": sum(_residual(arch, job) for _ in arch.layers)}
    for layer in arch.layers:
        for name, size in activations(arch, layer, job).items():
            if job.keeps(name):
                found[name] = found.get(name, 0.0) + size
    if job.remat == "none":
        found["between"] = sum(between(arch, layer, job) for layer in arch.layers)
        # Without a checkpoint around the layer, the scan keeps its whole weights for the backward pass.
        found["weights"] = sum(layer_weights(arch, job))
    return {name: size / GIB for name, size in found.items()}


def _residual(arch: Architecture, job: Job) -> float:
    return job.tokens_here * arch.hidden * job.itemsize / job.size("tp")


def activations(arch: Architecture, layer: Layer, job: Job) -> dict[str, float]:
    """Bytes of one layer's named activations on one device."""
    tp, tokens = job.size("tp"), job.tokens_here
    heads = arch.heads / tp if arch.heads % tp == 0 else arch.heads
    kv_heads = layer.kv_heads / tp if layer.kv_heads % tp == 0 else layer.kv_heads
    mlp = layer.mlp / tp if layer.mlp % tp == 0 else layer.mlp
    elements = {"q": heads * layer.head_dim, "attention": heads * layer.head_dim, "o": arch.hidden / tp,
                "gate": mlp, "up": mlp, "down": arch.hidden / tp}  # fmt: skip
    if not layer.kv_shared:
        elements["k"] = kv_heads * layer.head_dim
        if not layer.k_eq_v:  # else V is what K's projection gave, kept once
            elements["v"] = elements["k"]
    sizes = {name: tokens * count * job.itemsize for name, count in elements.items()}
    sizes["attention"] += tokens * heads * 4  # the row sums of its softmax, in float32
    if job.method == "lora":
        adapters = 5 if layer.kv_shared else 6 if layer.k_eq_v else 7
        sizes["lora_h"] = adapters * tokens * max(job.rank, LANES) * job.itemsize
    return sizes


def unnamed(arch: Architecture, layer: Layer, job: Job) -> float:
    """Bytes that a layer's backward pass wants besides the named ones: inputs of norms and of projections."""
    tp, tokens = job.size("tp"), job.tokens_here
    streams = 6 * arch.hidden / tp + layer.mlp / tp  # four norms, two of them kept as projection inputs too
    if layer.experts is not None:
        streams += layer.experts.top_k * (arch.hidden + 3 * layer.experts.mlp) + 3 * arch.hidden
    return tokens * (streams + arch.per_layer_input * 3) * job.itemsize


def between(arch: Architecture, layer: Layer, job: Job) -> float:
    """Bytes that differentiation keeps of a layer without a checkpoint, besides the named activations.

    Norms and RoPE keep their float32 insides, and the approximate GELU six values of the width of the MLP.
    """
    tp = job.size("tp")
    float32 = 8 * arch.hidden + 2 * (arch.heads + layer.kv_heads) * layer.head_dim
    mixture = unnamed(arch, layer, job) if layer.experts is not None else 0.0
    return job.tokens_here * (4 * float32 + 6 * layer.mlp * job.itemsize) / tp + mixture


def layer_weights(arch: Architecture, job: Job) -> list[float]:
    """Bytes of each layer's weights as its matmuls see them: fsdp's split undone, the others kept."""
    share = [0.0] * len(arch.layers)
    for variable in placed(arch, job):
        if not variable.path.startswith("blocks."):
            continue
        number, slot = map(int, variable.path.split(".")[1:3])
        block = arch.blocks[number]
        whole = math.prod(variable.local[1:]) * (job.size("fsdp") if variable.fsdp_dim is not None else 1)
        for repeat in range(block.repeats):
            share[block.layer_index(slot, repeat)] += whole * min(variable.itemsize, job.itemsize)
    return share


def logits_chunk(arch: Architecture, job: Job) -> float:
    """Bytes of one chunk's float32 logits on one device: its part of the vocabulary."""
    from gemma_tpu.step.loss import LOGITS_BYTES, MOST_TOKENS

    local = next(one.local[0] for one in placed(arch, job) if one.path == "embed.w")
    chunk = max(128, min(MOST_TOKENS, LOGITS_BYTES // (4 * local) // 128 * 128))
    group = job.devices // job.size("expert") // job.size("data") if local < arch.vocab else 1
    return 4.0 * local * min(chunk, job.tokens_here * group)


def memory(arch: Architecture, job: Job, place: Slice | None = None, fit: Fit = FIT) -> Memory:
    """The peak of one device. Without a slice there is no limit to hold it against."""
    variables = placed(arch, job)
    trained = sum(one.bytes for one in variables if one.trains) / GIB
    frozen = sum(one.bytes for one in variables if not one.trains) / GIB
    full = job.method == "full"
    widest, whole = max(enumerate(layer_weights(arch, job)), key=lambda pair: pair[1])
    layer = arch.layers[widest]
    named = activations(arch, layer, job).items()
    passing = sum(size for name, size in named if not job.keeps(name)) + unnamed(arch, layer, job)
    return Memory(
        weights=trained if full else frozen,
        lora=0.0 if full else trained,
        moments=moments(arch, job) / GIB,
        gradients=fit.gradients * trained,
        saved=saved(arch, job),
        gathered=fit.layers_gathered * whole / GIB if job.size("fsdp") > 1 else 0.0,
        relaid=_relaid(variables, place, fit),
        recomputed=fit.recomputed * passing / GIB,
        logits=fit.logits * logits_chunk(arch, job) / GIB,
        limit=math.inf if place is None else place.chip.device_hbm_gib,
    )


def _relaid(variables: Sequence[Variable], place: Slice | None, fit: Fit) -> float:
    if place is not None and place.chip.name in RETILES:
        return fit.retiled * sum(one.bytes for one in variables if not one.trains and one.itemsize == 2) / GIB
    attention = sum(one.bytes for one in variables if _is_weight(one, ".attention."))
    experts = sum(one.bytes for one in variables if _is_weight(one, ".experts."))
    return (fit.attention_relaid * attention + fit.experts_relaid * experts) / GIB


def _is_weight(one: Variable, part: str) -> bool:
    return part in one.path and one.path.endswith(".w") and len(one.shape) > 2


# --- what fits ---


@dataclass(frozen=True)
class MeshChoice:
    sizes: dict[str, int]
    reason: str | None  # why a run would refuse it; None: it would not

    @property
    def valid(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        return ", ".join(f"{axis}={size}" for axis, size in self.sizes.items() if size > 1) or "one device"


def valid_meshes(arch: Architecture, place: Slice, job: Job) -> list[MeshChoice]:
    """Every (fsdp, tp, expert) whose product is the slice's devices, held against the rules of a run; several slices
    are one data axis."""
    counts = [layer.experts.count for layer in arch.layers if layer.experts]
    found, each = [], place.devices // place.slices
    for expert in _divisors(each) if counts else [1]:
        for tp in _divisors(each // expert):
            sizes = {"data": place.slices, "fsdp": each // expert // tp, "expert": expert, "tp": tp}
            found.append(MeshChoice(sizes, _refusal(arch, job.change(mesh=sizes))))
    return found


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def _refusal(arch: Architecture, job: Job) -> str | None:
    from gemma_tpu.gemma import mesh as meshes

    try:
        meshes.check_experts(arch, dict(job.mesh))
        meshes.check_heads(arch, job.size("tp"), job.replicate_kv)
        meshes.check_rows(job.rows, dict(job.mesh))
        placed(arch, job)
    except UserError as error:
        first, *more = str(error).splitlines()
        return f"{first} {more[0].strip()}" if first.endswith(":") else first
    return None


def longest_sequence(arch: Architecture, job: Job, place: Slice) -> int:
    """The longest row, in steps of 128 tokens, that fits with all else as it is; 0 where not even 128 do."""
    most = _largest(arch.context // 128, lambda n: memory(arch, job.change(tokens=128 * n), place).fits)
    return 128 * most


def largest_batch(arch: Architecture, job: Job, place: Slice) -> int:
    """The most rows in a micro-batch that fit, a multiple of data x fsdp; 0 where not even one each does."""
    share = job.size("data") * job.size("fsdp")
    return share * _largest(4096, lambda n: memory(arch, job.change(rows=share * n), place).fits)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n up to `most` that fits, where every smaller one fits too; 0 where none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
