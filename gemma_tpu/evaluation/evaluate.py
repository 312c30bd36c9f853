"""Evaluations of a run or a model: Verilog problems by simulation, prompts of one's own, and the loss on held-out rows.

For a run folder the base is evaluated beside the tuned model, by the same prompts and settings: a score without its
base says nothing about the training.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import jax
import numpy as np

from gemma_tpu import assets
from gemma_tpu.adapter import adapters
from gemma_tpu.data.batches import Loader, make_loader
from gemma_tpu.data.corpus import prepare
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.errors import UserError
from gemma_tpu.evaluation import (
    answering,
    contamination,
    samples,
    scorecard,
    scoring,
    verilog,
    verilog_eval,
    verilog_prompts,
)
from gemma_tpu.evaluation.answering import Draw, Model, Question
from gemma_tpu.evaluation.samples import Sample
from gemma_tpu.evaluation.scorecard import Card
from gemma_tpu.gemma import loading
from gemma_tpu.gemma.model import Decoder
from gemma_tpu.gemma.projection import LoRA
from gemma_tpu.run import runs  # fmt: skip
from gemma_tpu.run.checkpoint import open_existing
from gemma_tpu.run.metrics import say
from gemma_tpu.step.step import take_apart
from gemma_tpu.training.train import held_out_loss

PROBLEMS = "bundled:tiny_verilog/heldout.jsonl"
TINY = Draw(max_new_tokens=192)


def tiny(
    target: str | Path, *, base: bool = True, unsafe: bool = False, draw: Draw = TINY, step: int | None = None,
    served: str | None = None, concurrency: int | None = None, out: Path | None = None, ks: Sequence[int] = (),
) -> Card:  # fmt: skip
    """pass@k on the bundled held-out problems; for a run folder, of its base too, and kept in eval_tiny.json."""
    version = verilog.require(unsafe)
    problems = verilog.load_problems(assets.resolve(PROBLEMS))
    questions = [Question(one.id, [{"role": "user", "content": one.prompt}]) for one in problems]
    target = _place(target)
    models = _models(target, step, base, served, concurrency)
    folder = out or (_home(target) / f"tiny_{_slug(draw)}{_at(target, step)}" if _is_run(target) else None)
    results = _measure(
        models, questions, draw, folder, {"eval": "tiny", "problems": _digest([vars(one) for one in problems])},
        scoring.simulated(problems, unsafe), ks,
    )  # fmt: skip
    results |= {"eval": "tiny", "target": str(target), "iverilog": version}
    if _is_run(target):
        results["contamination"] = _contamination(target, {(one.id, "prompt"): one.prompt for one in problems})
        path = target / "eval_tiny.json"
        scoring.keep(path, results)
    if out is not None:
        scoring.keep(out / "results.json", results)
    return scoring.told(results)


def verilog_bench(
    target: str | Path, clone: Path, *, task: str = verilog_eval.TASKS[0], style: str = "official", shots: int = 0,
    draw: Draw, only: Sequence[str] = (), base: bool = True, step: int | None = None,
    served: str | None = None, concurrency: int | None = None, unsafe: bool = False, workers: int | None = None,
    timeout: float = verilog_eval.TIMEOUT, out: Path | None = None, ks: Sequence[int] = (),
) -> Card:  # fmt: skip
    """verilog-eval v2 for a run (and its base) or a model; samples are kept as they come, and a rerun goes on."""
    version = verilog.require(unsafe)
    problems = verilog_eval.choose(verilog_eval.load(clone, task), only)
    questions = verilog_prompts.questions(problems, style, shots, clone)
    target = _place(target)
    name = f"verilog_{task}_{Path(style).stem}{shots}_{_slug(draw)}{_at(target, step)}"
    folder = out or _home(target) / name
    say(f"verilog-eval v2, {task}, {style} prompt, {shots} shots, {draw}; {version}")
    for note in filter(None, [verilog_prompts.NOTES.get(style)]):
        say(f"note: {note}")
    results = {
        "eval": "verilog", "target": str(target), "iverilog": version, "task": task, "style": style, "shots": shots,
        "draw": draw.json(),
    }  # fmt: skip
    if _is_run(target):
        texts = {(one.id, part): getattr(one, part) for one in problems for part in ("prompt", "reference")}
        results["contamination"] = _contamination(target, texts)
    else:
        say("contamination was not checked: only a run folder names its training data")
    models = _models(target, step, base, served, concurrency)
    settings = {
        "eval": "verilog", "task": task, "style": style, "shots": shots,
        "prompts": _digest([[one.problem, list(one.messages)] for one in questions]),
    }  # fmt: skip
    problems = scoring.scorable(problems, workers, unsafe, timeout)
    score = scoring.simulated(problems, unsafe, workers, timeout)
    results |= _measure(models, questions, draw, folder, settings, score, ks)
    results["unscorable"] = {one.id: one.unscorable for one in problems if one.unscorable}
    scoring.keep(folder / "results.json", results)
    return scoring.told(results)


def prompts(
    target: str | Path, file: Path, scorer: str, *, draw: Draw, base: bool = True, step: int | None = None,
    served: str | None = None, concurrency: int | None = None, out: Path | None = None,
) -> Card:  # fmt: skip
    """Prompts of the user's own, scored by a function of the user's: base and tuned, intervals, paired test."""
    from gemma_tpu.evaluation import own_prompts

    rows = own_prompts.read(file)
    judge = own_prompts.scorer(scorer)
    target = _place(target)
    folder = out or _home(target) / (
        f"prompts_{file.stem}_{_slug(draw)}{_at(target, step)}"
    )
    questions = [Question(row.name, row.messages) for row in rows]
    stored = _sampled(_models(target, step, base, served, concurrency), questions, draw, folder,
                      {"eval": "prompts", "file": _digest([row.record for row in rows])})  # fmt: skip
    entries = {name: own_prompts.card(rows, made, judge) for name, made in stored.items()}
    results = {**entries.pop("tuned"), "eval": "prompts", "target": str(target), "scorer": scorer, "draw": draw.json()}
    if entries:
        results |= {"base": entries["base"], "paired": scorecard.compare(entries["base"], results, ("base", "tuned"))}
    scoring.keep(folder / "results.json", results)
    say(own_prompts.table(results))
    if "paired" in results:
        say(results["paired"]["sentence"])
    return results


# --- the parts ---


def _place(target: str | Path) -> str | Path:
    """A server's URL as it stands, everything else as a path."""
    return target if "://" in str(target) else Path(target)


def _is_run(target: str | Path) -> TypeGuard[Path]:
    return isinstance(target, Path) and runs.is_run(target)


def _home(target: str | Path) -> Path:
    """Where evaluations of the target are kept by default."""
    if _is_run(target):
        return target / "evals"
    name = target.resolve().name if isinstance(target, Path) else re.sub(r"\W+", "_", target.partition("://")[2])
    return Path("evals") / name


def _models(
    target: str | Path, step: int | None, base: bool, served: str | None, concurrency: int | None
) -> dict[str, Model]:
    of_servers = {"--model": served, "--concurrency": concurrency}
    given = [f"{name} {value}" for name, value in of_servers.items() if value is not None]
    if given and isinstance(target, Path):
        raise UserError(f"{', '.join(given)}: nothing that a folder has; {target} is a folder, no server's URL")
    if not _is_run(target):
        if step is not None:
            raise UserError(f"--step {step}: {target} is no run folder, and only a run folder has steps")
        return {"tuned": Model(target, served=served, concurrency=concurrency)}
    return ({"base": Model(target, step, base=True)} if base else {}) | {"tuned": Model(target, step)}


def _measure(
    models: Mapping[str, Model], questions: Sequence[Question], draw: Draw, folder: Path | None,
    settings: Mapping[str, Any], score: scoring.Score, ks: Sequence[int],
) -> Card:  # fmt: skip
    """The card of the tuned model, with the base's in it and the paired test of the two."""
    order, entries = [one.problem for one in questions], {}
    for name, made in _sampled(models, questions, draw, folder, settings).items():
        entries[name] = scorecard.card(order, made, score(made), ks)
    results = entries.pop("tuned")
    if entries:
        results = {**results, "base": {**entries["base"], "target": models["base"].identity()["model"]}}
        results["paired"] = scorecard.compare(entries["base"], results, ("base", "tuned"))
    return results


def _sampled(
    models: Mapping[str, Model], questions: Sequence[Question], draw: Draw, folder: Path | None,
    settings: Mapping[str, Any],
) -> dict[str, list[Sample]]:  # fmt: skip
    """Every sample of every model: those that are stored, and the missing ones drawn and stored as they come."""
    wanted = [(one.problem, number) for one in questions for number in range(draw.n)]
    found = {}
    for name, model in models.items():
        store = samples.Store(
            None if folder is None else folder / f"{name}.jsonl",
            {**settings, "draw": draw.json(), **({} if folder is None else model.identity())},
        )
        missing = store.missing(wanted)
        said = f"{name} {model.target}: {len(questions)} problems x {draw.n} samples, {draw}"
        if store.path is not None:
            said += f"; {len(wanted) - len(missing)} are there, {len(missing)} to draw, kept in {store.path}"
        if store.dropped:
            said += "; one half-written line was cut off and is drawn again"
        say(said)
        if missing:
            answering.answer(model, questions, draw, missing, store.add)
        found[name] = [store.found[key] for key in wanted]
    return found


def _contamination(run: Path, texts: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    try:
        report = contamination.check(texts, contamination.training_rows(runs.read_config(run).data))
    except UserError as error:
        say(f"contamination was not checked: {error}")
        return {"not_checked": str(error)}
    for line in report.lines():
        say(line)
    return report.json()


def _slug(draw: Draw) -> str:
    return f"n{draw.n}_t{draw.temperature:g}_p{draw.top_p:g}_s{draw.seed}"


def _at(target: str | Path, step: int | None) -> str:
    """The checkpoint's part of a name: samples of two checkpoints must not meet."""
    return f"_step{step or adapters.read(target).step}" if _is_run(target) else ""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# --- held-out loss ---


def loss(target: str | Path, step: int | None = None) -> dict[str, Any]:
    """Loss per target token on the rows that the run's config holds out, of the base and of the tuned model."""
    target = Path(target)
    if not runs.is_run(target):
        raise UserError(f"eval loss needs a run folder (its config names the held-out rows); {target} is none")
    config = runs.read_config(target)
    if config.data.validation is None:
        raise UserError(f"{target}/config.yaml has no data.validation; name a file of held-out rows there")
    open_existing(target).close()  # refuse before the work, not after the base's loss
    trained = adapters.read(target, step)
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


def _loss_of(model: Decoder, loader: Loader) -> float:
    model.trains = LoRA
    parts, trained = take_apart(model)
    with jax.set_mesh(loading.one_device_mesh()):
        return held_out_loss(parts, trained, loader, loading.one_device_mesh())
