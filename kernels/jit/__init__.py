"""Triton kernels, installed as `trace_fast.kernels`: attention and divergence."""
