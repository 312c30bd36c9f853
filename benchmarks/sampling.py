"""New tokens a second on this CPU: gemma_tpu's sampler beside transformers' generate and Tunix's Sampler.

    python benchmarks/sampling.py [--problems 156] [--samples 5] [--rounds 3] [--envs .bench-envs] [--only ours …]
                                  [--bound 40] [--tuned FILE] [--json FILE]

156 prompts of mixed lengths, 5 samples of each at temperature 0.8 and top-p 0.95, every sample with a length of its
own that is the same for all three and that none of them knows beforehand: ours and transformers end a row there (a
per-row stopping criterion), for Tunix the model itself says its end token there. All compute the tiny Gemma 4 31B in
float32. Before its first turn each tries the batch sizes below on the first samples and keeps its fastest (`--tuned`
keeps what was found, for the next time); Tunix gets the cache length that the longest needs, and its sliding-window
cache where that is faster. Then they take turns, A B C A B C …; ratios are medians of those within a round. Ours makes
all of the samples in a turn; a peer begins no batch after `--bound` seconds, and its rate is that of the batches that
it has made, which are like the others. What each compiled, it compiled before the first turn.
"""

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
NEW, SEED, VOCAB = 384, 0, 1024
BATCHES = {"ours": (32, 64), "transformers": (32, 64, 156), "tunix": (32, 64, 156)}
ENVS = {"ours": None, "transformers": None, "tunix": "tunix"}
Work = list[tuple[list[int], int]]  # prompt, tokens to make


def draw_work(problems: int, samples: int) -> Work:
    """Prompts of 20 to 200 tokens; completions of lognormal length, median 100, from 8 to 384."""
    rng = np.random.default_rng(SEED)
    prompts = [rng.integers(256, VOCAB, int(n)).tolist() for n in rng.integers(20, 201, problems)]
    limits = rng.lognormal(math.log(100), 0.7, problems * samples).round().clip(8, NEW).astype(int).tolist()
    return list(zip([prompt for prompt in prompts for _ in range(samples)], limits, strict=True))


def batches(work: Work, size: int, bound: float) -> Iterator[Work]:
    """One batch after another; none is begun when `bound` seconds have passed."""
    begun = time.perf_counter()
    for first in range(0, len(work), size):
        if time.perf_counter() - begun > bound:
            return
        yield work[first : first + size]


# --- the contenders: model folder -> a function of (work, batch, bound) that makes the tokens and counts them --------


def ours(folder: str) -> Any:
    from gemma_tpu.adapter import adapters
    from gemma_tpu.sampling import sampler

    model = adapters.load(folder)

    def run(work: Work, batch: int, bound: float) -> tuple[int, dict[str, Any]]:
        asked = sampler.Sampler(model, rows=batch)
        settings = sampler.Settings(max_new_tokens=NEW, temperature=0.8, top_p=0.95)
        made = asked.run([prompt for prompt, _ in work], (), settings, limits=[limit for _, limit in work])
        return sum(len(one.tokens) for one in made), {"busy": round(asked.stats.busy, 3), **asked.stats.programs}

    return run


def transformers(folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    class Ends(StoppingCriteria):
        def __init__(self, limits: list[int], width: int):
            self.ends_B = torch.tensor(limits) + width

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids.shape[1] >= self.ends_B

    def run(work: Work, batch: int, bound: float) -> tuple[int, dict[str, Any]]:
        made = 0
        for part in batches(work, batch, bound):
            width = max(len(prompt) for prompt, _ in part)
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in part])
            seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in part])
            limits = [limit for _, limit in part]
            with torch.inference_mode():
                out = model.generate(
                    ids, attention_mask=seen, max_new_tokens=NEW, do_sample=True, temperature=0.8, top_p=0.95, top_k=0,
                    eos_token_id=None, pad_token_id=0, stopping_criteria=[Ends(limits, width)],
                )  # fmt: skip
            assert out.shape[1] == width + max(limits)
            made += sum(limits)
        return made, {}

    return run


def tunix(folder: str) -> Any:
    import jax.numpy as jnp
    from flax import nnx
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.gemma4.model import AttentionType, Gemma4, ModelConfig

    tiny = json.loads((Path(folder) / "config.json").read_text())
    tiny = tiny.get("text_config", tiny)

    class Ending(nnx.Module):
        """The model, and the end token where a row's own end is."""

        def __init__(self, model: Any, rows: int):
            self.model, self.config, self.ends_B = model, model.config, nnx.Variable(jnp.zeros(rows, jnp.int32))

        def init_cache(self, *of: Any) -> Any:
            return self.model.init_cache(*of)

        def __call__(self, tokens, positions, cache, attention_mask, decode_only_last_token=False):
            logits, cache = self.model(tokens, positions, cache, attention_mask,
                                       decode_only_last_token=decode_only_last_token)  # fmt: skip
            ended_B = positions[:, -1] >= self.ends_B[...]
            return logits.at[:, -1, 1].set(jnp.where(ended_B, 1e9, -1e9)), cache

    class Ids:
        """Their tokenizer is asked for text; here the text is the ids."""

        def encode(self, text: str) -> list[int]:
            return [int(word) for word in text.split()]

        def decode(self, ids: list[int]) -> str:
            return ""

        bos_id, eos_id, pad_id = (lambda self: None), (lambda self: 1), (lambda self: 0)

    @functools.cache
    def build(rows: int, sliding: bool) -> Any:
        kinds = {"sliding_attention": AttentionType.LOCAL_SLIDING, "full_attention": AttentionType.GLOBAL}
        config = ModelConfig(
            num_layers=tiny["num_hidden_layers"], num_embed=VOCAB, embed_dim=tiny["hidden_size"],
            hidden_dim=tiny["intermediate_size"], num_heads=tiny["num_attention_heads"], head_dim=tiny["head_dim"],
            num_kv_heads=tiny["num_key_value_heads"], num_global_kv_heads=tiny["num_global_key_value_heads"],
            global_key_size=tiny["global_head_dim"], sliding_window_size=tiny["sliding_window"], k_eq_v_global=True,
            attention_pattern=tuple(kinds[kind] for kind in tiny["layer_types"]), use_sliding_window_kv_cache=sliding,
        )  # fmt: skip
        model = Ending(Gemma4(config, rngs=nnx.Rngs(0)), rows)
        cache = CacheConfig(256 + NEW, config.num_layers, config.num_kv_heads, config.head_dim)
        return model, Sampler(model, Ids(), cache)

    def run(work: Work, batch: tuple[int, bool], bound: float) -> tuple[int, dict[str, Any]]:
        rows, (model, sampler), made = batch[0], build(*batch), 0
        for number, own in enumerate(batches(work, rows, bound)):
            part = own + own[:1] * (rows - len(own))  # the last batch has the shape of the others
            model.ends_B = nnx.Variable(jnp.array([len(prompt) - 1 + limit for prompt, limit in part], jnp.int32))
            sampler.transformer_state = nnx.variables(model)
            out = sampler([" ".join(map(str, prompt)) for prompt, _ in part], NEW, 256, temperature=0.8, top_p=0.95,
                          eos_tokens=[1], seed=number)  # fmt: skip
            counts = [len(tokens) for tokens in out.tokens]
            assert counts == [min(limit, NEW) for _, limit in part], (counts, [limit for _, limit in part])
            made += sum(counts[: len(own)])
        compiled = {"prefill": sampler._compiled_prefill_fn._cache_size(),
                    "decode": sampler._compiled_decode_fn._cache_size()}  # fmt: skip
        return made, compiled

    run.options = [(rows, sliding) for rows in BATCHES["tunix"] for sliding in (False, True)]
    return run


def worker(name: str, settings: dict[str, Any]) -> None:
    """Its fastest batch first, then one turn for each line on stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between
    run = {"ours": ours, "transformers": transformers, "tunix": tunix}[name](settings["model"])
    work = draw_work(settings["problems"], settings["samples"])
    bound, tried = settings["bound"], {}
    best = settings["tuned"].get(name)
    best = tuple(best) if isinstance(best, list) else best
    for batch in getattr(run, "options", BATCHES[name]) if best is None else ():
        rows = batch[0] if isinstance(batch, tuple) else batch
        trial = work[: max(rows, settings["trial"])]
        try:
            run(_short(trial), batch, math.inf)  # compiles
            begun = time.perf_counter()
            made, _ = run(trial, batch, bound / 2)
        except Exception as error:
            print(f"{name}, batch {batch}: {error!r}"[:300], file=sys.stderr)
            continue
        tried[batch] = made / (time.perf_counter() - begun)
    best = best or max(tried, key=tried.get)
    if name != "transformers":
        run(_short(work), best, math.inf)  # compiles what only the whole work has
    say = {"batch": best, "tried": {str(b): round(r) for b, r in tried.items()}}
    print(json.dumps(say), file=answers, flush=True)
    for _ in sys.stdin:
        begun, cpu = time.perf_counter(), time.process_time()
        made, about = run(work, best, bound)
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        print(json.dumps({"tokens": made, "seconds": seconds, "cpu_seconds": cpu, **about}), file=answers, flush=True)


def _short(work: Work) -> Work:
    """The same prompts, two tokens each: all that is compiled for the work itself, in a moment."""
    return [(prompt, 2) for prompt, _ in work]


# --- the parent -----------------------------------------------------------------------------------------------------


class Contender:
    def __init__(self, name: str, python: Path, settings: dict[str, Any], cores: set[int], log: Path):
        self.name, self.log = name, log
        mine = {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
        self._process = subprocess.Popen(
            [python, HERE / "sampling.py", "--worker", name, json.dumps(settings)], text=True, stderr=log.open("w"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=lambda: os.sched_setaffinity(0, cores),
            env={**os.environ, **(mine if ENVS[name] is None else {"PYTHONPATH": ""}), "JAX_PLATFORMS": "cpu",
                 "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(len(cores))},
        )  # fmt: skip

    def read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self._process.wait()}:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def turn(self) -> dict[str, Any]:
        self._process.stdin.write("turn\n")
        self._process.stdin.flush()
        return self.read()

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def measure(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[dict[str, dict[str, Any]]]]:
    from peers import environments

    from gemma_tpu.tiny.checkpoint import write_tiny

    model = write_tiny(folder / "model", "gemma4-31b", dtype="float32", text_only=True)
    tuned = json.loads(args.tuned.read_text()) if args.tuned and args.tuned.exists() else {}
    settings = {"model": str(model), "problems": args.problems, "samples": args.samples, "trial": args.trial,
                "bound": args.bound, "tuned": tuned}  # fmt: skip
    cores = set(sorted(os.sched_getaffinity(0))[: args.cores])
    contenders, ready, rounds = [], {}, []
    try:
        for name in args.only:  # one after another: compiling beside a rival's start would only slow both
            env = ENVS[name]
            python = Path(sys.executable) if env is None else environments.python(env, args.envs)
            contenders.append(Contender(name, python, settings, cores, folder / f"{name}.log"))
            ready[name] = contenders[-1].read()
            print(f"{name}: {ready[name]}", file=sys.stderr)
            if args.tuned:
                tuned[name] = ready[name]["batch"]
                args.tuned.write_text(json.dumps(tuned) + "\n")
        for number in range(args.rounds):
            rounds.append({one.name: one.turn() for one in contenders})
            rates = ", ".join(f"{name} {one['tokens'] / one['seconds']:,.0f}" for name, one in rounds[-1].items())
            print(f"round {number + 1}: {rates} tokens/s", file=sys.stderr)
    finally:
        for one in contenders:
            one.stop()
    return ready, rounds


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2], json.loads(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=156)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--trial", type=int, default=96, help="samples on which batch sizes are tried, or one batch")
    parser.add_argument("--bound", type=float, default=40, help="seconds after which a peer begins no new batch")
    parser.add_argument("--tuned", type=Path, help="a file of the batch sizes that were the fastest; made if missing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, help="how many cores everybody may use; all if left out")
    parser.add_argument("--envs", type=Path, default=HERE.parent / ".bench-envs")
    parser.add_argument("--only", nargs="+", choices=list(ENVS), default=list(ENVS))
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ready, rounds = measure(args, Path(folder))
    ratios: dict[str, float] = {}
    print("| sampler | batch | new tokens/s, median (range) | a second of CPU | ours over it | compiled |")
    print("|---|---|---|---|---|---|")
    for name in args.only:
        found = [one[name] for one in rounds]
        rates = [one["tokens"] / one["seconds"] for one in found]
        cpu = statistics.median(one["tokens"] / one["cpu_seconds"] for one in found)
        over = ""
        if "ours" in args.only:
            each = [one["ours"]["tokens"] / one["ours"]["seconds"] for one in rounds]
            ratios[name] = statistics.median(a / b for a, b in zip(each, rates, strict=True))
            over = f"{ratios[name]:.2f}"
        compiled = [f"{kind} {found[-1][kind]}" for kind in ("prefill", "decode") if kind in found[-1]]
        print(f"| {name} | {ready[name]['batch']} | {statistics.median(rates):,.0f} ({min(rates):,.0f} to "
              f"{max(rates):,.0f}) | {cpu:,.0f} | {over} | {', '.join(compiled)} |")  # fmt: skip
    if args.json:
        found = {"batch": {name: one["batch"] for name, one in ready.items()}, "rounds": rounds, "ours_over": ratios}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
