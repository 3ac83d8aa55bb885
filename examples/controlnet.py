"""Draw a new picture with the instance edges of a photo: `python examples/controlnet.py photo.jpg "a prompt" out.png`.

The ControlNet is one for soft edges, which was trained on edges of another kind; it takes instance edges, too.
"""

import sys

from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

from trace_fast import ControlNetAnnotator

CONTROLNET = "lllyasviel/control_v11p_sd15_softedge"
MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def main(photo: str, prompt: str, out: str, resolution: int = 512, steps: int = 20) -> None:
    """Make the picture of edges that the pipeline is controlled by, and run the pipeline."""
    with Image.open(photo) as picture:
        control = ControlNetAnnotator("mini")(picture, detect_resolution=512, image_resolution=resolution)
    controlnet = ControlNetModel.from_pretrained(CONTROLNET)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(MODEL, controlnet=controlnet)  # .to("cuda")
    pipe(prompt, image=control, num_inference_steps=steps).images[0].save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
