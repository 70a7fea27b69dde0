"""Prometheus metrics as plain integers on the event loop's thread; nothing but a scrape turns them into samples."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

CODECS = ("PCMU", "PCMA", "G722", "L16")
"""Codecs whose counters are there, at 0, before their first frame: a rate over a series that appears late is wrong."""

# Seconds. 20 ms is a frame; a loop that is late by more is heard.
_BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class CountedStream(Protocol):
    """What a live stream counts for itself, so that a frame costs the metrics nothing."""

    frames_received: int
    frames_lost: int

    @property
    def frames_sent(self) -> int:
        """Media messages sent."""

    @property
    def underruns(self) -> int:
        """How often the far end ran dry in the middle of something."""

    @property
    def codec_name(self) -> str:
        """The codec's name, or ``none`` before it is known."""


class Metrics:
    """Everything one endpoint counts. For the event loop's thread only, `render` too."""

    def __init__(self) -> None:
        self.streams_ended = 0
        self._live: Collection[CountedStream] = ()
        self._ended = _Totals()
        self._streams: Counter[tuple[str, str]] = Counter()
        self._messages_bad: Counter[str] = Counter()
        self._handshakes_refused: Counter[str] = Counter()
        self._processor_errors: Counter[str] = Counter()
        self._processor_dropped: Counter[str] = Counter()
        self._lag = _Histogram()
        self._lateness = _Histogram()
        self._lead = _Histogram()
        self._registry = CollectorRegistry()
        self._registry.register(_Scrape(self))

    def register(self, counts: Collector) -> None:
        """Show what another part of the process counts for itself, at each scrape."""
        self._registry.register(counts)

    def watch(self, live: Collection[CountedStream]) -> None:
        """Take the collection of live streams, which the endpoint keeps; read at each scrape.

        A stream is to leave it in the same step of the event loop in which `stream_ended` is told of it.
        """
        self._live = live

    def stream_ended(self, stream: CountedStream, outcome: str) -> None:
        """Keep what an ended stream has counted.

        Args:
            stream: Which one.
            outcome: A fixed word: why it ended.
        """
        self.streams_ended += 1
        self._streams[stream.codec_name, outcome] += 1
        self._ended.add(stream)

    def bad_message(self, reason: str) -> None:
        """Count a message that could not be used; ``reason`` is a fixed word, never the peer's text."""
        self._messages_bad[reason] += 1

    def handshake_refused(self, reason: str) -> None:
        """Count an upgrade that was refused; ``reason`` is a fixed word."""
        self._handshakes_refused[reason] += 1

    def processor_error(self, processor: str) -> None:
        """Count a processor that was retired from a stream or could not be built."""
        self._processor_errors[processor] += 1

    def processor_dropped(self, processor: str, count: int = 1) -> None:
        """Count frames a processor did not get because its queue was full."""
        self._processor_dropped[processor] += count

    def observe_lag(self, seconds: float) -> None:
        """Note how late the event loop ran a timer."""
        self._lag.observe(seconds)

    def observe_lateness(self, seconds: float) -> None:
        """Note how late outgoing audio left."""
        self._lateness.observe(seconds)

    def observe_lead(self, seconds: float) -> None:
        """Note how much audio the far end still had when more left."""
        self._lead.observe(seconds)

    def render(self) -> tuple[bytes, str]:
        """Everything in Prometheus' text format 0.0.4, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        """Turn the counts into samples, live streams' included; for Prometheus clients."""
        totals = self._ended.copy()
        for stream in self._live:
            totals.add(stream)
        yield GaugeMetricFamily("streamsink_streams_active", "Streams that are live.", value=len(self._live))
        streams = CounterMetricFamily("streamsink_streams", "Streams that have ended.", labels=["codec", "outcome"])
        for (codec, outcome), count in self._streams.items():
            streams.add_metric([codec, outcome], count)
        yield streams
        received = Counter(dict.fromkeys(CODECS, 0))
        received.update(totals.received)
        yield _labelled("streamsink_frames_received", "Media frames decoded.", "codec", received)
        yield CounterMetricFamily(
            "streamsink_frames_lost", "Frames that never came, by the jumps of chunk.", value=totals.lost
        )
        yield CounterMetricFamily("streamsink_frames_sent", "Media frames sent to the platform.", value=totals.sent)
        yield CounterMetricFamily(
            "streamsink_playout_underruns", "Gaps in outgoing audio, where it came too late.", value=totals.underruns
        )
        yield _labelled("streamsink_messages_bad", "Messages dropped.", "reason", self._messages_bad)
        yield _labelled("streamsink_handshakes_refused", "Upgrades refused.", "reason", self._handshakes_refused)
        yield _labelled(
            "streamsink_processor_errors", "Processors retired or not built.", "processor", self._processor_errors
        )
        yield _labelled(
            "streamsink_processor_dropped", "Frames a processor was too slow for.", "processor", self._processor_dropped
        )
        yield self._lag.family("streamsink_event_loop_lag_seconds", "How late the event loop runs its timers.")
        yield self._lateness.family("streamsink_playout_lateness_seconds", "How late outgoing audio leaves.")
        yield self._lead.family(
            "streamsink_playout_lead_seconds", "How much audio the far end still has when more leaves."
        )


def merged(texts: Mapping[int, bytes]) -> bytes:
    """Make one text of those that each worker rendered; the label ``worker`` tells whose a sample is."""
    families: dict[str, Metric] = {}
    for worker, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text.decode()):
            into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                into.samples.append(sample._replace(labels={**sample.labels, "worker": str(worker)}))
    registry = CollectorRegistry()
    registry.register(_Families(list(families.values())))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


class _Totals:
    """Sums over streams."""

    def __init__(self) -> None:
        self.received: Counter[str] = Counter()
        self.lost = 0
        self.sent = 0
        self.underruns = 0

    def add(self, stream: CountedStream) -> None:
        # A stream without a codec has no frames; its label would be one more series for nothing.
        if stream.frames_received:
            self.received[stream.codec_name] += stream.frames_received
        self.lost += stream.frames_lost
        self.sent += stream.frames_sent
        self.underruns += stream.underruns

    def copy(self) -> _Totals:
        totals = _Totals()
        totals.received.update(self.received)
        totals.lost, totals.sent, totals.underruns = self.lost, self.sent, self.underruns
        return totals


class _Histogram:
    """A histogram without the lock that prometheus_client's takes: `observe` is called for every tick of the pacer."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(_BOUNDS, value)] += 1
        self._sum += value

    def family(self, name: str, documentation: str) -> HistogramMetricFamily:
        buckets = []
        total = 0
        for bound, count in zip([*map(str, _BOUNDS), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=self._sum)


class _Scrape(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.collect()


def _labelled(name: str, documentation: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, documentation, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
