"""Other programs on what leaves this one, for each kind of architecture: `make test-clients`.

Each test would fail for an adapter of zeros: what is compared must be far from the base.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import arch_helper
import helpers
import numpy as np
import pytest
from safetensors.numpy import load_file
from serving_helper import CLIENTS

from gemma_tpu.adapter import lora, peft_folder
from gemma_tpu.adapter.updates import LowRank
from gemma_tpu.gemma.loading import architecture
from gemma_tpu.handoff import merging
from gemma_tpu.handoff.patch import write_patched
from gemma_tpu.storage.shards import open_checkpoint

pytestmark = pytest.mark.slow
NAMES = ("gemma4-e2b", "gemma4-26b-a4b", "gemma4-31b", "gemma3-4b")
EFFECT, NEAR = 0.3, 1e-4  # of logits: what the adapter moves at least; what two programs may differ by, x max |logit|

# In a process of its own: another transformers than the one of these tests.
ASK = """
import sys, json, numpy as np, torch, transformers, warnings
warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokens = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    np.save(sys.argv[3], model(tokens).logits.float().numpy())
    new = model.generate(tokens, do_sample=False, max_new_tokens=4, eos_token_id=None)
print(transformers.__version__, new.shape[1] - tokens.shape[1])
"""
# llama.cpp's own table of tensor names, asked as its convert_lora_to_gguf.py asks it.
GGUF_NAMES = """
import json, sys
from gguf import MODEL_ARCH, get_tensor_name_map
table = get_tensor_name_map(getattr(MODEL_ARCH, sys.argv[1]), int(sys.argv[2]))
print(json.dumps([table.get_name(name, try_suffixes=(".weight",)) for name in json.load(sys.stdin)]))
"""


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    """(base folder, our model with a random adapter, its updates, tokens, our logits of base and adapted)"""
    pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("clients")
    folder = arch_helper.checkpoints(root)(request.param)
    model = arch_helper.load_adapted(folder)
    run = arch_helper.trained(model, helpers.adapter_of(model), method="lora")
    tokens = np.stack(helpers.random_rows([24, 24], model.arch.vocab))
    adapted = helpers.logits(model, tokens)
    base = helpers.logits(helpers.load(folder), tokens)
    assert np.abs(adapted - base).max() > EFFECT
    return folder, merging.updates_of(run, model.arch), tokens, base, adapted


def near(found, wanted):
    return np.abs(found - wanted).max() <= NEAR * max(1, np.abs(wanted).max())


def peft_logits(folder, adapter, tokens):
    import torch
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = PeftModel.from_pretrained(helpers.reference(folder), str(adapter)).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


@pytest.mark.parametrize("form", ["portable", "native", "vllm"])
def test_peft_loads_the_adapter_folder_and_computes_what_we_compute(case, form, tmp_path):
    folder, updates, tokens, base, adapted = case
    arch = architecture(open_checkpoint(folder))
    how = {"native": form == "native", "v_from": peft_folder.without_v(updates, arch) if form == "vllm" else ()}
    peft_folder.write(tmp_path / "adapter", updates, base=str(folder), **how)
    found = peft_logits(folder, tmp_path / "adapter", tokens)
    assert near(found, adapted) and not near(found, base)
    zeroed = {name: LowRank(0 * part.b, part.a, part.scale) for name, part in updates.items()}
    peft_folder.write(tmp_path / "zeroed", zeroed, base=str(folder), **how)
    found = peft_logits(folder, tmp_path / "zeroed", tokens)
    assert near(found, base) and not near(found, adapted), "a zeroed adapter would pass"


def test_mixed_ranks_and_scales_are_in_peft_what_they_are_merged(case, tmp_path):
    folder, updates, tokens, _, adapted = case
    mixed = {name: LowRank(part.b[..., : 1 + number % 3], part.a[..., : 1 + number % 3, :], (0.7, 2.5)[number % 2])
             for number, (name, part) in enumerate(updates.items())}  # fmt: skip
    write_patched(open_checkpoint(folder), tmp_path / "merged", mixed)
    wanted = helpers.logits(helpers.load(tmp_path / "merged"), tokens)
    assert not near(wanted, adapted)
    for native in (False, True):
        peft_folder.write(tmp_path / str(native), mixed, base=str(folder), native=native)
        assert near(peft_logits(folder, tmp_path / str(native), tokens), wanted)


def test_what_peft_itself_saves_comes_back_as_it_is(case, tmp_path):
    """A foreign adapter: PEFT's own names, targets and file."""
    import peft
    import torch

    folder, updates, tokens, base, _ = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=r".*language_model.*(q|o)_proj")
        model = peft.get_peft_model(helpers.reference(folder), config)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.eval().save_pretrained(tmp_path / "theirs")
        with torch.no_grad():
            wanted = model(torch.tensor(tokens)).logits.float().numpy()
    assert not near(wanted, base)
    merging.merge(checkpoint=tmp_path / "theirs", layout="peft", base=folder, out=tmp_path / "merged")
    assert near(helpers.logits(helpers.load(tmp_path / "merged"), tokens), wanted)
    fresh = helpers.load(folder, rank=8)
    adapter = peft_folder.read(tmp_path / "theirs", open_checkpoint(folder), fresh.arch)
    values, _ = peft_folder.onto(adapter, fresh.arch, lora.initial(fresh, 0), lora.layout(fresh))
    from gemma_tpu.gemma import loading

    shardings, _ = loading.place(fresh, helpers.mesh_of(), True)
    loading.assign(fresh, loading.put(values, shardings))
    assert near(helpers.logits(fresh, tokens), wanted)


def test_llama_cpp_has_a_tensor_for_every_name_of_the_adapter_folder(case, tmp_path):
    """Its converter strips base_model.model. and language_model., and gives up at a name that it has no tensor for."""
    folder, updates, *_ = case
    peft_folder.write(tmp_path / "adapter", updates, base=str(folder))
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    bases = {name.replace("base_model.model.", "").replace(f".lora_{side}.weight", ".weight"): name
             for name in held for side in "AB" if f".lora_{side}.weight" in name}  # fmt: skip
    asked = [name.replace("model.language_model.", "model.", 1) for name in bases]
    kind, path = "GEMMA3" if "gemma3" in folder.name else "GEMMA4", CLIENTS / "gguf"
    if not path.is_dir():
        pytest.skip(f"{path} is not there: make test-clients")
    done = subprocess.run([sys.executable, "-c", GGUF_NAMES, kind, "64"], input=json.dumps(asked), text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(path)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = dict(zip(asked, json.loads(done.stdout), strict=True))
    assert len(found) == len(updates) == len(held) / 2
    assert not [name for name, tensor in found.items() if tensor is None]
    assert len(set(found.values())) == len(found), "two of ours in one of theirs"


def ask(folder, tokens, out, path: Path | None):
    environment = os.environ | ({} if path is None else {"PYTHONPATH": str(path)})
    done = subprocess.run([sys.executable, "-c", ASK, str(folder), json.dumps(tokens.tolist()), str(out)],
                          capture_output=True, text=True, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split(), np.load(out)


@pytest.mark.parametrize("version", ["here", "5.5"])
def test_transformers_reads_the_merged_folder_and_generates(case, version, tmp_path):
    folder, updates, tokens, base, adapted = case
    path = None if version == "here" else CLIENTS / "transformers-5.5"
    if path is not None and not path.is_dir():
        pytest.skip(f"{path} is not there: make test-clients")
    write_patched(open_checkpoint(folder), tmp_path / "merged", updates)
    (said, new), found = ask(tmp_path / "merged", tokens, tmp_path / "logits.npy", path)
    assert said.startswith("5.") if path is None else said.startswith("5.5.")
    assert new == "4" and near(found, adapted) and not near(found, base)
    if path is None:
        zeros = {name: LowRank(0 * part.b, part.a, part.scale) for name, part in updates.items()}
        write_patched(open_checkpoint(folder), tmp_path / "zeroed", zeros)
        _, found = ask(tmp_path / "zeroed", tokens, tmp_path / "zeroed.npy", path)
        assert near(found, base) and not near(found, adapted), "a zeroed adapter would pass"
