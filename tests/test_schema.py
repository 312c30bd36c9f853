"""The schema: every key has a type and a range, and a value is cast to it or refused, never guessed."""

from pathlib import Path

import pytest

from gemma_tpu.config import KEYS, SECTIONS, Config, from_dict, load
from gemma_tpu.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def read(*overrides: str) -> Config:
    """The defaults under overrides, whose values are cast as those of a file are."""
    return load(ROOT / "configs/tiny_cpu.yaml", overrides)


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        read(*overrides)
    return str(caught.value)


@pytest.mark.parametrize("text", ["1e-4", "0.0001", "1.0e-4", "'1e-4'", "+1E-4", "100e-6", ".0001"])
def test_every_way_to_write_a_number_is_the_number(text):
    assert read(f"optim.lr={text}").optim.lr == 1e-4


def test_an_integer_is_a_number():
    alpha = read("lora.alpha=64").lora.alpha
    assert alpha == 64.0 and type(alpha) is float


@pytest.mark.parametrize(
    "value", ["8.0", "1e1", "'8'", "true", "null", "[8]", "{a: 1}", "010", "0x10", "1_0"]
)
def test_only_an_integer_is_an_integer(value):
    assert "lora.rank = " in refusal(f"lora.rank={value}")


@pytest.mark.parametrize("value", ["yes", "off", "1", "'true'", "null", "truely"])
def test_only_true_and_false_are_booleans(value):
    assert read("log.progress=false").log.progress is False
    assert "log.progress = " in refusal(f"log.progress={value}")


def test_a_boolean_is_no_number():
    assert "optim.lr = true: must be a number above 0" in refusal("optim.lr=true")


def test_off_and_dates_are_words():
    config = read("data.packing=off", "run_dir=2026-11-21")
    assert config.data.packing == "off"
    assert config.run_dir == "2026-11-21"


@pytest.mark.parametrize("value", [".nan", ".inf", "nan", "inf", "1e999", "1" + "0" * 400])
def test_a_number_is_finite(value):
    assert "optim.weight_decay = " in refusal(f"optim.weight_decay={value}")
    with pytest.raises(UserError, match="weight_decay"):
        from_dict({"optim": {"weight_decay": float("inf")}})
    with pytest.raises(UserError, match="weight_decay"):
        from_dict({"optim": {"weight_decay": 10**400}})


@pytest.mark.parametrize("value", ["''", "7", "null", r'"a\nb"', r'"a\0"', r'"\ud800"', "' a'", "[a]"])
def test_text_is_printable_and_no_number(value):
    assert "model.path = " in refusal(f"model.path={value}")


def test_lists_and_single_values():
    assert read("data.path=a.jsonl").data.path == "a.jsonl"
    assert read("data.path=[a.jsonl, b.jsonl]").data.path == ("a.jsonl", "b.jsonl")
    assert read("lora.targets=[q_proj, v_proj]").lora.targets == ("q_proj", "v_proj")
    assert read(r"lora.targets=.*\.self_attn\.[qk]_proj").lora.targets == r".*\.self_attn\.[qk]_proj"
    assert read("lora.exclude=[]").lora.exclude == ()
    assert read("train.remat=[q, lora_h]").train.remat == ("q", "lora_h")


@pytest.mark.parametrize(
    "override", ["data.path=[]", "lora.targets=[]", "lora.targets='('", "train.remat=[]"]
)
def test_an_empty_list_and_a_broken_regex_are_refused(override):
    assert f"{override.split('=')[0]} = " in refusal(override)


OUT_OF_RANGE = {
    "model.dtype": "float16",
    "data.format": "sharegpt",
    "data.packing": "bucket",
    "data.train_on": "user",
    "data.overlong": "split",
    "data.transform": "codev",
    "data.limit": 0,
    "data.max_seq_len": 1,
    "lora.rank": 0,
    "lora.alpha": 0,
    "lora.dropout": 1,
    "mesh.data": 0,
    "mesh.fsdp": -4,
    "mesh.tp": 0,
    "mesh.expert": 2.0,
    "mesh.cpu_devices": -1,
    "train.method": "qlora",
    "train.steps": 0,
    "train.epochs": -1,
    "train.batch_size": 0,
    "train.accumulation": 0,
    "train.seed": -1,
    "train.remat": ["q", "nothing_has_this_name"],
    "optim.name": "adam",
    "optim.lr": 0,
    "optim.schedule": "poly",
    "optim.warmup_steps": -1,
    "optim.weight_decay": -0.1,
    "optim.clip": 0,
    "optim.b1": 1,
    "optim.b2": -0.1,
    "optim.eps": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 0,
    "log.every": 0,
}


@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_every_range_is_held(key):
    section, leaf = key.split(".")
    with pytest.raises(UserError) as caught:
        from_dict({section: {leaf: OUT_OF_RANGE[key]}})
    assert "1 problem\n" in str(caught.value)
    assert f"{key} = " in str(caught.value) and "must be" in str(caught.value)


def test_every_key_has_its_range_tested():
    no_range = {"mesh.auto", "mesh.replicate_kv", "log.progress"}  # booleans
    words = {
        "model.path",
        "data.path",
        "data.validation",
        "lora.targets",
        "lora.exclude",
        "lora.init_from",
        "run_dir",
        "recipe",
    }
    assert set(OUT_OF_RANGE) == set(KEYS) - no_range - words
    assert all(key.split(".")[0] in SECTIONS for key in OUT_OF_RANGE)


def test_a_refused_choice_names_the_allowed_ones():
    assert "data.packing = 'bucket': must be off or pack" in refusal("data.packing=bucket")
    message = refusal("optim.schedule=cosin")
    assert "must be one of cosine, linear, constant; did you mean cosine?" in message
