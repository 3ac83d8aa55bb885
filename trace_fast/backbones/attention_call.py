"""Reading query, key and log-sum-exp from the attention call of a module, or attending and making the map at once."""

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

from trace_fast.ops import attend as attend_op
from trace_fast.ops import dispatch

__all__ = ["AttentionCall", "AttentionInputs", "match_autocast"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor | None]
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
    alone. So the result stays the same bit for bit.

    `attend`, which adds the map to a total on the way, takes the place of `ops.attend`, and of torch's op where it
    computes logits once instead of twice: on a CPU, in float32, without gradients. Its result differs from torch's by
    rounding.

    Args:
        attend: called as attend(query, key, value); returns None to leave the call to what it takes the place of. None
            reads query and key alone.

    Attributes:
        attended: whether `attend` has given the result of a call.
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
        if function is scaled_dot_product_attention:
            function = self._attend
        elif function is attend_op:
            query, key, value = args[:3]
            self.inputs, self.obstacle = AttentionInputs(query, key, None), None
            if (output := self._attend_with_map(query, key, value)) is not None:
                return output
        return function(*args, **kwargs or {})

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
        if self._computes_logits_once(query, key, value):
            output = self._attend_with_map(query, key, value)
            if output is not None:
                self.obstacle = None
                return output
        # views, so that autograd adds up the gradients of what is read before those of the network's own use
        query_view, key_view = query.view_as(query), key.view_as(key)
        output, lse = op(query, key, value, options.get("scale"))
        # an op may pad the rows, or leave an axis of one column
        self.inputs = AttentionInputs(query_view, key_view, lse.flatten(2)[:, :, : query.shape[2]])
        self.obstacle = None
        return output

    def _computes_logits_once(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Return whether `ops.attend` makes the map of the logits that it attends with, without loss."""
        if self.attend is None or query.dtype != torch.float32:
            return False
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        return not trains and dispatch.choose("attend", query.device) == "native"

    def _attend_with_map(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """Return what `attend` does, if there is one and it takes the call."""
        output = None if self.attend is None else self.attend(query, key, value)
        self.attended = self.attended or output is not None
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
