"""Peak memory of one search on every full-size backbone, without weights and without a GPU.

`python scripts/memory.py` writes benchmarks/results/memory.json. Networks of the published configurations are built
on the meta device in bfloat16 and searched there, with the code that runs on a GPU; every tensor is counted from the
operation that allocates it to its end. Attention is fused, as on a GPU: its result alone is counted. The rounding of an
allocator and the workspaces of kernels are not in it.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from trace_fast import Tracer
from trace_fast.backbones import wrap_pipeline
from trace_fast.backbones.registry import PIPELINE_FAMILIES, find_family
from trace_fast.io.files import write_atomically
from trace_fast.ops import dispatch

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "memory.json"
TIMESTEPS = (0, 99, 199)  # the peak is the same at every step

SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
FLOW_VAE = {**SD_VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "cross_attention_dim": 2048,
}
PIXART = {
    "num_layers": 28,
    "patch_size": 2,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "out_channels": 8,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
}
SD35 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}
FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
SCHEDULER = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
TEXT = {"encoder_hidden_states": (1, 333, 4096), "pooled_projections": (1, 2048)}

# class, configuration, autoencoder's configuration, empty prompt, pixels; an empty configuration is the published one
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, tuple[int, ...]], int]] = {
    "SD1.5 @512": (
        "UNet2DConditionModel",
        {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
        SD_VAE,
        {"encoder_hidden_states": (1, 77, 768)},
        512,
    ),
    "SDXL @1024": (
        "UNet2DConditionModel",
        SDXL,
        SD_VAE,
        {"encoder_hidden_states": (1, 77, 2048), "text_embeds": (1, 1280)},
        1024,
    ),
    "PixArt @1024": (
        "PixArtTransformer2DModel",
        {**PIXART, "sample_size": 128},
        SD_VAE,
        {"encoder_hidden_states": (1, 120, 4096), "encoder_attention_mask": (1, 120)},
        1024,
    ),
    "SD3.5-M @1024": ("SD3Transformer2DModel", {**SD35, **MEDIUM}, FLOW_VAE, TEXT, 1024),
    "SD3.5-L @1024": ("SD3Transformer2DModel", {**SD35, **LARGE}, FLOW_VAE, TEXT, 1024),
    "FLUX.1 @1024": (
        "FluxTransformer2DModel",
        FLUX,
        FLOW_VAE,
        {"encoder_hidden_states": (1, 512, 4096), "pooled_projections": (1, 768)},
        1024,
    ),
    "FLUX.2 @1024": ("Flux2Transformer2DModel", {}, {}, {"encoder_hidden_states": (1, 512, 15360)}, 1024),
    "Qwen-Image @1024": ("QwenImageTransformer2DModel", {}, {}, {"encoder_hidden_states": (1, 5, 3584)}, 1024),
    "Z-Image @1024": ("ZImageTransformer2DModel", {}, FLOW_VAE, {"cap_feats": (1, 13, 2560)}, 1024),
}


def make_autoencoder(network: str, config: dict[str, Any]) -> Any:
    """Return the autoencoder of a class of network, initialized at random."""
    name, *_ = find_family(network, PIPELINE_FAMILIES).AUTOENCODERS
    return getattr(diffusers, name)(**config)


def make_tracer(name: str, device: str, dtype: torch.dtype) -> Tracer:
    """Return a network of `MODELS` with random weights."""
    kind, config, autoencoder, empty_prompt, side = MODELS[name]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network = getattr(diffusers, kind)(**config).eval().requires_grad_(False)
            vae = make_autoencoder(kind, autoencoder).eval().requires_grad_(False)
            text = {key: (torch.ones if "mask" in key else torch.randn)(shape) for key, shape in empty_prompt.items()}
    finally:
        torch.set_default_dtype(torch.float32)
    part = "unet" if kind.startswith("UNet") else "transformer"
    pipe = SimpleNamespace(**{part: network}, vae=vae, scheduler=SimpleNamespace(config=SCHEDULER))
    return Tracer(wrap_pipeline(pipe, text, (side, side)), name=name)


class Peak(TorchDispatchMode):
    """A count of the bytes of the storages that operations allocate, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        inputs = {tensor.untyped_storage()._cdata for tensor in leaves}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in inputs | self.known:
                self.begin(leaf.untyped_storage())
        return result

    def begin(self, storage: torch.UntypedStorage) -> None:
        """Add a storage."""
        self.known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.end, storage._cdata, storage.nbytes())

    def end(self, key: int, size: int) -> None:
        """Subtract a storage."""
        self.known.discard(key)
        self.live -= size


def measure(name: str) -> dict[str, Any]:
    """Return the bytes of the weights, and the peaks beside them: encoding, the network alone, the whole search."""
    kind, config, autoencoder, empty_prompt, side = MODELS[name]
    with torch.device("meta"):
        network = getattr(diffusers, kind)(**config).to(torch.bfloat16).eval().requires_grad_(False)
        vae = make_autoencoder(kind, autoencoder).to(torch.bfloat16).eval().requires_grad_(False)
        text = {key: torch.zeros(shape) for key, shape in empty_prompt.items()}
        images = torch.zeros(1, 3, side, side)
    part = "unet" if kind.startswith("UNet") else "transformer"
    pipe = SimpleNamespace(**{part: network}, vae=vae, scheduler=SimpleNamespace(config=SCHEDULER))
    tracer = Tracer(wrap_pipeline(pipe, text))
    backbone = tracer.backbone
    timestep = torch.zeros(1, dtype=torch.int64, device="meta")

    def peak(call: Callable[[], Any]) -> int:
        call()  # constants are kept from the first call on
        with Peak() as counted:
            call()
        return counted.peak

    with torch.no_grad():
        latent = backbone.encode(images)
        grid = max(backbone.grids(backbone.settings.size))
        return {
            "model": name,
            "grid": list(grid),
            "parameters": sum(p.numel() for p in network.parameters()),
            "weights": sum(p.nbytes for module in (network, vae) for p in module.parameters()),
            "maps": 2 * 4 * math.prod(grid) ** 2,
            "encode": peak(lambda: backbone.encode(images)),
            "forward": peak(lambda: backbone.predict(latent, timestep)),
            "search": peak(lambda: tracer.scan(images, timesteps=TIMESTEPS, noising="inversion")),
            "every_head": sum(
                2 * module.heads * math.prod(size) ** 2
                for module, size in zip(backbone.attentions(), backbone.grids(backbone.settings.size), strict=True)
            ),
        }


def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Allocate what fused attention does, which never holds its map."""
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def main() -> None:
    """Write the table."""
    dispatch.choose = lambda op, device: "triton"  # whose kernels allocate results alone, as the meta device does
    functional.scaled_dot_product_attention = fused
    diffusers.utils.logging.set_verbosity_error()
    rows = [measure(name) for name in tqdm(MODELS, unit="model", disable=None)]
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    versions = f'"torch": "{torch.__version__}", "diffusers": "{diffusers.__version__}"'
    with write_atomically(RESULTS, "memory") as file:
        file.write(f'{{{versions}, "models": [\n  {lines}\n]}}\n'.encode())


if __name__ == "__main__":
    main()
