"""The command `trace-fast segment`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trace_fast.cli.common import (
    FAILURES,
    Device,
    Inputs,
    OutputFolder,
    describe,
    list_images,
    open_folder,
    plan_results,
    refuse,
    refuse_failures,
    write_results,
)

__all__ = ["run_segment"]


def run_segment(
    inputs: Inputs,
    output: OutputFolder,
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Label map (PNG) of the masks of the one image, to split and complete. Without it, masks are found "
            "by edges alone.",
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Model of the edges, as in `trace-fast edges`.")] = "mini",
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Strength from which an edge separates masks. The default is the model's own or, to fit the masks of "
            "--masks, 0.15.",
        ),
    ] = None,
    mode: Annotated[
        Literal["fit", "flood", "walk"], typer.Option(help="The way in which the masks of --masks are refined.")
    ] = "fit",
    device: Device = None,
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write the masks drawn over the image.")] = False,
) -> None:
    """Write the masks of each image as DIR/NAME.png, a label map of 16 bits: 0 is background, each mask has a number.

    They are the regions that edges enclose or, with --masks, the masks of that file split and completed by the edges.
    With --overlay it also writes DIR/NAME_overlay.png. Files of an earlier run are replaced.
    """
    images = list_images(inputs)
    results = plan_results(images, output, ["", *["_overlay"] * overlay])
    if threshold == 0:
        refuse("--threshold must be above 0, got 0")
    if masks is not None and len(images) != 1:
        refuse(f"--masks must be of one image, got {len(images)}")

    import numpy as np
    from PIL import Image

    import trace_fast
    from trace_fast.io import visualize
    from trace_fast.io.images import read_image
    from trace_fast.masks.formats import open_masks, paint_labels

    given_labels = None if masks is None else _read_labels(masks)
    with refuse_failures():
        loaded = trace_fast.load(model, device=device)
    open_folder(output)
    barrier = loaded.region_threshold if threshold is None else threshold

    def write(image: Path, paths: dict[str, Path]) -> None:
        photo = read_image(image)
        edges = loaded.edges(photo)
        if given_labels is None:
            stack, _ = trace_fast.instances(edges, threshold=barrier)
            labels = paint_labels(stack, range(1, len(stack) + 1)).cpu().numpy()
        else:
            # masks that are fitted speak for weaker edges
            strength = threshold if mode == "fit" else barrier
            labels = trace_fast.propagate(given_labels, edges.cpu(), threshold=strength, mode=mode)
        if labels.max(initial=0) > 65535:
            raise ValueError(f"segment: masks must be at most 65535 for a map of 16 bits, got label {labels.max()}")
        visualize.write_picture(paths[""], Image.fromarray(labels.astype(np.uint16)))
        if overlay:
            visualize.write_picture(paths["_overlay"], visualize.draw_masks(photo[0], open_masks(labels)[0].masks))

    write_results(results, output, write)


def _read_labels(path: Path) -> Any:
    """Read a label map, (H, W) int32, from a lossless picture of integers."""
    import numpy as np

    from trace_fast.io.pictures import read_picture

    try:
        with read_picture("segment: masks", path) as picture:
            kind, mode = picture.format, picture.mode
            labels = np.asarray(picture)
    except FAILURES as error:
        refuse(f"--masks must be a readable picture, got '{path}': {describe(error)}")
    if kind == "JPEG" or mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        refuse(f"--masks must be a lossless picture of one channel of integers, got '{path}': {kind} of mode {mode}")
    return labels.astype(np.int32)
