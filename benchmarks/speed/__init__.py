"""Speed and memory: `python -m benchmarks.speed` prints tables of docs/evidence/performance/."""
