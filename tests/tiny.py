"""Diffusers pipelines and their parts: real classes of tiny random configurations, built offline.

A function named after a family gives the parts by name, and what stands for the empty prompt where no text encoder is
built; `pipeline` puts them together with text encoders.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest.mock import MagicMock

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import save_file

from trace_fast.backbones import load_backbone
from trace_fast.backbones.mini import Mini, MiniConfig
from trace_fast.decoder import FORMAT, make_decoder
from trace_fast.detector import save_student

SIZE = (16, 24)  # pixels; latents are half of it in the tiny autoencoder
TEXT = 5  # tokens of the empty prompt


def diffusers_class(name):
    """Return a class of diffusers; skip the test in releases that do not have it yet."""
    if not hasattr(diffusers, name):
        pytest.skip(f"needs a release of diffusers with {name}")
    return getattr(diffusers, name)


def autoencoder(channels, **config):
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        **config,
    )


def sd15():
    unet = diffusers.UNet2DConditionModel(
        sample_size=12,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    empty_prompt = {"encoder_hidden_states": torch.randn(1, TEXT, 8)}
    return {"unet": unet, "vae": autoencoder(4), "scheduler": scheduler}, empty_prompt


def sdxl():
    unet = diffusers.UNet2DConditionModel(
        sample_size=12,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=24 + 8,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    return {"unet": unet, "vae": autoencoder(4), "scheduler": scheduler, "config": {}}, None


def pixart(sample_size=12):
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=3,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=24,
        caption_channels=8,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    mask = torch.tensor([[1, 0, 0, 0, 0]])
    empty_prompt = {"encoder_hidden_states": torch.randn(1, TEXT, 8), "encoder_attention_mask": mask}
    return {"transformer": transformer, "vae": autoencoder(4), "scheduler": scheduler}, empty_prompt


def sd35(dual=()):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=12,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=8,
        caption_projection_dim=24,
        pooled_projection_dim=8,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=dual,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = autoencoder(16, shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False)
    empty_prompt = {"encoder_hidden_states": torch.randn(1, TEXT, 8), "pooled_projections": torch.randn(1, 8)}
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler}, empty_prompt


def flux(guidance=True):
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    vae = autoencoder(16, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    empty_prompt = {"encoder_hidden_states": torch.randn(1, TEXT, 8), "pooled_projections": torch.randn(1, 8)}
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler}, empty_prompt


def clip_tokenizer(folder):
    folder.mkdir(parents=True)
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77, pad_token="<|endoftext|>"
    )


def clip(kind=transformers.CLIPTextModel, width=8):
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=4,
            hidden_size=width,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=width,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).eval()


def t5_tokenizer():
    from tokenizers import Tokenizer, models, processors

    inner = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0)], unk_id=2))
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.T5TokenizerFast(tokenizer_object=inner, model_max_length=512)


def t5():
    config = transformers.T5Config(vocab_size=4, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config).eval()


def sd15_pipeline(folder):
    return diffusers.StableDiffusionPipeline(
        **sd15()[0],
        text_encoder=clip(),
        tokenizer=clip_tokenizer(folder / "clip"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(folder):
    parts, _ = sdxl()
    del parts["config"]
    return diffusers.StableDiffusionXLPipeline(
        **parts,
        text_encoder=clip(width=4),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection, 4),
        tokenizer=clip_tokenizer(folder / "clip"),
        tokenizer_2=clip_tokenizer(folder / "clip2"),
    )


def pixart_pipeline(_, sample_size=12):
    return diffusers.PixArtAlphaPipeline(**pixart(sample_size)[0], text_encoder=t5(), tokenizer=t5_tokenizer())


def sd35_pipeline(folder):
    return diffusers.StableDiffusion3Pipeline(
        **sd35()[0],
        text_encoder=clip(transformers.CLIPTextModelWithProjection, 4),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection, 4),
        text_encoder_3=t5(),
        tokenizer=clip_tokenizer(folder / "clip"),
        tokenizer_2=clip_tokenizer(folder / "clip2"),
        tokenizer_3=t5_tokenizer(),
    )


def flux_pipeline(folder):
    return diffusers.FluxPipeline(
        **flux()[0],
        text_encoder=clip(),
        text_encoder_2=t5(),
        tokenizer=clip_tokenizer(folder / "clip"),
        tokenizer_2=t5_tokenizer(),
    )


def chat_tokenizer():
    """Make a tokenizer whose every word is unknown, with a template of conversations."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template="{% for message in messages %} {{ message.role }} : {{ message.content }} {% endfor %} reply :",
    )


def flux2():
    transformer = diffusers_class("Flux2Transformer2DModel")(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
    )
    vae = diffusers_class("AutoencoderKLFlux2")(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    vae.bn.running_mean.copy_(torch.randn(16))
    vae.bn.running_var.copy_(torch.rand(16) + 0.5)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler}, {
        "encoder_hidden_states": torch.randn(1, TEXT, 24)
    }


def flux2_pipeline(_):
    kind = diffusers_class("Flux2Pipeline")
    text = language(vocab_size=16, num_hidden_layers=30, head_dim=4)  # the outputs of layers 10, 20 and 30
    encoder = transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(
            text_config=transformers.MistralConfig(**text),
            vision_config=transformers.PixtralVisionConfig(
                hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
            ),
        )
    )
    return kind(**flux2()[0], text_encoder=encoder.eval(), tokenizer=chat_tokenizer())


def qwen_image():
    transformer = diffusers_class("QwenImageTransformer2DModel")(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    vae = diffusers_class("AutoencoderKLQwenImage")(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.4],
        latents_std=[1.0, 2.0, 0.5, 4.0],
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler}, {
        "encoder_hidden_states": torch.randn(1, TEXT, 8)
    }


def qwen_image_pipeline(_):
    kind = diffusers_class("QwenImagePipeline")
    encoder = qwen(sections=(1, 0, 1), vocab_size=16).eval()
    return kind(**qwen_image()[0], text_encoder=encoder, tokenizer=chat_tokenizer())


def z_image():
    transformer = diffusers_class("ZImageTransformer2DModel")(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 4, 8],
        axes_lens=[128, 24, 32],
    )
    for parameter in transformer.parameters():  # diffusers leaves the tokens of padding uninitialized
        parameter.data.nan_to_num_(0.5)
    vae = autoencoder(4, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler}, {"cap_feats": torch.randn(1, TEXT, 8)}


def z_image_pipeline(_):
    kind = diffusers_class("ZImagePipeline")
    config = transformers.Qwen3Config(**language(vocab_size=16, num_hidden_layers=2, head_dim=4))
    encoder = transformers.Qwen3Model(config).eval()
    return kind(**z_image()[0], text_encoder=encoder, tokenizer=chat_tokenizer())


def first(count):
    return slice(0, count)


def last(count):
    return slice(-count, None)


@dataclass(frozen=True)
class Family:
    """Facts about a family that tests use.

    Attributes:
        parts: makes the parts by name, and what stands for the empty prompt.
        blocks: how many self-attentions are read.
        step: pixels of which a side must be a multiple.
        pipeline: makes the whole pipeline, with text encoders, in a folder for files.
        image: where the image's tokens stand among those that attention receives, by their count.
        others: how many other tokens attention may receive.
        ignored: positions of attention of text alone among the calls that have as many queries as keys.
        sample: the latent, from what the network receives and the grid of tokens.
        flow: whether it is a rectified flow, else variance preserving.
        call: what its pipeline needs beside size, prompt and steps.
        prompt: how many tokens its pipeline's empty prompt has.
    """

    parts: Callable[[], tuple[dict, dict | None]]
    blocks: int
    step: int = 4
    pipeline: Callable | None = None
    image: Callable[[int], slice] = first
    others: tuple[int, ...] = (0,)
    ignored: tuple[int, ...] = ()
    sample: Callable[[dict, tuple[int, int]], torch.Tensor] = lambda arguments, _: arguments["sample"]
    flow: bool = True
    call: dict = field(default_factory=dict)
    prompt: int = 77

    def calls(self, oracle):
        """Return query and key of the calls of attention that are read, in order."""
        alike = [(query, key) for query, key in oracle.calls if query.shape == key.shape]
        return [call for index, call in enumerate(alike) if index not in self.ignored]


def packed(arguments, grid):
    """Return the latent of which a network receives patches of 2 x 2 in a row."""
    patches = arguments["hidden_states"].unflatten(1, grid).unflatten(3, (-1, 2, 2))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


FAMILIES = {
    "sd15": Family(sd15, 7, 2, sd15_pipeline, flow=False),
    "sdxl": Family(sdxl, 18, 2, sdxl_pipeline, flow=False),
    "pixart": Family(
        pixart,
        3,
        pipeline=pixart_pipeline,
        sample=lambda arguments, _: arguments["hidden_states"],
        flow=False,
        call={"use_resolution_binning": False},
        prompt=120,
    ),
    "pixart-1024": Family(
        lambda: pixart(128),
        3,
        pipeline=lambda folder: pixart_pipeline(folder, 128),
        sample=lambda arguments, _: arguments["hidden_states"],
        flow=False,
        call={"use_resolution_binning": False},
        prompt=120,
    ),
    "sd3.5-large": Family(
        sd35,
        3,
        pipeline=sd35_pipeline,
        others=(TEXT,),
        sample=lambda arguments, _: arguments["hidden_states"],
        prompt=77 + 256,
    ),
    "sd3.5-medium": Family(lambda: sd35((0, 1)), 5, others=(0, TEXT)),
    "flux.1-dev": Family(flux, 4, pipeline=flux_pipeline, image=last, others=(TEXT,), sample=packed, prompt=512),
    "flux.1-schnell": Family(lambda: flux(False), 4, image=last, others=(TEXT,)),
    "flux.2": Family(
        flux2,
        3,
        pipeline=flux2_pipeline,
        image=last,
        others=(TEXT,),
        sample=lambda arguments, grid: arguments["hidden_states"].mT.unflatten(2, grid),
        prompt=512,
    ),
    "qwen-image": Family(
        qwen_image,
        3,
        pipeline=qwen_image_pipeline,
        image=last,
        others=(TEXT,),
        sample=packed,
        call={"true_cfg_scale": 1},
        prompt=9,  # what the template has behind its first 34
    ),
    "z-image": Family(
        z_image,
        3,
        pipeline=z_image_pipeline,
        others=tuple(range(64)),
        ignored=(1,),
        sample=lambda arguments, _: torch.stack([x for name, x in arguments.items() if name.startswith("x.")])[:, :, 0],
        call={"guidance_scale": 0.0},
        prompt=4,
    ),
}
PIPELINES = tuple(name for name, family in FAMILIES.items() if family.pipeline is not None)


def pipeline(family, folder):
    """Make a whole tiny pipeline, with text encoders."""
    torch.manual_seed(0)
    return FAMILIES[family].pipeline(folder)


def embedded(folder):
    """Write the folder of a network of ours with random weights: 32 x 48 pixels, 8 x 12 tokens, two blocks."""
    torch.manual_seed(0)
    network = Mini(MiniConfig(dim=16, depth=2, heads=2))
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    config = {"family": "mini", "architecture": network.config.to_dict(), "tracing": {"size": [32, 48], "timestep": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def student(folder, base, size, decoder="conv", timestep=0, **options):
    """Write the folder of a student with random adapters and decoder."""
    backbone = load_backbone(base, device=torch.device("cpu"), size=size)
    random = torch.Generator().manual_seed(5)
    names = {module: name for name, module in backbone.network.named_modules()}
    adapter = {}
    for name in (f"{names[module]}.{part}" for module in backbone.attentions() for part in ("to_q", "to_k", "to_v")):
        rows, columns = backbone.network.get_submodule(name).weight.shape
        adapter[f"{name}.lora_A.weight"] = torch.randn(2, columns, generator=random) / 4
        adapter[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=random) / 4
    torch.manual_seed(6)
    network_decoder = make_decoder(decoder, backbone.finest_grid(), **options)
    config = {
        "format": FORMAT,
        "base": {"model": str(base)},
        "size": list(size),
        "timestep": timestep,
        "decoder": network_decoder.options(),
        "scale": 0.5,
    }
    save_student(folder, config, network_decoder, adapter, getattr(backbone, "empty_prompt", None))
    return folder


def dinov2(registers=0):
    import transformers

    names = ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig") if registers else ("Dinov2Model", "Dinov2Config")
    kind, config = (getattr(transformers, name) for name in names)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 20, "patch_size": 4}
    return kind(config(**sizes, **{"num_register_tokens": registers} if registers else {}))


def dinov3():
    import transformers

    return transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=20,
            patch_size=4,
            num_register_tokens=4,
        )
    )


def language(**config):
    """Return the configuration of a tiny language model."""
    return {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }


def llava(**text):
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=20,
        patch_size=4,
        projection_dim=8,
    )
    text = transformers.LlamaConfig(**language(**text))
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=7)
    return transformers.LlavaForConditionalGeneration(config)


def qwen(patch_size=4, sections=(1, 0, 1), **text):
    """`sections` are the pairs of channels that turn with time, row and column, half of a head in all."""
    import transformers

    text = language(**text)
    vision = {
        "depth": 5,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "patch_size": patch_size,
        "window_size": 4 * patch_size,  # two units of two patches
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [1, 3],
    }
    rope = {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 10_000.0}
    text["rope_parameters" if int(transformers.__version__.split(".")[0]) >= 5 else "rope_scaling"] = rope
    marks = {"vision_end_token_id": 3, "vision_start_token_id": 4, "image_token_id": 5, "video_token_id": 6}
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **marks)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def timm():
    """timm, which imports torchvision, though its models need none of it: a stand-in serves where that is not there.

    The registry's torchvision is built for CUDA, and cannot be imported beside torch for the CPU.
    """
    parts = ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional")
    names = [f"torchvision{part}" for part in parts]
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        sys.modules.update({name: MagicMock() for name in names})
    try:
        import timm
    finally:
        for name in names:
            if isinstance(sys.modules.get(name), MagicMock):
                del sys.modules[name]
    return timm


def eva(architecture="eva02_large_patch14_448", **options):
    """EVA02-L by default: rotary positions, projections apart. EVA02-E has fused projections and learned positions."""
    sizes = {"img_size": 20, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 4}
    return timm().create_model(architecture, **{**sizes, "dynamic_img_size": True, **options})


def sam():
    """Make a SAM of 32 pixels, and its processor, of the classes that need no torchvision."""
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    sizes = {"hidden_size": 8, "image_size": 32, "patch_size": 8}
    config = transformers.SamConfig(
        vision_config=transformers.SamVisionConfig(
            **sizes,
            output_channels=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            window_size=2,
            global_attn_indexes=[0],
            num_pos_feats=4,
            mlp_dim=8,
        ),
        prompt_encoder_config=transformers.SamPromptEncoderConfig(**sizes, mask_input_channels=4),
        mask_decoder_config=transformers.SamMaskDecoderConfig(
            hidden_size=8,
            mlp_dim=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            iou_head_depth=2,
            iou_head_hidden_dim=8,
        ),
    )
    processor = SamImageProcessorPil(
        size={"longest_edge": 32},
        pad_size={"height": 32, "width": 32},
        mask_size={"longest_edge": 8},
        mask_pad_size={"height": 8, "width": 8},
    )
    return transformers.SamModel(config).eval(), transformers.SamProcessor(processor)


def sam2():
    """Make a SAM 2 of 64 pixels."""
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 1, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[4, 4, 4, 4],
        global_attention_blocks=[],
        window_positional_embedding_background_size=[4, 4],
    )
    config = transformers.Sam2Config(
        vision_config=transformers.Sam2VisionConfig(
            backbone_config=backbone,
            backbone_channel_list=[64, 32, 16, 8],
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
            fpn_hidden_size=32,
        ),
        prompt_encoder_config=transformers.Sam2PromptEncoderConfig(
            hidden_size=32, image_size=64, mask_input_channels=4
        ),
        mask_decoder_config=transformers.Sam2MaskDecoderConfig(
            hidden_size=32,
            mlp_dim=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            iou_head_depth=2,
            iou_head_hidden_dim=8,
        ),
    )
    return transformers.Sam2Model(config).eval()
