"""Speed and memory: `python -m benchmarks.speed` prints docs/evidence/performance.md."""
