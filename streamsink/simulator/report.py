"""What came of a simulation, for people and for programs."""

from __future__ import annotations

import dataclasses
from collections import Counter

import msgspec


@dataclasses.dataclass
class Report:
    """What came of a simulation.

    Attributes:
        streams: Calls asked for.
        frames_sent: Media messages sent, all calls together; those skipped on purpose are not among them.
        frames_received: Media messages that came back.
        lost: With ``expect_echo``, the frames that did not come back; else 0.
        turnaround_ms: From sending frame k to the arrival of the k-th returned frame, in milliseconds.
        underruns: How often the far end ran dry in the middle of a talk spurt; see `FarEnd`.
        close_code: The endpoint's WebSocket close code, of the call that went worst; 1006 where the connection ended
            without one, None where there was no call.
        late_ms: How late the simulator itself sent, in milliseconds: a busy machine shows here.
        events: What else happened, and how often: frames ``skipped`` on purpose, and the endpoint's ``mark``,
            ``clear``, ``dtmf`` and ``bad`` messages, the latter such as no platform would understand.
        failures: A sentence for each call that failed: what happened and how to mend it.
    """

    streams: int
    frames_sent: int = 0
    frames_received: int = 0
    lost: int = 0
    turnaround_ms: dict[str, float] | None = None
    underruns: int = 0
    close_code: int | None = None
    late_ms: dict[str, float] | None = None
    events: Counter[str] = dataclasses.field(default_factory=Counter)
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0 when all went well; 1 when a call failed or a reply is missing."""
        return 1 if self.failures or self.lost else 0

    def to_json(self) -> str:
        """One JSON object, the outside contract of ``--json``."""
        fields = ("streams", "frames_sent", "frames_received", "lost", "turnaround_ms", "underruns", "close_code")
        told = {field: getattr(self, field) for field in fields}
        told["turnaround_ms"] = self.turnaround_ms or dict.fromkeys(("p50", "p99", "p999", "max"))
        return msgspec.json.encode(told).decode()

    def to_text(self) -> str:
        """A table for people; what did not happen is left out."""
        rows: dict[str, object] = {
            "streams": self.streams,
            "frames sent": self.frames_sent,
            "frames received": self.frames_received,
            "lost": self.lost,
            "turnaround": _spread(self.turnaround_ms),
            "underruns": self.underruns,
            "skipped on purpose": self.events["skipped"] or None,
            "marks set": self.events["mark"] or None,
            "clears": self.events["clear"] or None,
            "digits received": self.events["dtmf"] or None,
            "bad messages": self.events["bad"] or None,
            "sent late by": _spread(self.late_ms),
            "close code": self.close_code,
        }
        rows = {label: value for label, value in rows.items() if value is not None}
        width = max(map(len, rows))
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows.items())


def _spread(milliseconds: dict[str, float] | None) -> str | None:
    if milliseconds is None:
        return None
    return "p50 {p50:.2f} · p99 {p99:.2f} · p99.9 {p999:.2f} · max {max:.2f} ms".format_map(milliseconds)
