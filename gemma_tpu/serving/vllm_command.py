"""A model folder and a machine into the vLLM command that serves the one on the other, or the reason why not.

Nothing is started here: what vLLM would refuse after minutes of loading is refused at once, and what will be in the
memory is counted. Images, flags and what is known to work are bundled/serving.yaml, under the user's own file.
"""

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tpu import assets, overlay
from gemma_tpu.adapter import peft_folder
from gemma_tpu.errors import UserError
from gemma_tpu.estimate import serving_memory
from gemma_tpu.estimate.serving_memory import GIB, Memory
from gemma_tpu.gemma import hf_config, sizes
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.hardware import chips, clouds
from gemma_tpu.hardware.chips import Slice
from gemma_tpu.run import runs
from gemma_tpu.storage import hub_cache
from gemma_tpu.storage.shards import open_checkpoint

VARIABLE = "GEMMA_TPU_SERVING"
USUAL_CONTEXT = 16384
HUB, MODEL = "/hub", "/model"  # in the container


@dataclass(frozen=True)
class Model:
    """What is served: a folder of this machine, or a repository of the hub."""

    folder: Path | None
    repository: str | None  # of the hub; None: the folder
    architecture: Architecture
    weight_bytes: int
    itemsize: int
    size: str | None  # our name of the published size that it has the geometry of
    told: str

    @property
    def here(self) -> Path:
        assert self.folder is not None, f"{self.repository} is no folder"
        return self.folder


@dataclass(frozen=True)
class Wish:
    """What the command line says; None: the usual."""

    tp: int | None = None
    context: int | None = None
    kv_dtype: str = "bfloat16"
    served_name: str | None = None
    port: int = 8000
    host: str = "127.0.0.1"
    image: str | None = None
    container: bool = True
    hub_cache: Path | None = None
    cache: Path = Path("~/.cache/gemma_tpu/serving")
    from_hub: str | None = None
    detach: bool = False


@dataclass(frozen=True)
class Serving:
    """Everything that is settled: what runs, and what it will take."""

    model: Model
    place: Slice | None  # None: the CPU
    machine: Mapping[str, Any]
    wish: Wish
    tp: int
    replicas: int
    context: int
    memory: Memory | None
    notes: tuple[str, ...]
    source: str

    @property
    def kind(self) -> str:
        return "cpu" if self.place is None else self.place.chip.kind

    @property
    def image(self) -> str:
        return self.wish.image or self.machine["image"]

    @property
    def by_repository(self) -> bool:
        """Does the server take a name in place of a path?"""
        return self.wish.container and not self.machine["local_folders"]

    @property
    def name(self) -> str:
        if self.model.repository:
            return self.wish.served_name or self.model.repository
        return self.wish.served_name or hub_cache.repository_of(self.model.here)

    @property
    def hub_cache(self) -> Path:
        folder = self.model.here.resolve()
        return (self.wish.hub_cache or folder.parent / ".hub-cache").expanduser().absolute()


# --- the model ---


def find_model(path: str, from_hub: str | None) -> Model:
    folder = Path(path).expanduser()
    if "://" in path:
        raise UserError(f"{path}: vLLM reads a folder of this machine or a repository of the hub; bring it here first: "
                        f"gcloud storage cp --recursive {path} models/")  # fmt: skip
    if not folder.exists():
        size = next((one for one in sizes.known() if path in (one, sizes.hub_id(one))), None)
        if size is None:
            raise UserError(f"{path}: no such folder; MODEL_DIR is a merged folder, or a published model: "
                            f"{', '.join(sizes.hub_id(one) for one in sizes.known())}")  # fmt: skip
        return _published(size, from_hub)
    _refuse_unmerged(folder)
    return _local(folder, from_hub)


def _published(size: str, from_hub: str | None) -> Model:
    arch = sizes.architecture(size)
    repository = from_hub or sizes.hub_id(size)
    told = f"{repository}, downloaded by the server; its weights are counted by the text tower alone"
    return Model(None, repository, arch, serving_memory.text_bytes(arch, 2), 2, size, told)


def _refuse_unmerged(folder: Path) -> None:
    if folder.is_file():
        raise UserError(f"{folder} is a file; MODEL_DIR is the folder of a merged model")
    if runs.is_run(folder):
        merged = folder / "merged"
        done = f"it has been: serve {merged}" if (merged / "config.json").is_file() else (
            f"gemma-tpu merge {folder} --out models/{folder.name}, then serve models/{folder.name}")  # fmt: skip
        raise UserError(f"{folder} is a run folder: its adapter has to be merged first; {done}")
    if (folder / peft_folder.CONFIG).is_file():
        merge = f"gemma-tpu merge --checkpoint {folder} --layout peft --base BASE --out models/merged"
        raise UserError(f"{folder} is an adapter, and vLLM on TPU serves none for Gemma 4: merge it first; {merge}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json here; MODEL_DIR is the folder of a merged model, as gemma-tpu merge "
                        "writes it")  # fmt: skip


def _local(folder: Path, from_hub: str | None) -> Model:
    checkpoint = open_checkpoint(folder)
    arch = hf_config.from_config(checkpoint.config)
    missing = [name for name in ("tokenizer.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} has no {' and no '.join(missing)}: vLLM needs the tokenizer beside the weights")
    size = next((one for one in sizes.known() if sizes.architecture(one).layers == arch.layers), None)
    stored = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    itemsize = 4 if stored == "float32" else 2
    far = f"; served from the hub as {from_hub}" if from_hub else ""
    told = f"{folder}, {checkpoint.total_bytes / GIB:.2f} GiB{far}"
    return Model(folder, from_hub, arch, checkpoint.total_bytes, itemsize, size, told)


# --- what fits together ---


def settle(path: str, on: str, wish: Wish) -> Serving:
    """Raises UserError with everything that is wrong, before anything is loaded."""
    data = overlay.load("serving.yaml", VARIABLE, open_at=("tpu_models.tested", "tpu_models.refused",
                                                           "tpu_models.generations"))  # fmt: skip
    place = None if on.strip().lower() == "cpu" else chips.find(on)
    if place is not None and place.slices > 1:
        raise UserError(f"--on {on}: a server runs on one slice; start one on each of them")
    kind = "cpu" if place is None else place.chip.kind
    machine = data["machines"][kind]
    if wish.from_hub:
        hub_cache.check(wish.from_hub)
    model = find_model(path, wish.from_hub)
    problems = list(_problems(model, place, wish, data["tpu_models"]))
    devices = 1 if place is None else place.devices
    allowed = serving_memory.group_sizes(model.architecture, devices)
    tp = wish.tp or max(allowed)
    if tp not in allowed:
        problems.append(_wrong_group(model.architecture, tp, devices, place, allowed))
    if problems:
        raise UserError("\n  ".join(["this cannot be served:", *problems]) if len(problems) > 1 else problems[0])
    context = wish.context or min(USUAL_CONTEXT, model.architecture.context)
    replicas = devices // tp
    memory = None
    if place is not None:
        memory = serving_memory.memory(model.architecture, tp, replicas, place.chip.device_hbm_gib, machine, context,
                                       model.weight_bytes, model.itemsize)  # fmt: skip
        _refuse_too_large(model, place, memory, wish, context)
    source = machine["source"]
    notes = tuple(_notes(model, place, machine, tp, replicas, data["tpu_models"]))
    return Serving(model, place, machine, wish, tp, replicas, context, memory, notes,
                   f"{source['from']}, {source['date']}".rstrip(", "))  # fmt: skip


def _problems(model: Model, place: Slice | None, wish: Wish, known: Mapping[str, Any]) -> Iterator[str]:
    arch = model.architecture
    if wish.context is not None and wish.context > arch.context:
        yield f"--max-len {wish.context}: the model was made for at most {arch.context} positions"
    if wish.served_name is not None and wish.container and place is not None and place.chip.kind == "tpu":
        try:
            hub_cache.check(wish.served_name)
        except UserError as error:
            yield f"--served-name: {error}"
    takes_folders = place is None or place.chip.kind != "tpu" or not wish.container or wish.from_hub
    if wish.hub_cache is not None and (takes_folders or model.repository):
        yield "--hub-cache: nothing to link; it is for a folder in an image that takes none"
    if wish.image is not None and not wish.container:
        yield "--image and --bare do not go together: a bare server is in no container"
    if place is None or place.chip.kind != "tpu":
        return
    refused = known["refused"].get(model.size) if model.size else None
    if refused:
        yield f"{refused} ({known['source']['from']}, {known['source']['date']})"
    hosts = clouds.machine_of(place).hosts
    if hosts > 1:
        single = [one.name for one in chips.slices()
                  if one.chip.name == place.chip.name and clouds.machine_of(one).hosts == 1]  # fmt: skip
        yield f"{place.name} is {hosts} machines, and this starts one server on one machine: {', '.join(single)}"


def _wrong_group(arch: Architecture, tp: int, devices: int, place: Slice | None, allowed: list[int]) -> str:
    reason = serving_memory.refusal(arch, tp) or f"{devices} devices of {place or 'a CPU'} do not divide by {tp}"
    return f"--tp {tp}: {reason}; possible here: {', '.join(map(str, allowed))}"


def _refuse_too_large(model: Model, place: Slice, memory: Memory, wish: Wish, context: int) -> None:
    if memory.sequences(wish.kv_dtype, context):
        return
    told = (f"weights {memory.weights:.1f} GiB and one sequence of {context} tokens "
            f"{memory.per_sequence[wish.kv_dtype][context]:.1f} GiB, of {memory.taken - memory.reserve:.1f} GiB that a "
            f"device of {place} has for them")  # fmt: skip
    shorter = [one for one in memory.per_sequence[wish.kv_dtype] if memory.sequences(wish.kv_dtype, one)]
    way = f"--max-len {max(shorter)} fits" if shorter else "take a larger slice, or a larger --tp"
    raise UserError(f"{model.told.partition(',')[0]} does not fit: {told}; {way}")


def _notes(model: Model, place: Slice | None, machine: Mapping[str, Any], tp: int, replicas: int,
           known: Mapping[str, Any]) -> Iterator[str]:  # fmt: skip
    arch = model.architecture
    copied = sorted({layer.kv_heads for layer in arch.layers if not layer.kv_shared and layer.kv_heads < tp})
    if copied:
        each = ", ".join(f"{count} KV heads {tp // count} times" for count in copied)
        yield f"tensor parallel over {tp}: {each}"
    if replicas > 1:
        yield f"{replicas} copies of the model, of {tp} devices each (--data-parallel-size)"
    if place is None or place.chip.kind != "tpu":
        return
    if not machine["sliding_bounded"] and len({layer.head_dim for layer in arch.layers}) > 1:
        yield ("this server keeps the whole context in sliding layers too, since the model's heads have two sizes: the "
               "KV cache is several times what the windows need")  # fmt: skip
    size = model.size
    tested = known["tested"].get(size) if size else None
    yield (f"{size}: {tested} ({known['source']['from']}, {known['source']['date']})" if tested
           else f"{size or 'this geometry'} is not in vLLM's list of models tested on TPU: it may fail")  # fmt: skip
    if place.chip.name in known["generations"]:
        yield known["generations"][place.chip.name]


# --- the command ---


def vllm_command(one: Serving) -> list[str]:
    """`serve ...`: what the image's vllm, or the one on PATH, is given."""
    if one.model.repository or one.by_repository:
        model = one.model.repository or one.name
    else:
        model = MODEL if one.wish.container else str(one.model.here.resolve())
    words = ["serve", model, "--served-model-name", one.name, "--host", one.wish.host, "--port", str(one.wish.port),
             "--max-model-len", str(one.context)]  # fmt: skip
    if one.place is not None:
        words += ["--tensor-parallel-size", str(one.tp), "--gpu-memory-utilization", str(one.machine["utilisation"])]
    if one.replicas > 1:
        words += ["--data-parallel-size", str(one.replicas)]
    if one.wish.kv_dtype == "fp8":
        words += ["--kv-cache-dtype", "fp8"]
    return [*words, *one.machine["flags"]]


def docker_command(one: Serving) -> list[str]:
    cache = one.wish.cache.expanduser().absolute()
    words = ["docker", "run", "--detach", "--name", container_name(one), *one.machine["docker"]]
    words += ["--volume", f"{cache}:/cache", "--env", f"{one.machine['cache']}={one.machine['cache_at']}"]
    if one.model.repository:
        words += ["--env", "HF_TOKEN", "--env", "HF_HOME=/cache/huggingface"]  # docker takes its value from here
    elif one.by_repository:
        words += ["--volume", f"{one.hub_cache}:{HUB}:ro", "--env", f"HF_HUB_CACHE={HUB}", "--env", "HF_HUB_OFFLINE=1"]
        folder = one.model.here.resolve()
        words += ["--volume", f"{folder}:{folder}:ro"]  # where links lead that are no hard links
    else:
        words += ["--volume", f"{one.model.here.resolve()}:{MODEL}:ro", "--env", "HF_HUB_OFFLINE=1"]
    if one.kind == "cpu":
        words += ["--env", f"VLLM_CPU_KVCACHE_SPACE={_cpu_cache_gib(one)}"]
    return [*words, "--entrypoint", "vllm", one.image, *vllm_command(one)]


def _cpu_cache_gib(one: Serving) -> int:
    size = serving_memory.cache_bytes(one.model.architecture, 1, one.context, 2, one.machine) / GIB
    return max(1, round(8 * size + 0.5))


def container_name(one: Serving) -> str:
    return "gemma-tpu-" + re.sub(r"[^a-z0-9]+", "-", one.name.lower()).strip("-") + f"-{one.wish.port}"


def script(one: Serving) -> str:
    """A bash script that starts the server, waits until it is healthy, and follows its log."""
    # exec: what is ended later is the server itself.
    words = docker_command(one) if one.wish.container else ["exec", "env", _cache_of_a_bare_one(one), "vllm",
                                                            *vllm_command(one)]  # fmt: skip
    values = {
        "NAME": container_name(one), "MODEL": one.name, "URL": url(one), "CONTAINER": "1" if one.wish.container else "",
        "DETACH": "1" if one.wish.detach else "", "CACHE": str(one.wish.cache.expanduser().absolute()),
        "IMAGE": one.image, "TRIES": str(one.machine["ready_minutes"] * 12),
    }  # fmt: skip
    about = [f"{one.name} on {one.place or 'a CPU'}, by vLLM {one.machine['vllm']} ({one.source})", *one.notes]
    lines = ["#!/usr/bin/env bash", *(f"# {line}" for line in about), "set -euo pipefail", ""]
    lines += ["# shellcheck disable=SC2034,SC2016  # a bare server needs fewer; nothing in them is expanded", "{"]
    lines += [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    lines += ["}", "", "# shellcheck disable=SC2016", "begin() {", f"  {_pretty(words)}", "}", ""]
    lines += ["# shellcheck disable=SC2016", "links() {", f"  {_links(one)}", "}", "", ""]
    return "\n".join(lines) + assets.resolve("bundled:launch/serve.sh").read_text(encoding="utf-8")


def _cache_of_a_bare_one(one: Serving) -> str:
    folder = one.wish.cache.expanduser().absolute()
    return f"{one.machine['cache']}={folder}{one.machine['cache_at'].removeprefix('/cache')}"


def _links(one: Serving) -> str:
    """What makes the cache of the hub that the container is given, where it is given one."""
    if not one.by_repository or one.model.repository:
        return ":"
    words = ["-m", "gemma_tpu.storage.hub_cache", str(one.model.here.resolve()), str(one.hub_cache), one.name]
    return " ".join(map(shlex.quote, [sys.executable, *words]))


def url(one: Serving) -> str:
    host = "127.0.0.1" if one.wish.host == "0.0.0.0" else one.wish.host
    return f"http://{host}:{one.wish.port}"


def _pretty(words: list[str]) -> str:
    """One option a line."""
    lines: list[str] = []
    rest = [shlex.quote(word) for word in words]
    while rest:
        word = rest.pop(0)
        if lines and word.startswith("--") and "=" not in word and rest and not rest[0].startswith("--") and (
            word not in ("--detach", "--privileged", "--disable_chunked_mm_input")
        ):
            lines.append(f"{word} {rest.pop(0)}")
        elif lines and word.startswith("--"):
            lines.append(word)
        elif lines:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return " \\\n    ".join(lines)


def to_json(one: Serving) -> dict[str, Any]:
    memory = one.memory
    found: dict[str, Any] = {
        "model": one.model.told, "size": one.model.size, "served_name": one.name,
        "on": "cpu" if one.place is None else one.place.name, "tp": one.tp, "replicas": one.replicas,
        "max_model_len": one.context, "kv_dtype": one.wish.kv_dtype, "url": f"{url(one)}/v1",
        "command": docker_command(one) if one.wish.container else ["vllm", *vllm_command(one)],
        "notes": list(one.notes), "source": one.source, "basis": "arithmetic",
    }  # fmt: skip
    if one.wish.container:
        found |= {"image": one.image, "vllm": one.machine["vllm"]}
    if memory is not None:
        found["memory_gib_per_device"] = {
            "limit": memory.limit, "taken": memory.taken, "weights": memory.weights, "reserve": memory.reserve,
            "for_cache": memory.for_cache,
        }  # fmt: skip
        found["kv_cache"] = {
            dtype: [{"context": context, "gib_per_sequence": size, "sequences": memory.sequences(dtype, context)}
                    for context, size in by_context.items()]
            for dtype, by_context in memory.per_sequence.items()
        }  # fmt: skip
    return found
