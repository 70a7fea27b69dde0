"""What all streams of a process share: settings, pipelines, the pacer, speech, rooms, and who is live."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import msgspec

from streamsink.auth import webhook_secret
from streamsink.config import Settings
from streamsink.delivery import Delivery
from streamsink.disk import DiskSpace
from streamsink.metrics import Metrics
from streamsink.pacer import Pacer
from streamsink.plugins import Plugin
from streamsink.room import Rooms
from streamsink.siblings import Siblings
from streamsink.speech.synthesis import build
from streamsink.speech.vad import Detectors
from streamsink.status import StatusEvent

if TYPE_CHECKING:
    from streamsink.session import Session


class Endpoint:
    """What all sessions of a process share.

    Args:
        settings: The endpoint's settings.
        pipelines: For each pipeline's name its processors, found and checked.
        metrics: Where everything is counted.
        loop: The event loop all of it runs on.
        room_processors: For each pattern of rooms' names the processors, found and checked.
    """

    def __init__(
        self,
        settings: Settings,
        pipelines: Mapping[str, list[Plugin]],
        metrics: Metrics,
        loop: asyncio.AbstractEventLoop,
        room_processors: Mapping[str, list[Plugin]] | None = None,
    ) -> None:
        self.settings = settings
        self.pipelines = pipelines
        self.metrics = metrics
        self.loop = loop
        self.clock: Callable[[], float] = loop.time
        self.pacer = Pacer(loop, metrics.observe_lateness, metrics.observe_lead)
        self.detectors = Detectors(settings.vad_streams)
        self.synthesizer = build(settings.speech)
        self.disk = DiskSpace(settings.min_free)
        self.delivery = Delivery(settings.recordings, functools.partial(webhook_secret, settings))
        self.draining = False
        self.rooms = Rooms(self, settings.rooms, room_processors or {}, settings.recordings, metrics)
        # Every session whose processors have not all ended, and the streaming ones by their streamSid.
        self.sessions: set[Session] = set()
        self.live: dict[str, Session] = {}
        # The endpoint's other processes, and how many streams each of them has; None where there is but this one.
        self.siblings: Siblings | None = None
        self._elsewhere: dict[int, int] = {}

    def join(self, siblings: Siblings) -> None:
        """Share streams' ids, webhooks and the limit of streams with the endpoint's other processes."""
        self.siblings = siblings
        siblings.on("hello", self._greet)
        siblings.on("streams", self._elsewhere.__setitem__)
        siblings.on("sid", lambda sender, sid: self.take_over(sid))
        siblings.on("status", lambda sender, body: self.status(msgspec.convert(body, StatusEvent)))
        siblings.tell("hello")

    def _greet(self, sender: int, body: object) -> None:
        # It is new: what its predecessor had ended with that.
        self._elsewhere.pop(sender, None)
        self.count()

    @property
    def full(self) -> bool:
        """Whether there are as many streams as the settings allow."""
        limit = self.settings.max_streams
        return limit is not None and len(self.sessions) + sum(self._elsewhere.values()) >= limit

    def count(self) -> None:
        """Tell the other processes how many streams this one has."""
        if self.siblings is not None:
            self.siblings.tell("streams", len(self.sessions))

    def take_over(self, sid: str) -> None:
        """A stream with this streamSid starts, here or in another process: an older one is closed."""
        older = self.live.pop(sid, None)
        if older is not None:
            older.close(1001, "a newer stream has this streamSid", "closed")

    def pipeline_of(self, path: str) -> str | None:
        """The pipeline a path names; None when the path leaves it open.

        Raises:
            KeyError: No pipeline has that name.
        """
        name = path.strip("/")
        if not name:
            return None
        if name not in self.pipelines:
            raise KeyError(name)
        return name

    def status(self, event: StatusEvent) -> bool:
        """Hand a status webhook to the stream it speaks of; whether there is one."""
        session = self.live.get(event.stream_sid) if event.stream_sid else None
        if session is None and event.call_sid:
            of_call = [s for s in self.live.values() if s.stream is not None and s.stream.call_sid == event.call_sid]
            session = of_call[0] if len(of_call) == 1 else None
        if session is None:
            return False
        session.status(event)
        return True
