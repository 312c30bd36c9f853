"""The configs that ship: each loads, says what it is for, and holds the numbers that its header promises."""

from pathlib import Path

import pytest

from gemma_tpu.config import Config, differences, load, to_yaml

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


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
        "optim.lr",
        "optim.warmup_steps",
        "optim.clip",
        "checkpoint.every",
        "run_dir",
    }
