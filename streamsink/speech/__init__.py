"""Speech: who is talking (VAD), what they say (transcription), and words of our own (synthesis)."""
