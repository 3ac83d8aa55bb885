"""Reading the queries and keys of self-attention while a network runs, without changing what it computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trace_fast.backbones.rotary import apply_rotary

__all__ = ["Capture", "UnheardError", "heard"]

Result = TypeVar("Result")


class UnheardError(RuntimeError):
    """A self-attention was not heard from: it did not run, or was compiled before there were hooks."""


class Capture:
    """Context in which every self-attention of a network hands its query and key to a function.

    Forward hooks sit on the last layers before the product: `norm_q` and `norm_k` where the module has them, else
    `to_q` and `to_k`; a rotary embedding passed to the module as `image_rotary_emb` is applied as the module does.
    Where projections are fused, `to_q` and `to_k` are silent and are called on the module's input as well. Attention
    processors and backends are left alone, and the hooks are removed on the way out, also after an error.

    Args:
        modules: attention modules, in the order of their blocks, with `to_q`, `to_k`, `heads` and perhaps `norm_q`,
            `norm_k`, whose outputs are (B, N, H * d), (B, N, H, d) or, for diffusers' `Attention`, (B, H, N, d).
        sink: called once per module and forward pass as sink(index, query, key), both (B, H, N, d). They are the
            network's own tensors: use them before returning, never write to them.
        tokens: how many of each module's tokens are the image's, the last of its sequence; None for all.

    Raises:
        UnheardError: some module has no to_q or to_k, or was never heard from when the block ends without an error
            (because it was skipped, say).
        RuntimeError: a module sees fewer tokens than the image has.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        sink: Callable[[int, Tensor, Tensor], None],
        tokens: Sequence[int] | None = None,
    ):
        self.modules = list(modules)
        self.sink = sink
        self.tokens: Sequence[int | None] = [None] * len(self.modules) if tokens is None else tokens
        self.heard = [False] * len(self.modules)  # a count would make a compiled network be compiled anew
        self._handles: list[Any] = []

    def __enter__(self) -> Capture:
        leaves = [self._leaves(module) for module in self.modules]  # before any hook is set
        for index, (module, (query, key)) in enumerate(zip(self.modules, leaves, strict=True)):
            self._watch(index, module, query, key)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        while self._handles:
            self._handles.pop().remove()
        silent = [module for module, heard in zip(self.modules, self.heard, strict=True) if not heard]
        if error is None and silent:
            raise UnheardError(self._complain(silent))

    def _complain(self, modules: Sequence[nn.Module]) -> str:
        kinds = ", ".join(sorted({type(module).__name__ for module in modules}))
        return (
            f"Capture: every self-attention must pass through its to_q and to_k, got nothing from {len(modules)} of "
            f"{len(self.modules)} modules ({kinds}); run them all and unfuse their projections (unfuse_qkv_projections)"
        )

    def _leaves(self, module: nn.Module) -> list[nn.Module]:
        """The last layers before the product: of the query, of the key."""
        found = [getattr(module, f"norm_{x}", None) or getattr(module, f"to_{x}", None) for x in "qk"]
        leaves = [leaf for leaf in found if leaf is not None]
        if len(leaves) < 2:
            raise UnheardError(self._complain([module]))
        return leaves

    def _watch(self, index: int, module: nn.Module, query: nn.Module, key: nn.Module) -> None:
        seen: dict[str, Any] = {}
        # the class that most diffusers networks share puts heads before tokens, others after
        heads_first = type(module).__module__ == "diffusers.models.attention_processor"

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.clear()
            seen["rotary"] = kwargs.get("image_rotary_emb")
            if getattr(module, "fused_projections", False) and query is module.to_q:
                hidden = args[0] if args else kwargs["hidden_states"]
                query(hidden), key(hidden)  # for the hooks below

        def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(_: nn.Module, __: Any, output: Tensor) -> None:
                x = output
                if x.dim() == 3 and x.shape[-1] == getattr(module, "inner_dim", x.shape[-1]):
                    x = x.unflatten(-1, (module.heads, -1))
                elif x.dim() == 3:  # a norm that is given (B * H, N, d)
                    x = x.unflatten(0, (-1, module.heads)).transpose(1, 2)
                elif heads_first:
                    x = x.transpose(1, 2)
                count = self.tokens[index] or x.shape[1]
                if x.shape[1] < count:
                    raise RuntimeError(
                        f"Capture: every self-attention must see all {count} tokens of the image, got {x.shape[1]}; "
                        "undo what merges tokens (tomesd.remove_patch)"
                    )
                x = x[:, x.shape[1] - count :]  # (B, N, H, d)
                if seen["rotary"] is not None:
                    x = apply_rotary(x, tuple(part[-count:] for part in seen["rotary"]))
                seen[name] = x

            return hook

        def finish(*_: Any) -> None:
            if "query" in seen and "key" in seen:
                self.heard[index] = True
                self.sink(index, seen["query"].transpose(1, 2), seen["key"].transpose(1, 2))
            seen.clear()

        self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        self._handles.append(query.register_forward_hook(keep("query")))
        self._handles.append(key.register_forward_hook(keep("key")))
        self._handles.append(module.register_forward_hook(finish))


def heard(call: Callable[[], Result]) -> Result:
    """What `call` returns, which runs a network in a `Capture`, if need be a second time, as it is written.

    What a compiled network was compiled to before there were hooks goes by them, and torch takes it again.
    """
    try:
        return call()
    except UnheardError:
        with torch.compiler.set_stance("force_eager"):
            result = call()
    warnings.warn(
        "trace: this network was compiled and has run without being traced, so it is traced uncompiled, in a second "
        "pass; trace it first, or set torch._dynamo.config.skip_nnmodule_hook_guards = False before it is compiled",
        stacklevel=2,
    )
    return result
