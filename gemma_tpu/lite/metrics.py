"""What the small server counts, as Prometheus reads it: vLLM's names behind the prefix `gemma_tpu:`, and its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

PREFIX = "gemma_tpu:"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One registry for each server: two in one process count apart."""

    def __init__(self) -> None:
        # A second series for each, of when it began; the library has no annotation here.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, about, labels, registry=self.registry)

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(PREFIX + name, about, registry=self.registry)

        def histogram(name: str, about: str) -> Histogram:
            return Histogram(PREFIX + name, about, buckets=SECONDS, registry=self.registry)

        self.running = gauge("num_requests_running", "Samples in a slot")
        self.waiting = gauge("num_requests_waiting", "Prompts that wait for a slot")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were computed")
        self.generation_tokens = counter("generation_tokens", "Tokens that were generated")
        self.success = counter("request_success", "Prompts that were answered whole", "finished_reason")
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token")
        self.end_to_end = histogram("e2e_request_latency_seconds", "From arrival to the last token")
        self.queue = histogram("request_queue_time_seconds", "From arrival to the prefill")
        self.prefill = histogram("request_prefill_time_seconds", "From the prefill's beginning to the first token")
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last")
        self.inference = histogram("request_inference_time_seconds", "From the prefill's beginning to the last token")
        self.bucket_hits = counter("prefill_bucket_hits", "Sheets of prompts, by their size", "bucket")
        self.sheet_tokens = counter("prefill_sheet_tokens", "Places of these sheets, padding among them")
        self.padding = gauge("prefill_padding_share", "Padding among these places, since the beginning")
        self.slot_steps = counter("slot_steps", "Steps of decode times slots")
        self.slots = gauge("slots", "Static slots")
        self.programs = gauge("compiled_programs", "Programs that were compiled before the first request")
        self.recompiles = counter("recompiles", "Compilations since then: must stay 0")
        self.rejected = counter("requests_rejected", "Requests that were refused, by status", "code")
        self.cancelled = counter("requests_cancelled", "Prompts whose client went away")
        # A series that begins with its first event hides that event from rate(): the usual ones begin at 0.
        for code in (400, 404, 405, 408, 413, 429, 500, 503):
            self.rejected.labels(code)
        for reason in ("stop", "length"):
            self.success.labels(reason)
        self._sheet = self._tokens = 0

    def sheet(self, size: int, tokens: int) -> None:
        self.bucket_hits.labels(size).inc()
        self.sheet_tokens.inc(size)
        self.prompt_tokens.inc(tokens)
        self._sheet, self._tokens = self._sheet + size, self._tokens + tokens
        self.padding.set(1 - self._tokens / self._sheet)

    def answered(self, reason: str, arrived: float, began: float, first: float | None, last: float) -> None:
        """A prompt whose samples have all ended, at times of one clock; without a token there is no first one."""
        self.success.labels(reason).inc()
        self.queue.observe(began - arrived)
        self.inference.observe(last - began)
        self.end_to_end.observe(last - arrived)
        if first is not None:
            self.first_token.observe(first - arrived)
            self.prefill.observe(first - began)
            self.decode.observe(last - first)

    def totals(self) -> dict[str, int]:
        """The whole, for the last word."""
        found = {}
        for name, short in (("request_success", "answered"), ("generation_tokens", "generated"),
                            ("requests_cancelled", "cancelled"), ("requests_rejected", "rejected"),
                            ("recompiles", "recompiles")):  # fmt: skip
            samples = [one for metric in self.registry.collect() if metric.name == PREFIX + name
                       for one in metric.samples if one.name.endswith("_total")]  # fmt: skip
            found[short] = int(sum(one.value for one in samples))
        return found

    def text(self) -> bytes:
        return generate_latest(self.registry)
