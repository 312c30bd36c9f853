"""vLLM serving what leaves this program, and lm-eval against that server: `make test-clients`.

Log-probabilities are transformers' in float32. Every check is also made on an adapter of zeros, where it must fail.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arch_helper
import helpers
import numpy as np
import pytest
from serving_helper import CLIENTS, NotServed, Server, lm_eval, log_probabilities, program

from gemma_tpu.adapter import peft_folder
from gemma_tpu.adapter.updates import LowRank
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.handoff import merging
from gemma_tpu.handoff.patch import write_patched
from gemma_tpu.storage.shards import open_checkpoint
from gemma_tpu.tiny.checkpoint import write_tiny

pytestmark = pytest.mark.slow
NAMES = ("gemma4-e2b", "gemma4-26b-a4b", "gemma4-31b", "gemma3-1b", "gemma3-4b")
NEAR, FAR = 1e-3, 0.1  # of log-probabilities: the bound, and what the adapter moves at least
NEW = 6
ASKED = ("Write a Verilog module for a 2-bit counter.", "What is an AND gate?", "module top(input a, output y);")
CHOICES = [" a", " the", " module", " output"]
# Gemma 4's text class reads the folders and adapters of the multimodal one; Gemma 3's those of the text-only sizes
# alone: 4B is served by its multimodal class without the vision tower, which imports torchvision all the same.
TEXT = {
    "gemma4": ("--hf-overrides", '{"architectures": ["Gemma4ForCausalLM"]}'), "gemma3-4b": ("--language-model-only",),
}  # fmt: skip
PATHS = {"gemma3-4b": (Path(__file__).parent / "torchvision_site", CLIENTS / "torchvision")}
# What this vLLM cannot do on a CPU: (architecture, what) -> a part of what it says itself. With LoRA it takes Triton's
# kernels for the experts of every model that has some, before it looks at --lora-target-modules or --moe-backend
# (select_unquantized_moe_backend); on a TPU it does not.
UNSERVED = {("gemma4-26b-a4b", "adapter"): "AttributeError: module 'triton.language' has no attribute 'float32'"}


@dataclass
class Case:
    """A tiny base, its adapter merged and as a PEFT folder, an adapter of zeros, and transformers' two models."""

    name: str
    root: Path
    base: Any
    tuned: Any

    def folder(self, name: str) -> Path:
        return self.root / name

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.folder("merged"))

    def prompts(self) -> list[list[int]]:
        return [self.tokenizer.encode(text, bos=True) for text in ASKED]


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    program("vllm")
    root = tmp_path_factory.mktemp(request.param)
    folder = write_tiny(root / "base", arch=request.param, dtype="float32")
    model = arch_helper.load_adapted(folder)
    updates = merging.updates_of(arch_helper.trained(model, helpers.adapter_of(model), method="lora"), model.arch)
    write_patched(open_checkpoint(folder), root / "merged", updates)
    zeros = {name: LowRank(0 * part.b, part.a, part.scale) for name, part in updates.items()}
    for name, parts in (("adapter", updates), ("zeroed", zeros)):
        peft_folder.write(root / name, parts, base=str(folder), depth=len(model.arch.layers),
                          v_from=peft_folder.without_v(parts, model.arch))  # fmt: skip
    return Case(request.param, root, helpers.reference(folder), helpers.reference(root / "merged"))


def served(case: Case, what: str, *options: str):
    """The server, or a skip that names what vLLM said; it must say just that."""
    folder = case.folder("merged" if what == "merged" else "base")
    for path in PATHS.get(case.name, ()):
        if not path.exists():
            pytest.skip(f"{path} is not there: make test-clients")
    known = UNSERVED.get((case.name, what))
    try:
        text = TEXT.get(case.name, TEXT.get(case.name[:6], ()))
        with Server(folder, case.root / f"{what}.log", (*text, *options), PATHS.get(case.name, ())) as server:
            server.ask_once()
            assert known is None, f"vLLM serves the {what} of {case.name} now: take it out of UNSERVED"
            yield server
    except NotServed as error:
        assert known is not None and known in str(error), str(error)[-4000:]
        pytest.skip(f"vLLM does not serve the {what} of {case.name} on a CPU: {known}")


@pytest.fixture(scope="module")
def merged(case):
    yield from served(case, "merged")


@pytest.fixture(scope="module")
def adapted(case):
    modules = [f"{name}={case.folder(name)}" for name in ("adapter", "zeroed")]
    yield from served(case, "adapter", "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2",
                      "--lora-modules", *modules)  # fmt: skip


def apart(server: Server, reference: Any, prompts: list[list[int]], model: str = "model") -> float:
    """The largest difference of log-probabilities to transformers', over prompts and what is completed."""
    found = [server.completion(prompt, NEW, model) for prompt in prompts]
    return max(np.abs(given - log_probabilities(reference, ids)).max() for ids, given in found)


def chat_apart(server: Server, reference: Any, tokenizer: Tokenizer, model: str = "model") -> float:
    worst = 0.0
    for text in ASKED[:2]:
        prompt, answer, given = server.chat(text, NEW, model)
        assert prompt == tokenizer.prompt([{"role": "user", "content": text}]), "another chat template"
        assert len(answer) == NEW
        worst = max(worst, np.abs(given - log_probabilities(reference, prompt + answer)[-NEW:]).max())
    return worst


def report(case: Case, what: str, worst: float) -> float:
    """Shown by `make test-clients ARGS=-rP`."""
    print(f"{case.name}: {what}, largest difference of a log-probability {worst:.2g}")
    return worst


def test_vllm_completes_with_the_log_probabilities_of_transformers(case, merged):
    assert report(case, "merged, completions", apart(merged, case.tuned, case.prompts())) <= NEAR
    assert apart(merged, case.base, case.prompts()) > FAR, "a zeroed adapter would pass"


def test_vllm_chats_with_the_log_probabilities_of_transformers(case, merged):
    assert report(case, "merged, chat", chat_apart(merged, case.tuned, case.tokenizer)) <= NEAR
    assert chat_apart(merged, case.base, case.tokenizer) > FAR, "a zeroed adapter would pass"


def test_vllm_serves_the_adapter_beside_its_base_and_it_does_what_it_should(case, adapted):
    assert report(case, "adapter, completions", apart(adapted, case.tuned, case.prompts(), "adapter")) <= NEAR
    assert report(case, "adapter, chat", chat_apart(adapted, case.tuned, case.tokenizer, "adapter")) <= NEAR
    for nothing in ("zeroed", "model"):
        assert apart(adapted, case.tuned, case.prompts(), nothing) > FAR, "a zeroed adapter would pass"
        assert apart(adapted, case.base, case.prompts(), nothing) <= NEAR


def told_apart(case: Case, count: int = 6) -> list[dict[str, Any]]:
    """Rows whose right answer the tuned model gives and the base does not, by a margin."""
    tokenizer, rows = case.tokenizer, []
    for question in (f"{verb} {noun}" for verb in ("Write a", "Design a", "Explain the", "What is a", "Make")
                     for noun in ("counter", "gate", "register", "mux", "adder", "state machine", "shift", "wire")):
        choices = []
        for reference in (case.base, case.tuned):
            context, scores = tokenizer.encode(question), []
            for choice in CHOICES:
                ids = tokenizer.encode(question + choice)
                scores.append(log_probabilities(reference, ids)[len(context) - 1 :].sum())
            best, second = np.sort(scores)[-1], np.sort(scores)[-2]
            choices.append(int(np.argmax(scores)) if best - second > 0.01 else None)
        if None not in choices and choices[0] != choices[1]:
            rows.append({"question": question, "choices": CHOICES, "answer": choices[1]})
    assert len(rows) >= count, f"only {len(rows)} rows tell the two models apart"
    return rows[:count]


def test_lm_eval_scores_the_served_model_as_transformers_would(case, merged, tmp_path):
    assert lm_eval(merged, "model", case.folder("merged"), told_apart(case), tmp_path / "merged") == 1.0


def test_lm_eval_tells_an_adapter_from_one_of_zeros(case, adapted, tmp_path):
    rows = told_apart(case)
    assert lm_eval(adapted, "adapter", case.folder("base"), rows, tmp_path / "adapter") == 1.0
    assert lm_eval(adapted, "zeroed", case.folder("base"), rows, tmp_path / "zeroed") == 0.0
