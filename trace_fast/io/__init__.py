"""Images, files and pictures: what comes in, what goes out, and how results are drawn."""

from trace_fast.io import files, images, visualize

__all__ = ["files", "images", "visualize"]
