"""Requests in, bytes in the right memory out. Knows nothing of tensors or datasets."""
