"""The least time in which a prompt can be read: its floating point operations at the peak of the chips that serve."""

from gemma_tpu.estimate.roofline import attention_flops, layer_matmuls
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.hardware.chips import Slice


def prefill_flops(arch: Architecture, tokens: int) -> float:
    """Of a prompt whose keys and values are all computed, up to the logits of its last token.

    Layers that take over the keys of lower ones need none of the earlier tokens: they count for the last alone.
    """
    found = 2.0 * arch.vocab * arch.hidden
    for layer in arch.layers:
        count = 1 if layer.kv_shared else tokens
        found += count * (2 * sum(layer_matmuls(arch, layer).values()) + attention_flops(arch, layer, tokens))
    return found


def ttft_ms(arch: Architecture, tokens: int, place: Slice) -> float:
    """No first token of a prompt can come sooner, in bf16, unless part of the prompt was not computed."""
    return 1e3 * prefill_flops(arch, tokens) / (place.chips * place.chip.bf16_tflops * 1e12)
