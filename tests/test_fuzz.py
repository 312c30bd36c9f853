"""Every parser of a file that a user gives, or that somebody gave the user, under broken files by the thousand.

Whatever a file holds, a reader takes it or says in one short message what is wrong with which file. The fast suite
feeds each reader the bombs, the seeds and a fixed number of trees; `make test-slow` mutates each reader's seeds for
GEMMA_TPU_FUZZ_SECONDS (60). A finding is repeated by its bytes, which stand in the message, or by GEMMA_TPU_FUZZ_SEED.
"""

import gzip
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fuzz_helper
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from gemma_tpu import config as configs
from gemma_tpu.bench import bench_file, bench_page, bench_prompts, bench_text, measuring, points, scrape
from gemma_tpu.costs import cost_sources, demand
from gemma_tpu.data.rows import Reader
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.evaluation import own_prompts, samples, scorecard, verilog_code
from gemma_tpu.gemma import sizes
from gemma_tpu.hardware import chips, clouds, prices
from gemma_tpu.lite import requests
from gemma_tpu.pages import comparison, comparison_page, report
from gemma_tpu.planning import calibration, subject
from gemma_tpu.run import runs
from gemma_tpu.schema import DataConfig
from gemma_tpu.serving import vllm_command
from gemma_tpu.storage.shards import open_checkpoint, read_file

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
SECONDS = float(os.environ.get("GEMMA_TPU_FUZZ_SECONDS", "60"))
SEED = int(os.environ.get("GEMMA_TPU_FUZZ_SEED", "0"))
TREES = 8  # that hypothesis makes for each reader in the fast suite
TINY: dict[str, Any] = dict(
    layers=2, pattern=1, hidden=8, mlp=8, heads=2, kv_heads=1, global_kv_heads=1, head_dim=8, global_head_dim=8,
    window=4, vocab=640,
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A reader: what it is given (a file that it may name), and good files to begin with."""

    read: Callable[[bytes], Any]
    names: Sequence[str]
    seeds: Sequence[bytes]


def as_json(*trees: Any) -> list[bytes]:
    return [json.dumps(tree).encode() for tree in trees]


def files(*patterns: str) -> list[bytes]:
    return [path.read_bytes() for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def of_file(folder: Path, name: str, read: Callable[[Path], Any], seeds: Sequence[bytes], *names: str) -> Target:
    """A reader of one file."""
    file = folder / name

    def run(data: bytes) -> None:
        file.write_bytes(data)
        read(file)

    return Target(run, [name, *names], seeds)


def some_of(readers: Sequence[Callable[[], Any]], names: Sequence[str]) -> None:
    """Several readers of one file: the message of each is looked at, and one that takes the file is enough."""
    faults = []
    for read in readers:
        try:
            read()
        except (UserError, RunError) as error:
            faults.append(error)
    if wrong := [error for error in faults if fuzz_helper.wrong_with(str(error), names)]:
        raise wrong[0]
    if len(faults) == len(readers):
        raise faults[0]


# --- configs and shipped tables ---


def config(folder: Path, _: Any) -> Target:
    def read(file: Path) -> None:
        found = configs.load(file)
        assert configs.from_dict(yaml.safe_load(configs.to_yaml(found).encode())) == found
        os.fsencode(found.run_dir).index(b"\0") if "\0" in found.run_dir else None

    return of_file(folder, "run.yaml", read, files("configs/*.yaml"))


def overrides(folder: Path, _: Any) -> Target:
    file = folder / "run.yaml"
    file.write_text("optim: {lr: 1e-4}\n")
    seeds = [
        b"optim.lr=1e-3\ntrain.steps=20\nmesh=auto\ndata.path=[a.jsonl, b.jsonl]\ndata.columns={prompt: q}\nlora.rank=8"
    ]
    return Target(
        lambda data: configs.load(file, data.decode("utf-8", "surrogateescape").split("\n")), ["run.yaml"], seeds
    )


def workload(folder: Path, _: Any) -> Target:
    return of_file(folder, "load.yaml", lambda file: demand.load(str(file)), files("configs/workloads/*.yaml"))


def variable(name: str, read: Callable[[], Any], seeds: Sequence[bytes]) -> Callable[[Path, Any], Target]:
    """A table of the user's, which an environment variable names."""

    def make(folder: Path, monkeypatch: Any) -> Target:
        file = folder / "table.yaml"
        monkeypatch.setenv(name, str(file))

        def run(data: bytes) -> None:
            file.write_bytes(data)
            read()

        return Target(run, ["table.yaml"], seeds)

    return make


CHIP = b"""chips:
  v5e: {usd: 1.0, spot_usd: [0.3, 0.9], slices: [1x1, 2x2], sources: {prices: {from: me, date: 2026-11-02}}}
"""


def hardware() -> None:
    chips._chips.cache_clear()
    try:
        for one in chips.slices():
            assert chips.find(one.name) and str(one) and one.devices > 0
            assert prices.load().knows(one, "on-demand") in (True, False)
    finally:
        chips._chips.cache_clear()


def cloud() -> None:
    for name in ("v5e-8", "v5p-8", "v6e-4"):
        assert clouds.machine_of(chips.find(name)).zones


def serving_of(folder: Path) -> Callable[[], None]:
    return lambda: vllm_command.settle(str(folder), "v5p-8", vllm_command.Wish())


def price_set(folder: Path, _: Any) -> Target:
    def read(file: Path) -> None:
        found = prices.load(str(file))
        for name in ("v5e-8", "h100x2"):
            for way in prices.WAYS:
                if found.knows(chips.find(name), way):
                    assert found.hour(chips.find(name), way).usd > 0

    own = b"""machines:
  v5e-8: {usd_hour: 9.6, spot_usd_hour: [3.0, 4.0], from: me, date: 2026-11-02}
own:
  h100: {usd: 30000, watts: 1000, from: me, date: 2026-11-02}
values:
  engineering.usd_hour: {value: 140, from: me, date: 2026-11-02}
"""
    return of_file(folder, "prices.yaml", read, [own, *files("gemma_tpu/bundled/prices/*.yaml")], "--prices")


# --- checkpoints ---

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones(4, np.float16),
    "c": np.zeros((0, 5), np.int8),
}


def safetensors(folder: Path, _: Any) -> Target:
    def read(file: Path) -> None:
        held = open_checkpoint(file.parent)
        for name in held.names():
            held.read(name)
        held.fingerprint()

    return of_file(folder, "model.safetensors", read, [save(TENSORS), save(TENSORS, {"format": "pt"})])


def header(folder: Path, _: Any) -> Target:
    """The JSON of a header under its right length."""
    file = folder / "adapter_model.safetensors"
    whole = save(TENSORS)
    length = int.from_bytes(whole[:8], "little")

    def read(data: bytes) -> None:
        file.write_bytes(len(data).to_bytes(8, "little") + data + whole[8 + length :])
        read_file(file)

    return Target(read, [file.name], [whole[8 : 8 + length]])


def index(folder: Path, _: Any) -> Target:
    for number, part in enumerate((["a"], ["b", "c"]), 1):
        (folder / f"model-{number}.safetensors").write_bytes(save({name: TENSORS[name] for name in part}))
    (folder.parent / "outside.safetensors").write_bytes(save(TENSORS))
    places = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    seeds = as_json(
        {"metadata": {"total_size": 1}, "weight_map": places},
        *(
            {"weight_map": places | {"a": away}}
            for away in (
                "../outside.safetensors",
                str(folder.parent / "outside.safetensors"),
                "..\\outside.safetensors",
                "./model-1.safetensors",
                "",
                ".safetensors",
                "\0.safetensors",
            )
        ),
    )
    opened: list[str] = []

    def read(file: Path) -> None:
        held = open_checkpoint(file.parent)
        opened.extend(held.shards)
        assert set(held.shards) <= {"model-1.safetensors", "model-2.safetensors"}

    return of_file(folder, "model.safetensors.index.json", read, seeds, folder.name)


def model_config(folder: Path, _: Any) -> Target:
    nulls = sizes.config("gemma4-31b")
    null = {"sliding_attention": {"rope_theta": None}, "full_attention": {"rope_type": "linear", "factor": None}}
    nulls["text_config"] = nulls["text_config"] | {"rope_parameters": null}
    seeds = as_json(nulls, *(sizes.config(size) for size in sizes.known()))
    return of_file(folder, "config.json", lambda file: subject.find_model(str(file.parent)), seeds)


# --- rows ---

LINES = [
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {
                "role": "assistant",
                "content": "",
                "weight": 1,
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"x": 1}}}],
            },
            {"role": "tool", "content": "r"},
            {"role": "assistant", "content": "done"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"prompt": "q", "response": "a"},
    {"instruction": "i", "input": "", "output": "o", "history": [["q", "a"]]},
    {"text": "t"},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"role": "user", "content": "q"},
]


def rows(name: str, seeds: Sequence[bytes], **more: Any) -> Callable[[Path, Any], Target]:
    def make(folder: Path, _: Any) -> Target:
        def read(file: Path) -> None:
            section = DataConfig(path=str(file), validation=None, **more)
            assert all(row.characters >= 0 for row in Reader(section))

        return of_file(folder, name, read, seeds)

    return make


def parquet() -> list[bytes]:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(arrow.table({"prompt": ["q", "r"], "response": ["a", None]}), out)
    return [out.getvalue()]


FOUND = as_json(
    {"instruction": "i", "output": "o", "history": 1.5},
    {"data": [-1]},
    {"messages": [{"role": "user", "content": [{"type": {}, "text": "q"}]}]},
    {"messages": [{"role": "assistant", "content": "", "tool_calls": json.loads("[" * 70 + "]" * 70)}]},
    {"prompt": "[" * 70 + "]" * 70, "response": "a"},
)
JSONL = [json.dumps(line).encode() + b"\n" for line in LINES] + [b"\n".join(as_json(*LINES[:1] * 3)), *FOUND]
CSV = [b"x" * 5000 + b",b\n1,2\n", b'prompt,response\nq,a\n"q, ""2""",a\n', b"instruction,input,output\ni,,o\n"]


# --- evaluations, benches, runs ---


def samples_file(folder: Path, _: Any) -> Target:
    lines = [
        {"problem": f"p{n // 2}", "sample": n % 2, "completion": "module", "finish_reason": "stop", "tokens": 3}
        for n in range(4)
    ]
    return of_file(folder, "samples.jsonl", samples.read, [b"\n".join(as_json(*lines))])


def store(folder: Path, _: Any) -> Target:
    """What an interrupted evaluation left."""
    line = b'{"problem": "p", "sample": 0, "completion": "x"}\n'
    file = folder / "samples.settings.json"
    (folder / "samples.jsonl").write_bytes(line)
    given_ = {"seed": 1, "n": 2}

    def read(data: bytes) -> None:
        file.write_bytes(data)
        samples.Store(folder / "samples.jsonl", given_)

    return Target(read, [file.name, str(folder)], as_json(given_, {"seed": 2}))


def prompts_file(folder: Path, _: Any) -> Target:
    lines = as_json({"prompt": "q", "id": "one"}, {"messages": [{"role": "user", "content": "q"}], "answer": 3})
    return of_file(folder, "prompts.jsonl", own_prompts.read, [b"\n".join(lines)])


def bench_data(folder: Path, _: Any) -> Target:
    lines = as_json({"prompt": "q", "output": 3}, {"messages": [{"role": "user", "content": "q"}]})
    return of_file(folder, "data.jsonl", lambda file: list(bench_prompts.own_prompts(file, True)), [b"\n".join(lines)])


def bench_points(folder: Path, _: Any) -> Target:
    seed = b"- {input: 512, output: 256, qps: [1, 2, inf]}\n- {input: 8, output: 8, qps: 0.5, prompts: 10}\n"
    return of_file(
        folder, "points.yaml", points.read, [seed, as_json([{"input": 1, "output": 1, "qps": 1}])[0]], "points"
    )


def bench_results(folder: Path, _: Any) -> Target:
    theirs = files("tests/data/vllm_bench_*.json")
    file = folder / "first.json"
    file.write_bytes(theirs[0])
    found = bench_file.read(file)
    ours = {
        "format": bench_file.FORMAT,
        "server": found.server,
        "settings": measuring.Settings().to_json(),
        "client": found.client,
        "points": found.points,
    }

    def read(file: Path) -> None:
        card = measuring.assess(bench_file.read(file), measuring.Judge({"ttft": 100.0}))
        bench_text.show(card)
        bench_page.page_of(card)
        cost_sources.bench(str(file), "v5e-8", None)

    return of_file(folder, "bench.json", read, [*theirs, b"\n".join(theirs), *as_json(ours)])


def eval_results(folder: Path, _: Any) -> Target:
    row = {"passed": 1, "samples": 2, "verdicts": ["passed", "mismatch"], "logs": ["", ""], "completions": ["a", "b"]}
    tree = {
        "passed": 1,
        "total": 2,
        "pass_at_k": {"1": [0.5, 0.1, 0.9]},
        "failures": {},
        "per_problem": {"p": row, "q": row},
    }
    prompts = {
        "mean_score": [0.5, 0.1, 0.9],
        "per_problem": {"p": {"score": 0.5, "scores": [0.5], "passed": 0, "samples": 1}},
    }

    def read(file: Path) -> None:
        found = scorecard.read(file)
        scorecard.compare(found, found, ("a", "b"))

    return of_file(folder, "results.json", read, as_json(tree, prompts))


ROW = {
    "step": 1,
    "loss": 2.0,
    "lr": 1e-4,
    "grad_norm": 1.0,
    "tokens": 100,
    "target_tokens": 50,
    "tokens_per_s": 10.0,
    "step_s": 0.1,
    "data_wait": 0.0,
    "mfu": 0.3,
    "memory_gib": 1.0,
    "usd": 0.1,
    "padding": 0.1,
}
JOURNAL = [b"\n".join(as_json(*(ROW | {"step": step} for step in range(1, 12))))]
SUMMARY = {
    "steps": 11,
    "device_kind": "TPU v5 lite",
    "devices": 8,
    "hosts": 1,
    "notes": ["n"],
    "version": "1",
    "plan": "x",
    "trainable_params": 10,
    "saving_share": 0.1,
    "held_out_loss": {"0": 2.0},
    "framework": "trl",
}
OTHERS = {
    "metrics.jsonl": JOURNAL[0],
    "summary.json": as_json(SUMMARY)[0],
    "held_out.jsonl": b'{"step": 0, "loss": 2.0, "perplexity": 7.4}\n{"step": 11, "loss": 1.0, "perplexity": 2.7}\n',
    "samples.jsonl": b'{"step": 0, "prompt": "q", "text": "a"}\n',
    "warnings.jsonl": b'{"step": 1, "kind": "spike", "text": "t"}\n',
}


def run_file(name: str) -> Callable[[Path, Any], Target]:
    """One file of a run folder, and all who read run folders."""

    def make(folder: Path, _: Any) -> Target:
        places = [folder / "run", folder / "other"]
        for place in places:
            place.mkdir()
            (place / "config.yaml").write_text("model: {path: models/x}\n")
            for other, content in OTHERS.items():
                (place / other).write_bytes(content)

        def read(data: bytes) -> None:
            (places[0] / name).write_bytes(data)
            found = [
                lambda place: report.write(runs.RunFolder(place)),
                calibration.measure,
                lambda place: cost_sources.training(str(place), "v5e-8", []),
                compare,
            ]
            some_of([partial(one, places[0]) for one in found], [folder.name])

        def compare(place: Path) -> None:
            both = comparison.read([place, places[1]])
            comparison.render(both)
            comparison.to_json(both)
            comparison_page.page_of(both)

        return Target(read, ["run"], [OTHERS[name]])

    return make


def calibrations(folder: Path, monkeypatch: Any) -> Target:
    file = folder / "calibration.json"
    monkeypatch.setenv(calibration.VARIABLE, str(file))
    one = {
        "chip": "v5e",
        "basis": "analytic",
        "ratio": 1.2,
        "run": "runs/x",
        "slice": "v5e-8",
        "measured_step_s": 1.0,
        "predicted_step_s": 1.2,
        "updates": 20,
        "date": "2026-11-02",
    }

    def read(_: Path) -> None:
        for found in calibration.of_chip("v5e").values():
            assert str(found) and 1.0 / found.ratio

    return of_file(folder, file.name, read, as_json([one]))


def plan_file(folder: Path, _: Any) -> Target:
    tree = {
        "slice": "v5e-8",
        "hours": 2.5,
        "fits": True,
        "tokens": 1e6,
        "basis": "analytic",
        "workload": "w",
        "usd": 3.0,
    }

    def read(file: Path) -> None:
        found, _ = cost_sources.training(str(file), None, [])
        assert found.hours > 0

    return of_file(folder, "plan.json", read, as_json(tree))


# --- what servers and models say ---


def request(kind: str) -> Callable[[Path, Any], Target]:
    common = {
        "model": "tiny",
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["x"],
        "seed": 3,
        "stream": True,
        "logprobs": 2,
        "stream_options": {"include_usage": True},
        "max_tokens": 8,
    }
    text = [common | {"prompt": prompt} for prompt in ("q", ["q", "r"], [1, 2], [[1], [2]])]
    talk = common | {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}],
        "logprobs": True,
        "top_logprobs": 2,
        "chat_template_kwargs": {"enable_thinking": True},
    }

    def make(_: Path, __: Any) -> Target:
        def read(data: bytes) -> None:
            try:
                requests.parse(kind, data, requests.Limits(), "tiny")
            except requests.Refused as error:
                assert 400 <= error.status < 500 and json.dumps(error.body)
                problem = fuzz_helper.wrong_with(str(error), [])
                assert not problem, f"{problem}: {str(error)[:500]}"

        return Target(read, [], as_json(*(text if kind == "text" else [talk])))

    return make


def answer(folder: Path, monkeypatch: Any) -> Target:
    """What a server says to `eval` and `bench`."""
    from gemma_tpu.sampling import endpoint

    class Said(io.BytesIO):
        status = 200

    said: list[bytes] = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Said(said[0]))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    asked = [endpoint.Asked("q", 0)]
    choice = {"text": "a", "finish_reason": "stop", "logprobs": {"token_logprobs": [-0.1]}}
    chat = {"message": {"content": "a"}, "finish_reason": "stop", "logprobs": {"content": [{"logprob": -0.1}]}}
    seeds = as_json(
        {"choices": [choice]},
        {"choices": [chat]},
        {"data": [{"id": "tiny", "max_model_len": 9, "root": "r"}]},
        {"version": "1.0"},
        {"error": {"message": "no"}},
    )
    prometheus = b'# HELP x\nvllm:num_requests{model="a b"} 3.0\nvllm:cache_config_info{cache_dtype="auto"} 1.0\n'

    def read(data: bytes) -> None:
        said[:] = [data]

        def write() -> None:
            from gemma_tpu.sampling.drawing import Settings

            one = endpoint.Endpoint("http://x", model="tiny", attempts=1)
            json.dumps(one.write(asked, Settings(8))).encode()

        asking = (write, lambda: endpoint.Endpoint("http://x", attempts=1), lambda: scrape.server("http://x", None))
        some_of(asking, ["http://x", "server"])

    return Target(read, ["http://x", "server"], [*seeds, prometheus])


def completion(_: Path, __: Any) -> Target:
    """Generated Verilog, before any of it runs."""
    module = b"""module m(input a, output reg [3:0] b);
  sub s(.x(a), .y(b[1:0]));
  assign b = a ? 4'd3 : {2{a}};
endmodule
"""
    seeds = [
        module,
        b"text\n```verilog\n" + module + b"```\n",
        b"[BEGIN]\n" + module + b"[DONE]",
        b'module m; initial $system("x"); endmodule',
        b'`include "/etc/passwd"\nmodule m; endmodule',
        b"module\n" * 2000,
        b"```\n" * 5000,
        b"[BEGIN]" * 3000,
        b"module a; assign x = " + b"a." * 5000 + b"b; endmodule",
        b"/*" * 5000,
        b'"' * 9999,
    ]

    def read(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        for start in ("", "module m(input a);"):
            code = verilog_code.extract_code(text, start)
            if code is not None:
                bare = verilog_code.bare(code)
                verilog_code.timescale(code)
                verilog_code.attack_in(verilog_code.used(bare, "m"))

    return Target(read, [], seeds)


def tokenizer_file(name: str) -> Callable[[Path, Any], Target]:
    """One file of a checkpoint's tokenizer; what the chat template makes of a conversation too."""

    def make(folder: Path, _: Any) -> Target:
        from gemma_tpu.data.tokenizer import Tokenizer
        from gemma_tpu.tiny.checkpoint import write_tiny

        model = write_tiny(folder / "model", **TINY)
        good = (model / name).read_bytes()
        talk = LINES[0]["messages"]

        def read(data: bytes) -> None:
            (model / name).write_bytes(data)
            found = Tokenizer(model)
            ids = found.prompt(talk) + found.training(talk)[0] + found.encode("a <turn|> b", bos=True)
            found.decode(ids)

        return Target(read, ["model", "chat template", "turn"], [good])

    return make


def adapter_file(name: str) -> Callable[[Path, Any], Target]:
    """A PEFT folder from elsewhere."""

    def make(folder: Path, _: Any) -> Target:
        from gemma_tpu.adapter import peft_folder
        from gemma_tpu.adapter.updates import LowRank
        from gemma_tpu.gemma import hf_config
        from gemma_tpu.gemma.weights import lora_entries
        from gemma_tpu.tiny.checkpoint import write_tiny

        base = open_checkpoint(write_tiny(folder / "base", **TINY, tokenizer=False))
        arch = hf_config.from_config(base.config)
        parts = {
            tensor: LowRank(
                np.ones((entry.hf_shape[0], 2), np.float32), np.ones((2, entry.hf_shape[1]), np.float32), 0.5
            )
            for tensor, entry in lora_entries(arch).items()
            if len(entry.hf_shape) == 2
        }
        peft_folder.write(folder / "adapter", parts, base="base", native=True)
        seed = (folder / "adapter" / name).read_bytes()
        config = json.loads((folder / "adapter" / peft_folder.CONFIG).read_bytes())
        patterns = {
            "rank_pattern": {"q_proj": 2, "(a+)+$": 3},
            "alpha_pattern": {".*k_proj": 4},
            "use_rslora": True,
            "target_parameters": ["mlp.experts.down_proj"],
        }
        more = as_json(config | patterns) if name == peft_folder.CONFIG else []

        def read(file: Path) -> None:
            peft_folder.read(file.parent, base, arch)

        return of_file(folder / "adapter", name, read, [seed, *more], "adapter")

    return make


TARGETS: dict[str, Callable[[Path, Any], Target]] = {
    "config": config,
    "overrides": overrides,
    "workload": workload,
    "prices": price_set,
    "hardware": variable(chips.VARIABLE, hardware, [CHIP, *files("gemma_tpu/bundled/hardware.yaml")]),
    "clouds": variable(
        clouds.VARIABLE,
        cloud,
        [
            b"tpus:\n  v5e: {zones: [europe-west4-b], runtime: v2-alpha-tpuv5-lite}\n",
            *files("gemma_tpu/bundled/clouds.yaml"),
        ],
    ),
    "safetensors": safetensors,
    "header": header,
    "index": index,
    "model_config": model_config,
    "jsonl": rows("rows.jsonl", JSONL),
    "json": rows("rows.json", [*as_json(LINES[:1] * 3, {"data": LINES[3:4]}, LINES[3]), *JSONL]),
    "csv": rows("rows.csv", CSV),
    "tsv": rows("rows.tsv", [b"prompt\tresponse\nq\ta\n"]),
    "text": rows("rows.txt", [b"some text\n"]),
    "trajectory": rows("rows.jsonl", [JSONL[-2] * 3], format="trajectory"),
    "gzip": rows("rows.jsonl.gz", [gzip.compress(JSONL[0])]),
    "preference": rows("rows.jsonl", [JSONL[6]], format="preference"),
    "parquet": lambda folder, patch: rows("rows.parquet", parquet())(folder, patch),
    "samples": samples_file,
    "store": store,
    "own_prompts": prompts_file,
    "bench_data": bench_data,
    "bench_points": bench_points,
    "bench_results": bench_results,
    "eval_results": eval_results,
    **{name: run_file(name) for name in OTHERS},
    "calibration": calibrations,
    "plan": plan_file,
    "text_request": request("text"),
    "chat_request": request("chat"),
    "answer": answer,
    "completion": completion,
    "adapter_config": adapter_file("adapter_config.json"),
    "adapter_weights": adapter_file("adapter_model.safetensors"),
    **{
        name: tokenizer_file(name)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
    },
}
HEAVY = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}  # 50 ms a file
TABLES = {"hardware", "clouds", "prices", "bench_points"}  # 100 ms a file, and read as `workload` is


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in HEAVY | TABLES])
def test_a_bomb_is_one_short_message(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    target = TARGETS[name](tmp_path, monkeypatch)
    assert fuzz_helper.fuzz(target.read, target.names, target.seeds, 0.0, SEED) >= len(fuzz_helper.BOMBS)


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in HEAVY])
def test_any_tree_is_one_short_message(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    trees(TARGETS[name](tmp_path, monkeypatch), TREES)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_minute_of_mutants_is_short_messages(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    target = TARGETS[name](tmp_path, monkeypatch)
    count = fuzz_helper.fuzz(target.read, target.names, target.seeds, SECONDS, SEED)
    trees(target, int(20 * SECONDS) if name not in HEAVY else int(SECONDS))
    print(f"{name}: {count:,} files")


def trees(target: Target, count: int) -> None:
    """Trees of JSON (which YAML reads too) with the names that the seeds have, and values of every kind."""
    words = sorted(
        {
            found.group()[1:-1] if found.group()[:1] == b'"' else found.group()
            for seed in target.seeds
            for found in fuzz_helper.SCALAR.finditer(seed[:20_000])
        }
    )[:400]
    names = st.sampled_from([word.decode("utf-8", "replace") for word in words] or [""]) | st.text(max_size=5)
    scalars = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | names
        | st.sampled_from(["../x", "\0", "\ud800", "1e999"])
    )
    anything = st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=6)
    )

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.dictionaries(names, anything, max_size=8) | anything)
    def run(tree: Any) -> None:
        data = json.dumps(tree).encode()
        fuzz_helper.hold(lambda: target.read(data), target.names, data)

    with fuzz_helper.watched():
        run()
