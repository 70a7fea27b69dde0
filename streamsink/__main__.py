"""``python -m streamsink`` is ``streamsink``."""

from streamsink.cli import main

main()
