"""Triton kernels, installed as `trace_fast.kernels`; none yet."""
