"""Adapters as PEFT folders: adapter_config.json and adapter_model.safetensors, out and in.

The portable form is what every reader understands: one rank for all (smaller ones padded with zeros, which change
nothing), one scale (another is folded into B), no flags that some readers ignore. The native form keeps what was
trained, rank and alpha of each module by PEFT's own patterns. The form for vLLM is the portable one, with K's pair a
second time as V's where V is K: vLLM holds such a layer's K and V as two, and would leave V as it was in the base.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tpu import plain
from gemma_tpu.adapter.updates import LowRank
from gemma_tpu.errors import UserError
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.gemma.weights import EXPERTS, lora_entries, to_peft
from gemma_tpu.storage.shards import Checkpoint, read_file
from gemma_tpu.storage.staging import staged, write_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TENSOR = r"(.+)\.(?:lora_(A|B)(?:\.\w+)?\.weight|lora_(magnitude)_vector(?:\.\w+)?(?:\.weight)?)"
_K, _V = ".self_attn.k_proj", ".self_attn.v_proj"
Pairs = Mapping[str, LowRank]  # by the checkpoint's tensor name

# --- out ---


def write(out: Path, adapter: Pairs, *, base: str, native: bool = False, overwrite: bool = False,
          depth: int | None = None, extra: Mapping[str, bytes] | None = None,
          v_from: Collection[str] = ()) -> dict[str, Any]:  # fmt: skip
    """Writes the folder, whole or not at all; returns its adapter_config.json. `depth`: the base's layers, of which
    some may have no adapter. `v_from`: K's tensors whose pairs are written as V's too."""
    from safetensors.numpy import save

    if any(part.magnitude is not None for part in adapter.values()) and not native:
        raise UserError("an adapter with magnitudes (DoRA) has no portable form: vLLM and llama.cpp cannot read it; "
                        "export it in its native form, or merge it")
    shaped, config = _native(adapter) if native else _portable(adapter)
    config = _config(shaped, base, depth) | config
    twice = {name.replace(_K, _V): shaped[name] for name in v_from}
    tensors = to_peft({name: (part.a, part.b) for name, part in (shaped | twice).items()})
    tensors |= {f"base_model.model.{_module(name)}.lora_magnitude_vector": part.magnitude
                for name, part in shaped.items() if part.magnitude is not None}  # fmt: skip
    tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    files = {CONFIG: json.dumps(config, indent=2, sort_keys=True).encode() + b"\n",
             WEIGHTS: save(tensors, metadata={"format": "pt"}), **(extra or {})}  # fmt: skip
    with staged(out, set(files), overwrite) as folder:
        for name, content in files.items():
            write_file(folder / name, methodcaller("write", content))
    return config


def _portable(adapter: Pairs) -> tuple[dict[str, LowRank], dict[str, Any]]:
    rank = max(part.a.shape[-2] for part in adapter.values())
    scales = {part.scale for part in adapter.values()}
    alpha = scales.pop() * rank if len(scales) == 1 else 0.5
    if alpha != int(alpha):  # vLLM takes whole numbers alone
        alpha = rank
    shaped = {}
    for name, part in adapter.items():
        fold = part.scale * rank / alpha
        pad = rank - part.a.shape[-2]
        a = np.pad(part.a, [(0, 0)] * (part.a.ndim - 2) + [(0, pad), (0, 0)])
        b = np.pad(part.b, [(0, 0)] * (part.b.ndim - 1) + [(0, pad)])
        shaped[name] = LowRank(b if fold == 1 else (b * np.float64(fold)).astype(np.float32), a, alpha / rank)
    return shaped, {"r": rank, "lora_alpha": int(alpha), "use_rslora": False}


def _native(adapter: Pairs) -> tuple[dict[str, LowRank], dict[str, Any]]:
    """Rank and alpha of most modules as the defaults, those of the others in patterns."""
    kinds: dict[tuple[int, float], list[str]] = {}
    for name, part in adapter.items():
        rank = part.a.shape[-2]
        kinds.setdefault((rank, part.scale * rank), []).append(name)
    common = max(kinds, key=lambda kind: len(kinds[kind]))
    others = {f"^{re.escape(_module(name))}$": kind for kind, names in kinds.items() if kind != common
              for name in names}  # fmt: skip
    alphas = {module: _whole(alpha) for module, (_, alpha) in others.items() if alpha != common[1]}
    config = {"r": common[0], "lora_alpha": _whole(common[1]), "use_rslora": False,
              "use_dora": any(part.magnitude is not None for part in adapter.values()),
              "rank_pattern": {module: rank for module, (rank, _) in others.items() if rank != common[0]},
              "alpha_pattern": alphas}  # fmt: skip
    return dict(adapter), config


def _whole(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def _config(adapter: Pairs, base: str, depth: int | None) -> dict[str, Any]:
    dense = [_module(name) for name in adapter if not name.endswith(EXPERTS)]
    stacks = _stacks([name for name in adapter if name.endswith(EXPERTS)], depth)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "lora_dropout": 0.0,
        "modules_to_save": None, "target_modules": _targets(dense), "target_parameters": stacks or None,
        "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip


def _stacks(names: list[str], depth: int | None) -> list[str]:
    """Stacks of experts are parameters: named by their ends, with the layer's number where some layers have none."""
    ends = [name.rpartition(".layers.")[2] for name in names]
    layers = {end.partition(".")[0] for end in ends}
    whole = depth is None or len(layers) == depth
    return sorted({end.partition(".")[2] if whole else f"layers.{end}" for end in ends})


def _targets(modules: list[str]) -> str | list[str]:
    """One regex over full names, so that neither a vision tower's q_proj nor that of a layer left out is among them."""
    if not modules:
        return []
    towers = sorted({module.rpartition(".layers.")[0] for module in modules})
    layers: dict[str, list[int]] = {}  # of each module that layers have
    for module in modules:
        number, _, name = module.rpartition(".layers.")[2].partition(".")
        layers.setdefault(name, []).append(int(number))
    alike: dict[tuple[tuple[int, ...], str], list[str]] = {}  # (layers, parent) -> what is in it
    for name, numbers in sorted(layers.items()):
        parent, _, last = name.rpartition(".")
        alike.setdefault((tuple(sorted(numbers)), parent), []).append(last)
    inner = "|".join(
        f"({'|'.join(map(str, numbers))})\\." + (f"{re.escape(parent)}\\." if parent else "") + f"({'|'.join(names)})"
        for (numbers, parent), names in alike.items()
    )
    return f"({'|'.join(map(re.escape, towers))})\\.layers\\.({inner})"


def _module(name: str) -> str:
    """The checkpoint's tensor -> the module that PEFT wraps: Gemma 3's multimodal class names its text tower anew."""
    return re.sub(r"^language_model\.model\.", "model.language_model.", name.removesuffix(".weight"))


# --- in ---


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder that was read: what it does to which tensor of the base."""

    folder: Path
    config: dict[str, Any]
    parts: dict[str, LowRank]


def read(folder: str | Path, base: Checkpoint, arch: Architecture) -> Adapter:
    """Ours or a foreign one; whatever in it would be ignored, or belongs to no weight of the text tower, is refused."""
    folder = Path(folder)
    config = _read_config(folder)
    tensors = read_file(folder / WEIGHTS)
    places = _places(base, arch, config)
    problems: list[str] = []
    pairs: dict[str, dict[str, np.ndarray]] = {}  # of each tensor of the base: A, B and a magnitude
    for name, value in tensors.items():
        found = re.fullmatch(_TENSOR, name)
        place = places.get(_suffix(found[1]) or "") if found else None
        if place is None and _is_copy_of_k(name, tensors):
            continue  # the form for vLLM; V is K, which has its own pair
        if found is None or place is None:
            problems.append(f"{plain.cut(name, 200)}: no weight of the base's text tower takes it")
        else:
            pairs.setdefault(place, {})[found[2] or found[3]] = value.astype(np.float32)
    parts: dict[str, LowRank] = {}
    for place, pair in pairs.items():
        if not {"A", "B"} <= pair.keys() or pair["A"].ndim != 2 or pair["B"].ndim != 2:
            problems.append(f"{place}: needs a matrix A and a matrix B, has {', '.join(sorted(pair))}")
            continue
        shape, rank = base.info(place).shape, _setting(config, "rank_pattern", "r", place)
        a, b = pair["A"], pair["B"]
        if place.endswith(EXPERTS) and a.size and b.size and a.shape[0] % shape[0] == b.shape[1] % shape[0] == 0:
            a, b = a.reshape(shape[0], -1, a.shape[-1]), np.moveaxis(b.reshape(b.shape[0], -1, shape[0]), -1, 0)
        if a.shape[-2] != rank or (*b.shape[:-1], a.shape[-1]) != shape:
            problems.append(f"{place}: A {list(a.shape)}, B {list(b.shape)} of rank {rank} do not give {list(shape)}")
            continue
        alpha = _setting(config, "alpha_pattern", "lora_alpha", place)
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        parts[place] = LowRank(b, a, float(scale), pair.get("magnitude"))
    if problems:
        raise UserError(f"{folder} is no adapter for {base.where}:\n  " + plain.first(sorted(problems), between="\n  "))
    if not parts:
        raise UserError(f"{folder / WEIGHTS} holds no adapter tensors")
    return Adapter(folder, config, parts)


def _is_copy_of_k(name: str, tensors: Mapping[str, np.ndarray]) -> bool:
    of_k = tensors.get(name.replace(_V, _K)) if _V in name else None
    return of_k is not None and np.array_equal(of_k, tensors[name])


def without_v(adapter: Pairs, arch: Architecture) -> list[str]:
    """K's tensors in layers whose V is K, and so has no tensor of its own."""
    numbers = {number for number, layer in enumerate(arch.layers) if layer.k_eq_v}
    return [name for name in adapter if _K in name and int(name.rpartition(".layers.")[2].partition(".")[0]) in numbers]


def _read_config(folder: Path) -> dict[str, Any]:
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is no PEFT adapter: it has no {' and no '.join(missing)}")
    config = plain.from_json((folder / CONFIG).read_bytes(), str(folder / CONFIG))
    wrong = []
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG}: peft_type must be LORA")
    for key in ("r", "lora_alpha"):
        if isinstance(config.get(key), bool) or not plain.number(config.get(key)) or config[key] <= 0:
            wrong.append(f"{key} must be a number above 0, not {plain.shown(config.get(key))}")
    if config.get("bias", "none") != "none":
        wrong.append(f"bias {plain.shown(config['bias'])}: only adapters without biases can be taken up")
    for key in ("modules_to_save", "trainable_token_indices", "layer_replication", "lora_bias"):
        if config.get(key):
            wrong.append(f"{key} is set, and would be lost")
    wrong += plain.faults(config, _FORM)
    if not wrong:
        wrong += [f"{name} has {plain.shown(key)}: {problem}" for name in ("rank_pattern", "alpha_pattern")
                  for key in config.get(name) or {} if (problem := _pattern_problem(key))]  # fmt: skip
    if wrong:
        raise UserError(f"{folder / CONFIG}:\n  " + plain.first(wrong, between="\n  "))
    return config


_FORM = {"bias?": (str, None), "use_rslora?": (bool, None), "target_parameters?": ([str], None),
         "rank_pattern?": ({str: int}, None), "alpha_pattern?": ({str: float}, None)}  # fmt: skip


def _pattern_problem(key: str) -> str | None:
    """A regex from elsewhere: one that repeats what repeats can take for ever to say no."""
    if len(re.findall(r"(?<!\\)[*+{]", key)) > 3 or re.search(r"(?<!\\)\)[*+?{]", key):
        return "a pattern that repeats groups, or more than three things, is not tried out"
    try:
        re.compile(key)
    except (re.error, RecursionError, OverflowError) as error:
        return f"no regular expression ({plain.cut(str(error))})"
    return None


def _setting(config: dict[str, Any], pattern: str, default: str, place: str) -> Any:
    """As PEFT matches its patterns: a key is a regex for the end of the module's name."""
    module = _module(place)
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return config[default]


def _places(base: Checkpoint, arch: Architecture, config: dict[str, Any]) -> dict[str, str]:
    """`layers.3.mlp.up_proj` -> the tensor: classes name what stands in front of the layers as they please. Where both
    stacks of experts are adapted, PEFT wraps their module twice: down_proj outside, gate_up_proj inside."""
    stacks = [name for name in EXPERTS if any(one.endswith(name) for one in config.get("target_parameters") or ())]
    found = {}
    for name in base.names():
        if name.startswith(f"{arch.prefix}layers.") and len(base.info(name).shape) > 1:
            found[name.removeprefix(arch.prefix).removesuffix(".weight")] = name
    for key in [key for key in found if key.endswith(EXPERTS)]:
        inner = len(stacks) == len(EXPERTS) and key.endswith("gate_up_proj")
        if key.endswith(tuple(stacks) or EXPERTS):
            found[key.rpartition(".")[0] + (".base_layer" if inner else "")] = found[key]
    return found


def _suffix(module: str) -> str | None:
    """What follows the text tower's own prefix; None for another tower's layers."""
    found = re.fullmatch(r"base_model\.model\.(?:model\.|language_model\.)*(layers\.\d+\..+)", module)
    return found[1] if found else None


def onto(adapter: Adapter, arch: Architecture, start: Mapping[str, np.ndarray],
         layout: Mapping[str, Any], dora: bool = False) -> tuple[dict[str, np.ndarray], list[str]]:
    """(our stacked tensors that compute what the adapter computes, what is new in them)

    `start` has fresh values, with B zero, which stay wherever the adapter has nothing: modules that it leaves out, and
    ranks beyond its own. Its scale goes into B, because ours is the config's. `layout` is lora.layout of our model.
    """
    values = {path: np.array(value, np.float32) for path, value in start.items()}
    if dora:
        rows = {name.removesuffix("b"): value.shape[:-1] for name, value in values.items() if name.endswith(".lora_b")}
        values |= {f"{name}magnitude": np.zeros(shape, np.float32) for name, shape in rows.items()}
    problems = []
    entries = lora_entries(arch)
    trained = {}  # tensor -> (our projection, rank and scale of this layer)
    for hf, entry in entries.items():
        stem = entry.path.removesuffix(".w")
        if (own := layout.get(stem)) is not None:
            number = int(np.ravel_multi_index(entry.index, values[f"{stem}.lora_b"].shape[: len(entry.index)]))
            if own["ranks"][number]:
                trained[hf] = stem, own["ranks"][number], own["scales"][number]
    for hf, part in adapter.parts.items():
        if hf not in trained:
            problems.append(f"{hf}: lora.targets and lora.layers do not train it")
            continue
        (stem, width, scale), index = trained[hf], entries[hf].index
        *experts, out, inside = entries[hf].hf_shape
        a_RI = values[f"{stem}.lora_a"][index].reshape(*experts, -1, inside)  # views: the stack has room in itself
        b_OR = values[f"{stem}.lora_b"][index].reshape(*experts, out, -1)
        rank = part.a.shape[-2]
        if dora != (part.magnitude is not None):
            has, must = ("no", "false") if dora else ("a", "true")
            problems.append(f"{hf}: has {has} magnitude, lora.dora must be {must}")
        elif rank > width:
            problems.append(f"{hf}: has rank {rank}, lora.rank must be at least that")
        else:
            a_RI[..., :rank, :] = part.a
            b_OR[..., :rank] = part.b * (part.scale / scale)
            if part.magnitude is not None:
                magnitude = values[f"{stem}.lora_magnitude"][index]
                magnitude[...] = part.magnitude.reshape(magnitude.shape)
    fresh = sorted(set(trained) - set(adapter.parts))
    if dora and fresh:
        problems += [f"{hf}: has no adapter there, and a DoRA needs its magnitude" for hf in fresh]
    if problems:
        shown = "\n  ".join(problems[:20])
        raise UserError(f"lora.init_from {adapter.folder} does not fit this config:\n  {shown}")
    ranks = sorted({part.a.shape[-2] for part in adapter.parts.values()})
    notes = [f"adapter of {adapter.folder}: {len(adapter.parts)} modules of rank {', '.join(map(str, ranks))} taken up"]
    if fresh:
        notes.append(f"{len(fresh)} modules that it leaves out start fresh")
    return values, notes
