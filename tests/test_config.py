"""The config: one YAML file is one run, and everything that is wrong with it is said at once."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tpu import config as configs
from gemma_tpu import plain
from gemma_tpu.config import KEYS, Config, differences, from_dict, load, to_dict, to_yaml
from gemma_tpu.errors import UserError
from gemma_tpu.schema import DataConfig, LoraConfig, MeshConfig, TrainConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def read(tmp_path):
    def read(text: str | bytes, *overrides: str) -> Config:
        file = tmp_path / "run.yaml"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return load(file, overrides)

    return read


@pytest.fixture
def refusal(read):
    def refusal(text: str | bytes, *overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            read(text, *overrides)
        return str(caught.value)

    return refusal


def test_a_file_that_says_nothing_is_the_defaults(read):
    assert read("# nothing yet\n") == Config()
    assert read("optim:\n") == Config()  # a section whose keys are all commented out


# --- everything at once ---


def test_every_problem_is_in_one_error_with_its_line(refusal):
    message = refusal(
        "model: {dtpye: float32}\n"
        "optim:\n"
        "  lr: fast\n"
        "  learning_rate: 3\n"
        "seeed: 3\n"
        "train: {batch_size: 10, accumulation: 3}\n"
        "checkpoint: 5\n"
        "log: {every: 0}\n"
        "log: {every: 5}\n",
        "lora.rnk=3",
        "data.packing=maybe",
        "nonsense",
    )
    assert message.splitlines()[0].endswith("run.yaml: 11 problems")
    assert [line.strip() for line in message.splitlines()[1:]] == [
        "line 1: model.dtpye = 'float32': unknown key; did you mean model.dtype?",
        "line 3: optim.lr = 'fast': must be a number above 0",
        "line 4: optim.learning_rate = 3: unknown key; did you mean optim.lr?",
        "line 5: seeed = 3: unknown key; did you mean train.seed?",
        "line 6: train.batch_size (10) must divide by train.accumulation (3)",
        "line 7: checkpoint = 5: must be a section with keys of its own",
        "line 8: log.every = 0: must be an integer of at least 1",
        "line 9: log: given twice, first on line 8",
        "override: lora.rnk = 3: unknown key; did you mean lora.rank?",
        "override: 'nonsense': must be key=value, like optim.lr=1e-4",
        "override: data.packing = 'maybe': must be one of off, bucket, pack",
    ]


@pytest.mark.parametrize(
    "text, meant",
    [
        ("lr: 3", "optim.lr?"),
        ("optimizer: {lr: 3}", "optim?"),
        ("train: {lr: 3}", "optim.lr?"),
        ("train: {step: 3}", "train.steps?"),
        ("every: 3", "checkpoint.every or log.every or eval.every?"),
        ("max_steps: 3", "train.steps?"),
    ],
)
def test_an_unknown_key_is_told_what_it_may_have_been(refusal, text, meant):
    assert f"did you mean {meant}" in refusal(text)


def test_a_key_like_no_other_is_told_what_there_is(refusal):
    assert "checkpoint.zzzzzz = 1: unknown key; known here: checkpoint.every, checkpoint.seconds, " in refusal(
        "checkpoint: {zzzzzz: 1}"
    )


def test_a_dotted_key_in_a_file_is_told_how_to_nest(refusal):
    assert "optim.lr = 3: unknown key; write it inside its section, as `optim: {lr: ...}`" in refusal(
        "optim.lr: 3"
    )


def test_a_key_given_twice_is_refused_on_every_level(refusal):
    message = refusal("optim:\n  lr: 1e-4\n  lr: 1e-3\nrun_dir: a\nrun_dir: b\n")
    assert "line 3: optim.lr: given twice, first on line 2" in message
    assert "line 5: run_dir: given twice, first on line 4" in message
    assert "optim.lr: given twice" in refusal("", "optim={lr: 1, lr: 2}")


# --- alternatives ---


def test_steps_replace_the_epochs_of_a_lower_layer_and_epochs_the_steps(read):
    def length(*args: str) -> tuple[int | None, int | None]:
        train = read(*args).train
        return train.steps, train.epochs

    assert length("train: {steps: 7}") == (7, None)
    assert length("train: {epochs: 2}") == (None, 2)
    assert length("train: {epochs: 2}", "train.steps=7") == (7, None)
    assert length("train: {steps: 7}", "train.epochs=2") == (None, 2)
    assert length("train: {steps: null, epochs: 2}") == (None, 2)
    assert length("train: {epochs: null}") == (Config().train.steps, None)


def test_steps_and_epochs_together_or_neither_are_refused(refusal):
    assert "train.steps (7) or train.epochs (2): give exactly one" in refusal("train: {steps: 7, epochs: 2}")
    assert "give exactly one" in refusal("train: {steps: null}")


def test_a_mesh_is_auto_until_an_axis_is_named(read, refusal):
    assert read("").mesh == read("mesh: auto").mesh == read("", "mesh=auto").mesh == MeshConfig(auto=True)
    assert read("mesh: {replicate_kv: true}").mesh == MeshConfig(auto=True, replicate_kv=True)
    assert read("mesh: {fsdp: 2}").mesh == MeshConfig(fsdp=2)
    assert read("mesh: auto", "mesh.tp=4", "mesh.cpu_devices=4").mesh == MeshConfig(tp=4, cpu_devices=4)
    assert read("mesh: auto", "mesh.fsdp=1").mesh == MeshConfig()
    assert read("mesh: {fsdp: 4, cpu_devices: 4}", "mesh=auto").mesh == MeshConfig(auto=True, cpu_devices=4)
    assert "remove it, or mesh.fsdp, mesh.tp" in refusal("mesh: {auto: true, fsdp: 2, tp: 2}")


def test_the_bundled_validation_rows_go_with_the_bundled_training_rows_only(read):
    assert read("data: {path: mine.jsonl}").data.validation is None
    assert read("", "data.path=mine.jsonl").data.validation is None
    assert read("data: {path: mine.jsonl, validation: held.jsonl}").data.validation == "held.jsonl"
    assert read("data: {validation: held.jsonl}", "data.path=mine.jsonl").data.validation == "held.jsonl"
    assert read("data: {limit: 5}").data.validation == DataConfig().validation


# --- overrides ---


def test_overrides_win_over_the_file_and_the_last_one_over_the_others(read):
    config = read(
        "optim: {lr: 1}\nrun_dir: a",
        "optim.lr=1e-4",
        "run_dir=b=c",
        "lora.targets=[q_proj]",
        "optim.clip=",
        "log={every: 3, progress: false}",
        "log.every=4",
    )
    assert config.optim.lr == 1e-4 and config.optim.clip is None
    assert config.run_dir == "b=c"
    assert config.lora.targets == ("q_proj",)
    assert (config.log.every, config.log.progress) == (4, False)


def test_an_override_that_is_no_yaml_is_refused_by_name(refusal):
    message = refusal("", "lora.targets=[q_proj", "lora.exclude=*_proj", "=3", "a.b.c=1")
    assert "'lora.targets=[q_proj': the value is not valid YAML" in message
    assert "quote a value that starts so" in message
    assert "'=3': must be key=value" in message
    assert "a.b.c = 1: unknown key" in message


# --- files that are not configs ---


@pytest.mark.parametrize(
    "text, said",
    [
        ("model:\n  path: [a,\noptim: {", "run.yaml:3:9: not valid YAML: expected the node content"),
        ("a: b: c", "run.yaml:1:5: not valid YAML: mapping values are not allowed here"),
        ("a: &x 1", "run.yaml:1:4: not valid YAML: aliases"),
        ("run_dir: !!python/object:os.system x", "run.yaml:1:10: not valid YAML: aliases"),
        ("a: 1\n---\nb: 1", "run.yaml:2:1: not valid YAML"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        ("[" * 4000, "nested too deep"),
        ("- model", "a config is a mapping of sections"),
        ("model", "a config is a mapping of sections"),
        ("? [a]\n: 1", "line 1: a key must be a word"),
        (b"a: \xff", "not UTF-8 text (byte 3)"),
        (b"a: \x00", "not valid YAML"),
    ],
)
def test_what_is_no_config_is_refused_with_its_place(refusal, text, said):
    assert said in refusal(text)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            load(path)


def test_a_byte_order_mark_is_no_problem(read):
    assert read(b"\xef\xbb\xbfrun_dir: a").run_dir == "a"


# --- round trips ---

text = st.text(st.characters(codec="utf-8"), min_size=1).filter(
    lambda s: s.isprintable() and s == s.strip() != ""
)
CONFIGS = st.builds(
    Config,
    data=st.builds(
        DataConfig, path=text | st.lists(text, min_size=1).map(tuple), limit=st.integers(1, 10**17)
    ),
    lora=st.builds(LoraConfig, exclude=st.lists(text).map(tuple), alpha=st.floats(1e-300, 1e300)),
    train=st.builds(TrainConfig, remat=st.sampled_from(["none", "full", ("q", "o")])),
    run_dir=text
    | st.sampled_from(["1e-4", "off", "null", "~", "2026-11-21", "1_0", "0x1", "1:30", "yes", "1.0"]),
)


@settings(max_examples=150, deadline=None)
@given(CONFIGS)
def test_what_is_written_loads_back_equal(tmp_path_factory, config):
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load(file) == config
    assert from_dict(to_dict(config)) == config


def test_the_resolved_config_is_plain_data_for_any_yaml_reader_and_lists_every_key():
    tree = yaml.safe_load(to_yaml(load("gemma4_31b_v5p8_codev.yaml")))
    assert tree["data"]["packing"] == "off"
    assert tree["optim"]["lr"] == 1e-4
    assert {f"{s}.{k}" if isinstance(v, dict) else s for s, v in tree.items() for k in (v or [s])} == set(
        KEYS
    )


def test_from_dict_refuses_what_a_file_may_not_say_either():
    with pytest.raises(UserError, match=r"checkpoint/config: 2 problems"):
        from_dict({"optim": {"lr": -1}, "lora": {"rnk": 1}}, source="checkpoint/config")


def test_differences_are_named_by_key_with_both_values():
    a = Config()
    b = replace(a, lora=LoraConfig(rank=8, targets=("q_proj",)), run_dir="runs/b")
    assert differences(a, a) == []
    assert differences(a, b) == [
        "lora.targets: 'all' -> ['q_proj']",
        "lora.rank: 32 -> 8",
        "run_dir: 'runs/tiny_cpu' -> 'runs/b'",
    ]


def test_a_config_does_not_change():
    with pytest.raises(FrozenInstanceError):
        Config().optim.lr = 1.0  # type: ignore[misc]
    assert hash(Config()) == hash(Config())


# --- whatever is thrown at it ---

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(KEYS)) | st.text(), inner)
    ),
    max_leaves=8,
)
near_configs = st.dictionaries(
    st.sampled_from(["model", "data", "lora", "mesh", "train", "optim", "log", "run_dir", "recipe", "x"]),
    st.dictionaries(st.sampled_from(sorted({key.rpartition(".")[2] for key in KEYS})), trees) | trees,
)
snippets = st.lists(
    st.sampled_from(
        ["a", "lr", "optim", ":", " ", "\n", "- ", "[", "]", "{", "}", "&a", "*a", "!!int ", "'", '"']
    )
    | st.sampled_from(
        ["%YAML 9.9", "---", "|", ">", "? ", "\\x", "\t", "0x_", "1_:3", "09", "<<", "#", "\ufeff"]
    ),
    max_size=20,
).map("".join)
anything = st.text() | snippets | near_configs.map(lambda tree: yaml.safe_dump(tree, allow_unicode=True))


@settings(max_examples=250, deadline=None)
@given(anything.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary())
def test_no_file_raises_anything_but_a_user_error(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_bytes(content)
    try:
        loaded = load(file)
    except UserError as error:
        str(error).encode()  # a message can always be printed
    else:
        assert from_dict(to_dict(loaded)) == loaded


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text() | st.tuples(st.sampled_from([*KEYS, *configs.SECTIONS]), snippets).map("=".join)))
def test_no_override_raises_anything_but_a_user_error(overrides):
    try:
        load(ROOT / "configs/tiny_cpu.yaml", overrides)
    except UserError as error:
        str(error).encode()


def test_reading_a_config_imports_no_jax_and_is_quick():
    code = (
        "import time; t = time.perf_counter(); import gemma_tpu.config, sys; "
        "print(time.perf_counter() - t, 'jax' in sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        for _ in range(3)
    ]
    seconds, jax = zip(*(run.stdout.split() for run in runs), strict=True)
    assert set(jax) == {"False"}
    assert min(map(float, seconds)) < 0.2


def test_a_hundred_mistakes_are_a_message_that_one_can_read():
    with pytest.raises(UserError) as error:
        load("tiny_cpu.yaml", [f"data.nothing_{number}=1" for number in range(99)])
    said = str(error.value)
    assert "99 problems" in said and said.endswith("… and 79 more") and len(said) < 6000


def test_a_file_of_more_than_settings_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "long.yaml"
    file.write_text(f"# {'x' * plain.YAML_LARGEST}\n")
    with pytest.raises(UserError, match="characters are no settings; at most 262,144 are read"):
        load(file)
