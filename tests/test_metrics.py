from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from streamsink.metrics import Metrics


@dataclass(eq=False)
class Counted:
    codec_name: str = "PCMU"
    frames_received: int = 0
    frames_lost: int = 0
    frames_sent: int = 0
    underruns: int = 0


def scrape(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    body, content_type = metrics.render()
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


BOUNDS = ("0.0005", "0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1.0", "+Inf")
UNLABELLED = {
    key("streamsink_streams_active"): 0.0,
    key("streamsink_frames_lost_total"): 0.0,
    key("streamsink_frames_sent_total"): 0.0,
    key("streamsink_playout_underruns_total"): 0.0,
    **{key("streamsink_frames_received_total", codec=codec): 0.0 for codec in ("PCMU", "PCMA", "G722", "L16")},
    **{
        key(f"streamsink_{name}_seconds{suffix}"): 0.0
        for name in ("event_loop_lag", "playout_lateness", "playout_lead")
        for suffix in ("_count", "_sum")
    },
    **{
        key(f"streamsink_{name}_seconds_bucket", le=bound): 0.0
        for name in ("event_loop_lag", "playout_lateness", "playout_lead")
        for bound in BOUNDS
    },
}


def test_before_anything_happened() -> None:
    assert scrape(Metrics()) == UNLABELLED


def test_everything_has_the_name_and_labels_that_scripts_hold_on_to() -> None:
    metrics = Metrics()
    metrics.stream_ended(Counted("G722", frames_received=5, frames_lost=2, frames_sent=3, underruns=4), "stop")
    metrics.bad_message("json")
    metrics.bad_message("json")
    metrics.handshake_refused("wrong")
    metrics.processor_error("record")
    metrics.processor_dropped("mine")
    metrics.processor_dropped("mine", 4)
    assert scrape(metrics) == UNLABELLED | {
        key("streamsink_streams_total", codec="G722", outcome="stop"): 1.0,
        key("streamsink_frames_received_total", codec="G722"): 5.0,
        key("streamsink_frames_lost_total"): 2.0,
        key("streamsink_frames_sent_total"): 3.0,
        key("streamsink_playout_underruns_total"): 4.0,
        key("streamsink_messages_bad_total", reason="json"): 2.0,
        key("streamsink_handshakes_refused_total", reason="wrong"): 1.0,
        key("streamsink_processor_errors_total", processor="record"): 1.0,
        key("streamsink_processor_dropped_total", processor="mine"): 5.0,
    }


def test_a_stream_counts_the_same_while_it_is_live_and_after() -> None:
    metrics = Metrics()
    live = {Counted("L16", 10, 1, 0), Counted("L16", 20, 0, 7), Counted("none")}
    metrics.watch(live)
    during = scrape(metrics)
    assert during[key("streamsink_streams_active")] == 3
    assert during[key("streamsink_frames_received_total", codec="L16")] == 30
    assert (during[key("streamsink_frames_lost_total")], during[key("streamsink_frames_sent_total")]) == (1, 7)
    for stream in tuple(live):
        metrics.stream_ended(stream, "lost")
        live.discard(stream)
    after = scrape(metrics)
    assert after == during | {
        key("streamsink_streams_active"): 0.0,
        key("streamsink_streams_total", codec="L16", outcome="lost"): 2.0,
        key("streamsink_streams_total", codec="none", outcome="lost"): 1.0,
    }


def test_histograms_count_what_is_at_most_the_bound() -> None:
    metrics = Metrics()
    for seconds in (0.0, 0.0005, 0.02, 0.0201, 3.0):
        metrics.observe_lag(seconds)
    metrics.observe_lateness(0.004)
    scraped = scrape(metrics)
    lag = [scraped[key("streamsink_event_loop_lag_seconds_bucket", le=bound)] for bound in BOUNDS]
    assert lag == [2, 2, 2, 2, 2, 3, 4, 4, 4, 4, 4, 5]
    assert scraped[key("streamsink_event_loop_lag_seconds_count")] == 5
    assert scraped[key("streamsink_event_loop_lag_seconds_sum")] == 3.0406
    lateness = [scraped[key("streamsink_playout_lateness_seconds_bucket", le=bound)] for bound in BOUNDS]
    assert lateness == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]


def test_two_servers_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.bad_message("json")
    assert key("streamsink_messages_bad_total", reason="json") not in scrape(other)
