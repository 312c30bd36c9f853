"""What several tests share: tiny checkpoints on a mesh, random adapters and batches, the reference's answers.

The figures that benchmarks/parity.py prints come from these same functions.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gemma_tpu.adapter import lora
from gemma_tpu.gemma import loading, weights
from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.gemma.model import Decoder
from gemma_tpu.gemma.projection import LoRA
from gemma_tpu.step import step
from gemma_tpu.tiny.checkpoint import write_tiny
from gemma_tpu.tiny.tokenizer import SPECIAL

# Two periods of 5 local + 1 global; every size differs from every other, so that a mix-up changes a shape.
DIMS = dict(
    layers=12, hidden=40, mlp=56, heads=8, kv_heads=4, global_kv_heads=2, head_dim=6, global_head_dim=16,
    window=8, vocab=112,
)  # fmt: skip
SMALL = dict(
    DIMS, layers=4, pattern=1
)  # the same two kinds of layer, alternating: compiles three times as fast
# What a mesh of four needs: all widths divide by 4.
EVEN = dict(SMALL, hidden=32, mlp=48, head_dim=8, vocab=96)
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Tests compile many programs and run each once on a few tokens: LLVM's optimiser is half of their time.
QUICK = {"xla_backend_optimization_level": 0}

Tree = dict[str, np.ndarray]
Pairs = dict[str, tuple[np.ndarray, np.ndarray]]  # the checkpoint's tensor -> (A, B), or their gradients


def write(folder: Path, **dims: Any) -> Path:
    return write_tiny(folder, dtype="float32", tokenizer=False, **dims)


def mesh_of(fsdp: int = 1, tp: int = 1) -> Mesh:
    return meshes.build({"fsdp": fsdp, "tp": tp}, jax.devices()[: fsdp * tp])


def load(folder: Path, mesh: Mesh | None = None, *, dtype: str = "float32", rank: int | None = None,
         alpha: float = 6.0, dropout: float = 0.0, replicate_kv: bool = False) -> Decoder:  # fmt: skip
    """The model of a checkpoint; with `rank`, with an adapter on everything whose A and B are both random."""
    model, checkpoint = loading.build(folder, dtype=dtype)
    if rank is not None:
        lora.inject(model, targets="all", rank=rank, alpha=alpha, dropout=dropout)
    shardings, _ = loading.place(model, mesh or mesh_of(), replicate_kv)
    loading.load_base(model, checkpoint, shardings)
    if rank is not None:
        loading.assign(model, loading.put(random_adapter(model), shardings))
    return model


def random_adapter(model: Decoder, seed: int = 0) -> Tree:
    """A and B about as large as PEFT's A: with much larger ones a random deep net amplifies rounding."""
    shapes = {path: v.shape for path, v in loading.variables(model, LoRA).items()}
    rng = np.random.default_rng(seed)
    return {path: (0.1 * rng.standard_normal(shapes[path])).astype(np.float32) for path in sorted(shapes)}


def random_rows(lengths: Sequence[int], vocab: int, seed: int = 0) -> list[np.ndarray]:
    """Rows of any tokens but the placeholders of other media: the reference puts other inputs there."""
    rng = np.random.default_rng(seed)
    text = np.setdiff1d(
        np.arange(3, vocab), [SPECIAL[name] for name in ("<|image|>", "<|audio|>", "<|video|>")]
    )
    return [rng.choice(text, length).astype(np.int32) for length in lengths]


def sheet(rows: Sequence[Sequence[np.ndarray]], tokens: int, first_target: int = 3) -> Tree:
    """Lists of segments, one list a row, as a [B, T] batch; each segment trains from `first_target` on."""
    shape = (len(rows), tokens)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions", "targets")}
    batch["weights"] = np.zeros(shape, np.float32)
    for row, segments in enumerate(rows):
        at = 0
        for number, segment in enumerate(segments, start=1):
            span = slice(at, at + len(segment))
            batch["tokens"][row, span] = segment
            batch["segment_ids"][row, span] = number
            batch["positions"][row, span] = np.arange(len(segment))
            batch["targets"][row, at : at + len(segment) - 1] = segment[1:]
            batch["weights"][row, at + first_target : at + len(segment) - 1] = 1.0
            at += len(segment)
    return batch


def micro_batches(batch: Tree, count: int = 1) -> dict[str, jax.Array]:
    """[B, T] -> [A, B / A, T], as the step takes it."""
    return {name: jnp.asarray(x.reshape(count, -1, x.shape[-1])) for name, x in batch.items()}


def logits(model: Decoder, tokens_BT: Any, segment_ids_BT: Any = None, positions_BT: Any = None,
           mesh: Mesh | None = None) -> np.ndarray:  # fmt: skip
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, *args: nnx.merge(graph, state)(*args), compiler_options=QUICK)
    with jax.set_mesh(mesh or mesh_of()):
        return np.asarray(run(state, tokens_BT, segment_ids_BT, positions_BT))


def make_grader(
    model: Decoder, mesh: Mesh | None = None, *, key: Any = None, remat: Any = "none"
) -> Callable[[dict[str, jax.Array]], tuple[float, Tree]]:
    """Compiles once for each shape of a batch; gives the loss and the gradients of what trains."""
    parts, trained = step.take_apart(model)
    run = jax.jit(lambda *args: step.mean_loss_and_grads(parts, *args, key, remat), compiler_options=QUICK)

    def grade(batch: dict[str, jax.Array]) -> tuple[float, Tree]:
        with jax.set_mesh(mesh or mesh_of()):
            loss, grads = run(trained, parts.frozen, batch)
        return float(loss), {path: np.asarray(x) for path, x in grads.items()}

    return grade


def loss_and_grads(model: Decoder, batch: dict[str, jax.Array], mesh: Mesh | None = None, **how: Any) -> Any:
    return make_grader(model, mesh, **how)(batch)


def largest_difference(a: Any, b: Any) -> float:
    """Largest absolute difference of two arrays or of two dicts of them; the keys must agree."""
    if isinstance(a, dict):
        assert set(a) == set(b)
        return max(largest_difference(a[name], b[name]) for name in a)
    return float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


# --- the reference ---------------------------------------------------------------------------------------


def reference(folder: Path) -> Any:
    """transformers' own model of the checkpoint, in float32; every tensor must find its place."""
    import torch
    import transformers

    from gemma_tpu.storage.shards import open_checkpoint

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = getattr(transformers, open_checkpoint(folder).config["architectures"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers and torch deprecate each other's calls
        model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def reference_logits(model: Any, tokens_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens_BT).long(), attention_mask=torch.tensor(mask_BT).long())
    return out.logits.numpy()


def with_peft(folder: Path, adapter: Pairs, rank: int, alpha: float) -> Any:
    """The reference under PEFT, with the adapter's values; every pair must find its place."""
    import peft
    import torch

    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(SEVEN), lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(reference(folder), config)
    modules = {hf: model.get_submodule("base_model.model." + hf.removesuffix(".weight")) for hf in adapter}
    assert len(modules) * 2 == sum("lora_" in name for name, _ in model.named_parameters())
    for hf, (a, b) in adapter.items():
        with torch.no_grad():
            modules[hf].lora_A["default"].weight.copy_(torch.tensor(a))
            modules[hf].lora_B["default"].weight.copy_(torch.tensor(b))
    return model.eval()


def peft_loss_and_grads(model: Any, batch: Tree) -> tuple[float, Pairs]:
    """Mean loss over the targets of a [B, T] batch with one segment a row, and its gradients."""
    import torch

    tensors = {name: torch.tensor(x) for name, x in batch.items()}
    mask = (tensors["segment_ids"] > 0).long()
    found = model(input_ids=tensors["tokens"].long(), attention_mask=mask).logits.flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(found, tensors["targets"].long().flatten(), reduction="none")
    loss = (losses * tensors["weights"].flatten()).sum() / tensors["weights"].sum()
    model.zero_grad()
    loss.backward()
    grads = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            hf = name.removeprefix("base_model.model.") + ".weight"
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            grads[hf] = (a.grad.numpy(), b.grad.numpy())
    return loss.item(), grads


def pairs(model: Decoder, tree: Tree) -> Pairs:
    """Our stacked adapter (or its gradients) by the checkpoint's names."""
    return weights.split_lora(model.arch, tree)


def adapter_of(model: Decoder) -> Tree:
    return {path: np.asarray(v[...]) for path, v in loading.variables(model, LoRA).items()}


# --- measurements, for tests and benchmarks/parity.py ------------------------------------------------------


def padded_rows(vocab: int, tokens: int = 64) -> Tree:
    """Three rows, two of them right-padded, each at least four windows of the tiny models long."""
    return sheet([[row] for row in random_rows([tokens, tokens - 15, tokens // 2], vocab)], tokens)


def compare_with_transformers(folder: Path) -> float:
    """Largest absolute difference of the logits of real tokens."""
    model = load(folder)
    batch = padded_rows(model.arch.vocab)
    real = batch["segment_ids"] > 0
    wanted = reference_logits(reference(folder), batch["tokens"], real)
    found = logits(model, batch["tokens"], batch["segment_ids"])
    assert found.shape == wanted.shape and found.dtype == np.float32
    assert wanted[real].std() > 0.3  # logits that are nearly constant would agree by themselves
    return largest_difference(found[real], wanted[real])


def compare_with_peft(folder: Path) -> tuple[dict[str, tuple[float, float]], float, float]:
    """(relative error of dA and dB by the checkpoint's name, difference of the losses, of the logits)"""
    rank, alpha = 3, 4.5
    model = load(folder, rank=rank, alpha=alpha)
    batch = padded_rows(model.arch.vocab)
    real = batch["segment_ids"] > 0
    loss, grads = loss_and_grads(model, micro_batches(batch))
    theirs = with_peft(folder, pairs(model, adapter_of(model)), rank, alpha)
    wanted_loss, wanted = peft_loss_and_grads(theirs, batch)
    ours = pairs(model, grads)
    assert set(ours) == set(wanted)
    errors = {hf: tuple(map(relative_error, ours[hf], wanted[hf])) for hf in wanted}
    tuned = logits(model, batch["tokens"], batch["segment_ids"])[real]
    base = logits(load(folder), batch["tokens"], batch["segment_ids"])[real]
    assert largest_difference(tuned, base) > 0.5  # the adapter does something
    difference = largest_difference(tuned, reference_logits(theirs, batch["tokens"], real)[real])
    return errors, abs(loss - wanted_loss), difference


def run_on_mesh(
    folder: Path, fsdp: int, tp: int, replicate_kv: bool = False
) -> tuple[np.ndarray, float, Tree]:
    """Logits, loss and adapter gradients of four rows on a mesh of fake devices."""
    mesh = mesh_of(fsdp, tp)
    model = load(folder, mesh, rank=3, replicate_kv=replicate_kv)
    batch = sheet([[row] for row in random_rows([32, 32, 27, 16], model.arch.vocab)], 32)
    loss, grads = loss_and_grads(model, micro_batches(batch), mesh)
    return logits(model, batch["tokens"], batch["segment_ids"], mesh=mesh), loss, grads
