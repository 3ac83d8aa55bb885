"""Images in, pictures out: conversion of inputs, drawing of results, and atomic writing of files."""

from trace_fast.io.images import convert_edges, read_image, resize, restore_edges
from trace_fast.io.visualize import draw_masks, grid, overlay, panel, plot_curve, show, write_picture, write_png

__all__ = [
    "convert_edges",
    "draw_masks",
    "grid",
    "overlay",
    "panel",
    "plot_curve",
    "read_image",
    "resize",
    "restore_edges",
    "show",
    "write_picture",
    "write_png",
]
