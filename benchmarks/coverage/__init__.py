"""Coverage of RIDEWrapper over the architectures of model libraries; see docs/coverage.md."""
