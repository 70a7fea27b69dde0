"""``python -m streamsink`` is ``streamsink``."""

from streamsink.cli import main

if __name__ == "__main__":
    main()
