"""Plays SignalWire's part over a real socket: a sound file or a capture goes to an endpoint as from a conference.

`script` says what is sent and when, `call` is one stream's socket, `far_end` what the platform does with the audio
that comes back, `simulation` many calls at once, `report` what came of them, and `command` all that as a command.
Nothing of the server is imported: what it says about an endpoint is a second opinion.
"""

from __future__ import annotations

from streamsink.simulator.command import run
from streamsink.simulator.options import SimulateOptions
from streamsink.simulator.report import Report
from streamsink.simulator.script import encode_payloads, read_audio
from streamsink.simulator.simulation import simulate

__all__ = ["Report", "SimulateOptions", "encode_payloads", "read_audio", "run", "simulate"]
