"""HF name <-> our path, in one table that loading, merging and adapter export all read.

Our weights keep the checkpoint's (out, in) order with the out and in dims spelled out, so every entry is a
reshape: an entry says which tensor of the checkpoint is which slice [repeat] or [repeat, K or V] of which variable.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gemma_tpu.errors import UserError
from gemma_tpu.gemma.variants import Architecture, Experts, Layer
from gemma_tpu.storage.shards import Checkpoint

STORED = ("bfloat16", "float32", "float16", "float64")  # a quantised file needs scales that are not applied here
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")  # three dims in the checkpoint too: [expert, out, in]


@dataclass(frozen=True)
class Entry:
    hf: str  # the checkpoint's name, e.g. model.language_model.layers.3.self_attn.k_proj.weight
    path: str  # our variable, e.g. blocks.0.3.attention.kv_einsum.w
    index: tuple[int, ...]  # the slice of it: (repeat,) or (repeat, 0 for K | 1 for V); () for an unstacked one
    shape: tuple[int, ...]  # of that slice
    out_dims: int  # the first `out_dims` of shape are the rows of the checkpoint's matrix

    @property
    def hf_shape(self) -> tuple[int, ...]:
        if len(self.shape) == 1 or self.hf.endswith(EXPERTS):
            return self.shape
        rows = int(np.prod(self.shape[: self.out_dims]))
        return rows, int(np.prod(self.shape[self.out_dims :]))

    @property
    def module(self) -> str:
        """The checkpoint's module, without the tensor's own name: what adapters are keyed by."""
        return self.hf.removesuffix(".weight")


@dataclass(frozen=True)
class Row:
    """One tensor of a decoder layer: its name in the checkpoint, ours, the shape of our slice, and when it exists."""

    hf: str
    ours: str
    shape: Callable[[Architecture, Layer], tuple[int, ...]]
    out_dims: int = 1
    index: tuple[int, ...] = ()  # within the repeat: which of K and V
    when: Callable[[Architecture, Layer], bool] = lambda a, n: True


def _kv(a: Architecture, n: Layer) -> tuple[int, ...]:
    return (n.kv_heads, n.head_dim, a.hidden)


def _hidden(a: Architecture, n: Layer) -> tuple[int, ...]:
    return (a.hidden,)


def _moe(a: Architecture, n: Layer) -> bool:
    return n.experts is not None


def _experts(n: Layer) -> Experts:
    assert n.experts is not None, "rows of experts are for the layers that `_moe` finds"
    return n.experts


def _ple(a: Architecture, n: Layer) -> bool:
    return a.per_layer_input > 0


def _two(a: Architecture, n: Layer) -> bool:
    return not n.kv_shared and not n.k_eq_v


LAYER: tuple[Row, ...] = (
    Row("self_attn.q_proj.weight", "attention.q_proj.w", lambda a, n: (a.heads, n.head_dim, a.hidden), 2),
    Row("self_attn.k_proj.weight", "attention.kv_einsum.w", _kv, 2, (0,), when=_two),
    Row("self_attn.v_proj.weight", "attention.kv_einsum.w", _kv, 2, (1,), when=_two),
    Row("self_attn.k_proj.weight", "attention.k_einsum.w", _kv, 2, when=lambda a, n: n.k_eq_v),
    Row("self_attn.o_proj.weight", "attention.o_proj.w", lambda a, n: (a.hidden, a.heads, n.head_dim)),
    Row("self_attn.q_norm.weight", "attention.q_norm.w", lambda a, n: (n.head_dim,)),
    Row("self_attn.k_norm.weight", "attention.k_norm.w", lambda a, n: (n.head_dim,), when=lambda a, n: not n.kv_shared),
    Row("mlp.gate_proj.weight", "mlp.gate_proj.w", lambda a, n: (n.mlp, a.hidden)),
    Row("mlp.up_proj.weight", "mlp.up_proj.w", lambda a, n: (n.mlp, a.hidden)),
    Row("mlp.down_proj.weight", "mlp.down_proj.w", lambda a, n: (a.hidden, n.mlp)),
    Row("input_layernorm.weight", "input_norm.w", _hidden),
    Row("post_attention_layernorm.weight", "post_attention_norm.w", _hidden),
    Row("pre_feedforward_layernorm.weight", "pre_mlp_norm.w", _hidden),
    Row("post_feedforward_layernorm.weight", "post_mlp_norm.w", _hidden),
    Row("layer_scalar", "layer_scalar", lambda a, n: (1,), when=lambda a, n: a.layer_scalar),
    Row("router.proj.weight", "experts.router", lambda a, n: (_experts(n).count, a.hidden), when=_moe),
    Row("router.scale", "experts.router_scale", _hidden, when=_moe),
    Row("router.per_expert_scale", "experts.expert_scale", lambda a, n: (_experts(n).count,), when=_moe),
    Row("experts.gate_up_proj", "experts.gate_up_proj.w",
        lambda a, n: (_experts(n).count, 2 * _experts(n).mlp, a.hidden), 2, when=_moe),
    Row("experts.down_proj", "experts.down_proj.w",
        lambda a, n: (_experts(n).count, a.hidden, _experts(n).mlp), 2, when=_moe),
    Row("post_feedforward_layernorm_1.weight", "dense_norm.w", _hidden, when=_moe),
    Row("pre_feedforward_layernorm_2.weight", "pre_experts_norm.w", _hidden, when=_moe),
    Row("post_feedforward_layernorm_2.weight", "post_experts_norm.w", _hidden, when=_moe),
    Row("per_layer_input_gate.weight", "per_layer_gate.w", lambda a, n: (a.per_layer_input, a.hidden), when=_ple),
    Row("per_layer_projection.weight", "per_layer_projection.w", lambda a, n: (a.hidden, a.per_layer_input), when=_ple),
    Row("post_per_layer_input_norm.weight", "post_per_layer_norm.w", _hidden, when=_ple),
)  # fmt: skip
# A layer that shares keys and values has no use for its own, and published files hold them all the same.
REDUNDANT = tuple(f"self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm"))


def entries(arch: Architecture) -> Iterator[Entry]:
    """The whole table of one architecture."""
    yield Entry(f"{arch.prefix}embed_tokens.weight", "embed.w", (), (arch.vocab, arch.hidden), 1)
    yield Entry(f"{arch.prefix}norm.weight", "final_norm.w", (), (arch.hidden,), 1)
    if arch.per_layer_input:
        L, P = len(arch.layers), arch.per_layer_input
        table, projection = (arch.per_layer_vocab, L * P), (L, P, arch.hidden)
        yield Entry(f"{arch.prefix}embed_tokens_per_layer.weight", "embed_per_layer.w", (), table, 1)
        yield Entry(f"{arch.prefix}per_layer_model_projection.weight", "embed_per_layer.projection", (), projection, 2)
        yield Entry(f"{arch.prefix}per_layer_projection_norm.weight", "embed_per_layer.norm.w", (), (P,), 1)
    for b, block in enumerate(arch.blocks):
        for repeat in range(block.repeats):
            for slot, layer in enumerate(block.period):
                number = block.layer_index(slot, repeat)
                for row in LAYER:
                    if row.when(arch, layer):
                        yield Entry(
                            f"{arch.prefix}layers.{number}.{row.hf}", f"blocks.{b}.{slot}.{row.ours}",
                            (repeat, *row.index), row.shape(arch, layer), row.out_dims,
                        )  # fmt: skip


def by_path(arch: Architecture) -> dict[str, list[Entry]]:
    table: dict[str, list[Entry]] = {}
    for entry in entries(arch):
        table.setdefault(entry.path, []).append(entry)
    return table


def check(checkpoint: Checkpoint, arch: Architecture) -> None:
    """Every tensor of the text tower is there, in the shape that config.json promises; all offenders at once."""
    names = set(checkpoint.names())
    wanted = {entry.hf: entry for entry in entries(arch)}
    problems = [f"{hf}: missing" for hf in wanted if hf not in names]
    for hf, entry in wanted.items():
        if hf in names and tuple(checkpoint.info(hf).shape) != entry.hf_shape:
            problems.append(f"{hf}: shape {tuple(checkpoint.info(hf).shape)}, config.json says {entry.hf_shape}")
        if hf in names and checkpoint.info(hf).dtype.name not in STORED:
            problems.append(f"{hf}: dtype {checkpoint.info(hf).dtype.name}, weights must be one of {', '.join(STORED)}")
    text_tower = {name for name in names if name.startswith(f"{arch.prefix}layers.")}
    sharing = [i for i, layer in enumerate(arch.layers) if layer.kv_shared]
    text_tower -= {f"{arch.prefix}layers.{i}.{hf}" for i in sharing for hf in REDUNDANT}
    problems += [f"{name}: not a tensor of this architecture" for name in sorted(text_tower - set(wanted))]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"{checkpoint.where}: the tensors do not fit config.json:\n  {shown}")


def lora_entries(arch: Architecture) -> dict[str, Entry]:
    """Module path of ours -> entries, for what an adapter can sit on: matrices inside layers."""
    return {e.hf: e for e in entries(arch) if e.hf.endswith(("_proj.weight", *EXPERTS))}


def split_lora(arch: Architecture, lora: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Our stacked adapter -> {checkpoint's tensor: (A [rank, in], B [out, rank])}; every tensor must be used."""
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    used: set[str] = set()
    for entry in lora_entries(arch).values():
        stem = entry.path.removesuffix(".w")
        if f"{stem}.lora_a" not in lora:
            continue
        a, b = lora[f"{stem}.lora_a"][entry.index], lora[f"{stem}.lora_b"][entry.index]
        used |= {f"{stem}.lora_a", f"{stem}.lora_b"}
        *experts, out, inside = entry.hf_shape
        rank = b.shape[-1]
        pairs[entry.hf] = (a.reshape(*experts, rank, inside), b.reshape(*experts, out, rank))
    unused = sorted(set(lora) - used)
    if unused:
        raise UserError("these adapter tensors belong to no weight of the base:\n  " + "\n  ".join(unused))
    return pairs


def join_lora(
    arch: Architecture, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The way back: adapters by the checkpoint's names -> our stacked tensors of the given shapes."""
    lora = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    table = lora_entries(arch)
    unknown = sorted(set(pairs) - set(table))
    if unknown:
        raise UserError("these adapter tensors belong to no weight of the base:\n  " + "\n  ".join(unknown))
    for hf, (a, b) in pairs.items():
        entry = table[hf]
        stem = entry.path.removesuffix(".w")
        lora[f"{stem}.lora_a"][entry.index] = a.reshape(lora[f"{stem}.lora_a"][entry.index].shape)
        lora[f"{stem}.lora_b"][entry.index] = b.reshape(lora[f"{stem}.lora_b"][entry.index].shape)
    return lora


def to_peft(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Adapters by the checkpoint's names -> the tensors of a PEFT adapter file.

    Of a stack of experts PEFT keeps matrices: A [(expert, rank), in], B [out, (rank, expert)]. The two stacks of a
    layer are parameters of one module, which PEFT wraps twice: gate_up_proj inside, down_proj outside. And Gemma 3's
    multimodal files name the text tower otherwise than the class that PEFT adapts.
    """
    tensors: dict[str, np.ndarray] = {}
    for hf, (a, b) in pairs.items():
        module = re.sub(r"^language_model\.model\.", "model.language_model.", hf.removesuffix(".weight"))
        if hf.endswith(EXPERTS):
            inner = hf.endswith("gate_up_proj") and hf.replace("gate_up_proj", "down_proj") in pairs
            module = module.rpartition(".")[0] + (".base_layer" if inner else "")
            a, b = a.reshape(-1, a.shape[-1]), np.moveaxis(b, 0, -1).reshape(b.shape[1], -1)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    return tensors
