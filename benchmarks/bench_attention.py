"""accumulate_attention, the work of one block at one noise level: 8 heads of 40 channels, as in SD 1.5."""

import functools

import pytest
import torch

from trace_fast import ops, reference
from trace_fast.testing import assert_no_worse

HEADS, CHANNELS = 8, 40


@functools.cache
def features(tokens):
    return torch.randn(2, 1, HEADS, tokens, CHANNELS, generator=torch.Generator().manual_seed(0))


@functools.cache
def truth(tokens):
    return reference.attention_map(*features(tokens).double()), reference.attention_map(*features(tokens))


def batched(total, query, key, weight):
    """All heads at once, as an attention processor that keeps its probabilities does."""
    total.add_((query @ key.mT).mul_(CHANNELS**-0.5).softmax(-1).mean(1), alpha=weight)


# inductor of torch 2.13 fails on an update in place head by head; on the map alone it works
compiled_map = torch.compile(reference.attention_map, dynamic=False)


def compiled(total, query, key, weight):
    total.add_(compiled_map(query, key), alpha=weight)


PROVIDERS = {
    "eager": reference.accumulate_attention,
    "batched": batched,
    "compiled": compiled,
    "native": ops.accumulate_attention,
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("tokens", [1024, 4096])
def bench_accumulate_attention(tokens, provider, measure):
    total = torch.zeros(1, tokens, tokens)
    call = functools.partial(PROVIDERS[provider], total, *features(tokens), 1.0)
    call()
    assert_no_worse(total, *truth(tokens))
    work = 2 * HEADS * tokens * tokens * CHANNELS
    measure(f"accumulate_attention, N = {tokens}", provider, call, flop=work)
