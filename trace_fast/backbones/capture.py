"""Reading the queries and keys of self-attention while a network runs, without changing what it computes."""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trace_fast.backbones.attention_call import AttentionCall, match_autocast

if TYPE_CHECKING:
    from trace_fast.backbones.base import Backbone

__all__ = [
    "AttendBlock",
    "AttentionLayout",
    "Capture",
    "CaptureError",
    "OnAttention",
    "StopForward",
    "network_lock",
    "run_captured",
    "unwrap_compiled",
]

Result = TypeVar("Result")
OnAttention = Callable[[int, Tensor, Tensor, Tensor | None, Tensor | None], None]
AttendBlock = Callable[[int, Tensor, Tensor, Tensor, int], Tensor | None]

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_TABLE = threading.Lock()  # of the dictionary itself
_STANCE = threading.Lock()  # torch has one stance for all threads, and two that overlap would leave the wrong one


class CaptureError(RuntimeError):
    """A self-attention could not be read: its layers are not the declared ones, or they did not run."""


class StopForward(Exception):  # noqa: N818 (it is a signal, not an error)
    """Raised by `on_attention` to end a pass early: what the network would still compute is not needed."""


@dataclass(frozen=True)
class AttentionLayout:
    """The layers of one kind of self-attention module, as its family declares them.

    Attributes:
        query: name of the last layer that makes the query, a norm or a projection.
        key: name of the last layer that makes the key; the same as `query` where one projection makes both.
        others: names of all other layers that such a module may have. None of them may come between `query` or `key`
            and the attention itself; a module with a layer that is not declared is refused.
        adapters: names of the projections that low-rank adapters train; an index follows a dot, as in "to_out.0".
        rotary: keyword argument in which the module receives its rotary embedding; None if there is none.
        fused: attribute of the module that is true while its projections are fused. The separate projections do not
            run then, so that the capture calls them itself. None if `query` and `key` run all the same.
    """

    query: str
    key: str
    others: frozenset[str]
    adapters: tuple[str, ...] = ()
    rotary: str | None = None
    fused: str | None = None

    def fits(self, module: nn.Module) -> bool:
        """Return whether a module has the layers `query` and `key`, and none that is not declared."""
        children = {name for name, _ in module.named_children()}
        return {self.query, self.key} <= children <= {self.query, self.key, *self.others}


class Capture:
    """Context in which self-attention modules pass their query and key to a function.

    Query, key and log-sum-exp are those of the module's call of `scaled_dot_product_attention` (`AttentionCall`). Where
    a module makes no such call, makes one whose log-sum-exp is another, or is compiled, forward hooks keep what the
    layers give that a family declares (`Backbone.LAYOUTS`), and the rotary embedding; the family's `attention_inputs`
    makes of them what attention receives, exactly. Attention processors, backends and configurations are neither
    replaced nor written to, and the hooks are removed at the end, also after an error.

    Only calls of the thread that entered the context are read: another thread may run the same network meanwhile, and
    neither notices the other. The lock of the network (`network_lock`) is held inside the context.

    Args:
        backbone: the network whose attention is read.
        on_attention: called as on_attention(index, query, key, lse, others) once for each block and forward pass, with
            the position among `blocks` and two tensors (B, H, N, d) of the image's tokens. lse (B, H, N) float32 is the
            logarithm of the sum of exp(query key^T / sqrt(d)) over the keys of the image and of all others, (B, H, T,
            d); lse is None where it is not known, others where there are none. They are the network's own tensors: use
            them before returning, and never write to them.
        blocks: indices of the blocks that are read; None for all.
        attend: called as attend(index, query, key, value, first) in the place of a module's attention and of
            `on_attention`, where one pass does the work of both (`AttentionCall`), with all tokens that attention
            receives and the position of the image's first; returns what `ops.attend` does, or None to leave the call to
            the network, whose output then stays the same bit for bit. None leaves all calls, as does a network that is
            compiled.

    Attributes:
        obstacles: for each block that is read why its last call gave no log-sum-exp, in words that follow "it"; None
            where it gave one.

    Raises:
        CaptureError: a module has layers that its family does not declare, or, at the end of the context, did not run.
        RuntimeError: a module receives fewer tokens than the image has.
    """

    def __init__(
        self,
        backbone: Backbone,
        on_attention: OnAttention,
        blocks: Sequence[int] | None = None,
        attend: AttendBlock | None = None,
    ):
        modules, grids = backbone.attentions(), backbone.grids(backbone.settings.size)
        chosen = range(len(modules)) if blocks is None else blocks
        self.backbone = backbone
        self.on_attention = on_attention
        # of a compiled network torch runs some calls as graphs and others not: all must round alike
        self.attend = attend if attend is not None and not is_compiled(backbone.network) else None
        self.modules = [modules[block] for block in chosen]
        self.tokens = [math.prod(grids[block]) for block in chosen]
        self.captured = [False] * len(self.modules)  # a count would make a compiled network be compiled anew
        self.obstacles: list[str | None] = ["has not run"] * len(self.modules)
        self._layouts = [backbone.find_layout(module) for module in self.modules]
        self._lock = network_lock(backbone.network)
        self._thread = threading.local()  # torch.compile guards on what it holds, so that a graph knows its thread
        self._every_thread = False
        self._trains = False
        self._calls: list[Any] = []  # `AttentionCall`s that are entered; their base class has no types
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Set the hooks for good, and read the calls of every thread: for a network that nothing else runs."""
        self._every_thread = True
        for index in range(len(self.modules)):
            self._watch(index)

    def __enter__(self) -> Capture:
        self._lock.acquire()
        self._trains = torch.is_grad_enabled()
        self._thread.inside = True
        for index in range(len(self.modules)):
            self._watch(index)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._leave_call()
        self._thread.inside = False
        self._lock.release()
        silent = [module for module, captured in zip(self.modules, self.captured, strict=True) if not captured]
        if error is None and silent:
            names = ", ".join(sorted({type(module).__name__ for module in silent}))
            raise CaptureError(
                f"Capture: every self-attention must run and call its declared layers, got nothing from {len(silent)} "
                f"of {len(self.modules)} modules ({names}); if their projections are fused, separate them "
                "(unfuse_qkv_projections)"
            )

    def _is_own_call(self) -> bool:
        """Return whether the thread that runs a module is the one whose calls are read."""
        if self._every_thread or getattr(self._thread, "inside", False):
            return True
        if not self._trains or torch.compiler.is_compiling():
            return False
        # on a GPU, autograd runs a checkpointed block again in another thread
        return torch._C._current_graph_task_id() >= 0

    def _watch(self, index: int) -> None:
        """Set the hooks on one module."""
        module, layout = self.modules[index], self._layouts[index]
        query, key = module.get_submodule(layout.query), module.get_submodule(layout.key)
        values: dict[str, Any] = {}  # of the call that runs

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            # kwargs are missing in another thread that meets the hook while it is set or removed
            if kwargs is None or not self._is_own_call():
                return
            values.clear()
            values["rotary"] = None if layout.rotary is None else kwargs.get(layout.rotary)
            if not (torch.compiler.is_compiling() or self._every_thread):
                self._calls.append(AttentionCall(self.attend and functools.partial(self._attend, index, values)))
                self._calls[-1].__enter__()

        def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(_: nn.Module, __: Any, output: Tensor) -> None:
                if self._is_own_call():
                    # a view, so that autograd adds up the gradients of what is read before those of the network's own
                    # use: the sum does not depend on where the read values are used
                    values[name] = output.view_as(output)

            return hook

        def finish(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._is_own_call():
                call = self._leave_call()
                if output is not None:  # as after an error
                    self._read(index, call, values, args, kwargs)
                values.clear()

        self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        self._handles.append(query.register_forward_hook(keep("query")))
        self._handles.append(key.register_forward_hook(keep("key")))
        self._handles.append(module.register_forward_hook(finish, with_kwargs=True, always_call=True))

    def _attend(self, index: int, values: dict[str, Any], query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """Attend, and make the map of a block, if the call is of all that the module's layers give."""
        layout, projected, count = self._layouts[index], values.get("query"), self.tokens[index]
        if self.attend is None or projected is None or query.shape[2] < count:
            return None
        image = self.backbone.image_tokens(count)
        parts = 3 if layout.query == layout.key else 1  # one projection may make query, key and value
        # text may have other layers
        if projected.numel() not in (parts * query.numel(), parts * query[:, :, image].numel()):
            return None
        return self.attend(index, query, key, value, range(query.shape[2])[image].start)

    def _leave_call(self) -> Any:
        """Leave the context of the attention call that runs, and return it; None if there is none."""
        if not self._calls:
            return None
        call = self._calls.pop()
        call.__exit__(None, None, None)
        return call

    def _read(
        self,
        index: int,
        call: AttentionCall | None,
        values: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Pass on what the attention of a module has received, as its call says, or else the layers before it."""
        module, layout = self.modules[index], self._layouts[index]
        self.obstacles[index] = "is compiled" if call is None else call.obstacle
        if call is not None and call.attended:
            self.captured[index], self.obstacles[index] = True, None
            return
        if call is not None and call.inputs is not None:
            self._pass_on(index, *call.inputs)
            return
        if layout.fused is not None and getattr(module, layout.fused, False):
            hidden = args[0] if args else kwargs["hidden_states"]
            for name in (layout.query, layout.key):
                module.get_submodule(name)(hidden)  # for the hooks, which keep what they give
        if "query" in values and "key" in values:
            inputs = self.backbone.attention_inputs(module, values["query"], values["key"], values["rotary"])
            self._pass_on(index, *map(match_autocast, inputs))  # norms stay in float32 under autocast

    def _pass_on(self, index: int, query: Tensor, key: Tensor, lse: Tensor | None = None) -> None:
        """Give the image's tokens of a block to the function, with a key for every head."""
        count = self.tokens[index]
        if query.shape[2] < count:
            raise RuntimeError(
                f"Capture: every self-attention must receive all {count} tokens of the image, got {query.shape[2]}; "
                "undo what merges tokens (tomesd.remove_patch)"
            )
        if (sharing := query.shape[1] // key.shape[1]) > 1:  # heads that share a key
            key = key.repeat_interleave(sharing, 1)
        image = self.backbone.image_tokens(count)
        others = None
        if lse is not None:
            lse = lse[:, :, image]
            if query.shape[2] > count:
                others = key[:, :, image.stop :] if image.stop else key[:, :, : image.start]
        self.captured[index] = True
        self.on_attention(index, query[:, :, image], key[:, :, image], lse, others)


def run_captured(call: Callable[[], Result]) -> Result:
    """Return the result of a call that runs a network in a `Capture`, which is repeated uncompiled if need be.

    A graph that was compiled before the hooks were set does not run them, and torch would use it again.

    Args:
        call: takes no arguments; called a second time where the first raises `CaptureError`.
    """
    try:
        return call()
    except CaptureError:
        with _STANCE, torch.compiler.set_stance("force_eager"):
            result = call()
    warnings.warn(
        "trace: this network was compiled and has run without being traced, so it is traced uncompiled, in a second "
        "pass; trace it first, or set torch._dynamo.config.skip_nnmodule_hook_guards = False before it is compiled",
        stacklevel=2,
    )
    return result


def network_lock(module: nn.Module) -> threading.RLock:
    """Return the lock of a network or an autoencoder: one for all objects that use it, compiled or not.

    A thread may hold it more than once. It is no part of the module, which can be copied and pickled as before; a copy
    has another lock.

    Args:
        module: a module, or what `torch.compile` makes of it.
    """
    with _TABLE:
        return _LOCKS.setdefault(unwrap_compiled(module), threading.RLock())


def unwrap_compiled(module: Any) -> Any:
    """Return the module that `torch.compile` has wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module or a part of it is compiled."""
    # asked before every pass, and `unwrap_compiled` of every part takes three times as long
    return any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in module.modules())
