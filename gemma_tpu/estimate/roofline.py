"""How much a train step computes and how long that takes at best, by arithmetic alone.

FLOPs of a token, with the letters that the planner prints: N the layer weights that a token meets, L the
adapters' weights, A attention (forward: scores and values), VD the head. A frozen base has no weight
gradients: forward 2N and backward 2N. The backward pass of adapters and of attention costs twice the forward
pass. What remat recomputes costs time and is no useful work: MFU leaves it out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gemma_tpu.estimate.budget import activations, layer_weights
from gemma_tpu.gemma.variants import Architecture, Layer
from gemma_tpu.hardware.chips import Slice
from gemma_tpu.step.job import Job, placed


@dataclass(frozen=True)
class Pace:
    """What share of a peak is reached, and what is waited for; fitted to walks over compiled schedules."""

    matmul: float = 0.99  # of the peak
    attention: float = 0.75  # of the peak: blocks on the edge of a mask are computed whole
    attention_backward: float = 3.5  # times the forward pass: both of its kernels redo the scores
    activation_passes: float = 7.0  # over every named activation: norms, RoPE, the residual, copies
    adapter_passes: float = 0.5  # over inputs and outputs of adapted projections: too few FLOPs to hide them
    logits_passes: float = 0.5  # over the float32 logits: most of a chunk stays on the chip
    state_passes: float = 8.0  # over what trains: gradients, moments, values, read and written
    expert_passes: float = 0.0  # over the rows of experts, where they are sorted into blocks by a program of its own
    crowding: float = 0.15  # of these passes more for each doubling of a device's tokens beyond FEW: less stays on chip
    tp_forward: float = 4.0  # times a layer's residual stream over the links; again where remat recomputes
    tp_backward: float = 8.0
    exposed_fsdp: float = 0.72  # of the time of weight gathers: that which no matmul hides
    exposed_tp: float = 0.8


PACE = Pace()
# Fitted to what XLA's GPU compiler makes of the same step (benchmarks/gpu_plans.py), walked with matmuls at the full
# peak: no time is lost in them there, and far more passes over memory are programs of their own. Attention: heads of
# 512 have no kernel and pass over their scores.
GPU_PACE = Pace(matmul=1.0, attention=0.6, activation_passes=16.0, adapter_passes=4.5, logits_passes=5.0,
                expert_passes=15.0, crowding=0.0, exposed_fsdp=0.5, exposed_tp=0.5)  # fmt: skip
FEW = 4096  # tokens of a micro-batch on a device
ADAPTED = ("q", "k", "v", "o", "gate", "up", "down")
GPU_SHARES = (
    "shares of it that were fitted to the schedules of XLA's GPU compiler, with matmuls at the full peak, which no GPU "
    "reaches (benchmarks/README.md)"
)
FLOAT32_PASSES = 6  # of bf16 for one float32 product


@dataclass(frozen=True)
class Work:
    """FLOPs of one token."""

    layers: float  # N: weights, of a mixture those that a token is routed to
    adapters: float  # L
    attention: float  # A
    head: float  # VD
    recomputed: float  # of the matmuls
    recomputed_attention: float
    full: bool

    @property
    def useful(self) -> float:
        if self.full:
            return 6 * self.layers + 3 * self.attention + 6 * self.head
        return 4 * self.layers + 6 * self.adapters + 3 * self.attention + 4 * self.head

    @property
    def executed(self) -> float:
        return self.useful + self.recomputed + self.recomputed_attention

    @property
    def formula(self) -> str:
        """The sum in words and figures, for the page."""
        n, a, v = (f"{x / 1e9:.3g}e9" for x in (self.layers, self.attention, self.head))
        again = self.recomputed + self.recomputed_attention
        remat = f"; remat adds {again / 1e9:.3g} GFLOP" if again else ""
        if self.full:
            told = f"6N + 3A + 6VD = 6 x {n} + 3 x {a} + 6 x {v}"
        else:
            told = f"4N + 6L + 3A + 4VD = 4 x {n} + 6 x {self.adapters / 1e9:.3g}e9 + 3 x {a} + 4 x {v}"
        return f"{told} = {self.useful / 1e9:.4g} GFLOP a token{remat}"


def layer_matmuls(arch: Architecture, layer: Layer) -> dict[str, float]:
    """Weights that a token meets in one layer, by the name of the activation that they make."""
    D, H, K = arch.hidden, layer.head_dim, layer.kv_heads
    found = {"q": D * arch.heads * H, "o": D * arch.heads * H, "gate": D * layer.mlp, "up": D * layer.mlp,
             "down": D * layer.mlp}  # fmt: skip
    if not layer.kv_shared:
        found["k"] = D * K * H
        if not layer.k_eq_v:
            found["v"] = D * K * H
    if layer.experts is not None:
        found["experts"] = layer.experts.top_k * 3 * D * layer.experts.mlp + D * layer.experts.count
    if arch.per_layer_input:
        found["per layer"] = 2 * D * arch.per_layer_input
    return {name: float(count) for name, count in found.items()}


def keys_seen(layer: Layer, tokens: int) -> float:
    """Keys that a query looks at, on average over a row: those before it, within the window."""
    reach = tokens if layer.window is None else min(layer.window, tokens)
    # The first `reach` queries see 1, 2 … reach keys, all others `reach`.
    return reach * (1 - (reach - 1) / (2 * tokens))


def attention_flops(arch: Architecture, layer: Layer, tokens: int) -> float:
    """Scores and values, forward, of one token in one layer."""
    return 4.0 * arch.heads * layer.head_dim * keys_seen(layer, tokens)


def work(arch: Architecture, job: Job) -> Work:
    """The FLOPs of a token of this job. Packed rows count as whole: the kernel skips by position only."""
    matmuls = [layer_matmuls(arch, layer) for layer in arch.layers]
    attention = [attention_flops(arch, layer, job.tokens) for layer in arch.layers]
    adapters = _adapters(arch, job)
    again = again_attention = 0.0
    if job.remat != "none":
        again = sum(2 * count for one in matmuls for name, count in one.items() if job.recomputes(name))
        again += adapters if job.recomputes("lora_h") else 0.0  # A x again, half of the 2L of a forward pass
        again_attention = sum(attention) if job.recomputes("attention") else 0.0
    extra = len(arch.layers) * arch.per_layer_input * arch.hidden  # per-layer inputs, made once for all
    return Work(
        layers=sum(sum(one.values()) for one in matmuls) + extra, adapters=adapters, attention=sum(attention),
        head=float(arch.vocab * arch.hidden), recomputed=again, recomputed_attention=again_attention,
        full=job.method == "full",
    )  # fmt: skip


def _adapters(arch: Architecture, job: Job) -> float:
    """Adapter weights that a token meets; those of routed experts count for the experts it is routed to."""
    if job.method == "full":
        return 0.0
    count = 0.0
    for one in placed(arch, job):
        if one.trains:
            block, slot = one.path.split(".")[1:3]
            experts = arch.blocks[int(block)].period[int(slot)].experts
            routed = experts if ".experts." in one.path else None
            count += one.elements * (routed.top_k / routed.count if routed else 1.0)
    return count


# --- time ---


@dataclass(frozen=True)
class Estimate:
    """One optimizer update on a slice; `parts` add up to `step_s`."""

    step_s: float
    tokens_per_s: float
    mfu: float
    flops_per_token: float
    formula: str
    parts: Mapping[str, float]
    assumptions: tuple[str, ...]
    basis: str = "analytic"

    @property
    def limited_by(self) -> str:
        """The largest part: matmul, attention, memory, or links."""
        return max(self.parts, key=lambda name: self.parts[name])


def limit_tokens_per_s(arch: Architecture, job: Job, place: Slice) -> float:
    """Tokens a second if every chip did nothing but useful work at its full peak."""
    return place.chips * place.chip.bf16_tflops * 1e12 / work(arch, job).useful


def pace_of(place: Slice) -> Pace:
    return GPU_PACE if place.chip.kind == "gpu" else PACE


def estimate(arch: Architecture, job: Job, place: Slice, pace: Pace | None = None) -> Estimate:
    """The roofline time of a step: compute, memory, and of the links what nothing hides."""
    pace = pace or pace_of(place)
    done = work(arch, job)
    chip, tokens = place.chip, job.tokens_per_update / place.devices
    peak = chip.device_bf16_tflops * 1e12 / (1 if job.dtype == "bfloat16" else FLOAT32_PASSES)
    bandwidth = chip.device_hbm_gbs * 1e9
    backward = done.attention * pace.attention_backward
    attention = done.attention + done.recomputed_attention + backward
    matmuls = done.executed - 3 * done.attention - done.recomputed_attention
    weights = sum(layer_weights(arch, job)) * (3 if done.recomputed else 2) * job.accumulation
    exposed = 1.0 if place.slices > 1 else pace.exposed_fsdp  # with a data axis, XLA gathers while nothing else runs
    parts = {
        # Few tokens: the matmuls wait for their weights.
        "matmul": max(tokens * matmuls / (peak * pace.matmul), weights / bandwidth),
        "attention": tokens * attention / (peak * pace.attention),
        "memory": _bytes(arch, job, pace, tokens) / bandwidth * (1 + pace.crowding * _crowd(job)),
        "fsdp links": exposed * _fsdp_seconds(arch, job, place),
        "tp links": pace.exposed_tp * _tp_seconds(arch, job, place, pace, done),
        "network": _network_seconds(arch, job, place),
    }
    step = sum(parts.values())
    rate = job.tokens_per_update / step
    return Estimate(
        step_s=step, tokens_per_s=rate,
        mfu=rate * done.useful / (place.chips * chip.bf16_tflops * 1e12), flops_per_token=done.useful,
        formula=done.formula, parts=parts, assumptions=_assumptions(place, pace, job),
    )  # fmt: skip


def _crowd(job: Job) -> float:
    """How often the tokens of a micro-batch on a device have doubled since FEW; halving them helps once."""
    return max(-1.0, math.log2(job.tokens_here / FEW))


def _bytes(arch: Architecture, job: Job, pace: Pace, tokens: float) -> float:
    """HBM traffic of a step beside that of the matmuls."""
    named = sum(sum(activations(arch, layer, job).values()) for layer in arch.layers) * job.accumulation
    logits = 4.0 * tokens * arch.vocab  # or a part of the vocabulary of so many more tokens
    trained = sum(one.bytes for one in placed(arch, job) if one.trains)
    touched = job.tokens_here * job.itemsize * job.accumulation * sum(
        arch.hidden + count / arch.hidden / job.size("tp")
        for layer in arch.layers for name, count in layer_matmuls(arch, layer).items() if name in ADAPTED
    )  # fmt: skip
    adapters = pace.adapter_passes * touched if job.method == "lora" else 0.0
    passes = pace.activation_passes * named + pace.logits_passes * logits + pace.state_passes * trained
    routed = sum(one.experts.top_k * (2 * arch.hidden + 3 * one.experts.mlp) for one in arch.layers if one.experts)
    return passes + adapters + pace.expert_passes * tokens * routed * job.itemsize


def _fsdp_seconds(arch: Architecture, job: Job, place: Slice) -> float:
    """Weights to every device, once forward and once backward, in every micro-batch."""
    count = job.size("fsdp")
    if count == 1:
        return 0.0
    gathers = 2 if job.method == "lora" else 3  # training the base, its gradients go back the same way
    moved = gathers * sum(layer_weights(arch, job)) * job.accumulation * (count - 1) / count
    return moved / _link_bandwidth(place, count)


def _tp_seconds(arch: Architecture, job: Job, place: Slice, pace: Pace, done: Work) -> float:
    """The residual stream, gathered before and scattered after each half of a layer."""
    count = job.size("tp")
    if count == 1:
        return 0.0
    stream = job.tokens_here * arch.hidden * job.itemsize * (count - 1) / count
    times = pace.tp_forward * (2 if done.recomputed else 1) + pace.tp_backward
    return times * len(arch.layers) * stream * job.accumulation / _link_bandwidth(place, count)


def _network_seconds(arch: Architecture, job: Job, place: Slice) -> float:
    """Gradients of what trains, in the dtype of the matmuls that made them, summed over the slices once in every
    micro-batch: the compiler does it layer by layer, in the backward pass. Nothing else crosses the network."""
    if place.slices == 1:
        return 0.0
    gradients = sum(one.bytes / one.itemsize for one in placed(arch, job) if one.trains) * job.itemsize
    crossing = 2 * gradients * (place.slices - 1) / place.slices * job.accumulation
    return crossing * place.chip.devices / (place.network_gbs * 1e9)


def _link_bandwidth(place: Slice, count: int) -> float:
    """Bytes a second that one device receives in a collective over `count` devices."""
    chip = place.chip
    if chip.kind == "gpu":
        return chip.links * chip.link_gbs * 1e9
    sides = [int(side) for side in place.topology.split("x")]
    # Sides of 4 close to rings in three dims, sides of 16 in two; the ends of an open side have one link.
    ring = 4 if len(sides) == 3 else 16
    links = sum(2 if side % ring == 0 else 1 for side in sides if side > 1)
    links = max(1, min(links, count // 2, 2 if count < place.devices // place.slices else links))
    return links * chip.link_gbs * 1e9 / chip.devices  # those of one chip share its links


def _assumptions(place: Slice, pace: Pace, job: Job) -> tuple[str, ...]:
    lines = [
        "analytic: fitted to schedules that compilers made, not a measurement",
        f"peaks of one {place.chip.name}: {place.chip.bf16_tflops:g} bf16 TFLOP/s, "
        f"{place.chip.hbm_gbs:g} GB/s of HBM ({place.chip.source})",
        f"matmuls at {pace.matmul:.0%} of the peak, attention at {pace.attention:.0%}, its backward pass "
        f"{pace.attention_backward:g} times its forward pass",
        "attention is causal within the whole packed row, and within the window of local layers",
        f"{pace.activation_passes:g} passes over the named activations, {pace.logits_passes:g} over the logits"
        + (f", {pace.crowding:.0%} more for each doubling of a device's {FEW:,} tokens" if pace.crowding else "")
        + (f", {pace.adapter_passes:g} over what adapters read and write" if job.method == "lora" else "")
        + (f", {pace.expert_passes:g} over the rows of experts" if pace.expert_passes else ""),
    ]
    if job.size("fsdp") > 1:
        exposed = 1.0 if place.slices > 1 else pace.exposed_fsdp
        lines.append(f"{exposed:.0%} of the time of fsdp's weight gathers is waited for")
    if job.size("tp") > 1:
        lines.append(f"{pace.exposed_tp:.0%} of the time of tp's gathers and scatters is waited for")
    if place.slices > 1:
        lines.append(
            f"the network between slices: {place.chip.network_gbs:g} GB/s a chip ({place.chip.sources['network']}), "
            "nothing of it beside compute"
        )
    if job.dtype != "bfloat16":
        lines.append(f"float32 products take {FLOAT32_PASSES} passes of bf16")
    if place.chip.kind == "gpu":
        lines.append(f"no GPU compiler was asked: {GPU_SHARES}")
    return tuple(lines)
