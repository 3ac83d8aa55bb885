"""Scores of edges, masks and panoptic segmentations, each in a module of its own."""
