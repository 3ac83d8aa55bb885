"""Model cards, as the hub reads them: YAML with facts for machines, then Markdown for people."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping

import torch

__all__ = ["describe_machine", "format_card"]

TAGS = ("edge-detection", "instance-edges", "image-segmentation")


def format_card(title: str, summary: str, facts: Iterable[str], metadata: Mapping[str, str] | None = None) -> str:
    """Return a model card.

    Args:
        title: of the page, one line.
        summary: what the model is, in full sentences.
        facts: lines of a list.
        metadata: further entries of the YAML block, such as the base model; one line each.

    Example:
        >>> print(format_card("A student", "It finds edges.", ["Decoder: conv"], {"base_model": "mini"}))
        ---
        library_name: trace_fast
        tags: [edge-detection, instance-edges, image-segmentation]
        base_model: "mini"
        ---
        # A student
        <BLANKLINE>
        It finds edges.
        <BLANKLINE>
        - Decoder: conv
        <BLANKLINE>
    """
    entries = [f'{name}: "{value}"' for name, value in (metadata or {}).items()]
    front = ["---", "library_name: trace_fast", f"tags: [{', '.join(TAGS)}]", *entries, "---"]
    return "\n".join([*front, f"# {title}", "", summary, "", *(f"- {fact}" for fact in facts), ""])


def describe_machine(device: torch.device, processes: int, seconds: float) -> str:
    """Return where a model was trained, and for how long.

    Args:
        device: of this process.
        processes: number of processes.
        seconds: of training.

    Example:
        >>> describe_machine(torch.device("cpu"), 1, 5400.0)  # doctest: +SKIP
        'Machine: x86_64, cpu, 1 process(es) of 2 thread(s), 1.50 hours; torch 2.13.0'
    """
    return (
        f"Machine: {platform.processor() or platform.machine()}, {device}, {processes} process(es) of "
        f"{torch.get_num_threads()} thread(s), {seconds / 3600:.2f} hours; torch {torch.__version__}"
    )
