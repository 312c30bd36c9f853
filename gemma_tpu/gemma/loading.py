"""From a folder to a model on a mesh: shapes first, then shardings, then weights streamed onto their shards."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from gemma_tpu.gemma import hf_config, quantise, streaming, variants
from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.gemma.model import Decoder
from gemma_tpu.gemma.projection import Base, Constant, shaped
from gemma_tpu.gemma.sites import sites
from gemma_tpu.storage.shards import Checkpoint, open_checkpoint
from gemma_tpu.storage.transfer import Transfer

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def architecture(checkpoint: Checkpoint) -> variants.Architecture:
    """What config.json says, with the prefix that the tensors really have."""
    arch = hf_config.from_config(checkpoint.config)
    # Text towers saved alone from a multimodal class, or the other way round, keep config.json as it was.
    there = [prefix for prefix in (arch.prefix, *hf_config.PREFIXES) if f"{prefix}embed_tokens.weight" in checkpoint]
    return arch.with_prefix(there[0]) if there else arch


def variables(
    model: Decoder, kind: type[nnx.Variable[jax.Array]] = nnx.Variable
) -> dict[str, nnx.Variable[jax.Array]]:
    """Every variable of the model by its dotted path."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, kind))}


def assign(model: Decoder, values: Mapping[str, Any]) -> None:
    """Give variables their values, by dotted path."""
    flat = nnx.to_flat_state(nnx.state(model))
    chosen = [(path, leaf.replace(values[name])) for path, leaf in flat if (name := ".".join(map(str, path))) in values]
    if len(chosen) != len(values):
        raise KeyError(f"not in the model: {sorted(set(values) - {'.'.join(map(str, p)) for p, _ in chosen})}")
    nnx.update(model, nnx.from_flat_state(chosen))


def place(
    model: Decoder, mesh: meshes.AnyMesh, replicate_kv: bool = False
) -> tuple[dict[str, NamedSharding], list[meshes.Fix]]:
    """A sharding for every variable, each held against its rank and the mesh; and what had to be changed."""
    tensors, specs = [], {}
    for path, variable in variables(model).items():
        axes = variable.get_metadata()["axes"]
        tensors.append(meshes.Tensor(path, tuple(variable.shape), axes, variable.dtype.itemsize))
        specs[path] = meshes.spec_for(axes, mesh)
    # A rank that fsdp does not divide leaves an adapter tensor whole: small beside the base, and said.
    # So do blocks that it does not divide: an eighth of what they scale.
    whole = frozenset({"rank", "embed_blocks", "mlp_blocks", *(["kv_heads"] if replicate_kv else [])})
    fixed, fixes = meshes.fix_specs(tensors, specs, mesh, whole)
    return meshes.shardings(mesh, fixed), fixes


def load_base(model: Decoder, checkpoint: Checkpoint, shardings: Mapping[str, NamedSharding]) -> None:
    shapes = {path: jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in variables(model, Base).items()}
    encoders = {}
    for site in sites(model):
        one, path = site.projection, f"{site.path}.w"
        if one.quantised:
            shapes[path] = jax.ShapeDtypeStruct(one.w.shape, model.embed.w.dtype)
            encoders[path] = partial(quantise.encode, kind=one.quantised, inside=one.inputs, xp=jnp)
    with Transfer("weights", checkpoint.source) as transfer:
        assign(model, streaming.load(checkpoint, model.arch, shapes, shardings, transfer.update, encoders))


def hold_quantised(model: Decoder, kind: str | None) -> None:
    """Let the layers' matrices be held in fewer bits; embedding, head, norms and routers stay as they are."""
    if kind is None:
        return
    for site in sites(model):
        one = site.projection
        shape, axes = tuple(one.w.shape), one.w.get_metadata()["axes"]
        blocks = f"{axes[-1]}_blocks" if axes[-1] in ("embed", "mlp") else axes[-1]
        named = {"w": axes, "w_scale": (*axes[:-1], blocks)}
        for name, (held, dtype) in quantise.parts(kind, shape, one.inputs).items():
            variable = Base if name == "w" else Constant
            setattr(one, name, shaped(variable, held, dtype, named.get(name, axes[: len(held)])))
        one.quantised = kind


def put(values: Mapping[str, np.ndarray], shardings: Mapping[str, NamedSharding]) -> dict[str, jax.Array]:
    """Host arrays onto their shards, each device getting its own slice."""
    return {
        path: jax.make_array_from_callback(value.shape, shardings[path], value.__getitem__)
        for path, value in values.items()
    }


def one_device_mesh() -> Mesh:
    return meshes.build({}, jax.devices()[:1])


def build(folder: str | Path, *, dtype: str, quantise: str | None = None) -> tuple[Decoder, Checkpoint]:
    """The model of a checkpoint (a folder, a URL, a hub id) as shapes, nothing read yet but its config and headers."""
    checkpoint = open_checkpoint(folder)
    model = Decoder(architecture(checkpoint), DTYPES[dtype])
    hold_quantised(model, quantise)
    return model, checkpoint
