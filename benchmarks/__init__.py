"""What streamsink costs, measured: ``python -m benchmarks``."""
