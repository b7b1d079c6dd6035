"""RIDEWrapper on the architectures of model libraries; see docs/evidence/coverage.md."""
