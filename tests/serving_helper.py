"""vLLM as a server of its own, what it is asked, and what transformers says to the same.

The environments lie in the folder that GEMMA_TPU_CLIENTS names, or in .client-envs, where `make test-clients` makes
them.
"""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CLIENTS = Path(os.environ.get("GEMMA_TPU_CLIENTS", Path(__file__).parent.parent / ".client-envs"))
STARTING, ANSWERING = 420, 120  # seconds; a minute and a second on two idle cores
OPTIONS = ("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager",
           "--host", "127.0.0.1")  # fmt: skip
QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


class NotServed(Exception):
    """The server ended before it answered; in its own words."""


def program(name: str) -> Path:
    """The Python of a client's environment, or the test is skipped."""
    path = CLIENTS / name / "bin" / "python"
    if not path.exists():
        pytest.skip(f"{path} is not there: make test-clients")
    return path


def environment(**more: str) -> dict[str, str]:
    """Without what would bring this process's packages into another environment."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    return kept | QUIET | more


@dataclass
class Server:
    """`with Server(folder, log, "--enable-lora", …) as server:`; the model's name is "model"."""

    folder: Path
    log: Path
    options: tuple[str, ...] = ()
    paths: tuple[Path, ...] = ()  # of more packages
    port: int = field(default_factory=lambda: free_port())

    def __enter__(self) -> "Server":
        command = [program("vllm"), "-m", "vllm.entrypoints.openai.api_server", "--model", self.folder,
                   "--served-model-name", "model", "--port", self.port, *OPTIONS, *self.options]  # fmt: skip
        more = {"PYTHONPATH": os.pathsep.join(map(str, self.paths))} if self.paths else {}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment(**more),
                                            cwd=self.log.parent, start_new_session=True)  # fmt: skip
        try:
            self._await()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _await(self) -> None:
        until = time.monotonic() + STARTING
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise NotServed(self.log.read_text(errors="replace"))
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise NotServed(f"no answer in {STARTING} s:\n" + self.log.read_text(errors="replace")[-3000:])

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=ANSWERING) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read().decode()[:2000]}") from None

    def ask_once(self) -> None:
        """Some engines start well and end at the first request."""
        try:
            self.completion([2, 107], 1)
        except AssertionError as error:
            self.process.terminate()
            self.process.wait(60)
            raise NotServed(f"{error}\n{self.log.read_text(errors='replace')}") from None

    def completion(self, tokens: list[int], new: int, model: str = "model") -> tuple[list[int], np.ndarray]:
        """(prompt and greedy continuation, the log-probability of each of them but the first)"""
        found = self.post("/v1/completions", model=model, prompt=tokens, max_tokens=new, temperature=0, logprobs=1,
                          echo=True, ignore_eos=True, return_token_ids=True)["choices"][0]  # fmt: skip
        ids = [*tokens, *found["token_ids"][-new:]]
        return ids, np.array(found["logprobs"]["token_logprobs"][1 : len(ids)], np.float64)

    def chat(self, text: str, new: int, model: str = "model") -> tuple[list[int], list[int], np.ndarray]:
        """(the prompt as the server rendered it, the greedy answer, the answer's log-probabilities)"""
        found = self.post("/v1/chat/completions", model=model, messages=[{"role": "user", "content": text}],
                          max_tokens=new, temperature=0, logprobs=True, ignore_eos=True,
                          return_token_ids=True)  # fmt: skip
        choice = found["choices"][0]
        said = [one["logprob"] for one in choice["logprobs"]["content"]]
        return found["prompt_token_ids"], choice["token_ids"], np.array(said, np.float64)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def log_probabilities(model: Any, tokens: list[int]) -> np.ndarray:
    """Of each token but the first, by transformers."""
    import torch

    with torch.no_grad():
        found = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1)
    return found[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].numpy()


def lm_eval(server: Server, model: str, tokenizer: Path, rows: list[dict[str, Any]], scratch: Path) -> float:
    """The accuracy that lm-eval measures through the server on multiple-choice rows, a task of a few lines."""
    scratch.mkdir()
    (scratch / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (scratch / "local.yaml").write_text(
        "task: local_rows\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs:\n  data_files:\n    test: {scratch / 'rows.jsonl'}\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        'target_delimiter: ""\nmetric_list:\n  - metric: acc\n'
    )
    given = {"model": model, "base_url": f"{server.url}/v1/completions", "tokenizer": tokenizer, "max_length": 256,
             "tokenizer_backend": "huggingface", "tokenized_requests": True, "num_concurrent": 1}  # fmt: skip
    command = [program("lm_eval"), "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", "local_rows",
               "--model_args", ",".join(f"{key}={value}" for key, value in given.items()),
               "--include_path", scratch, "--output_path", scratch / "out", "--batch_size", "4"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=ANSWERING * 3, cwd=scratch,
                          env=environment(HF_HOME=str(scratch / "home"), HF_DATASETS_OFFLINE="1"))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (scratch / "out").rglob("results*.json")
    found = json.loads(results.read_text())
    assert found["n-samples"]["local_rows"]["effective"] == len(rows)
    return found["results"]["local_rows"]["acc,none"]
