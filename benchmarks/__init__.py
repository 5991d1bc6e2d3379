"""Measurements of torch_s3 beside its peers; run with ``python -m benchmarks.<name>``."""
