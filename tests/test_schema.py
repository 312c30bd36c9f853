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
    "model.quantise": "fp4",
    "data.format": "chatml",
    "data.weights": [1, 0],
    "data.columns": {"prompt": 7},
    "data.workers": 0,
    "data.packing": "sorted",
    "data.train_on": "user",
    "data.overlong": "split",
    "data.transform": "codev",
    "data.limit": 0,
    "data.max_seq_len": 1,
    "lora.rank": 0,
    "lora.alpha": 0,
    "lora.dropout": 1,
    "lora.rank_pattern": {"q_proj": 0},
    "lora.alpha_pattern": {"(": 8},
    "lora.layers": [-1],
    "lora.init": "olora",
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
    "optim.loraplus_ratio": 0,
    "optim.warmup_steps": -1,
    "optim.warmup_ratio": 1,
    "optim.decay_ratio": 0,
    "optim.weight_decay": -0.1,
    "optim.clip": 0,
    "optim.b1": 1,
    "optim.b2": -0.1,
    "optim.eps": 0,
    "preference.loss": "orpo",
    "preference.beta": 0,
    "preference.margin": -1,
    "checkpoint.every": 0,
    "checkpoint.seconds": 0,
    "checkpoint.keep": 0,
    "checkpoint.keep_best": -1,
    "log.every": 0,
    "log.trackers": ["mlflow"],
    "log.usd_per_hour": 0,
    "eval.every": 0,
    "eval.patience": 0,
    "eval.max_new_tokens": 0,
    "faults.skips": 0,
    "faults.spike": 0,
    "profile.start": 0,
    "profile.steps": 0,
    "distributed.processes": 0,
    "distributed.process": -1,
    "distributed.timeout": 0,
}


@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_every_range_is_held(key):
    section, leaf = key.split(".")
    with pytest.raises(UserError) as caught:
        from_dict({section: {leaf: OUT_OF_RANGE[key]}})
    assert "1 problem\n" in str(caught.value)
    assert f"{key} = " in str(caught.value) and "must be" in str(caught.value)


def test_every_key_has_its_range_tested():
    no_range = {
        "mesh.auto", "mesh.replicate_kv", "log.progress", "log.tensorboard", "data.strict", "lora.rslora", "lora.dora",
    }  # fmt: skip
    words = {
        "model.path",
        "data.path",
        "data.validation",
        "data.cache",
        "train.compile_cache",
        "lora.targets",
        "lora.exclude",
        "lora.init_from",
        "checkpoint.folder",
        "log.project",
        "eval.prompts",
        "distributed.coordinator",
        "run_dir",
        "recipe",
    }
    assert set(OUT_OF_RANGE) == set(KEYS) - no_range - words
    assert all(key.split(".")[0] in SECTIONS for key in OUT_OF_RANGE)


def test_columns_are_a_mapping_that_can_be_hashed():
    config = read("data.columns={prompt: question, response: answer}")
    assert config.data.columns == {"prompt": "question", "response": "answer"}
    assert hash(config) == hash(read("data.columns={response: answer, prompt: question}"))
    assert "must be a mapping of " in refusal("data.columns=[prompt]")


def test_a_transform_is_shipped_or_a_place_to_find_it():
    for name in ("codev_r1", "mine:shorten", "tools/mine.py:shorten"):
        assert read(f"data.transform={name}").data.transform == name
    assert read("data.transform=[codev_r1, 'mine:f']").data.transform == ("codev_r1", "mine:f")
    assert "must be codev_r1, your own function as module:function" in refusal("data.transform=codev_r2")


def test_held_out_rows_are_a_file_or_a_share():
    assert read("data.validation=0.05").data.validation == 0.05
    assert read("data.validation=[a.jsonl, b.jsonl]").data.validation == ("a.jsonl", "b.jsonl")
    for wrong in ("0", "1", "1.5", "[]"):
        assert "data.validation = " in refusal(f"data.validation={wrong}")


def test_there_is_a_weight_for_each_path():
    assert read("data.path=[a, b]", "data.weights=[3, 1]").data.weights == (3.0, 1.0)
    assert "data.weights (1 numbers) must have one for each of data.path (2)" in refusal(
        "data.path=[a, b]", "data.weights=[1]")


def test_a_refused_choice_names_the_allowed_ones():
    assert "data.packing = 'sorted': must be one of off, bucket, pack" in refusal("data.packing=sorted")
    message = refusal("optim.schedule=cosin")
    assert "must be one of cosine, linear, constant, wsd; did you mean cosine?" in message
