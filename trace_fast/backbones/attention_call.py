"""Reading query, key and log-sum-exp from the attention call of a module, whose result stays the same bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

__all__ = ["AttentionCall", "AttentionInputs", "match_autocast"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
FusedOp = Callable[[Tensor, Tensor, Tensor, float | None], tuple[Tensor, Tensor]]

aten = torch.ops.aten
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class AttentionInputs(NamedTuple):
    """The query and key of an attention call, and the statistics of its rows.

    Attributes:
        query: (B, H, T, d) float.
        key: (B, H, T, d) of the same dtype.
        lse: (B, H, T) float32, the logarithm of the sum over all T keys of exp(query key^T / sqrt(d)); None of a call
            of `ops.attend`.
    """

    query: Tensor
    key: Tensor
    lse: Tensor | None


class AttentionCall(TorchFunctionMode):
    """Context of one call of an attention module, in which its `scaled_dot_product_attention` is read.

    The fused op that torch would choose is called in its place, since the function itself drops the log-sum-exp that
    the op returns. A call that no fused op computes, or in which more than the softmax over all keys decides, is left
    alone.

    A call of `ops.attend`, with which a network adds its map to a total on the way, is given to `attend`.

    Args:
        attend: called as attend(query, key, value) in the place of `ops.attend`; None reads query and key alone.

    Attributes:
        attended: whether `attend` was called.
        inputs: those of the one call that was read, else None.
        obstacle: why `inputs` is None, in words that follow "it".
    """

    def __init__(self, attend: Attend | None = None) -> None:
        super().__init__()
        self.attend, self.attended = attend, False
        self.inputs: AttentionInputs | None = None
        self.obstacle: str | None = "calls no scaled_dot_product_attention of torch"
        self._calls = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.trace_fast.attend.default:
            query, key, value, _ = args
            self.inputs, self.obstacle = AttentionInputs(query, key, None), None
            if self.attend is not None:
                self.attended = True
                return self.attend(query, key, value)
        attend = self._attend if function is scaled_dot_product_attention else function
        return attend(*args, **kwargs or {})

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return the result of `scaled_dot_product_attention`, whose arguments these are."""
        query, key, value = (match_autocast(x) for x in (query, key, value))
        self._calls += 1
        if self._calls == 1:
            op = choose_op(query, key, value, *args, **options)
        else:
            op = f"calls attention {self._calls} times"
        if isinstance(op, str):
            self.inputs, self.obstacle = None, op
            return scaled_dot_product_attention(query, key, value, *args, **options)
        # views, so that autograd adds up the gradients of what is read before those of the network's own use
        query_view, key_view = query.view_as(query), key.view_as(key)
        output, lse = op(query, key, value, options.get("scale"))
        # an op may pad the rows, or leave an axis of one column
        self.inputs = AttentionInputs(query_view, key_view, lse.flatten(2)[:, :, : query.shape[2]])
        self.obstacle = None
        return output


def match_autocast(x: Tensor) -> Tensor:
    """Return a tensor in the dtype in which `scaled_dot_product_attention` takes it under autocast."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def choose_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> FusedOp | str:
    """Return the op that torch would choose for a call and that gives the log-sum-exp, or why there is none."""
    modes = [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]
    subclasses = [type(x).__name__ for x in (query, key, value) if type(x) is not Tensor]
    if modes:
        return f"runs in a {type(modes[-1]).__name__}, which may replace its attention call"
    if subclasses:
        return f"calls attention with a {subclasses[0]}"
    if attn_mask is not None or is_causal:
        return "masks its attention"
    if dropout_p:
        return "drops a part of its probabilities"
    if query.dim() != 4 or query.shape != key.shape:
        return f"calls attention with a query {tuple(query.shape)} and a key {tuple(key.shape)}"
    if query.dtype not in DTYPES:
        return f"calls attention in {query.dtype}"
    if scale is not None and not math.isclose(scale, query.shape[-1] ** -0.5, rel_tol=1e-6):
        return f"scales its logits by {scale}"
    backend = SDPBackend(torch._fused_sdp_choice(query, key, value, scale=scale))
    if query.device.type not in ("cpu", "cuda") or backend not in FUSED:
        return f"runs on {query.device.type}, where torch chooses {backend.name} for its attention"
    if backend == SDPBackend.FLASH_ATTENTION and query.is_cuda and query.shape[-1] % 8:
        return f"has heads of {query.shape[-1]} channels, which torch pads"
    return FUSED[backend]


def attend_flash(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Return the result and the log-sum-exp of FlashAttention."""
    op = aten._scaled_dot_product_flash_attention if query.is_cuda else aten._scaled_dot_product_flash_attention_for_cpu
    return op(query, key, value, scale=scale)[:2]


def attend_efficient(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Return the result and the log-sum-exp, its rows padded, of memory-efficient attention."""
    return aten._scaled_dot_product_efficient_attention(query, key, value, None, True, scale=scale)[:2]


def attend_cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Return the result and the log-sum-exp (B, H, T, 1) of cuDNN."""
    return aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)[:2]


FUSED: dict[SDPBackend, FusedOp] = {
    SDPBackend.FLASH_ATTENTION: attend_flash,
    SDPBackend.EFFICIENT_ATTENTION: attend_efficient,
    SDPBackend.CUDNN_ATTENTION: attend_cudnn,
}
