"""What transcription counts, for the whole process; the event loop's thread only."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

_FACTORS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 2.0)
_SECONDS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 5.0, 10.0)


class Histogram:
    """Observations by upper bounds.

    Args:
        bounds: Ascending.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, documentation: str) -> Metric:
        """All of them, as Prometheus wants them."""
        buckets = []
        total = 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=self._sum)


class TranscriptionCounts(Collector):
    """Everything the transcription of a process counts.

    Attributes:
        finals: Final transcripts, by engine.
        dropped: What load or failure cost: ``interim`` transcripts, and every transcript of an ``utterance``.
        retried: Utterances tried a second time since their worker died.
        deaths: Workers that died.
        work: Seconds of audio that were transcribed, and of work that took.
    """

    def __init__(self) -> None:
        self.finals: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter(interim=0, utterance=0)
        self.retried = 0
        self.deaths = 0
        self.work = (0.0, 0.0)
        self._factor = Histogram(_FACTORS)
        self._queue = Histogram(_SECONDS)
        self._latency = Histogram(_SECONDS)

    def worked(self, audio: float, busy: float) -> None:
        """Note that an utterance of ``audio`` seconds took ``busy`` seconds of work."""
        if audio > 0:
            self.work = (self.work[0] + audio, self.work[1] + busy)
            self._factor.observe(busy / audio)

    def queued(self, seconds: float) -> None:
        """Note how long an utterance waited for a worker."""
        self._queue.observe(seconds)

    def answered(self, seconds: float) -> None:
        """Note how long after the end of speech its final transcript came."""
        self._latency.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Turn the counts into samples."""
        name = "streamsink_transcription"
        finals = CounterMetricFamily(f"{name}_finals", "Final transcripts.", labels=["engine"])
        for engine, count in self.finals.items():
            finals.add_metric([engine], count)
        yield finals
        dropped = CounterMetricFamily(f"{name}_dropped", "Transcripts that load or failure cost.", labels=["what"])
        for what, count in self.dropped.items():
            dropped.add_metric([what], count)
        yield dropped
        yield CounterMetricFamily(f"{name}_retried", "Utterances tried again since their worker died.", self.retried)
        yield CounterMetricFamily(f"{name}_worker_deaths", "Transcription workers that died.", self.deaths)
        yield self._factor.family(f"{name}_real_time_factor", "Seconds of work a second of speech, by utterance.")
        yield self._queue.family(f"{name}_queue_seconds", "How long an utterance waited for a worker.")
        yield self._latency.family(f"{name}_latency_seconds", "From the end of speech to its final transcript.")


counts = TranscriptionCounts()
"""Those of this process."""
