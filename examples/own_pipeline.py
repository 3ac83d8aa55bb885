"""Trace with a pipeline of diffusers, which stays as it is: `python examples/own_pipeline.py MODEL photo.jpg out/`.

MODEL is a repository of the hub or a folder, such as stable-diffusion-v1-5/stable-diffusion-v1-5. This needs the extras
diffusion and eval: pip install 'trace_fast[diffusion,eval]'.
"""

import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from trace_fast import Tracer
from trace_fast.io import write_png


def main(model: str, photo: str, folder: str) -> None:
    """Search the timesteps for t*, and write edges, and a figure of edges, ABDiv and the KL curve."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    pipe = DiffusionPipeline.from_pretrained(model)
    if torch.cuda.is_available():
        pipe.to("cuda", torch.bfloat16)
    tracer = Tracer.from_pipeline(pipe)
    output = tracer(photo, timestep="iep", return_abdiv=True)
    write_png(out / "edges.png", output.edges)
    output.plot().savefig(out / "trace.png")
    print(f"attention changes most at timestep {output.timestep.item()} of {output.timesteps.tolist()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
