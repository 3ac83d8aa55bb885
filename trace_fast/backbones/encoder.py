"""What the encoders share: no noise levels, hooks that replay the way from projections to the product, pixels in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trace_fast.backbones.base import Settings, dtype_of
from trace_fast.backbones.capture import Capture, UnheardError

__all__ = ["CLIP", "EncoderBackbone", "EncoderCapture", "pair"]

# mean and standard deviation of pixels, red, green, blue
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class EncoderCapture(Capture):
    """`Capture` for the self-attention of encoders of transformers and timm.

    Forward hooks keep what the family's `LEAVES` give, such as the projections `q_proj` and `k_proj`, and the
    rotary embedding that the module is called with; the family's `product` then does what the module does with
    them, by the model's own function. So all of it is local to the modules: whichever attention implementation the
    user chose (eager, sdpa, flash, flex, a kernel of the hub) is called under its own name, the configuration is
    never written to, and other models and threads notice nothing. Putting a listener into transformers'
    `AttentionInterface` instead would see the product's own arguments, but the interface belongs to the process,
    its names decide elsewhere which masks are made and whether windows are cut, and it is not asked about eager
    attention in every version. The price is that a layer between projection and product, such as a norm that a
    later version may add, is not replayed: a module with a child that is not known is refused.

    Args:
        family: the backbone whose modules they are.
        modules: attention modules, in the order of their blocks.
        sink: see `Capture`.
        tokens: how many of each module's tokens are the image's, the last of its sequence: class and register tokens
            come first and are dropped. The softmax over what is left is the image's part of the whole softmax, its
            rows renormalised.
    """

    def __init__(
        self,
        family: EncoderBackbone,
        modules: Sequence[nn.Module],
        sink: Callable[[int, Tensor, Tensor], None],
        tokens: Sequence[int] | None,
    ):
        super().__init__(modules, sink, tokens)
        self.family = family

    def _complain(self, modules: Sequence[nn.Module]) -> str:
        kinds = ", ".join(sorted({type(module).__name__ for module in modules}))
        children = sorted({name for module in modules for name, _ in module.named_children()})
        leaves = " or ".join(" and ".join(dict.fromkeys(names)) for names in self.family.LEAVES)
        library = type(modules[0]).__module__.partition(".")[0]
        return (
            f"Capture: every self-attention must run, and have {leaves}, and beside them none but "
            f"{', '.join(sorted(self.family.OTHERS))}, got {len(modules)} of {len(self.modules)} modules ({kinds}) "
            f"that were not heard from or differ, with {', '.join(children) or 'no layers'}; this version of "
            f"{library} may be too old or too new"
        )

    def _leaves(self, module: nn.Module) -> list[nn.Module]:
        children = dict(module.named_children())
        for names in self.family.LEAVES:
            if set(names) <= set(children) <= {*names, *self.family.OTHERS}:
                return [children[name] for name in names]
        raise UnheardError(self._complain([module]))

    def _watch(self, index: int, module: nn.Module, to_query: nn.Module, to_key: nn.Module) -> None:
        seen: dict[str, Any] = {}

        def begin(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
            seen.clear()
            seen["position"] = kwargs.get(self.family.POSITION)

        def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(_: nn.Module, __: Any, output: Tensor) -> None:
                seen[name] = output

            return hook

        def finish(*_: Any) -> None:
            if "query" in seen and "key" in seen:
                query, key = self.family.product(module, seen["query"], seen["key"], seen["position"])
                sharing = query.shape[1] // key.shape[1]
                if sharing > 1:  # heads that share a key
                    key = key.repeat_interleave(sharing, 1)
                count = self.tokens[index] or query.shape[2]
                self.heard[index] = True
                self.sink(index, query[:, :, -count:], key[:, :, -count:])
            seen.clear()

        self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        self._handles.append(to_query.register_forward_hook(keep("query")))
        self._handles.append(to_key.register_forward_hook(keep("key")))
        self._handles.append(module.register_forward_hook(finish))


class EncoderBackbone:
    """An encoder as the tracer sees it: the sample is the normalised image, the level always 0.

    The network is used as it is, on its device and in its dtype. Families say how large its patches are, how it is
    called and what it does between projection and product.

    Attributes:
        LEAVES: names of the layers that query and key are heard from, (the query's, the key's); whichever a module has.
        OTHERS: names of a module's other layers, none of which comes between those and the product.
        POSITION: the argument in which a module is given its rotary embedding.
        COLOURS: mean and standard deviation of the pixels that the family was trained on.

    Args:
        network: the vision model alone.
        settings: how it is traced; `timestep` is 0.
        mean: of the pixels it was trained on, red, green, blue, in [0, 1]; None is the family's default.
        std: standard deviation likewise.

    Raises:
        ValueError: the network does not allow the size.
    """

    schedule: ClassVar[None] = None  # no noise levels
    LEAVES: ClassVar[tuple[tuple[str, str], ...]] = (("q_proj", "k_proj"), ("qkv", "qkv"))
    OTHERS: ClassVar = {"v_proj", "o_proj", "out_proj", "proj"}
    POSITION: ClassVar = "position_embeddings"
    COLOURS: ClassVar = IMAGENET

    def __init__(
        self,
        network: Any,
        settings: Settings,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        self.network, self.settings = network, settings
        self.mean, self.std = (
            torch.tensor(default if values is None else values, dtype=torch.float32).reshape(-1, 1, 1)  # (3, 1, 1)
            for values, default in zip((mean, std), self.COLOURS, strict=True)
        )
        self.grids(settings.size)  # refuse a size that the network does not allow

    @classmethod
    def from_model(
        cls,
        network: Any,
        *,
        size: tuple[int, int] | None = None,
        blocks: Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> EncoderBackbone:
        """A loaded network at a size, its own where None; `blocks` are read, `default_blocks` where None."""
        chosen = cls.default_blocks(network) if blocks is None else tuple(blocks)
        return cls(network, Settings(size=size or cls.native_size(network), timestep=0, blocks=chosen), mean, std)

    @staticmethod
    def default_blocks(network: Any) -> tuple[int, ...] | None:
        """Indices of the blocks that are averaged; None for all of them."""
        return None

    @staticmethod
    def config(network: Any) -> Any:
        """What the network says of its images."""
        return network.config

    @classmethod
    def native_size(cls, network: Any) -> tuple[int, int]:
        """Height and width in pixels that the model was made for."""
        return pair(cls.config(network).image_size)

    def attentions(self) -> list[nn.Module]:
        """The self-attention modules, in the order in which they run."""
        return [
            module
            for module in self.network.modules()
            if any(all(hasattr(module, name) for name in names) for names in self.LEAVES)
        ]

    def token(self) -> tuple[int, int]:
        """Height and width in pixels of what a token stands for: a patch."""
        return pair(self.config(self.network).patch_size)

    def step(self) -> tuple[int, int]:
        """Height and width must be multiples of these, in pixels: a token, or what the network merges of them."""
        return self.token()

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Tokens, the same in every block."""
        step, token = self.step(), self.token()
        if any(side < one or side % one for side, one in zip(size, step, strict=True)):
            raise ValueError(
                f"{type(self).__name__}: size must be positive multiples of {step[0]} x {step[1]} pixels, got {size}"
            )
        return [(size[0] // token[0], size[1] // token[1])] * len(self.attentions())

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to (image - mean) / std of the data that the model was trained on."""
        self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)  # moved once
        return (images - self.mean) / self.std

    def predict(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """One call of the network: features of every token; there are no levels, so `timestep` is ignored."""
        return self.call(sample.to(dtype_of(self.network)))

    def call(self, pixels: Tensor) -> Tensor:
        """The network's features of normalised images in its dtype."""
        return self.network(pixels)[0]

    def product(self, module: nn.Module, query: Tensor, key: Tensor, position: Any) -> tuple[Tensor, Tensor]:
        """Query and key of the product, (B, H, T, d), from what the leaves give, here projections (B, T, H * d).

        Where projections are fused, both are the same tensor. `position` is the module's rotary embedding or None.
        Several heads may share a key.
        """
        query, key = (x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for x in (query, key))
        return query, key

    def capture(
        self,
        modules: Sequence[nn.Module],
        sink: Callable[[int, Tensor, Tensor], None],
        tokens: Sequence[int] | None = None,
    ) -> Capture:
        """See `Backbone.capture`."""
        return EncoderCapture(self, modules, sink, tokens)


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a configuration's side or sides."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
