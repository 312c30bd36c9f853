"""How fast a slice can serve a model at best: its weights and KV cache against the HBM, its FLOPs against the peak.

A bound, not a forecast: nothing but the reading of weights and of keys and values, useful products and the bytes of
the collectives. What share of it a real server reaches is measured elsewhere and stands beside every figure.

Letters as in `roofline`; `rows` are the sequences that a server continues at once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gemma_tpu.estimate import roofline
from gemma_tpu.estimate.budget import GIB
from gemma_tpu.estimate.serving_memory import group_sizes
from gemma_tpu.gemma.variants import Architecture, Layer
from gemma_tpu.hardware.chips import Slice

USABLE = 0.90  # of HBM: what servers take for weights and cache; the rest is for activations and the runtime
MOST_ROWS = 1024


@dataclass(frozen=True)
class Load:
    """What every request looks like."""

    prompt: int  # tokens in
    output: int  # tokens out

    @property
    def context(self) -> int:
        return self.prompt + self.output

    def __str__(self) -> str:
        return f"{self.prompt:,} tokens in, {self.output:,} out"


@dataclass(frozen=True)
class Server:
    """A model on a slice: `tp` devices hold it once, and there are `replicas` of that."""

    arch: Architecture
    place: Slice
    tp: int
    kv_bytes: int = 2
    weight_bytes: int = 2

    @property
    def replicas(self) -> int:
        return self.place.devices // self.tp

    # --- memory, of one device ---

    @property
    def weights_gib(self) -> float:
        return weights_held(self.arch) * self.weight_bytes / self.tp / GIB

    def cache_bytes(self, context: float) -> float:
        """Keys and values of one sequence on one device; a device that has no whole head holds a copy of one."""
        return sum(
            2 * math.ceil(layer.kv_heads / self.tp) * layer.head_dim * _reach(layer, context) * self.kv_bytes
            for layer in self.arch.layers if not layer.kv_shared
        )  # fmt: skip

    def rows_that_fit(self, context: int) -> int:
        """Sequences of that length that one replica's cache holds."""
        free = self.place.chip.device_hbm_gib * USABLE - self.weights_gib
        return max(0, math.floor(free * GIB / self.cache_bytes(context)))

    # --- time, of one replica ---

    @property
    def peak(self) -> float:
        return self.tp * self.place.chip.device_bf16_tflops * 1e12

    @property
    def bandwidth(self) -> float:
        return self.tp * self.place.chip.device_hbm_gbs * 1e9

    def prefill_s(self, tokens: int) -> float:
        """The least time in which a prompt can be read: its useful FLOPs at the full peak, its weights once."""
        flops = prefill_flops(self.arch, tokens)
        return max(flops / self.peak, weights_read(self.arch, tokens) * self.weight_bytes / self.bandwidth)

    def step_parts(self, rows: float, context: float) -> dict[str, float]:
        """Seconds of one token for each of `rows` sequences of that length, by what is waited for."""
        read = self.cache_bytes(context) * self.tp * rows
        stream = rows * self.arch.hidden * 2 * 2 * (self.tp - 1) / self.tp  # an all-reduce sends everything twice
        links = self.place.chip.links * self.place.chip.link_gbs * 1e9
        return {
            "weights": weights_read(self.arch, rows) * self.weight_bytes / self.bandwidth,
            "cache": read / self.bandwidth,
            "arithmetic": rows * flops_of_token(self.arch, context) / self.peak,
            "links": 2 * len(self.arch.layers) * stream / links if self.tp > 1 else 0.0,
        }

    def step_s(self, rows: float, context: float) -> float:
        """Memory and arithmetic overlap, the links do not."""
        part = self.step_parts(rows, context)
        return max(part["weights"] + part["cache"], part["arithmetic"]) + part["links"]

    def output_tokens_per_s(self, load: Load, rows: int) -> float:
        """Of the whole slice with `rows` requests at work on each replica, prompts read between the steps."""
        middle = load.prompt + load.output / 2
        seconds = rows * self.prefill_s(load.prompt) + load.output * self.step_s(rows, middle)
        return self.replicas * rows * load.output / seconds

    def tpot_s(self, load: Load, rows: int) -> float:
        """Between two tokens of a request, prompts of others included."""
        return self.replicas * rows / self.output_tokens_per_s(load, rows)

    def most_rows(self, load: Load) -> int:
        return min(MOST_ROWS, self.rows_that_fit(load.context))


def servers(arch: Architecture, place: Slice, kv_bytes: int = 2) -> Iterator[Server]:
    """Every tensor parallelism that divides the slice and the heads and leaves room for the weights."""
    for tp in group_sizes(arch, place.devices):
        one = Server(arch, place, tp, kv_bytes)
        if one.weights_gib <= place.chip.device_hbm_gib * USABLE:
            yield one


# --- the model ---


def _reach(layer: Layer, context: float) -> float:
    return context if layer.window is None else min(layer.window, context)


def _experts_touched(layer: Layer, tokens: float) -> float:
    """Experts that at least one of the tokens is routed to, were each as likely as another."""
    experts = layer.experts
    return experts.count * (1 - (1 - experts.top_k / experts.count) ** tokens)


def _met(arch: Architecture) -> float:
    """Layer weights that a token meets."""
    layers = sum(sum(roofline.layer_matmuls(arch, layer).values()) for layer in arch.layers)
    return layers + len(arch.layers) * arch.per_layer_input * arch.hidden


def weights_read(arch: Architecture, tokens: float) -> float:
    """Weights that a pass over so many tokens reads: of a mixture the experts that it touches; the head once."""
    return _weights(arch, tokens) + arch.vocab * arch.hidden


def weights_held(arch: Architecture) -> float:
    """All of them; of per-layer embeddings only rows are ever read, but every row is held."""
    tables = arch.per_layer_vocab * len(arch.layers) * arch.per_layer_input
    return _weights(arch, math.inf) + arch.vocab * arch.hidden + tables


def _weights(arch: Architecture, tokens: float) -> float:
    found = _met(arch)
    for layer in arch.layers:
        if layer.experts is not None:
            touched = layer.experts.count if math.isinf(tokens) else _experts_touched(layer, tokens)
            found += (touched - layer.experts.top_k) * 3 * arch.hidden * layer.experts.mlp
    return found


def prefill_flops(arch: Architecture, tokens: int) -> float:
    """Of a prompt whose keys and values are all computed, up to the logits of its last token.

    Layers that take over the keys of lower ones need none of the earlier tokens: they count for the last alone.
    """
    found = 2.0 * arch.hidden * (arch.vocab + tokens * len(arch.layers) * arch.per_layer_input)
    for layer in arch.layers:
        weights = sum(roofline.layer_matmuls(arch, layer).values())
        count = 1 if layer.kv_shared else tokens
        found += count * (2 * weights + roofline.attention_flops(arch, layer, tokens))
    return found


def least_ttft_ms(arch: Architecture, tokens: int, place: Slice) -> float:
    """No first token of a prompt can come sooner, in bf16, unless part of the prompt was not computed."""
    return 1e3 * prefill_flops(arch, tokens) / (place.devices * place.chip.device_bf16_tflops * 1e12)


def flops_of_token(arch: Architecture, context: float) -> float:
    """To generate one token after `context` others."""
    return 2 * (_met(arch) + arch.vocab * arch.hidden) + _scores(arch, context)


def flops_of_request(arch: Architecture, load: Load) -> float:
    """Prompt and output: what utilisation counts as useful."""
    weights = 2 * _met(arch) * load.context + 2 * load.output * arch.vocab * arch.hidden
    return weights + attention_of_request(arch, load)


def attention_of_request(arch: Architecture, load: Load) -> float:
    """Scores and values of prompt and output."""
    prompt = sum(roofline.attention_flops(arch, layer, load.prompt) for layer in arch.layers) * load.prompt
    return prompt + load.output * _scores(arch, load.prompt + load.output / 2)


def _scores(arch: Architecture, context: float) -> float:
    return sum(4.0 * arch.heads * layer.head_dim * _reach(layer, context) for layer in arch.layers)


def cache_of_token(arch: Architecture, context: int, kv_bytes: int = 2) -> float:
    """Bytes of cache for each token of a sequence of that length, on average."""
    return sum(2 * layer.kv_heads * layer.head_dim * _reach(layer, context) * kv_bytes
               for layer in arch.layers if not layer.kv_shared) / context  # fmt: skip
