"""Speed and memory: `python -m benchmarks.speed` prints the tables of docs/performance.md."""
