"""The configs that ship: each loads, says what it is for, and holds the numbers that its header promises."""

import math
import re
from pathlib import Path

import pytest

from gemma_tpu.config import Config, differences, load, to_yaml
from gemma_tpu.gemma import mesh, sizes

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
ON_TPU = [file for file in SHIPPED if not file.stem.startswith("tiny_")]
HBM_GB = {"v5e": 16, "v5p": 95, "v6e": 32}  # of one chip, as its Cloud TPU page says
CORES = {"v5e": 1, "v5p": 2, "v6e": 1}  # that the N of a slice's name counts for each chip


def slice_of(file: Path) -> tuple[str, int, int]:
    """Generation, the N of its name, chips: from the header's line about the hardware."""
    line = r"^# Hardware  TPU (v\w+)-(\d+): (\d+) chips?, \3 JAX devices?$"
    found = re.search(line, file.read_text(), re.M)
    assert found, "the header names no slice"
    return found[1], int(found[2]), int(found[3])


def size_of(file: Path) -> str:
    """gemma4_26b_a4b_v6e4.yaml is of gemma4-26b-a4b."""
    (name,) = [name for name in sizes.known() if file.stem.startswith(name.replace("-", "_") + "_v")]
    return name


def state_gib(config: Config, name: str) -> tuple[float, float, int]:
    """On one chip, GiB of weights and of the adapter with its two moments; the parameters of the adapter."""
    from jax.sharding import AbstractMesh, AxisType

    from gemma_tpu.adapter import lora
    from gemma_tpu.gemma import loading
    from gemma_tpu.gemma.model import Decoder
    from gemma_tpu.gemma.projection import Base, LoRA

    model = Decoder(sizes.architecture(name), loading.DTYPES[config.model.dtype])
    wanted = config.lora
    lora.inject(model, targets=wanted.targets, exclude=wanted.exclude, rank=wanted.rank, alpha=wanted.alpha)
    shape = tuple(getattr(config.mesh, axis) for axis in mesh.AXES)
    devices = AbstractMesh(shape, mesh.AXES, axis_types=(AxisType.Auto,) * len(shape))
    shardings, _ = loading.place(model, devices, config.mesh.replicate_kv)

    def gib(kind: type) -> float:
        held = loading.variables(model, kind)
        shards = {path: shardings[path].shard_shape(tuple(held[path].shape)) for path in held}
        return sum(math.prod(shards[path]) * held[path].dtype.itemsize for path in held) / 2**30

    return gib(Base), 3 * gib(LoRA), lora.count(model)


def test_there_are_shipped_configs():
    assert {file.stem for file in SHIPPED} >= {
        "tiny_cpu",
        "tiny_base",
        "gemma4_31b_v5p8_codev",
        "gemma4_31b_v5p8_fast",
    }


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_config_loads_and_opens_with_command_hardware_and_expectation(file, tmp_path):
    config = load(file)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(to_yaml(config), encoding="utf-8")
    assert load(resolved) == config
    header = file.read_text().partition("\nmodel:")[0]
    for word in ("# Command", "# Hardware", "# Expected"):
        assert f"\n{word} " in header or f"\n{word}\n" in header, word


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_config_has_its_own_run_folder(file):
    assert load(file).run_dir == f"runs/{file.stem}"


def test_every_known_size_has_a_config_for_a_tpu_slice():
    assert {size_of(file) for file in ON_TPU} == set(sizes.known())


@pytest.mark.parametrize("file", ON_TPU, ids=lambda file: file.stem)
def test_the_slice_the_mesh_the_heads_and_the_rows_of_a_tpu_config_agree(file):
    config, (generation, number, chips) = load(file), slice_of(file)
    assert number == chips * CORES[generation]
    assert f"{generation}{number}" in file.stem.split("_")
    arch, train = sizes.architecture(size_of(file)), config.train
    rows = train.batch_size // train.accumulation
    assert math.prod(mesh.sizes(config.mesh, arch, chips, rows).values()) == chips
    assert not config.mesh.auto, "a config for one slice says its mesh"
    assert config.data.max_seq_len <= arch.context


@pytest.mark.parametrize("file", ON_TPU, ids=lambda file: file.stem)
def test_a_tpu_config_downloads_the_model_that_it_trains(file):
    config, hub = load(file), sizes.hub_id(size_of(file))
    assert config.model.path == f"models/{hub.partition('/')[2]}"
    assert config.model.dtype == "bfloat16"
    text = file.read_text()
    shared = re.search(r"configs/(\S+), which also has the download commands", " ".join(text.split("\n# ")))
    if shared:
        text = (ROOT / "configs" / shared[1]).read_text()
    assert f"hf download {hub} --local-dir {config.model.path}" in text


@pytest.mark.parametrize("file", ON_TPU, ids=lambda file: file.stem)
def test_what_a_tpu_config_must_hold_fits_its_chips_and_is_what_the_header_says(file):
    weights, adapter, trained = state_gib(load(file), size_of(file))
    limit = HBM_GB[slice_of(file)[0]]
    assert weights + adapter <= limit / 2  # the other half is for gradients, activations and logits
    text = file.read_text()
    if size_of(file) == "gemma4-31b":  # their headers compare with a paper instead
        return
    stated = re.sub(r"\n# +", " ", text)
    assert f"{weights:.2f} GiB of bfloat16 weights + {adapter:.2f} GiB of float32 adapter" in stated
    assert f"({trained:,} parameters)" in stated
    total = round(weights, 2) + round(adapter, 2)
    assert f"= {total:.2f} GiB, of {limit} GB HBM" in stated
    assert "measured here  nothing yet" in stated


@pytest.mark.parametrize("file", ON_TPU, ids=lambda file: file.stem)
def test_a_tpu_config_packs_and_keeps_what_fits_or_is_the_papers(file):
    config, papers = load(file), file.stem == "gemma4_31b_v5p8_codev"
    assert config.train.remat == ("full" if papers else "auto")
    assert config.data.packing == ("off" if papers else "pack")
    if size_of(file) != "gemma4-31b":
        assert (config.data.path, config.data.format) == ("data/train.jsonl", "messages")
        assert config.data.transform is None


@pytest.mark.parametrize("file", ON_TPU, ids=lambda file: file.stem)
def test_the_header_says_what_the_table_of_plans_says(file):
    table = (ROOT / "benchmarks/README.md").read_text()
    (row,) = re.findall(rf"^\| {file.stem} \|.*$", table, re.M)
    _, _, _, peak, _, _, rate, mfu, usd, _ = (cell.strip() for cell in row.strip("|").split("|"))
    assert f"{rate} tokens/s, MFU {mfu}, {peak} GiB a chip" in file.read_text()
    assert size_of(file) == "gemma4-31b" or f"${usd} per million tokens" in file.read_text()


def test_the_defaults_are_tiny_cpu():
    assert load("tiny_cpu.yaml") == Config()
    assert load(ROOT / "configs/tiny_cpu.yaml") == Config()


def test_codev_has_the_numbers_of_the_paper():
    config = load("gemma4_31b_v5p8_codev.yaml")
    lora, optim = config.lora, config.optim
    assert (lora.targets, lora.rank, lora.alpha, lora.dropout) == ("all", 64, 64.0, 0.05)
    assert (optim.lr, optim.schedule, optim.warmup_steps, optim.weight_decay) == (1e-4, "cosine", 100, 0.001)
    assert optim.clip is None
    assert (config.data.max_seq_len, config.data.limit, config.data.packing) == (3072, 10_000, "off")
    assert (config.train.epochs, config.train.batch_size) == (1, 8)
    assert 9_959 // config.train.batch_size == 1_244
    assert (config.checkpoint.every, config.checkpoint.keep) == (100, 3)
    assert config.model.dtype == "bfloat16"


def test_fast_says_the_updates_and_the_rate_that_its_own_numbers_give():
    config, slow = load("gemma4_31b_v5p8_fast.yaml"), load("gemma4_31b_v5p8_codev.yaml")
    text = (ROOT / "configs/gemma4_31b_v5p8_fast.yaml").read_text()
    updates = 9_959 * 922 / (config.train.batch_size * config.data.max_seq_len * 0.98)
    assert f"= {updates:.0f} updates instead of 1,244" in text
    rate = slow.optim.lr * (9_959 / updates / slow.train.batch_size) ** 0.5
    assert config.optim.lr == pytest.approx(rate, rel=0.03)
    assert config.optim.warmup_steps == round(100 / 1_244 * updates)
    changed = {line.split(":")[0] for line in differences(slow, config)}
    assert changed == {
        "data.max_seq_len",
        "data.packing",
        "train.batch_size",
        "train.remat",
        "optim.lr",
        "optim.warmup_steps",
        "optim.clip",
        "checkpoint.every",
        "run_dir",
    }
