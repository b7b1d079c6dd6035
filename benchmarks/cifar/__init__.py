"""CIFAR-100-LT and CIFAR-10-LT: `python -m benchmarks.cifar --help`."""
