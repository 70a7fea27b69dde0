"""The processors streamsink ships."""
