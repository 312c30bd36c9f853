"""Serving: what is refused before anything loads, what will be in the memory, and the start that waits for health."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from gemma_tpu import cli
from gemma_tpu.errors import UserError
from gemma_tpu.estimate import serving_memory
from gemma_tpu.gemma import sizes
from gemma_tpu.hardware import chips
from gemma_tpu.serving import vllm_command
from gemma_tpu.serving.vllm_command import Wish
from gemma_tpu.storage import hub_cache
from gemma_tpu.tiny.checkpoint import write_tiny

ROOT = Path(__file__).parent.parent
BIG = "google/gemma-4-31B-it"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "my model", dtype="bfloat16")


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


# --- the command ---


def test_on_a_tpu_the_container_gets_the_model_by_name_from_a_cache_of_the_hub(model):
    one = vllm_command.settle(str(model), "v6e-8", Wish(tp=4))
    words = vllm_command.docker_command(one)
    assert words[:2] == ["docker", "run"] and "--privileged" in words
    assert option(words, "--network") == "host" and option(words, "--shm-size") == "16G"
    assert option(words, "--entrypoint") == "vllm"
    start = words.index("vllm/vllm-tpu:gemma4")
    assert words[start + 1 : start + 3] == ["serve", "local/my-model"]
    assert f"{model.parent}/.hub-cache:/hub:ro" in words and "HF_HUB_OFFLINE=1" in words
    assert "VLLM_XLA_CACHE_PATH=/cache/xla" in words and "--disable_chunked_mm_input" in words
    assert option(words, "--tensor-parallel-size") == "4" and option(words, "--data-parallel-size") == "2"
    assert option(words, "--host") == "127.0.0.1"


def test_on_a_gpu_it_gets_the_folder(model):
    words = vllm_command.docker_command(vllm_command.settle(str(model), "h100x2", Wish(kv_dtype="fp8", context=2048)))
    assert option(words, "--gpus") == "all" and option(words, "--ipc") == "host"
    assert words[words.index("serve") + 1] == "/model" and f"{model.resolve()}:/model:ro" in words
    assert option(words, "--kv-cache-dtype") == "fp8" and option(words, "--max-model-len") == "2048"
    assert option(words, "--tensor-parallel-size") == "2"


def test_on_a_cpu_and_without_a_container(model):
    words = vllm_command.docker_command(vllm_command.settle(str(model), "cpu", Wish()))
    assert "--tensor-parallel-size" not in words and any(word.startswith("VLLM_CPU_KVCACHE_SPACE=") for word in words)
    bare = vllm_command.to_json(vllm_command.settle(str(model), "v6e-4", Wish(container=False, tp=4)))
    assert bare["command"][:3] == ["vllm", "serve", str(model.resolve())] and "image" not in bare


def test_a_pushed_model_comes_from_the_hub_with_the_token_by_the_environment(model):
    for source, slice_name, wish in ((BIG, "v6e-8", Wish()), (str(model), "v6e-4", Wish(from_hub="me/private"))):
        one = vllm_command.settle(source, slice_name, wish)
        words = vllm_command.docker_command(one)
        assert words[words.index("serve") + 1] == one.model.repository
        assert option(words[words.index("HF_TOKEN") - 1 :], "--env") == "HF_TOKEN"  # the name alone
        assert not any(word.startswith("HF_TOKEN=") for word in words) and "HF_HUB_OFFLINE=1" not in words


# --- head counts and memory ---


@pytest.mark.parametrize("size, place, tp, replicas", [
    ("gemma4-31b", "v6e-8", 8, 1),  # 4 global KV heads, each twice
    ("gemma4-31b", "tpu7x-8", 8, 1),  # 4 chips of two devices
    ("gemma4-26b-a4b", "v6e-8", 8, 1), ("gemma4-e2b", "v6e-8", 8, 1), ("gemma3-270m", "v6e-8", 4, 2),
    ("gemma3-27b", "h100x2", 2, 1), ("gemma4-12b", "h100x8", 8, 1),
])  # fmt: skip
def test_the_group_is_the_largest_that_the_heads_allow(size, place, tp, replicas):
    one = vllm_command.settle(sizes.hub_id(size), place, Wish(context=2048))
    assert (one.tp, one.replicas) == (tp, replicas)


def test_a_group_that_no_head_count_allows_names_those_that_do():
    told = "--tp 3: 32 query heads do not divide by 3; possible here: 1, 2, 4, 8"
    with pytest.raises(UserError, match=re.escape(told)):
        vllm_command.settle(BIG, "v6e-8", Wish(tp=3))
    with pytest.raises(UserError, match="8 devices of v6e-8 .* do not divide by 16; possible here: 1, 2, 4, 8"):
        vllm_command.settle(BIG, "v6e-8", Wish(tp=16))


def test_the_cache_of_a_sequence_is_counted_layer_by_layer():
    arch = sizes.architecture("gemma4-31b")  # 50 sliding: 16 KV heads of 256, window 1024; 10 global: 4 of 512
    gpu = {"sliding_bounded": True, "cell_bits": 0, "head_multiple": 1}
    tpu = {"sliding_bounded": False, "cell_bits": 32, "head_multiple": 128}
    count = serving_memory.cache_bytes
    assert count(arch, 1, 16384, 2, gpu) == 2 * 2 * (50 * 1024 * 16 * 256 + 10 * 16384 * 4 * 512)
    assert count(arch, 1, 512, 2, gpu) == 2 * 2 * 512 * (50 * 16 * 256 + 10 * 4 * 512)
    assert count(arch, 8, 16384, 2, gpu) == 2 * 2 * (50 * 1024 * 2 * 256 + 10 * 16384 * 1 * 512)  # copied: 1, not 1/2
    assert count(arch, 8, 16384, 2, tpu) == 2 * 2 * 16384 * (50 * 2 * 256 + 10 * 1 * 512)
    # In 8 bits a cell of 32 holds four heads, and a chip has two of a global layer: K and V of its one.
    assert count(arch, 8, 16384, 1, tpu) == 16384 * (50 * 4 * 256 + 10 * 4 * 512)


def test_layers_that_share_keys_take_nothing_and_heads_of_one_size_keep_their_windows():
    edge, gpu = sizes.architecture("gemma4-e2b"), {"sliding_bounded": True, "cell_bits": 0, "head_multiple": 1}
    own = [layer for layer in edge.layers if not layer.kv_shared]
    assert len(own) == 15 < len(edge.layers)
    per_token = sum(2 * 2 * layer.kv_heads * layer.head_dim for layer in own)
    assert serving_memory.cache_bytes(edge, 1, 100, 2, gpu) == 100 * per_token
    old = sizes.architecture("gemma3-27b")  # all heads 128 wide: the TPU keeps windows too
    tpu = {"sliding_bounded": False, "cell_bits": 32, "head_multiple": 128}
    assert serving_memory.cache_bytes(old, 8, 8192, 2, tpu) < 0.4 * 8192 * 62 * 2 * 2 * 2 * 128


def test_weights_of_a_device_count_the_kv_projections_that_are_copied():
    arch = sizes.architecture("gemma4-31b")
    total = serving_memory.text_bytes(arch, 2)
    one, eight = (serving_memory.weights_per_device(arch, tp, total, 2) for tp in (1, 8))
    assert one == total == 2 * sizes.parameters(arch)
    copied = 10 * 4 * 512 * 5376 * 2  # K of the global layers, a second time; there is no V
    assert eight == (total + copied) / 8
    assert serving_memory.weights_per_device(arch, 8, total + 10**9, 2) == eight + 10**9  # another tower, whole


def test_the_numbers_are_those_of_the_paper():
    """7.75 GB of weights a chip with the vision tower; and 16k contexts: 10 fit on v6e-8, 34 on two H100."""
    tpu, gpu = vllm_command.settle(BIG, "v6e-8", Wish()), vllm_command.settle(BIG, "h100x2", Wish())
    assert 7.0 < tpu.memory.weights < 7.3
    assert tpu.memory.sequences("bfloat16", 16384) == 10 and gpu.memory.sequences("bfloat16", 16384) == 34
    assert list(tpu.memory.per_sequence["fp8"]) == [2048, 4096, 8192, 16384]
    assert any("keeps the whole context in sliding layers" in note for note in tpu.notes)
    assert not any("keeps the whole context" in note for note in gpu.notes)


def test_copies_of_the_model_have_their_own_sequences():
    one, two = (vllm_command.settle(sizes.hub_id("gemma4-e4b"), "h100x2", Wish(tp=tp)) for tp in (2, 1))
    assert (one.replicas, two.replicas) == (1, 2)
    assert two.memory.sequences("bfloat16", 2048) % 2 == 0 and two.memory.weights > one.memory.weights


# --- what is refused ---


@pytest.mark.parametrize("path, on, wish, words", [
    ("google/gemma-4-12B-it", "v6e-8", Wish(), "is not in vLLM's support matrix for TPU; serve it on a GPU"),
    (BIG, "v6e-7", Wish(), "nearest: v6e-8"),
    (BIG, "v6e-16", Wish(), "v6e-16 is 4 machines, and this starts one server on one machine: v6e-1, v6e-4, v6e-8"),
    (BIG, "v6e-8", Wish(context=300_000), "the model was made for at most 262144 positions"),
    (BIG, "v6e-1", Wish(), "does not fit: weights 57.2 GiB"),
    (BIG, "v6e-4", Wish(context=262_144), "--max-len 32768 fits"),
    ("gs://mine/model", "v6e-8", Wish(), "bring it here first: gcloud storage cp --recursive gs://mine/model models/"),
    (__file__, "v6e-8", Wish(), "test_serve.py is a file; MODEL_DIR is the folder of a merged model"),
    ("models/nowhere", "v6e-8", Wish(), "models/nowhere: no such folder; MODEL_DIR is a merged folder"),
    (BIG, "v6e-8", Wish(hub_cache=Path("x")), "--hub-cache: nothing to link"),
    (BIG, "v6e-8", Wish(image="x", container=False), "--image and --bare do not go together"),
    (BIG, "v6e-8", Wish(from_hub="nothing"), "'nothing' is no name of a repository"),
])  # fmt: skip
def test_what_cannot_be_served_is_said_at_once(path, on, wish, words):
    with pytest.raises(UserError, match=re.escape(words)):
        vllm_command.settle(path, on, wish)


def test_several_mistakes_are_said_together():
    with pytest.raises(UserError) as error:
        vllm_command.settle("google/gemma-4-12B-it", "v6e-16", Wish(tp=5, context=10**6))
    told = str(error.value)
    assert told.startswith("this cannot be served:") and told.count("\n  ") == 4


def test_folders_that_are_no_merged_model_say_how_they_become_one(tmp_path, model):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("run_dir: x\n")
    with pytest.raises(UserError, match=f"gemma-tpu merge {run} --out models/run, then serve models/run"):
        vllm_command.settle(str(run), "v6e-8", Wish())
    (run / "merged").mkdir()
    (run / "merged/config.json").write_text("{}")
    with pytest.raises(UserError, match=f"it has been: serve {run}/merged"):
        vllm_command.settle(str(run), "v6e-8", Wish())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter, and vLLM on TPU serves none for Gemma 4: merge it first"):
        vllm_command.settle(str(adapter), "v6e-8", Wish())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no config.json here"):
        vllm_command.settle(str(tmp_path / "empty"), "v6e-8", Wish())
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer.json: vLLM needs the tokenizer"):
        vllm_command.settle(str(bare), "v6e-4", Wish(tp=4))


def test_an_own_file_pins_the_image(tmp_path, monkeypatch, model):
    own = tmp_path / "own.yaml"
    own.write_text('machines: {tpu: {image: "vllm/vllm-tpu@sha256:abc", local_folders: true}}')
    monkeypatch.setenv(vllm_command.VARIABLE, str(own))
    one = vllm_command.settle(str(model), "v6e-4", Wish(tp=4))
    assert one.image == "vllm/vllm-tpu@sha256:abc" and one.source == str(own)
    assert f"{model.resolve()}:/model:ro" in vllm_command.docker_command(one)
    own.write_text("machines: {tpu: {flags: []}, gpu: {flags: [--enforce-eager]}}")
    four = vllm_command.settle(str(model), "v6e-4", Wish(tp=4))
    assert "--disable_chunked_mm_input" not in vllm_command.docker_command(four)
    assert vllm_command.docker_command(vllm_command.settle(str(model), "h100x1", Wish()))[-1] == "--enforce-eager"
    own.write_text("machines: {tpu: {flags: [3]}, gpu: {flags: x}}")
    with pytest.raises(UserError, match="tpu.flags: .3. must be a list like .*\n.*gpu.flags: 'x' must be a list of "):
        vllm_command.settle(str(model), "v6e-4", Wish(tp=4))
    own.write_text("machines: {tpu: {flag: [x]}}")
    with pytest.raises(UserError, match="machines.tpu.flag: unknown key; did you mean flags"):
        vllm_command.settle(str(model), "v6e-4", Wish(tp=4))


# --- the cache of the hub ---


def test_the_hubs_own_library_finds_the_model_offline(model, tmp_path):
    cached = hub_cache.make(model, tmp_path / "hub", "local/mine")
    assert not cached.linked
    found = Path(snapshot_download("local/mine", cache_dir=tmp_path / "hub", local_files_only=True))
    assert found == cached.snapshot and {path.name for path in found.iterdir()} >= {"config.json", "tokenizer.json"}
    weights = next(model.glob("*.safetensors"))
    assert os.path.samefile(found / weights.name, weights), "a hard link: nothing is copied"
    one = hf_hub_download("local/mine", "config.json", cache_dir=tmp_path / "hub", local_files_only=True)
    assert Path(one).is_file()
    with pytest.raises(LocalEntryNotFoundError):
        snapshot_download("local/other", cache_dir=tmp_path / "hub", local_files_only=True)


def test_transformers_loads_config_and_tokenizer_from_it_offline(model, tmp_path):
    hub_cache.make(model, tmp_path / "hub", "local/mine")
    code = (
        "import transformers as t; c = t.AutoConfig.from_pretrained('local/mine'); "
        "print(c.model_type, len(t.AutoTokenizer.from_pretrained('local/mine')('module x;').input_ids) > 0)"
    )
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.split() == ["gemma4", "True"], done.stderr[-2000:]


def test_on_another_disk_the_links_are_symbolic_and_said(model, tmp_path, monkeypatch):
    def other_disk(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    cached = hub_cache.make(model, tmp_path / "hub", "local/mine")
    assert cached.linked
    found = Path(snapshot_download("local/mine", cache_dir=tmp_path / "hub", local_files_only=True))
    assert (found / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_a_changed_model_is_another_revision_and_the_old_links_go(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    first = hub_cache.make(folder, tmp_path / "hub", "local/mine")
    assert hub_cache.make(folder, tmp_path / "hub", "local/mine").revision == first.revision
    (folder / "config.json").write_text("{}")
    second = hub_cache.make(folder, tmp_path / "hub", "local/mine")
    assert second.revision != first.revision and not first.snapshot.exists() and second.snapshot.exists()
    assert (folder / "tokenizer.json").is_file()


def test_a_cache_that_was_not_made_here_is_left_alone(model, tmp_path):
    theirs = tmp_path / "hub/models--google--gemma"
    theirs.mkdir(parents=True)
    with pytest.raises(UserError, match="was not made by gemma-tpu"):
        hub_cache.make(model, tmp_path / "hub", "google/gemma")
    assert not list(theirs.iterdir())


@pytest.mark.parametrize("folder, name", [("my model", "local/my-model"), ("a--b..c", "local/a-b-c"),
                                          ("über_31B", "local/ber_31B"), ("---", "local/model")])  # fmt: skip
def test_every_folder_has_a_name_that_the_hub_takes(tmp_path, folder, name):
    assert hub_cache.repository_of(tmp_path / folder) == name
    hub_cache.check(name)


# --- the start ---


@pytest.fixture
def start(tmp_path, model):
    """start(...) -> (exit code, stderr, docker's calls): the script with a docker and a curl that play along."""
    tools, state = tmp_path / "bin", tmp_path / "state"
    tools.mkdir()
    state.mkdir()
    (tools / "docker").write_text(f"""#!/bin/bash
echo "$*" >> {state}/docker.log
case $1 in
  info) [ ! -e {state}/no-daemon ] ;;
  run) [ ! -e {state}/no-image ] || {{ echo "manifest unknown" >&2; exit 125; }}; touch {state}/up ;;
  inspect) [ -e {state}/up ] || exit 1; [ -e {state}/died ] && echo false || echo true ;;
  logs) echo "loading shard 1 of 1"; [ -e {state}/died ] && echo "out of memory" || true ;;
  rm | stop) rm -f {state}/up ;;
esac
""")
    (tools / "vllm").write_text(f"""#!/bin/bash
echo "vllm $*, programs in $VLLM_XLA_CACHE_PATH" >> {state}/docker.log
touch {state}/up
exec sleep 60
""")
    (tools / "curl").write_text(f"""#!/bin/bash
[ ! -e {state}/taken ] || exit 0
[ -e {state}/up ] || exit 7
n=$(cat {state}/asked 2>/dev/null || echo 0); echo $((n + 1)) > {state}/asked
[ "$n" -ge "$(cat {state}/healthy_after)" ] || exit 22
""")
    for path in list(tools.iterdir()):
        # By another process: were one forked here meanwhile, it would hold the file open for writing, and no program
        # that is being written can be started ("Text file busy").
        source = path.rename(state / f"{path.name}.source")
        subprocess.run(["install", "-m", "755", source, path], check=True)

    def call(healthy_after=2, before=(), wish=None, wait=None):
        for name in before:
            (state / name).touch()
        (state / "healthy_after").write_text(str(healthy_after))
        usual = Wish(tp=4, detach=True, cache=tmp_path / "cache", hub_cache=tmp_path / "hub")
        one = vllm_command.settle(str(model), "v6e-4", wish or usual)
        path = tmp_path / "serve.sh"
        path.write_text(vllm_command.script(one).replace("TRIES=540", "TRIES=6"))
        env = {"PATH": f"{tools}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "GEMMA_TPU_PAUSE": "0.05",
               "TMPDIR": str(tmp_path)}  # fmt: skip
        out, err = subprocess.DEVNULL, subprocess.PIPE
        process = subprocess.Popen(["bash", path], stdout=out, stderr=err, text=True, env=env)
        if wait:
            wait(process)
        err = process.communicate(timeout=30)[1]
        log = state / "docker.log"
        return process.returncode, err, log.read_text().splitlines() if log.exists() else []

    call.state = state
    return call


def test_it_waits_until_health_is_green_and_says_where(start):
    code, err, calls = start()
    assert code == 0, err
    assert "ready: http://127.0.0.1:8000/v1, model local/my-model" in err
    assert "gemma-tpu sample http://127.0.0.1:8000/v1" in err
    assert "docker rm --force gemma-tpu-local-my-model-8000" in err
    assert [line for line in calls if line.startswith("run --detach --name gemma-tpu-local-my-model-8000")]
    assert (start.state / "up").exists(), "it goes on"
    hub = next(line for line in calls if line.startswith("run")).partition(":/hub:ro")[0].rpartition(" ")[2]
    found = snapshot_download("local/my-model", cache_dir=hub, local_files_only=True)
    assert (Path(found) / "config.json").is_file() and "hard links to" in err


def test_a_server_that_ends_is_told_with_its_last_lines_and_taken_away(start):
    code, err, _ = start(before=["died"])
    assert code == 1 and "out of memory" in err and "the server has ended" in err
    assert not (start.state / "up").exists()


def test_a_server_that_never_gets_healthy_is_stopped(start):
    code, err, calls = start(healthy_after=99)
    assert code == 1 and "was not healthy after" in err and not (start.state / "up").exists()


def test_interrupted_it_takes_its_container_with_it(start, tmp_path):
    def interrupt(process):
        deadline = time.monotonic() + 20
        while not (start.state / "asked").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)

    code, err, _ = start(wish=Wish(tp=4, cache=tmp_path / "cache", hub_cache=tmp_path / "hub"), wait=interrupt)
    assert code == 130 and "ready:" in err and not (start.state / "up").exists(), err


@pytest.mark.parametrize("before, words", [
    ("no-daemon", "docker does not answer"), ("up", "is there already: docker rm"),
    ("taken", "something answers at http://127.0.0.1:8000 already"),
    ("no-image", "docker could not start vllm/vllm-tpu:gemma4"),
])  # fmt: skip
def test_what_stands_in_the_way_is_said(start, before, words):
    code, err, calls = start(before=[before])
    assert code == (1 if before == "no-image" else 2) and words in err, err
    assert before == "no-image" or not [line for line in calls if line.startswith("run")]


def test_a_bare_server_is_waited_for_and_ended_too(start, tmp_path):
    def end(process):
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)

    code, err, calls = start(wish=Wish(tp=4, container=False, cache=tmp_path / "cache"), wait=end)
    assert "ready: http://127.0.0.1:8000/v1" in err and any(line.startswith("vllm serve") for line in calls)
    assert f"{tmp_path}/cache/xla" in " ".join(calls), "its compiled programs are kept too"


@pytest.mark.parametrize("on, wish", [("v6e-4", Wish(tp=4)), ("h100x2", Wish(served_name="it's 'quoted' $(x)")),
                                      ("cpu", Wish(container=False))])  # fmt: skip
def test_every_script_is_bash_without_a_warning(model, on, wish, tmp_path):
    path = tmp_path / "serve.sh"
    path.write_text(vllm_command.script(vllm_command.settle(str(model), on, wish)))
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", path], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


# --- the command line ---


def test_the_command_prints_the_script_the_table_and_one_object(capsys):
    assert cli.main(["serve", BIG, "--on", "v6e-8"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("#!/usr/bin/env bash") and "docker run" in out
    assert "16,384      10 x    1.875 GiB      17 x    1.094 GiB" in err and "printed, not done" in err
    assert cli.main(["serve", BIG, "--on", "v6e-8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["script"] == out and found["tp"] == 8 and found["image"] == "vllm/vllm-tpu:gemma4"
    last = found["kv_cache"]["bfloat16"][-1]
    assert (last["context"], last["sequences"]) == (16384, 10)
    assert found["memory_gib_per_device"]["limit"] == chips.find("v6e-8").chip.device_hbm_gib


def test_run_without_docker_says_so(capfd, monkeypatch, tmp_path, model):
    for tool in ("bash", "mktemp", "rm", "curl"):
        os.symlink(shutil.which(tool), tmp_path / tool)
    monkeypatch.setenv("PATH", str(tmp_path))
    hub = tmp_path / "hub"
    assert cli.main(["serve", str(model), "--on", "v6e-4", "--tp", "4", "--run", "--hub-cache", str(hub)]) == 2
    err = capfd.readouterr().err
    assert "error: docker is not installed; or serve with a vLLM of your own environment: --bare" in err
    assert not hub.exists()
