"""What a server says of itself: its models, its version, its settings and its own clocks in /metrics.

vLLM's names are looked for without their prefix (`vllm:`), so that other servers that expose the same are read too.
"""

import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gemma_tpu import plain
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.sampling.endpoint import api

TIMEOUT = 10.0
_SAMPLE = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
_INFO = ("cache_dtype", "enable_prefix_caching", "block_size", "num_gpu_blocks", "gpu_memory_utilization",
         "kv_cache_size_tokens", "kv_cache_max_concurrency")  # fmt: skip
# In the order in which a request goes through them.
PHASES = {"queue": "request_queue_time_seconds", "prefill": "request_prefill_time_seconds",
          "decode": "request_decode_time_seconds", "whole": "e2e_request_latency_seconds"}  # fmt: skip
_COUNTERS = {"prefix_queries": "prefix_cache_queries", "prefix_hits": "prefix_cache_hits",
             "preemptions": "num_preemptions"}  # fmt: skip

Samples = dict[str, list[tuple[dict[str, str], float]]]


@dataclass(frozen=True)
class Server:
    """One server, as it describes itself."""

    url: str  # up to /v1
    model: str
    root: str | None  # what the server loaded as this model
    max_model_len: int | None = None
    version: str | None = None
    settings: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"url": self.url, "model": self.model, "root": self.root, "max_model_len": self.max_model_len,
                "version": self.version, "settings": self.settings}  # fmt: skip


def key() -> str | None:
    return os.environ.get("OPENAI_API_KEY")


def server(url: str, model: str | None) -> Server:
    """Asks it. A server that does not answer is an error, one that tells little is none."""
    where = api(url)
    listed = _models(where)
    if model is None and len(listed) != 1:
        named = plain.first(map(plain.cut, listed)) or "none"
        raise UserError(f"{where} serves {named}: say which model to ask (--model NAME)")
    name = model or next(iter(listed))
    if listed and name not in listed:
        raise UserError(f"--model {name}: {where} serves {plain.first(map(plain.cut, listed))}")
    entry = listed.get(name, {})
    longest, root = entry.get("max_model_len"), entry.get("root")
    return Server(where, name, root if isinstance(root, str) else None, longest if type(longest) is int else None,
                  _version(where), settings(metrics(where)))  # fmt: skip


def _models(where: str) -> dict[str, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {key()}"} if key() else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{where}/models", headers=headers), timeout=TIMEOUT) as one:
            found = plain.require(plain.json_value(one.read()), {"data": [{"id": str}]}, f"{where}/models")
            return {entry["id"]: entry for entry in found["data"]}
    except urllib.error.HTTPError as error:
        error.close()
        hint = "; set OPENAI_API_KEY to a key of this server" if error.code in (401, 403) else ""
        raise UserError(f"{where}/models: {error.code} {error.reason}{hint}") from None
    except (OSError, http.client.HTTPException) as error:
        told = getattr(error, "reason", None) or error
        raise RunError(f"{where}: no answer ({told!s:.80}); is the server up?") from None
    except ValueError:
        raise UserError(f"{where}/models: not the answer of an OpenAI-compatible server") from None


def _version(where: str) -> str | None:
    try:
        found = plain.json_value(_get(_beside(where, "/version")) or "")
        return str(plain.require(found, {"version": str}, "/version")["version"])
    except (ValueError, UserError):  # another kind of server
        return None


def metrics(where: str) -> Samples:
    """Everything in /metrics; nothing where there is none."""
    return parse(_get(_beside(where, "/metrics")) or "")


def parse(text: str) -> Samples:
    """Prometheus' text format, each name without its prefix and its `_total`."""
    found: Samples = {}
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample is None or line.startswith("#"):
            continue
        try:
            value = float(sample[3])
        except ValueError:
            continue
        name = sample[1].rpartition(":")[2].removesuffix("_total")
        found.setdefault(name, []).append((dict(_LABEL.findall(sample[2] or "")), value))
    return found


def settings(samples: Samples) -> dict[str, str]:
    """What a server says about its cache."""
    labels = samples.get("cache_config_info", [({}, 0.0)])[0][0]
    return {name: labels[name] for name in _INFO if labels.get(name) not in (None, "", "None")}


def total(samples: Samples, name: str) -> float | None:
    """Over all engines and label values."""
    return sum(value for _, value in samples[name]) if name in samples else None


def phases(before: Samples, after: Samples) -> dict[str, Any] | None:
    """Mean milliseconds that a request spent in each phase between two looks, and how many requests that was."""
    found: dict[str, Any] = {}
    for phase, name in PHASES.items():
        spent, count = _more(before, after, f"{name}_sum"), _more(before, after, f"{name}_count")
        if spent is not None and count:
            found[phase] = round(1e3 * spent / count, 4)
            found["requests"] = max(found.get("requests", 0), round(count))
    return found or None


def counters(before: Samples, after: Samples) -> dict[str, int]:
    """How much the counters grew that explain a measurement."""
    found = {what: _more(before, after, name) for what, name in _COUNTERS.items()}
    return {what: round(value) for what, value in found.items() if value is not None}


def split(phase: Mapping[str, float] | None, e2e_ms: float | None) -> dict[str, float] | None:
    """Where the mean time of a request went. What the server does not see of it is transport: the way there and back,
    the connection, and this client."""
    if phase is None or e2e_ms is None or not {"queue", "prefill", "decode"} <= set(phase):
        return None
    parts = {name: phase[name] for name in ("queue", "prefill", "decode")}
    inside = sum(parts.values())
    if "whole" in phase:
        parts["server_other"] = round(max(0.0, phase["whole"] - inside), 4)
        inside = max(inside, phase["whole"])
    parts["transport"] = round(e2e_ms - inside, 4)
    return parts


def _more(before: Samples, after: Samples, name: str) -> float | None:
    now = total(after, name)
    return None if now is None else now - (total(before, name) or 0.0)


def _beside(where: str, path: str) -> str:
    return where.removesuffix("/v1") + path


def _get(url: str) -> str | None:
    headers = {"Authorization": f"Bearer {key()}"} if key() else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
            return str(answer.read(), "utf-8", "replace")
    except urllib.error.HTTPError as error:
        error.close()
    except (OSError, http.client.HTTPException):
        pass  # a server that does not answer is noticed where it is asked for tokens
    return None
