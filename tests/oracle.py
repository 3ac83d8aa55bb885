"""An independent witness of what attention is computed from."""

import contextlib
import functools
import pkgutil
from unittest import mock

import torch


def log_sum_exps(query, keys):
    """Return the logarithm of the sum of exp(query keys^T / sqrt(d)) over keys, in float64."""
    return (query.double() @ keys.double().mT * query.shape[-1] ** -0.5).logsumexp(-1)


def assert_read_from_the_call(block, call, image):
    """Compare what a capture passes on, behind the index, with query and key of the call that the oracle saw.

    `image` is where the image's tokens stand in the call.
    """
    _, query, key, lse, others = block
    whole_query, whole_key = call
    assert torch.equal(query, whole_query[:, :, image]) and torch.equal(key, whole_key[:, :, image])
    # logits are sums of few products, and no larger than some hundreds
    exact = log_sum_exps(whole_query, whole_key)[:, :, image]
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-5)
    tokens = whole_key.shape[2]
    assert (others is None) == (key.shape[2] == tokens)
    if others is not None:
        torch.testing.assert_close(log_sum_exps(query, torch.cat([key, others], 2)), exact)


class AttentionOracle:
    """Context that records query and key of every call of scaled_dot_product_attention, or ops.attend, by its name.

    It knows nothing of the network, and stands outside of what capture itself sees: the function that the name stands
    for is called as before.
    """

    NAMES = ("torch.nn.functional.scaled_dot_product_attention", "trace_fast.ops.attend")

    def __init__(self):
        self.calls = []
        self._patches = contextlib.ExitStack()

    def __enter__(self):
        for name in self.NAMES:
            function = pkgutil.resolve_name(name)
            self._patches.enter_context(mock.patch(name, functools.partial(self._attend, function)))
        return self

    def _attend(self, function, query, key, *args, **kwargs):
        self.calls.append((query.clone(), key.clone()))
        return function(query, key, *args, **kwargs)

    def __exit__(self, *_):
        self._patches.close()
