"""The acceptance run on one GPU: see `benchmarks.gpu.__main__`."""
