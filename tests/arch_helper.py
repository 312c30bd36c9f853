"""Tiny random float32 checkpoints of every architecture, made by transformers, and what is measured on them.

A case is what a published config.json says of the text tower, in small: the same kinds of layer in the same
order, with periods of two instead of five or six. The figures of benchmarks/architectures.py come from here.
"""

import copy
import functools
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers
import jax
import numpy as np
from helpers import SEVEN, Tree, largest_difference, relative_error

from gemma_tpu.adapter import adapters, lora
from gemma_tpu.gemma import loading
from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.gemma.model import Decoder
from gemma_tpu.gemma.projection import Base
from gemma_tpu.gemma.weights import REDUNDANT, to_peft
from gemma_tpu.handoff import difference, merging, verify
from gemma_tpu.handoff.patch import write_patched
from gemma_tpu.sampling import sampler
from gemma_tpu.storage.shards import open_checkpoint

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
RANK, ALPHA = 3, 7.5
Config = dict[str, Any]


def kinds(layers: int, period: int = 2) -> list[str]:
    return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]


def gemma4(layers: int, **text: Any) -> Config:
    common = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "head_dim": 8,
        "global_head_dim": 16, "sliding_window": 8, "max_position_embeddings": 256,
        "final_logit_softcapping": 30.0,
        "num_hidden_layers": layers, "layer_types": kinds(layers), "hidden_size_per_layer_input": 0,
    }  # fmt: skip
    return common | text


def gemma3(layers: int, **text: Any) -> Config:
    common = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 1, "sliding_window": 8, "max_position_embeddings": 256, "rope_theta": 1e6,
        "num_hidden_layers": layers, "sliding_window_pattern": 2, "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 8,
    }  # fmt: skip
    return common | text


_PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96}
_LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
_SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
_VISION = {
    "model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16,
}  # fmt: skip


def multimodal(kind: str, model_type: str, text: Config, vision: Config | None = None) -> Config:
    inner = text | {"model_type": f"{model_type}_text"}
    beside = {} if vision is None else {"vision_config": vision}
    return {"architectures": [kind], "model_type": model_type, "text_config": inner} | beside


def text_only(kind: str, model_type: str, text: Config) -> Config:
    return {"architectures": [kind], "model_type": model_type} | text


GEMMA4, UNIFIED, GEMMA3 = (
    f"{name}ForConditionalGeneration" for name in ("Gemma4", "Gemma4Unified", "Gemma3")
)
CASES: dict[str, Config] = {
    "gemma4-e2b": multimodal(GEMMA4, "gemma4", gemma4(
        8, num_key_value_heads=1, num_kv_shared_layers=4, use_double_wide_mlp=True, **_PER_LAYER)),
    "gemma4-e4b": multimodal(GEMMA4, "gemma4", gemma4(
        6, num_key_value_heads=2, num_kv_shared_layers=2, **_PER_LAYER), _VISION),
    "gemma4-12b": multimodal(UNIFIED, "gemma4_unified", gemma4(
        4, num_key_value_heads=2, num_global_key_value_heads=1, attention_k_eq_v=True)),
    "gemma4-26b-a4b": multimodal(GEMMA4, "gemma4", gemma4(
        4, num_key_value_heads=4, num_global_key_value_heads=2, attention_k_eq_v=True, enable_moe_block=True,
        num_experts=8, top_k_experts=3, moe_intermediate_size=20)),
    "gemma4-31b": multimodal(GEMMA4, "gemma4", gemma4(
        4, num_key_value_heads=4, num_global_key_value_heads=2, attention_k_eq_v=True), _VISION),
    "gemma3-270m": text_only("Gemma3ForCausalLM", "gemma3_text", gemma3(4)),
    "gemma3-1b": text_only("Gemma3ForCausalLM", "gemma3_text", gemma3(5)),  # ends with a sliding layer
    "gemma3-4b": multimodal(GEMMA3, "gemma3", gemma3(5, num_key_value_heads=2, **_LINEAR), _SIGLIP),
    "gemma3-12b": multimodal(GEMMA3, "gemma3", gemma3(4, num_key_value_heads=2, **_LINEAR), _SIGLIP),
    "gemma3-27b": multimodal(GEMMA3, "gemma3", gemma3(
        5, num_key_value_heads=2, query_pre_attn_scalar=11, head_dim=6, **_LINEAR), _SIGLIP),
}  # fmt: skip
TEXT_ONLY: dict[str, Config] = {  # the classes of the text tower alone
    name: CASES[size]["text_config"] | {"architectures": [kind]}
    for name, size, kind in (
        ("gemma4_text", "gemma4-e2b", "Gemma4ForCausalLM"),
        ("gemma4_unified_text", "gemma4-12b", "Gemma4UnifiedForCausalLM"),
    )
}


# --- checkpoints -------------------------------------------------------------------------------------------


def hf_config(config: Config) -> Any:
    """transformers' own config object of a published config.json."""
    from transformers import CONFIG_MAPPING

    given = copy.deepcopy({key: value for key, value in config.items() if key != "model_type"})
    return CONFIG_MAPPING[config["model_type"]](**given)


def rewritten(config: Config) -> Config:
    """The config.json that transformers writes when it saves this one."""
    return json.loads(hf_config(config).to_json_string())


def write(folder: Path, config: Config, seed: int = 0) -> Path:
    """A random checkpoint with its published config.json, and the redundant tensors of published files."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers and torch deprecate each other's calls
        model = getattr(transformers, config["architectures"][0])(hf_config(config))
        _randomise(model, offset=1.0 if config["model_type"].startswith("gemma3") else 0.0)
        model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    arch = loading.architecture(open_checkpoint(folder))
    for number in (i for i, layer in enumerate(arch.layers) if layer.kv_shared):
        kind = arch.layers[number].kind
        like = max(i for i, layer in enumerate(arch.layers) if not layer.kv_shared and layer.kind == kind)
        for name in REDUNDANT:
            source = tensors.get(f"{arch.prefix}layers.{like}.{name}")
            if source is None:  # V is K there
                continue
            tensors[f"{arch.prefix}layers.{number}.{name}"] = torch.randn_like(source)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def _randomise(model: Any, offset: float) -> None:
    """Every norm, scalar and scale random; q and k norms so that the scores of a random net are not sharp."""
    import torch

    def like(p: Any, mean: float, deviation: float) -> Any:
        return mean + deviation * torch.randn_like(p)

    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if not p.is_floating_point() or "rotary" in name or "inv_freq" in name or "embed_scale" in name:
                continue
            if "q_norm" in name or "k_norm" in name:
                p.copy_(like(p, 1.0, 0.1) * p.shape[0] ** -0.25 - offset)
            elif "post_" in name and p.ndim == 1:  # small branches do not amplify rounding
                p.copy_(like(p, 0.4, 0.04) - offset)
            elif "norm" in name and p.ndim == 1:
                p.copy_(like(p, 1.0, 0.1) - offset)
            elif "layer_scalar" in name:
                p.copy_(0.5 + 0.5 * torch.rand_like(p))
            elif "router.scale" in name or "per_expert" in name:
                p.copy_(like(p, 1.0, 0.2))
            elif p.ndim >= 2:
                p.copy_(like(p, 0.0, p.shape[-1] ** -0.5))


# --- models ------------------------------------------------------------------------------------------------


def load_adapted(folder: Path, *, experts: bool = False, sizes: Mapping[str, int] | None = None) -> Decoder:
    """The model with an adapter on everything, on the experts too where asked; A and B both random."""
    mesh = mesh_of(sizes)
    model, checkpoint = loading.build(folder, dtype="float32")
    lora.inject(model, targets=(*lora.ALL, *EXPERTS) if experts else "all", rank=RANK, alpha=ALPHA)
    shardings, _ = loading.place(model, mesh, replicate_kv=True)
    loading.load_base(model, checkpoint, shardings)
    loading.assign(model, loading.put(helpers.random_adapter(model), shardings))
    return model


def mesh_of(sizes: Mapping[str, int] | None = None) -> Any:
    sizes = sizes or {}
    return meshes.build(sizes, jax.devices()[: int(np.prod(list(sizes.values()) or [1]))])


def has_experts(model: Decoder) -> bool:
    return any(layer.experts for layer in model.arch.layers)


def trained(model: Decoder, values: Tree, *, method: str) -> adapters.Trained:
    """What the checkpoint of a run holds that ended with these values."""
    record = {"method": method, "adapter": {"rank": RANK, "alpha": ALPHA}}
    return adapters.Trained(Path("run"), 0, record, values)


# --- measurements ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradients:
    """Against PEFT: absolute differences of loss and logits, relative errors by PEFT's own tensor names."""

    loss: float
    logits: float
    errors: dict[str, float]
    remat: float  # largest relative error of any gradient under full rematerialisation, against none
    remat_loss: float

    @property
    def worst(self) -> float:
        return max(self.errors.values())


def compare_with_peft(folder: Path, experts: bool = False, remat: bool = True) -> Gradients:
    model = load_adapted(folder, experts=experts)
    batch = helpers.padded_rows(model.arch.vocab, 32)
    real = batch["segment_ids"] > 0
    loss, grads = helpers.loss_and_grads(model, helpers.micro_batches(batch))
    again, recomputed = loss, grads
    if remat:
        again, recomputed = helpers.loss_and_grads(model, helpers.micro_batches(batch), remat="full")
    theirs = with_peft(folder, model, experts)
    wanted_loss, _ = helpers.peft_loss_and_grads(theirs, batch)
    wanted = {name: p.grad.numpy() for name, p in peft_tensors(theirs).items()}
    ours = to_peft(helpers.pairs(model, grads))
    assert set(ours) == set(wanted)
    found = helpers.logits(model, batch["tokens"], batch["segment_ids"])[real]
    with theirs.disable_adapter():
        base = helpers.reference_logits(theirs, batch["tokens"], real)[real]
    assert largest_difference(found, base) > 0.3  # the adapter does something
    return Gradients(
        abs(loss - wanted_loss),
        largest_difference(found, helpers.reference_logits(theirs, batch["tokens"], real)[real]),
        {name: relative_error(ours[name], wanted[name]) for name in wanted},
        max(relative_error(recomputed[path], grads[path]) for path in grads),
        abs(loss - again),
    )


def with_peft(folder: Path, model: Decoder, experts: bool) -> Any:
    """The reference under PEFT with the values of the model's adapter; every tensor must find its place."""
    import peft
    import torch

    layers = r"(model|model\.language_model)\.layers\.\d+\.(self_attn|mlp)\."
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=layers + f"({'|'.join(SEVEN)})", lora_dropout=0.0,
        target_parameters=list(EXPERTS) if experts else None,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(helpers.reference(folder), config)
    values = to_peft(helpers.pairs(model, helpers.adapter_of(model)))
    places = peft_tensors(adapted)
    assert set(places) == set(values)
    with torch.no_grad():
        for name, value in values.items():
            places[name].copy_(torch.tensor(value))
    return adapted.eval()


def peft_tensors(adapted: Any) -> dict[str, Any]:
    """The adapter's parameters by the names that they have in an adapter file."""
    return {name.replace(".default.", "."): p for name, p in adapted.named_parameters() if ".lora_" in name}


def compare_merge(folder: Path, out: Path, experts: bool = False) -> tuple[float, dict[str, Any]]:
    """(difference of the merged folder in transformers to PEFT's adapter / max |logit|, verify's figures)"""
    model = load_adapted(folder, experts=experts)
    base = open_checkpoint(folder)
    run = trained(model, helpers.adapter_of(model), method="lora")
    write_patched(base, out, merging.updates_of(run, model.arch))
    report = verify.Report()
    verify._compare_tensors(report, run, base, open_checkpoint(out), "original")
    assert not report.failures, report.failures
    batch = helpers.padded_rows(model.arch.vocab, 32)
    real = batch["segment_ids"] > 0
    applied = helpers.reference_logits(with_peft(folder, model, experts), batch["tokens"], real)[real]
    merged = helpers.reference_logits(helpers.reference(out), batch["tokens"], real)[real]
    return largest_difference(applied, merged) / float(np.abs(applied).max()), report.figures


def export_untrained(folder: Path, out: Path) -> dict[str, Any]:
    """What differs between a checkpoint and its weights after a way through the model."""
    model, base = helpers.load(folder), open_checkpoint(folder)
    values = {path: np.asarray(v[...]) for path, v in loading.variables(model, Base).items()}
    write_patched(base, out, merging.updates_of(trained(model, values, method="full"), model.arch))
    return difference.compare(base, open_checkpoint(out))


def greedy(folder: Path, new: int = 10, lengths: tuple[int, ...] = (3, 21, 70)) -> tuple[list, list]:
    """Greedy continuations of prompts before and past the window: (ours, those of transformers' generate)"""
    import torch

    model, theirs = helpers.load(folder), helpers.reference(folder)
    prompts = [row.tolist() for row in helpers.random_rows(lengths, model.arch.vocab, seed=3)]
    done = sampler.generate(model, prompts, (), sampler.Settings(max_new_tokens=new), rows=len(prompts))
    theirs.generation_config.eos_token_id = None
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        greedily = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            out = theirs.generate(ids, **greedily)
        wanted.append(out[0, len(prompt) :].tolist())
    return [completion.tokens for completion in done], wanted


def run_on_mesh(
    folder: Path, sizes: Mapping[str, int], experts: bool = False
) -> tuple[np.ndarray, float, Tree]:
    """Logits, loss and adapter gradients of four rows on a mesh of fake devices."""
    model, mesh = load_adapted(folder, experts=experts, sizes=sizes), mesh_of(sizes)
    rows = helpers.random_rows([32, 32, 27, 16], model.arch.vocab)
    batch = helpers.sheet([[row] for row in rows], 32)
    loss, grads = helpers.loss_and_grads(model, helpers.micro_batches(batch), mesh, remat="full")
    return helpers.logits(model, batch["tokens"], batch["segment_ids"], mesh=mesh), loss, grads


def mesh_differences(found: Any, wanted: Any) -> tuple[float, float, float, float]:
    """Of two results of `run_on_mesh`: logits over max |logit|, loss, gradients absolute and relative.

    Not the logits themselves: those of tiny E2B, with the adapter, are 1.3e-5 from float64 on one device already.
    """
    scale = float(np.abs(wanted[0]).max())
    return (
        largest_difference(found[0], wanted[0]) / scale,
        abs(found[1] - wanted[1]),
        largest_difference(found[2], wanted[2]),
        max(relative_error(found[2][path], wanted[2][path]) for path in wanted[2]),
    )


@functools.cache
def checkpoints(root: Path) -> Any:
    """checkpoints(root)(name) -> the folder of that architecture's tiny checkpoint, written once."""

    @functools.cache
    def make(name: str) -> Path:
        return write(root / name, (CASES | TEXT_ONLY)[name])

    return make
