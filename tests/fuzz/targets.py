"""The targets: each makes an input from random numbers, gives it to the package, and checks the result."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inputs import check_answer, check_shard, damage_manifest, make_input
from PIL import Image
from pycocotools import mask as mask_api
from safetensors.torch import load_file, save_file
from server import RefusedError, Target, UnclearError, WrongError, refusals
from typer.testing import CliRunner
from values import NUMBERS, choose, distort_array, distort_bytes, distort_tensor, distort_tree, dump_json, hostile

import trace_fast
import trace_fast.evaluation
import trace_fast.training.distillation
import trace_fast.training.mini
from trace_fast import ops, reference
from trace_fast.cli import app
from trace_fast.io.images import read_image
from trace_fast.jobs.manifest import MANIFEST
from trace_fast.masks import coco
from trace_fast.masks.formats import open_masks

__all__ = ["TARGETS"]

EMBEDDED = Path(trace_fast.__file__).parent / "weights" / "mini"
SIZES = ((16, 16), (16, 40), (33, 17), (48, 64))


def require(condition: Any, what: str) -> None:
    """Raise WrongError unless a condition holds of a result."""
    if not bool(condition):
        raise WrongError(what)


def pick_size(random: np.random.Generator, level: int) -> tuple[int, int]:
    """Return a height and a width, small at low levels."""
    return choose(random, SIZES[: 1 + level])


# --- arrays and tensors as images


def images(random: np.random.Generator, level: int, folder: Path) -> None:
    """Read an array or a tensor of any dtype, layout and range."""
    height, width = pick_size(random, level)
    channels = choose(random, (None, 1, 3, 3, 4, 2, 5))
    dtype = choose(random, ("uint8", "uint16", "float16", "float32", "float64", "int8", "int32", "int64", "bool", "c8"))
    shape = (height, width) if channels is None else (height, width, channels)
    values = random.random(shape)
    exact = dtype in ("uint8", "uint16", "float32", "float64") and channels in (None, 1, 3)
    scale = {"uint8": 255, "uint16": 65535}.get(dtype, 1)
    array = np.round(values * scale).astype(dtype) if scale > 1 else values.astype(dtype)
    expected = array.astype(np.float64) / scale
    if level > 1 and array.dtype.kind == "f" and random.random() < 0.3:
        array.flat[int(random.integers(array.size))] = choose(random, [x for x in NUMBERS if isinstance(x, float)])
        exact = False
    if random.random() < 0.5:
        image: Any = distort_array(random, array)
    else:
        if array.dtype == np.uint16 and random.random() < 0.5:
            array = array.astype(np.int32)
            exact = False
        image = torch.from_numpy(array if array.ndim == 2 else array.transpose(2, 0, 1).copy())
        if random.random() < 0.6:
            image, exact = distort_tensor(random, image), False
    with refusals("edges: image"):
        pixels = read_image(image)
    if pixels.device.type == "meta":
        raise WrongError("a tensor without values is accepted")
    require(pixels.dtype == torch.float32 and pixels.ndim == 4 and pixels.shape[1] == 3, "kind of the result")
    require(pixels.isfinite().all() and pixels.min() >= 0 and pixels.max() <= 1, "range of the result")
    if exact:
        plane = torch.from_numpy(expected.reshape(height, width, -1)).permute(2, 0, 1).expand(3, -1, -1)
        require(pixels.shape[2:] == (height, width), "size of the result")
        require((pixels[0] - plane).abs().max() < 1e-4, "values of the result")


# --- ops against the reference


def floats(random: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(random.random(shape)).float()


def flags(random: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(random.random(shape) < random.random())


def maps(random: np.random.Generator, batch: int, tokens: int) -> torch.Tensor:
    logits = torch.from_numpy(random.standard_normal((batch, tokens, tokens)))
    return (choose(random, (1, 20)) * logits).softmax(-1).float()


def draw_op(random: np.random.Generator, level: int) -> tuple[str, dict[str, Any]]:
    """Return the name of an op and valid arguments."""
    b, h, w = (int(random.integers(1, 4 + 6 * level)) for _ in range(3))
    b = min(b, 3)
    n = h * w
    name = choose(random, ops.__all__)
    if name in ("attention_map", "accumulate_attention", "attend", "readout"):
        heads, d = int(random.integers(1, 4)), int(random.integers(1, 40))
        n = min(n, 120)
        query, key = (torch.from_numpy(random.standard_normal((b, heads, n, d))).float() for _ in range(2))
        arguments = {"query": query, "key": key}
        if name == "accumulate_attention":
            arguments = {"total": floats(random, b, n, n), **arguments, "weight": float(random.random())}
        if name == "attend":
            arguments["value"] = torch.from_numpy(random.standard_normal((b, heads, n, d))).float()
            arguments["total"] = choose(random, (None, floats(random, b, n, n)))
        if name == "readout":
            arguments["values"] = floats(random, n, int(random.integers(1, 65)))
        return name, {**arguments, "scale": choose(random, (None, 0.5, 2.0))}
    if name in ("resize_attention", "accumulate_resized"):
        h, w = min(h, 6), min(w, 7)
        target = h + int(random.integers(4)), w + int(random.integers(4))
        arguments = {"attention": maps(random, b, h * w), "size": (h, w), "target": target}
        if name == "accumulate_resized":
            total = floats(random, b, target[0] * target[1], target[0] * target[1])
            arguments = {"total": total, **arguments, "weight": float(random.random())}
        return name, arguments
    if name in ("step_kl", "abdiv", "step_kl_abdiv"):
        h, w = min(h, 9), min(w, 12)
        pair = {"previous": maps(random, b, h * w), "current": maps(random, b, h * w)}
        grid = {"height": h, "width": w}
        return name, pair if name == "step_kl" else {**pair, **grid} if name != "abdiv" else {
            "attention": pair["current"],
            **grid,
        }
    mask, edges = flags(random, b, h, w), floats(random, b, h, w)
    if random.random() < 0.3:
        edges = (4 * edges).round() / 4
    seeds = torch.from_numpy(random.integers(0, 2**31 - 1, (b, h, w)) * (random.random((b, h, w)) < 0.1)).int()
    count = int(random.integers(0, 4))
    arguments = {
        "label_regions": lambda: {"barrier": mask, "connectivity": choose(random, (4, 8))},
        "flood_fill": lambda: {
            "seeds": seeds,
            "barrier": mask,
            "connectivity": choose(random, (4, 8)),
            "claim_barrier": choose(random, (False, True)),
        },
        "watershed": lambda: {"edges": edges},
        "merge_tree": lambda: {
            "labels": reference.watershed(edges)[0][0],
            "edges": edges[0],
        },
        "random_walk": lambda: {
            "masks": floats(random, count, h, w),
            "edges": edges[0],
            "radius": int(random.integers(1, 6)),
            "beta": float(random.random() * 10),
            "steps": int(random.integers(0, 5)),
        },
        "merge_masks": lambda: {
            "masks": flags(random, count, h, w),
            "iou": float(random.random()),
            "scores": choose(random, (None, floats(random, count))),
        },
        "suppress_nonmaxima": lambda: {"edges": edges, "method": choose(random, ("bsds", "hessian"))},
        "thin": lambda: {"mask": mask},
        "match_contours": lambda: {
            "detected": mask,
            "truth": flags(random, b, h, w),
            "distance": float(choose(random, (0, 1, 1.5, 3, 1e4, 1e19))),
        },
        "count_matches": lambda: {
            "edges": edges[0],
            "truths": flags(random, b, h, w),
            "thresholds": torch.tensor([0.25, 0.5]),
            "distance": float(choose(random, (0, 1.5, 1e9))),
            "thinning": choose(random, (False, True)),
        },
    }
    return name, arguments[name]()


# ops whose results are compared in numbers: which pixels are matched is not unique, and ridges depend on rounding
COUNTED = ("match_contours",)
LOOSE = ("suppress_nonmaxima",)
UNIQUE = [0, 1, 5]  # columns of count_matches


def copy_arguments(arguments: dict[str, Any], double: bool = False) -> dict[str, Any]:
    """Return arguments that share no memory with these, perhaps in float64."""

    def take(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().clone()
        return value.double() if double and value.is_floating_point() else value

    return {name: take(value) for name, value in arguments.items()}


def compare_op(name: str, out: Any, expected: Any) -> None:
    """Compare a result with that of the reference in float64."""
    outs, wanted = ((value,) if isinstance(value, torch.Tensor) else value for value in (out, expected))
    for one, other in zip(outs, wanted, strict=True):
        if one is None or other is None:
            require(one is other, f"{name}: a missing result")
            continue
        if one.numel() == 0 and other.numel() == 0:
            continue
        require(one.shape == other.shape, f"{name}: shape {tuple(one.shape)}, expected {tuple(other.shape)}")
        if name == "count_matches" and one.ndim == 2 and one.shape[1] == 6:
            # the partners of several annotators are not unique, and neither is how many pixels have one
            one, other = one[:, UNIQUE], other[:, UNIQUE]
        if name in COUNTED:
            require(one.sum() == other.sum(), f"{name}: {int(one.sum())} pixels, expected {int(other.sum())}")
        elif not one.is_floating_point():
            require(torch.equal(one.long(), other.long()), f"{name}: integers differ")
        elif name not in LOOSE:
            error = (one.double() - other.double()).abs()
            allowed = 1e-3 * (1 + other.double().abs())
            require(one.isfinite().all() and (error <= allowed).all(), f"{name}: error {float(error.max()):.3g}")


def native_ops(random: np.random.Generator, level: int, folder: Path) -> None:
    """Call an op with valid arguments, or with one that is distorted."""
    name, arguments = draw_op(random, level)
    valid = random.random() < 0.4
    if not valid:
        argument = choose(random, arguments)
        value = arguments[argument]
        is_tensor = isinstance(value, torch.Tensor) and random.random() < 0.8
        arguments[argument] = distort_tensor(random, value) if is_tensor else hostile(random, objects=True)
        if argument == "steps" and isinstance(arguments["steps"], int):
            arguments["steps"] = min(arguments["steps"], 1000)  # it walks as many as are asked for, if for days
    exact = {key: value for key, value in arguments.items() if not (key == "scale" and value is None)}
    plain = all(type(value) is torch.Tensor for value in exact.values() if isinstance(value, torch.Tensor))
    plain = plain and all(value.numel() < 2**30 for value in exact.values() if isinstance(value, torch.Tensor))
    finite = all(not isinstance(value, float) or np.isfinite(value) for value in exact.values())
    # the reference would walk through a radius that an op limits, and through all steps without a mask
    walk = exact.get("radius"), exact.get("steps")
    finite = finite and not any(isinstance(value, int) and value > 100 for value in walk)
    copies = copy_arguments(exact, double=True) if plain else {}
    with refusals(rf"^{name}: \w"):
        out = getattr(ops, name)(**arguments)
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    if any(value.device.type == "meta" for value in tensors):
        return
    if out is None:
        out = arguments["total"]
    if not (plain and finite):
        return
    # the reference checks nothing: what it cannot compute is compared with nothing
    try:
        expected = getattr(reference, name)(**copies)
    except Exception:
        require(not valid, f"{name}: the reference fails")
        return
    compare_op(name, out, copies["total"] if expected is None else expected)


# --- picture files

MODES = {
    "PNG": ("L", "RGB", "RGBA", "P", "1", "LA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("L", "P"),
    "BMP": ("L", "RGB", "P", "1"),
    "TIFF": ("L", "RGB", "RGBA", "I;16", "F", "CMYK", "1"),
    "WEBP": ("RGB", "RGBA"),
    "PPM": ("L", "RGB", "1"),
    "JPEG2000": ("L", "RGB"),
    "AVIF": ("RGB",),
    "EPS": ("L", "RGB"),
    "PDF": ("L",),
    "ICO": ("RGB",),
    "TGA": ("RGB",),
}
LOSSLESS = ("PNG", "BMP", "TIFF", "PPM")


def encode_picture(random: np.random.Generator, level: int) -> tuple[bytes, str, np.ndarray]:
    """Return a picture file, its format and its pixels, (H, W, 3) uint8."""
    height, width = pick_size(random, level)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    kind = choose(random, MODES)
    mode = choose(random, MODES[kind])
    picture = Image.fromarray(pixels)
    if mode == "I;16":
        picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode in ("F", "P", "1"):
        picture = picture.convert("L").convert(mode)
    else:
        picture = picture.convert(mode)
    file = io.BytesIO()
    options: dict[str, Any] = {}
    if kind == "TIFF":
        options["compression"] = choose(random, (None, "tiff_lzw", "packbits", "tiff_adobe_deflate"))
    if kind == "PNG" and random.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = int(random.integers(0, 10))
        options["exif"] = exif
        pixels = None
    try:
        picture.save(file, kind, **options)
    except (KeyError, OSError, ValueError):  # a format that this Pillow does not write
        picture.convert("RGB").save(file, "PNG")
        kind = "PNG"
    return file.getvalue(), kind, pixels if kind in LOSSLESS and mode == "RGB" else None


def pictures(random: np.random.Generator, level: int, folder: Path) -> None:
    """Read a picture file, whole or damaged, under any name."""
    content, kind, pixels = encode_picture(random, level)
    changes = int(random.integers(0, 1 + 4 * level))
    content = distort_bytes(random, content, changes)
    name = choose(random, ("a.png", "a.jpg", "a", "a.eps", "A.PNG", "\u00e4.tif", ".png", "a b.gif", "a.heic"))
    path = folder / name
    path.write_bytes(content)
    with refusals("edges: image"):
        result = read_image(choose(random, (path, str(path))))
    require(result.dtype == torch.float32 and result.ndim == 4 and result.shape[1] == 3, "kind of the result")
    # a sum, since a mask of a large picture may exceed the memory of the child
    require(result.sum().isfinite() and result.min() >= 0 and result.max() <= 1, "range of the result")
    require(kind not in ("EPS", "PDF") or changes, "a document is accepted")
    if changes == 0 and pixels is not None:
        expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        require(
            result.shape[1:] == expected.shape and (result[0] - expected).abs().max() < 1e-6, "values of the result"
        )


# --- masks of any format


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    rle = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def count_runs(mask: np.ndarray) -> dict[str, Any]:
    column = mask.T.ravel()
    changes = np.flatnonzero(np.diff(column)) + 1
    runs = np.diff(np.concatenate([[0], changes, [column.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if column[0] else runs}


def draw_masks(random: np.random.Generator, level: int) -> np.ndarray:
    count, (height, width) = int(random.integers(0, 1 + level)), pick_size(random, level)
    return random.random((count, height, width)) < random.random((count, 1, 1))


def draw_records(random: np.random.Generator, kind: str, truth: np.ndarray) -> list[dict[str, Any]]:
    """Return masks as records of SAM or COCO, as RLE or polygons."""
    records = []
    for index, mask in enumerate(truth):
        record: dict[str, Any] = {"segmentation": encode_rle(mask), "id": index + 1, "image_id": 1}
        if kind == "sam":
            record |= {"predicted_iou": 0.5, "bbox": [0, 0, 2, 2], "area": int(mask.sum())}
        else:
            record |= {"category_id": 1, "score": 0.5, "bbox": [0.0, 0.0, 3.0, 3.0], "iscrowd": 0}
        if kind == "polygons":
            record["segmentation"] = [[1, 1, 9, 1, 9, 9, 1, 9], [2.5, 2.5, 7.5, 2.5, 7.5, 7.5]]
        records.append(record)
    return records


def draw_collection(random: np.random.Generator, kind: str, truth: np.ndarray) -> tuple[Any, bool]:
    """Return masks in a format, and whether they are the same masks."""
    if kind == "array":
        array = distort_array(random, truth.astype(choose(random, ("bool", "uint8", "int64", "float32", "uint16"))))
        return array, not isinstance(array, np.ma.MaskedArray)
    if kind == "tensor":
        distorted = random.random() < 0.6 and len(truth)
        return distort_tensor(random, torch.from_numpy(truth)) if distorted else torch.from_numpy(truth), not distorted
    if kind == "list":
        return [distort_array(random, mask) for mask in truth], True
    if kind == "labels":
        labels = np.zeros(truth.shape[1:], dtype=choose(random, ("uint8", "int32", "uint32", "int64", "uint16")))
        for index, mask in enumerate(truth):
            labels[mask] = index + 1
        return labels, False
    if kind in ("rle", "runs"):
        return [(encode_rle if kind == "rle" else count_runs)(mask) for mask in truth], True
    return draw_records(random, kind, truth), kind != "polygons"


def masks(random: np.random.Generator, level: int, folder: Path) -> None:
    """Open masks of any format, some of them distorted, and write them back."""
    truth = draw_masks(random, level)
    kind = choose(random, ("array", "tensor", "list", "labels", "rle", "runs", "sam", "coco", "polygons"))
    size: Any = truth.shape[1:] if kind == "polygons" or random.random() < 0.5 else None
    collection, exact = draw_collection(random, kind, truth)
    if isinstance(collection, list) and random.random() < 0.7:
        collection, exact = distort_tree(random, collection, int(random.integers(1, 1 + level)), objects=True), False
    if random.random() < 0.1:
        size, exact = hostile_size(random), False
    with refusals(r"^open_masks: \w"):
        mask_set, restore = open_masks(collection, size)
    require(mask_set.masks.dtype == torch.bool and mask_set.masks.ndim == 3, "kind of the masks")
    if exact and len(truth):
        require(mask_set.masks.shape == truth.shape, "shape of the masks")
        require(torch.equal(mask_set.masks, torch.from_numpy(truth)), "pixels of the masks")
    with refusals(r"open_masks|restore|masks"):
        groups = [[index] for index in range(len(mask_set.masks))]
        again, _ = open_masks(restore(mask_set, groups), mask_set.masks.shape[1:])
    if kind not in ("labels", "tensor"):
        require(torch.equal(again.masks, mask_set.masks), "masks that are written back")


def hostile_size(random: np.random.Generator) -> tuple[Any, Any]:
    sizes = [number for number in NUMBERS if isinstance(number, int)]
    return choose(random, sizes), choose(random, sizes)


# --- COCO's JSON files


def make_content(random: np.random.Generator, level: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    stacks = [draw_masks(random, level) for _ in range(level)]
    images = [
        {"id": index + 1, "file_name": f"{index}.png", "height": stack.shape[1], "width": stack.shape[2]}
        for index, stack in enumerate(stacks)
    ]
    annotations = []
    for index, stack in enumerate(stacks):
        for mask in stack:
            segmentation = choose(random, (encode_rle, count_runs))(mask)
            entry = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": 1, "segmentation": segmentation}
            annotations.append(entry | {"area": float(mask.sum()), "iscrowd": 0, "bbox": [0, 0, 1, 1]})
    categories = [{"id": 1, "name": "thing", "isthing": 1}]
    return {"images": images, "annotations": annotations, "categories": categories}, stacks


def coco_files(random: np.random.Generator, level: int, folder: Path) -> None:
    """Read a COCO JSON file: instances, results or panoptic segments, with some nodes distorted."""
    content, stacks = make_content(random, level)
    kind = choose(random, ("instances", "results", "list", "panoptic"))
    tree: Any = content
    if kind in ("results", "list"):
        for entry in content["annotations"]:
            entry["score"] = 0.5
        tree = content["annotations"] if kind == "list" else content
    if kind == "panoptic":
        (folder / "a").mkdir()
        content["annotations"] = []
        for image, stack in zip(content["images"], stacks, strict=True):
            ids = np.zeros(stack.shape[1:], dtype=np.uint8)
            for index, mask in enumerate(stack):
                ids[mask] = index + 1
            Image.fromarray(np.stack([ids, 0 * ids, 0 * ids], -1)).save(folder / "a" / image["file_name"])
            segments = [{"id": int(number), "category_id": 1, "iscrowd": 0} for number in np.unique(ids) if number]
            entry = {"image_id": image["id"], "file_name": image["file_name"], "segments_info": segments}
            content["annotations"].append(entry)
    changes = int(random.integers(0, 1 + level))
    tree = distort_tree(random, tree, changes)
    path = folder / "a.json"
    data = dump_json(random, tree)
    if random.random() < 0.1:
        data, changes = distort_bytes(random, data, level), changes + 1
    path.write_bytes(data)
    with refusals(r"^read_annotations: path"):
        annotations = coco.read_annotations(path, results=kind in ("results", "list"))
    if isinstance(annotations, coco.Panoptic):
        for image in annotations.images.values():
            image.segment_map()
        return
    for number, image in annotations.images.items():
        with refusals("masks"):
            stack = image.masks()
        require(stack.shape == (len(image.instances), image.height, image.width), "shape of the masks")
        if not changes:
            require(np.array_equal(stack, stacks[number - 1]), "pixels of the masks")


# --- folders of models


def models(random: np.random.Generator, level: int, folder: Path) -> None:
    """Load a folder of a network, a pipeline or a student whose files are damaged, and use what is accepted."""
    target = folder / "model"
    make = choose(random, (*[make_student] * 6, *[make_small_network] * 6, make_pipeline))
    make(target)
    files = sorted(path for path in target.rglob("*") if path.suffix in (".json", ".safetensors"))
    path = choose(random, files)
    action = random.random()
    if action < 0.05:
        path.unlink()
    elif action < 0.1:
        path.unlink()
        path.mkdir()
    elif path.suffix == ".json" and action < 0.85:
        path.write_bytes(dump_json(random, distort_tree(random, json.loads(path.read_text()), level)))
    elif action < 0.4:
        distort_weights(random, path)
    else:
        content = path.read_bytes()
        # the header, or all of it
        part = content[:4000] if random.random() < 0.7 else content
        path.write_bytes(distort_bytes(random, part, level) + content[len(part) :])
    photo = np.random.default_rng(0).random((16, 24, 3)).astype(np.float32)
    size = PIPELINE_SIZE if make is make_pipeline else None
    with refusals(r"^[\w.]+: \w+ .*must|^[\w.]+: .*(install|device)"):
        edges = trace_fast.edges(photo, model=str(target), device="cpu", size=size)
    require(edges.shape == (16, 24) and np.isfinite(edges).all(), "edges")
    require(edges.min() >= 0 and edges.max() <= 1, "range of the edges")


def make_student(target: Path) -> None:
    """Write the embedded student."""
    shutil.copytree(EMBEDDED / "student", target)


SMALL: dict[str, torch.Tensor] = {}  # weights of a small network, made once


def make_small_network(target: Path) -> None:
    """Write a network of the family of `mini` with random weights."""
    target.mkdir(exist_ok=True)
    from trace_fast.backbones.mini import Mini, MiniConfig

    config = MiniConfig(dim=16, depth=1, heads=2)
    if not SMALL:
        torch.manual_seed(0)
        SMALL.update({name: value + 0.2 * torch.randn_like(value) for name, value in Mini(config).state_dict().items()})
    save_file(SMALL, target / "model.safetensors")
    description = {"family": "mini", "architecture": config.to_dict(), "tracing": {"size": [16, 24], "timestep": 0}}
    (target / "config.json").write_text(json.dumps(description))


PIPELINE: dict[str, bytes] = {}  # files of a small pipeline, made once
PIPELINE_SIZE = (64, 64)


def make_pipeline(target: Path) -> None:
    """Write a pipeline of the family of Stable Diffusion 1.5 with random weights."""
    if not PIPELINE:
        sys.path.append(str(Path(__file__).parents[1]))
        import tiny

        with tempfile.TemporaryDirectory() as folder:
            tiny.pipeline("sd15", Path(folder)).save_pretrained(Path(folder, "model"))
            files = [path for path in Path(folder, "model").rglob("*") if path.is_file()]
            PIPELINE.update({str(path.relative_to(Path(folder, "model"))): path.read_bytes() for path in files})
    for name, content in PIPELINE.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)


def distort_weights(random: np.random.Generator, path: Path) -> None:
    """Change a tensor of a file of weights."""
    weights = load_file(path) or {"x": torch.zeros(2, 3)}
    name = choose(random, sorted(weights))
    ways: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: x * float("nan"),
        lambda x: x * 1e30,
        lambda x: x.float() * float("inf"),
        lambda x: x[:0],
        lambda x: x[..., None],
        lambda x: x.flatten(),
        lambda x: x.to(torch.int8),
        lambda x: x.double(),
        lambda x: x.bool(),
        lambda x: torch.zeros_like(x),
    ]
    weights[name] = choose(random, ways)(weights[name]).contiguous()
    if random.random() < 0.2:
        weights[f"{name}.x"] = weights.pop(name)
    save_file(weights, path)


# --- edges and masks in Python


def propagation(random: np.random.Generator, level: int, folder: Path) -> None:
    """Split and complete masks, find instances and seeds, with hostile options."""
    truth = draw_masks(random, level)
    height, width = truth.shape[1:]
    edges: Any = random.random((height, width)).astype(np.float32)
    if random.random() < 0.4:
        edges = distort_array(random, edges)
    elif random.random() < 0.4:
        edges = distort_tensor(random, torch.from_numpy(edges))
    options: dict[str, Any] = {"threshold": float(random.random())}
    name = choose(random, ("propagate", "instances", "seeds"))
    if name == "propagate":
        options["mode"] = choose(random, ("fit", "flood", "walk"))
        if random.random() < 0.3:
            options["classes"] = random.integers(0, 3, len(truth)).tolist()
    if name != "propagate" and random.random() < 0.5:
        options["min_area"] = int(random.integers(1, 9))
    if random.random() < 0.5:
        options[choose(random, options)] = hostile(random, objects=True)
    collection: Any = choose(random, (truth, torch.from_numpy(truth), list(truth)))
    with refusals(rf"^({name}|open_masks)\b: \w"):
        if name == "propagate":
            result: Any = trace_fast.propagate(collection, edges, **options)
            result = result if isinstance(result, list) else [result]
            require(all(np.asarray(mask).shape[-2:] == (height, width) for mask in result), "size of the masks")
        elif name == "instances":
            stack, scores = trace_fast.instances(edges, **options)
            require(stack.dtype == torch.bool and stack.shape[1:] == edges.shape[-2:], "kind of the masks")
            require(scores.isfinite().all() and len(scores) == len(stack), "scores")
            # without a threshold masks lie within each other
            require(options["threshold"] is None or (stack.sum(0) <= 1).all(), "instances that overlap")
        else:
            k = int(random.integers(1, 9)) if random.random() < 0.7 else hostile(random, objects=True)
            points = trace_fast.seeds(edges, k, **options)
            require(len(points.points) <= k, "number of seeds")


# --- jobs over shards, lists and folders


def jobs(random: np.random.Generator, level: int, folder: Path) -> None:
    """Run a job over an input of any kind; then damage what it has recorded, and run it again."""
    source = make_input(random, level, folder)
    make_small_network(folder / "model")
    os.chdir(folder)
    words = [source.name, "-o", "out", "--model", "./model", "--device", "cpu", "--size", "16x24"]
    words = ["edges", *words, *choose(random, ([], ["--overlay"], ["--max-side", "16"], ["--recursive"]))]

    def run(*more: str) -> dict[Path, bytes]:
        check_answer(CliRunner().invoke(app, [*words, *more], env={"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}))
        require(not list((folder / "out").rglob("*.part")), "incomplete files")
        files = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
        for path in files:
            check_shard(path)
        return files

    before = run()
    require({path.name for path in folder.iterdir()} <= KEPT, "a file outside of the output")
    manifest = Path("out", MANIFEST)
    if manifest.exists() and random.random() < 0.7:
        damage_manifest(random, level, manifest)
        with contextlib.suppress(RefusedError):
            require(run() == before, "another result of a run that is continued")
        require(run("--overwrite") == before, "another result of a run that is repeated")


KEPT = {"in", "in.tar", "in.parquet", "in.txt", "model", "out"}


# --- the command line

COMMANDS: dict[str, list[list[str]]] = {
    "edges": [["PHOTO", "-o", "OUT", "--size", "16x24"], ["PHOTOS", "-o", "OUT", "--size", "16x24", "--overlay"]],
    "segment": [["PHOTO", "-o", "OUT"], ["PHOTO", "-o", "OUT", "--masks", "MASKS", "--threshold", "0.5"]],
    "evaluate": [
        ["--data", "DATA", "-o", "OUT", "--results", "RESULTS"],
        ["--data", "DATA", "-o", "OUT", "--method", "sobel"],
    ],
    "models": [[]],
    "backends": [[]],
    "scenes": [["PHOTOS", "-o", "OUT", "--count", "1", "--size", "32"]],
    "distill": [["--images", "PHOTOS", "-o", "OUT", "--epochs", "0", "--rank", "1", "--batch", "1"]],
    "pretrain": [
        ["PHOTOS", "-o", "OUT", "--images", "1", "--batch", "1", "--size", "16", "--dim", "16", "--depth", "1"]
    ],
}
WORDS = (
    *("0", "-1", "1e9", "nan", "inf", "-inf", "99999999999999999999", "", " ", "\u00e4", "\ud800", "x" * 5000, "a\nb"),
    *("0x0", "1x1", "40000x40000", "16x24x3", "999999999x9", "--help", "--", "-", "/", "/proc/self/mem", "/dev/null"),
    *(".", "..", "~", "mini", "sd15", "./sd16", "models/my--model", "owner/name", "http://x", "FILE", "MISSING", "iep"),
    *("1000", "-o", "--size", "--threshold", "PHOTO", "%s", "maps:MISSING", "maps:PHOTOS", "x=PHOTO", "cuda:7", "meta"),
    *("xpu", "float16"),
)


def commands(random: np.random.Generator, level: int, folder: Path) -> None:
    """Run a command with words that are replaced, repeated or removed."""
    command = choose(
        random, [name for name in COMMANDS for _ in range(1 + 3 * (name in ("edges", "segment", "evaluate")))]
    )
    paths = make_paths(random, folder)
    words = [command, *choose(random, COMMANDS[command])]
    for _ in range(int(random.integers(0, 1 + level))):
        index = int(random.integers(len(words)))
        action = random.random()
        if action < 0.6 and index:
            words[index] = choose(random, WORDS)
        elif action < 0.8:
            words.insert(index + 1, choose(random, WORDS))
        elif index:
            del words[index]
    words = [paths.get(word, word) for word in words]
    os.chdir(folder)
    environment = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "TRACE_FAST_CACHE": str(folder / "cache")}
    result = CliRunner().invoke(app, words, env=environment)
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        raise UnclearError(f"{command}: {type(error).__name__}: {error}")
    if result.exit_code not in (0, 1, 2):
        raise UnclearError(f"{command}: exit status {result.exit_code}")
    if result.exit_code and (not result.stderr.strip() or "Traceback" in result.stderr):
        raise UnclearError(f"{command}: {result.stderr[:200]!r}")
    left = [path for path in folder.rglob("*.part") if path.is_file()]
    require(not left, f"{command}: incomplete files")
    for picture in (folder / "out").glob("*.png"):
        with Image.open(picture) as opened:
            opened.load()
    if result.exit_code:
        raise RefusedError(result.stderr)


def make_paths(random: np.random.Generator, folder: Path) -> dict[str, str]:
    """Make the files that the words of commands name."""
    pixels = random.integers(0, 256, (20, 31, 3), dtype=np.uint8)
    for name in ("photos", "data/images", "data/inst"):
        (folder / name).mkdir(parents=True)
    for index in range(8 if random.random() < 0.3 else 2):
        Image.fromarray(pixels).save(folder / "photos" / f"{index}.png")
    Image.fromarray(pixels).save(folder / "data" / "images" / "1.png")
    labels = np.kron(random.integers(0, 3, (4, 5)), np.ones((5, 7), dtype=np.int64))[:20, :31].astype(np.uint16)
    Image.fromarray(labels).save(folder / "data" / "inst" / "1.png")
    Image.fromarray(labels).save(folder / "masks.png")
    results = [{"image_id": 1, "category_id": 1, "segmentation": encode_rle(labels == 1), "score": 0.5}]
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "file").write_bytes(b"")
    return {
        "PHOTO": str(folder / "photos" / "0.png"),
        "PHOTOS": str(folder / "photos"),
        "OUT": str(folder / "out"),
        "DATA": str(folder / "data"),
        "MASKS": str(folder / "masks.png"),
        "RESULTS": str(folder / "results.json"),
        "FILE": str(folder / "file"),
        "MISSING": str(folder / "missing"),
    }


TARGETS = (
    Target("images", images, 13),
    Target("ops", native_ops, 12),
    Target("pictures", pictures, 10),
    Target("masks", masks, 8),
    Target("coco", coco_files, 6),
    Target("propagation", propagation, 3),
    Target("models", models, 2),
    Target("jobs", jobs, 2),
    Target("commands", commands, 1),
)
