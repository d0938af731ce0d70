"""The GPU pool against what people serve models with today; ``python -m benchmarks.peers``."""
