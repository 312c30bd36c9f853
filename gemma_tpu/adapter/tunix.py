"""Adapters in checkpoints that Tunix wrote: LoRA by qwix, saved by Orbax, whose rank and alpha stand nowhere in them.

`layers/3/attn/q_einsum/w_lora_a` is [in..., rank] and `w_lora_b` [rank, out...]: the transposes of ours, with the dims
of the einsum spelled out. K and V share one A, and B of a kv_einsum is [rank, 2, heads, head dim].
"""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tpu.adapter.updates import LowRank
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.run.metrics import say
from gemma_tpu.storage.remote import BucketSource, restore_url
from gemma_tpu.storage.shards import Checkpoint

ITEM = "model_params"
# Tunix's module -> the checkpoint's; several where B stacks them in front of its own dims.
_MODULES = {
    "attn.q_einsum": ("self_attn.q_proj",), "attn.k_einsum": ("self_attn.k_proj",),
    "attn.kv_einsum": ("self_attn.k_proj", "self_attn.v_proj"),
    "attn.qkv_einsum": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.attn_vec_einsum": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj",), "mlp.up_proj": ("mlp.up_proj",), "mlp.down_proj": ("mlp.down_proj",),
    "per_layer_input_gate": ("per_layer_input_gate",), "per_layer_projection": ("per_layer_projection",),
}  # fmt: skip
_NAME = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)\.(?:w|kernel)_lora_([ab])")


def read(place: str | Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """(the adapter's tensors by Tunix's names, the names of what else is there) of a folder of steps, of one step,
    or of its model_params, here or in a bucket."""
    with _here(place) as folder:
        return _read(folder, restore_url(place))


def _read(folder: Path, place: str) -> tuple[dict[str, np.ndarray], list[str]]:
    import jax
    import orbax.checkpoint as ocp

    try:
        handler = ocp.PyTreeCheckpointHandler()
        leaves = jax.tree_util.tree_flatten_with_path(handler.metadata(folder).tree)[0]
        wanted = {path for path, _ in leaves if "_lora_" in _name(path)}
        others = sorted(_name(path) for path, _ in leaves if path not in wanted)
        tree = handler.metadata(folder).tree
        item = jax.tree_util.tree_map_with_path(lambda path, x: x if path in wanted else ocp.PLACEHOLDER, tree)
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        found = handler.restore(folder, args=ocp.args.PyTreeRestore(item=item, restore_args=args))
    except Exception as error:  # Orbax and TensorStore raise what they please
        raise RunError(f"{place}: this checkpoint cannot be read: {str(error).splitlines()[0][:300]}") from error
    flat = jax.tree_util.tree_flatten_with_path(found)[0]
    return {_name(path): np.asarray(leaf) for path, leaf in flat if path in wanted}, others


def updates_of(tensors: Mapping[str, np.ndarray], base: Checkpoint, arch: Architecture, *, rank: int,
               alpha: float) -> dict[str, LowRank]:
    """Every adapter tensor as an update of the base's; refuses what has no place, no partner, or another rank."""
    modules: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    problems = []
    for name, value in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None or found[2] not in _MODULES:
            problems.append(f"{name}: no such projection is known")
        else:
            modules.setdefault((int(found[1]), found[2]), {})[found[3]] = value
    updates: dict[str, LowRank] = {}
    for (layer, module), parts in sorted(modules.items()):
        stem = f"layers.{layer}.{module}"
        if parts.keys() != {"a", "b"}:
            problems.append(f"{stem}: only its lora_{''.join(parts)} is there")
        elif parts["a"].shape[-1] != rank or parts["b"].shape[0] != rank:
            problems.append(f"{stem}: its rank is {parts['a'].shape[-1]}, not {rank}")
        else:
            names = [f"{arch.prefix}layers.{layer}.{hf}.weight" for hf in _MODULES[module]]
            problems += [f"{stem}: the base has no {name}" for name in names if name not in base]
            updates |= dict(zip(names, _split(parts, len(names), alpha / rank), strict=True))
    if not tensors:
        problems.append("there is no *_lora_a and *_lora_b in it")
    if problems:
        raise UserError("this is no adapter for the base:\n  " + "\n  ".join(problems[:20]))
    return updates


def _split(parts: Mapping[str, np.ndarray], count: int, scale: float) -> list[LowRank]:
    a_RI = np.ascontiguousarray(parts["a"].reshape(-1, parts["a"].shape[-1]).T)
    b_RCO = parts["b"].reshape(parts["b"].shape[0], count, -1)
    return [LowRank(np.ascontiguousarray(b_RCO[:, number].T), a_RI, scale) for number in range(count)]


@contextmanager
def _here(place: str | Path) -> Iterator[Path]:
    """The folder with the latest step's parameters; those of a bucket are copied for as long as they are read."""
    url = restore_url(place)
    if "://" not in url:
        folder = Path(url).expanduser()
        if not folder.is_dir():
            raise UserError(f"{place}: no such folder; give the checkpoints of a Tunix run, or one step of them")
        yield (folder / _params(url, [path.relative_to(folder).as_posix() for path in folder.rglob("*")])).absolute()
        return
    bucket = BucketSource(url)
    files = bucket.list(recursive=True)
    inside = _params(url, list(files))
    wanted = {name: file.size for name, file in files.items() if name.startswith(inside)}
    with tempfile.TemporaryDirectory() as scratch:
        size, free = sum(wanted.values()), shutil.disk_usage(scratch).free
        if size > free:
            raise UserError(f"{url}: copying its {size / 2**20:,.0f} MiB to {scratch} takes more than the "
                            f"{free / 2**20:,.0f} MiB that are free there; set TMPDIR to another disk")  # fmt: skip
        say(f"copying {len(wanted)} files of {url}, {size / 2**20:,.1f} MiB")
        for name, bytes_ in wanted.items():
            target = Path(scratch) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(bucket.read(name, 0, bytes_) if bytes_ else b"")
        yield Path(scratch) / inside


def _params(place: str, names: list[str]) -> str:
    """Where the parameters of the latest step begin, "" or "12/model_params/", in a list of what lies there."""
    found = re.compile(rf"((\d+)/{ITEM}/|{ITEM}/|)(?:_METADATA|manifest\.ocdbt)")
    trees = [match for name in names if (match := found.fullmatch(name))]
    if not trees:
        raise UserError(f"{place}: neither steps with {ITEM}/ nor an Orbax tree")
    return max(trees, key=lambda match: (int(match[2] or -1), len(match[1])))[1]


def _name(path: tuple[Any, ...]) -> str:
    """The dotted name of a leaf; nnx saves each variable as {value: array}."""
    keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return ".".join(keys[:-1] if keys and keys[-1] == "value" else keys)
