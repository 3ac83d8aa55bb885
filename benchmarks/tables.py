"""Write the README's tables from benchmarks/results/: `python benchmarks/tables.py`.

`speed-cpu.json` is made by `pytest benchmarks --benchmark-only --benchmark-json=benchmarks/results/speed-cpu.json`,
`quality-mini.json` by `benchmarks/quality.py` (it is that run's quality.json).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

SHOWN = {  # rows of the quality table, in this order
    "chance, random numbers": "chance",
    "colour difference (control)": "colour difference of the same grid, the control",
    "Canny, 256 px, six thresholds averaged": "Canny",
    "Sobel, 128 px": "Sobel",
    "PiDiNet, native size": "PiDiNet, trained on human edges",
    "ground truth itself (ceiling)": "ground truth on the grid, the ceiling",
}


def speed(results: dict[str, Any]) -> str:
    """Benchmarks grouped as they were run, fastest first; ratios are to the eager reference of the same run."""
    machine, commit = results["machine_info"], results["commit_info"]["id"][:7]
    lines = [
        f"Measured on {machine['cpu']['brand_raw']}, {machine['threads']} threads, {machine['instruction_set']}, "
        f"torch {machine['versions']['torch']}, commit `{commit}`, by `make bench`. Memory is what one call adds at "
        "its peak, outputs included.",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in results["benchmarks"]:
        groups.setdefault(case["group"], []).append(case)
    for group, cases in groups.items():
        lines += ["", f"| {group} | median ms | eager / it | memory MiB |", "| --- | ---: | ---: | ---: |"]
        eager = next((case["stats"]["median"] for case in cases if case["extra_info"]["provider"] == "eager"), None)
        if not group.startswith("stages"):
            cases = sorted(cases, key=lambda case: case["stats"]["median"])
        for case in cases:
            median, info = case["stats"]["median"], case["extra_info"]
            ratio = f"{eager / median:.1f}" if eager else ""
            memory = "" if info["peak_memory"] is None else f"{info['peak_memory'] / 2**20:.1f}"
            lines.append(f"| {info['provider']} | {median * 1e3:.2f} | {ratio} | {memory} |")
    return "\n".join(lines)


def quality(results: dict[str, Any]) -> str:
    """The methods of `SHOWN` and the model's own rows, by average precision."""
    methods = results["methods"]
    levels = [name for name in methods if re.fullmatch(r"ABDiv, \w+, level \d+", name)]
    best = max(levels, key=lambda name: methods[name]["ap"])
    own = [name for name in methods if name.startswith("ABDiv") and name not in levels]
    names = {**SHOWN, **{name: name for name in own}, best: f"{best} (best level, chosen on these photographs)"}
    rows = sorted((methods[name]["ap"], name) for name in names)
    lines = ["| method | AP | 95 % | best F a photo | gap to the control |", "| --- | ---: | ---: | ---: | ---: |"]
    for _, name in rows:
        row = methods[name]
        low, high = row["ap_interval"]
        gap = f"{row['gap']:+.3f} ± {row['gap_error']:.3f}" if row["gap_error"] else ""
        lines.append(f"| {names[name]} | {row['ap']:.3f} | {low:.3f} to {high:.3f} | {row['ois']:.3f} | {gap} |")
    tracing = results["tracing"]
    shares = " and ".join(
        f"{tracing[noising]['interior_share']:.1%} with {noising}" for noising in ("inversion", "gaussian")
    )
    settings = tracing["settings"]
    lines += [
        "",
        "The paper's noise level is no use at this size: the KL curve peaks at the first or the last step almost "
        f"always (t* lies strictly inside the grid for {shares} noising). `mini` therefore reads level "
        f'{settings["timestep"]} unless told otherwise; `timestep="iep"` searches.',
    ]
    lines += ["", f"{results['photos']} photographs; commit `{results['commit'][:7]}`; `{results['command']}`."]
    return "\n".join(lines)


def main() -> None:
    """Replace what stands between the README's markers."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, file, table in (("speed", "speed-cpu.json", speed), ("quality", "quality-mini.json", quality)):
        content = table(json.loads((RESULTS / file).read_text()))
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)
    readme.write_text(text)


if __name__ == "__main__":
    main()
