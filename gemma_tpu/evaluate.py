"""Evaluations of a run or a model: the bundled Verilog problems by simulation, and the loss on held-out rows.

For a run folder the base is evaluated beside the tuned model, by the same prompts and settings: a score without its
base says nothing about the training.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma_tpu import adapters, assets, loading, runs, sampler, sandbox, verilog
from gemma_tpu.checkpoint import open_existing
from gemma_tpu.data import make_loader, prepare
from gemma_tpu.errors import UserError
from gemma_tpu.metrics import say
from gemma_tpu.model import Decoder
from gemma_tpu.projection import LoRA
from gemma_tpu.step import take_apart
from gemma_tpu.tokenizer import Tokenizer
from gemma_tpu.train import held_out_loss

PROBLEMS = "bundled:tiny_verilog/heldout.jsonl"
BOOTSTRAP = 2000


def tiny(target: str | Path, *, base: bool = True, unsafe: bool = False, settings: sampler.Settings | None = None,
         samples: int = 1) -> dict[str, Any]:  # fmt: skip
    """pass@1 on the bundled held-out problems; for a run folder, of its base too."""
    version = verilog.require_iverilog(unsafe)
    if not unsafe:
        sandbox.require()
    settings = settings or sampler.Settings(max_new_tokens=192)
    problems = verilog.load_problems(assets.resolve(PROBLEMS))
    target = Path(target)
    model, folder = adapters.load_target(target)
    tokenizer = Tokenizer(folder)
    tuned = _score(model, tokenizer, problems, settings, samples, unsafe, f"tuned {target}")
    results = {**tuned, "target": str(target), "iverilog": version}
    if base and runs.is_run(target):
        found = _score(adapters.load(folder), tokenizer, problems, settings, samples, unsafe, f"base {folder}")
        results["base"] = {**found, "target": str(folder)}
    if runs.is_run(target):
        path = target / "eval_tiny.json"
        runs.write_text(path, json.dumps(results, indent=1) + "\n")
        say(f"every completion and verdict is in {path}")
    say(_table(results))
    return results


def _score(
    model: Decoder, tokenizer: Tokenizer, problems: list, settings: sampler.Settings, samples: int, unsafe: bool,
    name: str,
) -> dict[str, Any]:  # fmt: skip
    prompts = [tokenizer.prompt([{"role": "user", "content": problem.prompt}]) for problem in problems]
    say(f"{name}: {len(problems)} problems x {samples} samples, temperature {settings.temperature:g}")
    made = sampler.generate(model, [p for p in prompts for _ in range(samples)], tokenizer.stop_ids, settings, rows=30)
    texts = [tokenizer.decode(completion.tokens) for completion in made]
    verdicts = verilog.score_all([p for p in problems for _ in range(samples)], texts, unsafe=unsafe)
    per_problem, failures = {}, {}
    for number, problem in enumerate(problems):
        mine = range(number * samples, (number + 1) * samples)
        per_problem[problem.id] = {
            "passed": sum(verdicts[i].passed for i in mine), "samples": samples,
            "verdicts": [verdicts[i].kind for i in mine], "completions": [texts[i] for i in mine],
        }  # fmt: skip
    for verdict in verdicts:
        if not verdict.passed:
            failures[verdict.kind] = failures.get(verdict.kind, 0) + 1
    passed = np.array([entry["passed"] for entry in per_problem.values()])
    cut = sum(completion.finish_reason == "length" for completion in made)
    if cut:
        say(f"note: {cut} of {len(made)} completions were cut at {settings.max_new_tokens} tokens")
    return {
        "passed": int(passed.sum()), "total": len(verdicts), "problems": len(problems),
        "pass_at_k": {str(k): pass_at_k(passed, samples, k) for k in sorted({1, samples})},
        "failures": failures, "cut": cut, "per_problem": per_problem,
    }  # fmt: skip


def pass_at_k(passed_P: np.ndarray, samples: int, k: int) -> list[float]:
    """[value, low, high]: the unbiased estimate and its 95 % bootstrap interval over problems."""
    each_P = np.array([verilog.pass_at_k(samples, int(count), k) for count in passed_P])
    draws = np.random.default_rng(0).integers(0, len(each_P), (BOOTSTRAP, len(each_P)))
    low, high = np.quantile(each_P[draws].mean(axis=1), [0.025, 0.975])
    return [round(float(x), 4) for x in (each_P.mean(), low, high)]


def _table(results: dict[str, Any]) -> str:
    lines = [f"{'model':<8}{'pass@1':>8}   {'95 % interval':<16}{'passed':>10}   failures"]
    for name, entry in (("base", results.get("base")), ("tuned", results)):
        if entry is not None:
            value, low, high = entry["pass_at_k"]["1"]
            failures = ", ".join(f"{kind} {n}" for kind, n in sorted(entry["failures"].items())) or "none"
            interval = f"{low:.3f} to {high:.3f}"
            passed = f"{entry['passed']:>5}/{entry['total']:<4}"
            lines.append(f"{name:<8}{value:>8.3f}   {interval:<16}{passed}   {failures}")
    return "\n".join([*lines, f"simulated with {results['iverilog']}"])


def loss(target: str | Path) -> dict[str, Any]:
    """Loss per target token on the rows that the run's config holds out, of the base and of the tuned model."""
    target = Path(target)
    if not runs.is_run(target):
        raise UserError(f"eval loss needs a run folder (its config names the held-out rows); {target} is none")
    config = runs.read_config(target)
    if config.data.validation is None:
        raise UserError(f"{target}/config.yaml has no data.validation; name a file of held-out rows there")
    open_existing(target).close()  # refuse before the work, not after the base's loss
    trained = adapters.read(target)
    tokenizer = Tokenizer(trained.base_folder)
    rows = prepare(config.data, tokenizer, config.data.validation)
    loader = make_loader(rows, max_seq_len=config.data.max_seq_len, packing=config.data.packing,
                         batch_size=config.train.batch_size, accumulation=config.train.accumulation,
                         seed=0, keep_partial=True)  # fmt: skip
    found = {"base": _loss_of(adapters.load(trained.base_folder), loader)}
    found["tuned"] = _loss_of(adapters.load(trained.base_folder, trained), loader)
    results = {
        "target": str(target), "step": trained.step, "rows": len(rows), "target_tokens": rows.target_tokens,
        **{f"{name}_loss": round(value, 6) for name, value in found.items()},
        **{f"{name}_perplexity": round(float(np.exp(value)), 4) for name, value in found.items()},
    }  # fmt: skip
    say(f"held-out loss over {rows.target_tokens:,} tokens: base {found['base']:.4f}, tuned {found['tuned']:.4f}")
    return results


def _loss_of(model: Decoder, loader: Any) -> float:
    model.trains = LoRA
    parts, trained = take_apart(model)
    with jax.set_mesh(loading.one_device_mesh()):
        return held_out_loss(parts, trained, loader, loading.one_device_mesh())
