"""Find the edges and regions of a photograph: `python examples/quick_start.py photo.jpg out/`.

This needs the core alone: torch, numpy, Pillow, safetensors and tqdm.
"""

import sys
from pathlib import Path

import trace_fast
from trace_fast.io import write_png


def main(photo: str, folder: str) -> None:
    """Write the edges, and a picture of the photograph beside its edges and regions."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    model = trace_fast.load("mini")
    edges = model(photo)  # (H, W) float32 in [0, 1], at the photograph's own size
    regions, scores = trace_fast.instances(edges, k=20)  # masks (M, H, W) from the edges alone, the best first
    write_png(out / "edges.png", edges)
    trace_fast.show(photo, edges, regions).save(out / "result.png")
    print(f"{len(regions)} regions, the best with a score of {scores[0]:.2f}; see {out / 'result.png'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
