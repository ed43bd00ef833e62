"""Metrics for Prometheus: vLLM's names where they mean the same, so that its dashboards work, else `quasar:`."""

import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime import Engine, Event, Stats

_FIRST = (*(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75), *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160))
_TOKEN = (*(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75), *(1, 2.5, 5, 10, 20))
_REQUEST = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_ACCEPTED = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
# The runtime's reasons in vLLM's words.
_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "deadline": "abort"}
_ROUTES = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/ready", "/metrics", "/version"}
)


class ServerMetrics:
    """Counts what the server does; `exposition` is what Prometheus reads."""

    def __init__(self, engine: Engine, name: str, replica: str) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": name, "engine": replica}
        self._registry.register(_EngineCollector(engine, self._labels))
        ProcessCollector(registry=self._registry)
        self._first = self._histogram(
            "vllm:time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST
        )
        self._between = self._histogram(
            "vllm:inter_token_latency_seconds",
            "Between the steps of an answer, each of which may bring tokens.",
            _TOKEN,
        )
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Of an answer, for a token after the first.", _TOKEN
        )
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "From a request's arrival to an answer's end.", _REQUEST
        )
        self._wait = self._histogram(
            "quasar:request_wait_seconds", "What an answer waited for others, all in all.", _REQUEST
        )
        self._prompt = self._histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._generated = self._histogram("vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._length = self._histogram(
            "quasar:acceptance_length", "Of an answer: tokens emitted for a round, bonus included.", _ACCEPTED
        )
        self._tokens = self._counter("vllm:generation_tokens", "Tokens emitted.")
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts, those from the cache included.")
        self._queries = self._counter("vllm:prefix_cache_queries", "Tokens of prompts that were looked for.")
        self._hits = self._counter("vllm:prefix_cache_hits", "Tokens of prompts that were in the cache.")
        self._drafts = self._counter("vllm:spec_decode_num_drafts", "Rounds with drafts.")
        self._drafted = self._counter("vllm:spec_decode_num_draft_tokens", "Draft tokens.")
        self._accepted = self._counter("vllm:spec_decode_num_accepted_tokens", "Accepted draft tokens.")
        self._ended = self._counter("vllm:request_success", "Answers that ended.", "finished_reason")
        self._rounds = self._counter("quasar:rounds", "Rounds, by whose drafts they had.", "drafter")
        self._round_tokens = self._counter("quasar:round_tokens", "Tokens that those emitted.", "drafter")
        self._http = self._counter("quasar:http_responses", "Answers to requests.", "path", "status")

    def answered(self, path: str, status: int) -> None:
        """A request was answered."""
        self._http.labels(**self._labels, path=path if path in _ROUTES else "other", status=str(status)).inc()

    def clock(self, begun: float) -> "AnswerClock":
        """Measures one answer, to a request that came at `begun` (`time.perf_counter`)."""
        return AnswerClock(self, begun)

    def exposition(self) -> bytes:
        """Every metric, in Prometheus' text format."""
        return generate_latest(self._registry)

    def first_token(self, seconds: float) -> None:
        """An answer has its first token."""
        self._first.labels(**self._labels).observe(seconds)

    def step(self, event: Event) -> None:
        """A step of an answer."""
        self._tokens.labels(**self._labels).inc(len(event.token_ids))
        if event.drafted:
            self._drafts.labels(**self._labels).inc()
            self._drafted.labels(**self._labels).inc(event.drafted)
            self._accepted.labels(**self._labels).inc(event.accepted)

    def between_steps(self, seconds: float) -> None:
        """Time that a step took its reader to get, after the one before."""
        self._between.labels(**self._labels).observe(seconds)

    def ended(self, stats: Stats, *, seconds: float, per_token: float | None) -> None:
        """An answer has ended."""
        labels = self._labels
        self._ended.labels(**labels, finished_reason=_REASONS[stats.finish_reason]).inc()
        self._whole.labels(**labels).observe(seconds)
        self._wait.labels(**labels).observe(stats.wait_seconds)
        self._prompt.labels(**labels).observe(stats.prompt_tokens)
        self._generated.labels(**labels).observe(stats.tokens)
        for counter, count in (
            (self._prompt_tokens, stats.prompt_tokens),
            (self._queries, stats.prompt_tokens),
            (self._hits, stats.reused_tokens),
        ):
            counter.labels(**labels).inc(count)
        if per_token is not None:
            self._per_token.labels(**labels).observe(per_token)
        if stats.rounds:
            self._length.labels(**labels).observe(stats.acceptance_length)
        for one in stats.drafts:
            drafter = one.drafter or "none"
            self._rounds.labels(**labels, drafter=drafter).inc(one.rounds)
            self._round_tokens.labels(**labels, drafter=drafter).inc(one.tokens)

    def left(self) -> None:
        """Nobody waits for an answer's end any more."""
        self._ended.labels(**self._labels, finished_reason="abort").inc()

    def _histogram(self, name: str, about: str, buckets: Iterable[float]) -> Histogram:
        made = Histogram(name, about, tuple(self._labels), registry=self._registry, buckets=tuple(buckets))
        made.labels(**self._labels)
        return made

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        made = Counter(name, about, (*self._labels, *labels), registry=self._registry)
        if not labels:
            # So that it is there before anything was counted.
            made.labels(**self._labels)
        return made


class AnswerClock:
    """The times of one answer."""

    def __init__(self, metrics: ServerMetrics, begun: float) -> None:
        self._metrics, self._begun = metrics, begun
        self._first = self._last = 0.0
        self._ended = False

    @property
    def first_token_seconds(self) -> float | None:
        """From the request to the first token."""
        return self._first - self._begun if self._first else None

    def step(self, event: Event) -> None:
        """A step was given out."""
        now = time.perf_counter()
        self._metrics.step(event)
        if event.token_ids and not self._first:
            self._first = now
            self._metrics.first_token(now - self._begun)
        elif event.token_ids:
            self._metrics.between_steps(now - self._last)
        if event.stats is not None:
            self._ended = True
            tokens = event.stats.tokens
            per_token = (now - self._first) / (tokens - 1) if tokens > 1 else None
            self._metrics.ended(event.stats, seconds=now - self._begun, per_token=per_token)
        self._last = now

    def leave(self) -> None:
        """No more steps are read; it counts where the answer had not ended."""
        if not self._ended:
            self._ended = True
            self._metrics.left()


class _EngineCollector(Collector):
    """What the engine counts itself, read when Prometheus asks."""

    def __init__(self, engine: Engine, labels: dict[str, str]) -> None:
        self._engine, self._names, self._values = engine, tuple(labels), tuple(labels.values())

    def collect(self) -> Iterator[Metric]:
        """The metrics of the scheduler."""
        found = self._engine.metrics()
        yield self._gauge("vllm:num_requests_running", "Answers that were in a pass and go on.", found.running)
        yield self._gauge("vllm:num_requests_waiting", "Answers that were in no pass yet.", found.waiting)
        usage = found.positions_used / found.positions
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the cache's positions that are used, 0 to 1.", usage)
        yield self._gauge("quasar:slots", "Slots of the cache.", found.slots)
        yield self._gauge("quasar:slots_used", "Slots that hold a sequence.", found.slots_used)
        yield self._gauge("quasar:sequences_swapped_out", "Sequences outside of the cache.", found.swapped_out)
        passes = CounterMetricFamily(
            "quasar:passes", "Passes, by how many sequences they held.", labels=(*self._names, "sequences")
        )
        for width, count in sorted(found.sequences_per_pass.items()):
            passes.add_metric((*self._values, str(width)), count)
        yield passes
        yield self._counter("quasar:pass_seconds", "Seconds in passes.", found.pass_seconds)
        yield self._counter("quasar:host_seconds", "Seconds around passes.", found.host_seconds)

    def describe(self) -> Iterator[Metric]:
        """Nothing: a registry asks before there is an engine to read."""
        return iter(())

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        made = GaugeMetricFamily(name, about, labels=self._names)
        made.add_metric(self._values, value)
        return made

    def _counter(self, name: str, about: str, value: float) -> Metric:
        made = CounterMetricFamily(name, about, labels=self._names)
        made.add_metric(self._values, value)
        return made
