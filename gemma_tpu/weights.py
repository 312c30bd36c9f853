"""HF name <-> our path, in one table that loading, merging and adapter export all read.

Our weights keep the checkpoint's (out, in) order with the out and in dims spelled out, so every entry is a
reshape: an entry says which tensor of the checkpoint is which slice [repeat] or [repeat, K or V] of which variable.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from gemma_tpu.errors import UserError
from gemma_tpu.shards import Checkpoint
from gemma_tpu.variants import Architecture, Layer


@dataclass(frozen=True)
class Entry:
    hf: str  # the checkpoint's name, e.g. model.language_model.layers.3.self_attn.k_proj.weight
    path: str  # our variable, e.g. blocks.0.3.attention.kv_einsum.w
    index: tuple[int, ...]  # the slice of it: (repeat,) or (repeat, 0 for K | 1 for V); () for an unstacked one
    shape: tuple[int, ...]  # of that slice
    out_dims: int  # the first `out_dims` of shape are the rows of the checkpoint's matrix

    @property
    def hf_shape(self) -> tuple[int, ...]:
        if len(self.shape) == 1:
            return self.shape
        rows = int(np.prod(self.shape[: self.out_dims]))
        return rows, int(np.prod(self.shape[self.out_dims :]))

    @property
    def module(self) -> str:
        """The checkpoint's module, without the tensor's own name: what adapters are keyed by."""
        return self.hf.removesuffix(".weight")


# (checkpoint's name in the layer, ours, shape of the slice, out dims, index within the repeat)
_Row = tuple[str, str, Callable[[Architecture, Layer], tuple[int, ...]], int, tuple[int, ...]]

_EVERY_LAYER: tuple[_Row, ...] = (
    ("self_attn.q_proj.weight", "attention.q_proj.w", lambda a, n: (a.heads, n.head_dim, a.hidden), 2, ()),
    ("self_attn.o_proj.weight", "attention.o_proj.w", lambda a, n: (a.hidden, a.heads, n.head_dim), 1, ()),
    ("self_attn.q_norm.weight", "attention.q_norm.w", lambda a, n: (n.head_dim,), 1, ()),
    ("self_attn.k_norm.weight", "attention.k_norm.w", lambda a, n: (n.head_dim,), 1, ()),
    ("mlp.gate_proj.weight", "mlp.gate_proj.w", lambda a, n: (n.mlp, a.hidden), 1, ()),
    ("mlp.up_proj.weight", "mlp.up_proj.w", lambda a, n: (n.mlp, a.hidden), 1, ()),
    ("mlp.down_proj.weight", "mlp.down_proj.w", lambda a, n: (a.hidden, n.mlp), 1, ()),
    ("input_layernorm.weight", "input_norm.w", lambda a, n: (a.hidden,), 1, ()),
    ("post_attention_layernorm.weight", "post_attention_norm.w", lambda a, n: (a.hidden,), 1, ()),
    ("pre_feedforward_layernorm.weight", "pre_mlp_norm.w", lambda a, n: (a.hidden,), 1, ()),
    ("post_feedforward_layernorm.weight", "post_mlp_norm.w", lambda a, n: (a.hidden,), 1, ()),
    ("layer_scalar", "layer_scalar", lambda a, n: (1,), 1, ()),
)


def _kv(a: Architecture, n: Layer) -> tuple[int, ...]:
    return (n.kv_heads, n.head_dim, a.hidden)


_K_EQ_V: tuple[_Row, ...] = (("self_attn.k_proj.weight", "attention.k_einsum.w", _kv, 2, ()),)
_K_AND_V: tuple[_Row, ...] = (
    ("self_attn.k_proj.weight", "attention.kv_einsum.w", _kv, 2, (0,)),
    ("self_attn.v_proj.weight", "attention.kv_einsum.w", _kv, 2, (1,)),
)


def entries(arch: Architecture) -> Iterator[Entry]:
    """The whole table of one architecture."""
    yield Entry(f"{arch.prefix}embed_tokens.weight", "embed.w", (), (arch.vocab, arch.hidden), 1)
    yield Entry(f"{arch.prefix}norm.weight", "final_norm.w", (), (arch.hidden,), 1)
    for b, block in enumerate(arch.blocks):
        for repeat in range(block.repeats):
            for slot, layer in enumerate(block.period):
                number = block.layer_index(slot, repeat)
                for hf, ours, shape, out_dims, index in _EVERY_LAYER + (_K_EQ_V if layer.k_eq_v else _K_AND_V):
                    yield Entry(
                        f"{arch.prefix}layers.{number}.{hf}", f"blocks.{b}.{slot}.{ours}",
                        (repeat, *index), shape(arch, layer), out_dims,
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
    text_tower = {name for name in names if name.startswith(f"{arch.prefix}layers.")}
    problems += [f"{name}: not a tensor of this architecture" for name in sorted(text_tower - set(wanted))]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"{checkpoint.folder}: the tensors do not fit config.json:\n  {shown}")


def load(
    checkpoint: Checkpoint, arch: Architecture, variables: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, NamedSharding],
) -> dict[str, jax.Array]:  # fmt: skip
    """Stream the base weights onto their shards: each device's slice is read and placed, one at a time."""
    check(checkpoint, arch)
    table = by_path(arch)
    loaded: dict[str, jax.Array] = {}
    for path, variable in variables.items():
        def piece(index: tuple[slice, ...], path=path, variable=variable) -> np.ndarray:
            return _read(checkpoint, table[path], variable, index)

        loaded[path] = jax.make_array_from_callback(variable.shape, shardings[path], piece)
    return loaded


def _read(checkpoint: Checkpoint, found: list[Entry], variable: Any, index: tuple[slice, ...]) -> np.ndarray:
    index = tuple(slice(*s.indices(size)) for s, size in zip(index, variable.shape, strict=True))
    out = np.empty([s.stop - s.start for s in index], variable.dtype)
    for entry in found:
        lead = len(entry.index)
        if all(s.start <= i < s.stop for s, i in zip(index, entry.index, strict=False)):
            at = tuple(i - s.start for s, i in zip(index, entry.index, strict=False))
            out[at] = _read_slice(checkpoint, entry, index[lead:]).astype(variable.dtype)
    return out


def _read_slice(checkpoint: Checkpoint, entry: Entry, index: tuple[slice, ...]) -> np.ndarray:
    """The slice of one entry, read as rows and columns of the checkpoint's matrix."""
    if len(entry.shape) == 1:
        return checkpoint.read(entry.hf)[index[0]]
    rows = _flat(index[: entry.out_dims], entry.shape[: entry.out_dims])
    columns = _flat(index[entry.out_dims :], entry.shape[entry.out_dims :])
    return checkpoint.read_slice(entry.hf, (rows, columns)).reshape([s.stop - s.start for s in index])


def _flat(index: tuple[slice, ...], shape: tuple[int, ...]) -> slice:
    """Only the first dim of a group is ever split (heads, never within a head), so a group's slice is contiguous."""
    inner = int(np.prod(shape[1:]))
    if any((s.start, s.stop) != (0, size) for s, size in zip(index[1:], shape[1:], strict=True)):
        raise ValueError(f"slice {index} splits inside {shape}")
    return slice(index[0].start * inner, index[0].stop * inner)


def lora_entries(arch: Architecture) -> dict[str, Entry]:
    """Module path of ours -> entries, for what an adapter can sit on: matrices inside layers."""
    return {e.hf: e for e in entries(arch) if e.hf.endswith("_proj.weight")}


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
        rank = b.shape[-1]
        out, inside = entry.hf_shape
        pairs[entry.hf] = (a.reshape(rank, inside), b.reshape(out, rank))
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
