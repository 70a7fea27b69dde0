from streamsink import BargeIn, Outcome, Processor, VadSettings


class Greeter(Processor):
    """Speaks, lets itself be interrupted, and answers what was said."""

    vad = VadSettings(hangover_ms=600)

    async def on_start(self, stream):
        self.stream = stream
        self.greeting = stream.say("Hello. Say something, or press one.", barge_in=BargeIn(clear_ms=300))

    def on_dtmf(self, digit, duration_ms):
        self.greeting.cancel()
        if digit == "1":
            self.stream.tone(440, 200)

    def on_speech(self, event):
        print(f"the caller {event.change.value} talking at {event.at:.1f} s")

    def on_transcript(self, transcript):
        if transcript.final and "goodbye" in transcript.text:
            self.stream.say("Talk to you soon.")

    async def on_stop(self, reason):
        greeting = await self.greeting
        if greeting.outcome is Outcome.INTERRUPTED:
            print(f"interrupted after {greeting.played_ms} ms; heard was: {greeting.text_heard}")
