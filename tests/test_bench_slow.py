"""`gemma-tpu bench` beside `vllm bench serve`, on vLLM itself with a tiny model: `make test-clients`.

Both measure the same server in turns, three times. Medians and throughput must agree within 5 %, or within the spread
that the peer has over its own three runs.
"""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from bench_server import Server

from gemma_tpu import cli
from gemma_tpu.bench.bench_prompts import Vocabulary, random_prompts
from gemma_tpu.tiny.checkpoint import write_tiny

pytestmark = pytest.mark.slow
CLIENTS = Path(os.environ.get("GEMMA_TPU_CLIENTS", Path(__file__).parent.parent / ".client-envs"))
PYTHON = CLIENTS / "vllm" / "bin" / "python"
QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
INPUT, OUTPUT, PROMPTS, RUNS = 64, 24, 24, 3
RATES = (2, 5)  # below saturation on two cores
STARTING = 300.0
CLOSE = 0.05
# `vllm bench serve` again and again in one process, which takes a minute to start on two busy cores: arguments in, a
# line back. (The command `vllm` of the CPU wheel does not start: it looks for a distribution of another name.)
PEER = """
import json, sys
from vllm.benchmarks import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser
out, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    serve.main(parser.parse_args(json.loads(line)))
    print("measured", file=out, flush=True)
"""
FIGURES = {"TTFT": ("ttft_ms", "median_ttft_ms"), "TPOT": ("tpot_ms", "median_tpot_ms"),
           "ITL": ("itl_ms", "median_itl_ms"), "E2E": ("e2e_ms", "median_e2el_ms")}  # fmt: skip


def environment():
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    return kept | QUIET


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON} is not there: make test-clients")
    return write_tiny(tmp_path_factory.mktemp("served") / "model", arch="gemma3-1b", dtype="float32")


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1", "--port",
               port, "--dtype", "float32", "--max-model-len", 512, "--max-num-seqs", 16, "--enforce-eager",
               "--no-enable-prefix-caching"]  # fmt: skip
    with log.open("wb") as stream:
        process = subprocess.Popen(list(map(str, command)), stdout=stream, stderr=stream, env=environment(),
                                   cwd=log.parent, start_new_session=True)  # fmt: skip
    try:
        end = time.monotonic() + STARTING
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            time.sleep(0.5)
        else:
            pytest.fail(f"vLLM did not start: {log.read_text(errors='replace')[-2000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def prompts(model):
    """The same for both: the peer's own random prompts have other lengths than asked for with so small a vocabulary."""
    vocabulary = Vocabulary(model)
    return [one.content for one in random_prompts(vocabulary, PROMPTS + 2, INPUT, key=[0], chat=False)]


@pytest.fixture(scope="module")
def peer(model, tmp_path_factory):
    """Asks the peer's process for one measurement."""
    log = tmp_path_factory.mktemp("peer") / "log"
    with log.open("w") as stream, subprocess.Popen(
        [PYTHON, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True,
        env=environment(), cwd=log.parent,
    ) as process:  # fmt: skip

        def measure(*arguments):
            process.stdin.write(json.dumps(list(map(str, arguments))) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "measured\n", log.read_text()[-3000:]

        yield measure
        process.stdin.close()


def theirs(peer, url, model, prompts, rate, file):
    data = file.with_suffix(".data")
    data.write_text(json.dumps([{"conversations": [{"value": one}, {"value": one}]} for one in prompts[:PROMPTS]]))
    peer("--base-url", url, "--model", model, "--dataset-name", "sharegpt", "--dataset-path", data,
         "--sharegpt-output-len", OUTPUT, "--disable-shuffle", "--ignore-eos", "--num-prompts", PROMPTS,
         "--request-rate", rate, "--temperature", 0, "--num-warmups", 2, "--percentile-metrics", "ttft,tpot,itl,e2el",
         "--metric-percentiles", "50,90,99", "--save-result", "--save-detailed", "--result-filename", file, "--seed",
         file.stem[-1])  # fmt: skip
    found = json.loads(file.read_text())
    assert found["completed"] == PROMPTS
    assert set(found["input_lens"]) == {INPUT} and set(found["output_lens"]) == {OUTPUT}
    return {name: found[key] for name, (_, key) in FIGURES.items()} | {"tokens/s": found["output_throughput"]}


def ours(url, model, prompts, rate, file, capsys, metrics=True):
    data = file.with_suffix(".data")
    data.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
    code = cli.main(["bench", url, "--json", "--tokenizer", str(model), "--data", str(data), "--output", str(OUTPUT),
                     "--qps", str(rate), "--prompts", str(PROMPTS), "--seed", file.stem[-1], "--out",
                     str(file)])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["completed"] == PROMPTS, found
    assert {one["output_tokens"] for one in found["points"][0]["requests"]} == {OUTPUT}
    assert {one["input_tokens"] for one in found["points"][0]["requests"]} == {INPUT}
    if metrics:
        assert found["points"][0]["phases"]["requests"] == PROMPTS and found["points"][0]["split_ms"]["transport"] > 0
    return {name: found[key]["p50"] for name, (key, _) in FIGURES.items()} | {"tokens/s": found["output_throughput"]}


def test_medians_and_throughput_are_those_of_vllm_bench_serve(peer, url, model, prompts, tmp_path, capsys):
    lines, wrong = [], []
    for rate in RATES:
        runs = [
            (ours(url, model, prompts, rate, tmp_path / f"ours-{rate}-{run}.json", capsys),
             theirs(peer, url, model, prompts, rate, tmp_path / f"theirs-{rate}-{run}.json"))
            for run in range(RUNS)
        ]  # fmt: skip
        for name in runs[0][0]:
            mine, others = (np.array([one[side][name] for one in runs]) for side in (0, 1))
            found, wanted = np.median(mine), np.median(others)
            allowed = max(CLOSE * wanted, others.max() - others.min())
            lines.append(f"QPS {rate}  {name:8}  {found:8.2f} {mine.round(2)}  {wanted:8.2f} {others.round(2)}  "
                         f"{found / wanted - 1:+.1%}, allowed {allowed / wanted:.1%}")  # fmt: skip
            wrong += [lines[-1]] if abs(found - wanted) > allowed else []
    with capsys.disabled():  # the table of a run by hand
        print("\n" + "\n".join(lines))
    assert not wrong


def test_both_measure_the_same_of_a_server_of_known_delays(peer, model, prompts, tmp_path, capsys):
    """Where the machine is too busy for the test above: what sleeps is not disturbed much."""
    server = Server()
    server.first, server.gap, server.count = 0.4, 0.08, Vocabulary(model).count
    wanted = {"TTFT": 400, "TPOT": 80, "ITL": 80, "E2E": 400 + 80 * (OUTPUT - 1)}
    try:
        mine = ours(server.url, model, prompts, 5, tmp_path / "ours-0.json", capsys, metrics=False)
        others = theirs(peer, server.url, model, prompts, 5, tmp_path / "theirs-0.json")
    finally:
        server.stop()
    with capsys.disabled():
        print("\n" + "\n".join(f"{name:8}  {mine[name]:8.2f}  {others[name]:8.2f}" for name in mine))
    assert mine == pytest.approx(others, rel=CLOSE)
    assert {name: mine[name] for name in wanted} == pytest.approx(wanted, rel=CLOSE)


def test_its_detailed_file_is_read_as_it_counts(peer, url, model, prompts, tmp_path, capsys):
    file = tmp_path / "theirs-0.json"
    wanted = theirs(peer, url, model, prompts, 8, file)
    assert cli.main(["bench", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name, (key, _) in FIGURES.items():
        assert found[key]["p50"] == pytest.approx(wanted[name], rel=1e-4)
    assert found["output_throughput"] == pytest.approx(wanted["tokens/s"])


def test_random_prompts_have_the_servers_own_count_of_tokens(url, model, tmp_path, capsys):
    """By both endpoints; the tokenizer is found where the server loaded the model."""
    for endpoint, tokens in (("completions", 40), ("chat", 60)):
        file = tmp_path / f"{endpoint}.json"
        words = ["--endpoint", endpoint, "--input", tokens, "--output", 8, "--qps", "inf", "--prompts", 6]
        words += ["--out", file]
        assert cli.main(["bench", url, "--json", *map(str, words)]) == 0
        point = json.loads(capsys.readouterr().out)["points"][0]
        assert {one["input_tokens"] for one in point["requests"]} == {tokens}
        assert {one["output_tokens"] for one in point["requests"]} == {8} and point["counted_by"] == ["usage"]
