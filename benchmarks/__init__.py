"""Claims of speed, each a ratio against a baseline measured beside it. `python -m benchmarks` measures all of them."""
