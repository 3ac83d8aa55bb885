"""Write the tables of README.md, docs/ and benchmarks/README.md from benchmarks/results/: `python scripts/tables.py`.

`speed-cpu.json`, `regions-cpu.json` and `evaluation-cpu.json` are written by the commands beside their tables, with
`--benchmark-json=benchmarks/results/speed-cpu.json` and so on, `quality-mini.json` by `scripts/quality.py` (it is that
run's quality.json), `ablations.json` by `scripts/ablations.py`, `kernels.json` by `scripts/compile_kernels.py`,
`memory.json` by `scripts/memory.py`, `engines-cpu.json` by `scripts/engines.py`, `gpu-check.json`, `gpu-time.json`,
`speed-gpu.json` and a `backbones-gpu-<model>.json` each by `scripts/gpu.sh`;
`edges-*.json` are the report.json of `trace-fast evaluate`, `propagation.json`, `-walk` and `-fit` its
masks.json, and `commit` was added to each.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workload import SHAPES

from trace_fast.evaluation.report import edge_table, mask_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

REGIONS = ("label_regions", "flood_fill", "random_walk", "merge_masks")
PROVIDERS = ("encode", "forward", "capture", "search", "eager", "student", "student, compiled")  # of backbones
SHOWN = {  # rows of the quality table, in this order
    "chance, random numbers": "chance",
    "color difference (control)": "color difference of the same grid, the control",
    "Canny, 256 px, six thresholds averaged": "Canny",
    "Sobel, 128 px": "Sobel",
    "PiDiNet, native size": "PiDiNet, trained on human edges",
    "ground truth itself (ceiling)": "ground truth on the grid, the ceiling",
}


SPEED = "pytest benchmarks/bench_{attention,divergence,edges}.py --benchmark-only"


def speed(results: dict[str, Any]) -> str:
    """Return the benchmarks of the ops on attention and of edges, without the student's."""
    return grouped(results, SPEED, lambda group: not group.startswith("the student"))


def student(results: dict[str, Any]) -> str:
    """Return the benchmarks of the student beside its teacher."""
    return grouped(results, SPEED, lambda group: group.startswith("the student"))


def ablations(results: dict[str, Any]) -> str:
    """Return the scores of students with one choice changed, best last, and paired differences to the first."""
    first = next(name for name in results["methods"] if name not in results["differences"])
    lines = [
        f"| | ODS | OIS | AP | clDice | ODS above {first} | 95 % interval |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in sorted(results["methods"].items(), key=lambda item: item[1]["ods"]):
        difference = ["", ""]
        if name != first:
            value, low, high = results["differences"][name]["ods"]
            difference = [f"{value:+.3f}", f"{low:+.3f} to {high:+.3f}"]
        cells = [f"{row[key]:.3f}" for key in ("ods", "ois", "ap", "cldice")] + difference
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"{results['photos']} photographs; commit `{results['commit'][:7]}`; `{results['command']}`."]
    return "\n".join(lines)


def regions(results: dict[str, Any]) -> str:
    """Return the benchmarks of the ops on regions and masks."""
    return grouped(results, "pytest benchmarks/bench_regions.py --benchmark-only", lambda x: x.startswith(REGIONS))


def evaluation(results: dict[str, Any]) -> str:
    """Return the benchmarks of scoring edges."""
    return grouped(results, "pytest benchmarks/bench_evaluation.py --benchmark-only", lambda _: True)


def grouped(results: dict[str, Any], command: str, shown: Callable[[str], bool]) -> str:
    """Return benchmarks grouped as they were run, fastest first; ratios are to the eager reference of the same run."""
    machine, commit = results["machine_info"], describe_commit(results)
    lines = [
        f"Measured on {machine['cpu']['brand_raw']}, {machine['threads']} threads, {machine['instruction_set']}, "
        f"torch {machine['versions']['torch']}, commit `{commit}`, by `{command}`. Memory is what one call adds at "
        "its peak, outputs included.",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in results["benchmarks"]:
        if shown(case["group"]):
            groups.setdefault(case["group"], []).append(case)
    for group, cases in groups.items():
        lines += ["", f"| {group} | median ms | speed-up over eager | memory MiB |", "| --- | ---: | ---: | ---: |"]
        eager = next((case["stats"]["median"] for case in cases if case["extra_info"]["provider"] == "eager"), None)
        if not group.startswith("stages"):
            cases = sorted(cases, key=lambda case: case["stats"]["median"])
        for case in cases:
            median, info = case["stats"]["median"], case["extra_info"]
            ratio = f"{eager / median:.1f}" if eager else ""
            memory = "" if info["peak_memory"] is None else f"{info['peak_memory'] / 2**20:.1f}"
            pairs = f", in pairs {info['over_forward']:.2f} x forward" if "over_forward" in info else ""
            lines.append(f"| {info['provider']}{pairs} | {median * 1e3:.2f} | {ratio} | {memory} |")
    return "\n".join(lines)


def describe_commit(results: dict[str, Any]) -> str:
    """Return the commit that benchmarks ran on, and whether it was changed."""
    commit = results["commit_info"]
    return str(commit["id"])[:7] + (" with changes" if commit.get("dirty") else "")


def quality(results: dict[str, Any]) -> str:
    """Return the methods of `SHOWN` and the rows of the model, by average precision."""
    methods = results["methods"]
    fixed = [name for name in methods if re.fullmatch(r"ABDiv, \w+, timestep \d+", name)]
    best = max(fixed, key=lambda name: methods[name]["ap"])
    own = [name for name in methods if name.startswith("ABDiv") and name not in fixed]
    names = {**SHOWN, **{name: name for name in own}, best: f"{best} (best timestep, chosen on these photographs)"}
    rows = sorted((methods[name]["ap"], name) for name in names)
    lines = [
        "| method | AP | 95 % interval | best F a photo | gap to the control |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
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
        "The timestep that the paper chooses is no use at this size: the KL curve peaks at the first or the last step "
        f"almost always (t* lies strictly inside the grid for {shares} noising). `mini` therefore reads timestep "
        f'{settings["timestep"]} by default; `timestep="iep"` searches.',
    ]
    lines += ["", f"{results['photos']} photographs; commit `{results['commit'][:7]}`; `{results['command']}`."]
    return "\n".join(lines)


def edges(results: dict[str, Any]) -> str:
    """Return the scores of edge maps, and the recall of contours at the threshold of ODS."""
    images = next(iter(results["methods"].values()))["images"]
    source = f"{images} images; commit `{results['commit'][:7]}`; `{results['command']}`."
    return f"{edge_table(results['methods'])}\n\n{source}"


def propagation(results: dict[str, Any]) -> str:
    """Return the scores of masks before and after propagation."""
    source = f"Commit `{results['commit'][:7]}`; `{results['command']}`."
    return f"{mask_table(results['results'])}\n\n{source}"


def gpu(results: dict[str, Any] | None) -> str:
    """Return the goals of the GPU kernels and their measurements, which are empty where there is no run yet."""
    bars = [
        ("`accumulate_attention`, all blocks of SD1.5 @512, over its floor", "at most 1.5", "SD1.5 @512", over_floor),
        (
            "`accumulate_attention`, all blocks of SD3.5-L @1024, over its floor",
            "at most 1.5",
            "SD3.5-L @1024",
            over_floor,
        ),
        ("the same, faster than eager, SD1.5 @512", "at least 4", "SD1.5 @512", over_eager),
        ("the same, faster than eager, SD3.5-L @1024", "at least 4", "SD3.5-L @1024", over_eager),
        ("`step_kl_abdiv`, N = 4096, share of the copy bandwidth", "at least 0.75", "", share_of_copy),
        ("`readout` over `scaled_dot_product_attention`, the slowest shape", "at most 1.3", "", over_sdpa),
    ]
    lines = []
    if results is None:
        lines += ["No GPU has run these kernels yet: `scripts/gpu.sh kernels` fills the table.", ""]
    else:
        machine, versions = results["machine_info"], results["machine_info"]["versions"]
        rates = machine["ceilings"]
        lines += [
            f"{machine['gpu']}, torch {versions['torch']}, triton {versions['triton']}, commit "
            f"`{describe_commit(results)}`. Ceilings of the same run: {rates['flops'] / 1e12:.0f} TFLOP/s, "
            f"{rates['bandwidth'] / 1e12:.2f} TB/s, {rates['exponentials'] / 1e12:.2f} T exponentials/s.",
            "",
        ]
    lines += ["| what | bar | measured |", "| --- | --- | ---: |"]
    for what, bar, model, figure in bars:
        try:
            value = "" if results is None else f"{figure(Times(results), model):.2f}"
        except KeyError:  # a run that was cut short
            value = ""
        lines.append(f"| {what} | {bar} | {value} |")
    return "\n".join(lines)


class Times:
    """Median seconds, and other facts, of GPU benchmarks by group and provider."""

    def __init__(self, results: dict[str, Any]):
        self.cases = {
            (case["group"], case["extra_info"]["provider"]): case["extra_info"] for case in results["benchmarks"]
        }

    def over_blocks(self, model: str, provider: str, key: str) -> float:
        """Sum a fact of accumulate_attention over all blocks of a model; KeyError unless all were measured."""
        start = f"accumulate_attention, {model}:"
        blocks = [case for (group, name), case in self.cases.items() if group.startswith(start) and name == provider]
        if len(blocks) < len(SHAPES[model]):
            raise KeyError(provider)
        return sum(block["blocks"] * block[key] for block in blocks)


def over_floor(times: Times, model: str) -> float:
    """Return the time of all blocks over their floor."""
    return times.over_blocks(model, "triton", "seconds") / times.over_blocks(model, "triton", "floor")


def over_eager(times: Times, model: str) -> float:
    """Return the time of plain torch over the time of the kernels, all blocks."""
    return times.over_blocks(model, "eager", "seconds") / times.over_blocks(model, "triton", "seconds")


def first_contact(results: list[dict[str, Any]]) -> str:
    """Return what the checks of the kernels on a GPU found, and the times of what ships."""
    if not results:
        return "No GPU has been met yet: `scripts/gpu.sh check` and `scripts/gpu.sh time` fill this in."
    lines = []
    for run in results:
        versions = run["versions"]
        lines += [
            f"{run['gpu']}, torch {versions['torch']}, triton {versions['triton']}, commit `{run['commit']}`.",
            "",
        ]
        if "right" in run["rows"][0]:
            wrong = [f"- {row['what']}: {row['figures']}" for row in run["rows"] if not row["right"]]
            lines += [f"{len(run['rows'])} checks, {len(wrong)} wrong.", "", *wrong, *([""] if wrong else [])]
        else:
            lines += ["| what | us | floors | expected |", "| --- | ---: | ---: | --- |"]
            for row in run["rows"]:
                if row["ships"]:
                    floors = row["seconds"] / row["floor"]
                    lines.append(f"| {row['what']} | {row['seconds'] * 1e6:.1f} | {floors:.2f} | {row['expected']} |")
            lines.append("")
    return "\n".join(lines).rstrip()


def share_of_copy(times: Times, _: str) -> float:
    """Return the bandwidth of the divergence as a share of a copy's."""
    case = times.cases["step_kl_abdiv, N = 4096, torch.float32", "triton"]
    return float(case["floor"] / case["seconds"])


def over_sdpa(times: Times, _: str) -> float:
    """Return the time of the readout over the time of torch's attention, for the slowest shape."""
    groups = {group for group, _ in times.cases if group.startswith("readout, ")}
    other = "scaled_dot_product_attention"
    if not groups:
        raise KeyError(other)
    return max(
        times.cases[group, "triton"]["seconds"]
        / min(
            case["seconds"]
            for (name, provider), case in times.cases.items()
            if name == group and provider.startswith(other)
        )
        for group in groups
    )


def backbones(results: list[dict[str, Any]]) -> str:
    """Return latency and memory of the full-size backbones on a GPU, in the order of `memory.json`."""
    if not results:
        return "No GPU has run the full-size backbones yet: `scripts/gpu.sh backbones` fills the table."
    machine, commits = results[0]["machine_info"], {describe_commit(run) for run in results}
    lines = [
        f"{machine['gpu']}, torch {machine['versions']['torch']}, bfloat16, one image, commit "
        f"`{'`, `'.join(sorted(commits))}`, by `scripts/gpu.sh backbones`. Random weights prove latency and wiring, "
        "never quality. Milliseconds: `capture` is a forward with every map added up, `share` what that adds to the "
        "plain forward (aim: at most 25 %); `search` is ten timesteps by inversion, `eager` the same with maps in "
        "plain torch (aim: 4 times as long). GiB: what a search adds to the weights at its peak.",
        "",
        "| model | encode | forward | capture | share | search | eager | speed-up | GiB | student | compiled |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    cases = [case for run in results for case in run["benchmarks"]]
    for model in [row["model"] for row in json.loads((RESULTS / "memory.json").read_text())["models"]]:
        facts = {
            case["extra_info"]["provider"]: case["extra_info"]
            for case in cases
            if case["group"] == f"{model}, random weights"
        }
        if not facts:
            continue
        ms = {name: 1e3 * facts[name]["seconds"] if name in facts else math.nan for name in PROVIDERS}
        memory = facts["search"]["peak_memory"] / 2**30 if "search" in facts else math.nan
        numbers = [
            *(f"{ms[name]:.1f}" for name in ("encode", "forward", "capture")),
            f"{ms['capture'] / ms['forward'] - 1:.0%}",
            *(f"{ms[name]:.0f}" for name in ("search", "eager")),
            f"{ms['eager'] / ms['search']:.1f}",
            f"{memory:.2f}",
            *(f"{ms[name]:.1f}" for name in ("student", "student, compiled")),
        ]
        shown = ["" if number.startswith("nan") else number for number in numbers]  # a step that failed
        lines.append(f"| {model} | {' | '.join(shown)} |")
    return "\n".join(lines)


def kernels(results: dict[str, Any]) -> str:
    """Return registers, spilled bytes and shared memory of the shipped kernels for sm_90."""
    lines = [
        f"Triton {results['triton']}, as ptxas reports. All rows, sm_80 too, are in `results/kernels.json`.",
        "",
        "| kernel | dtype | channels | tile | warps | registers | spilled | shared KiB | loop: issued | special x 8 |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["kernels"]:
        if row["shipped"] and row["sm"] == 90 and row.get("channels", 0) in (0, 40, 64, 128):
            rows, columns, warps, *_ = row["tile"]
            name = f"{row['kernel']}, log-sum-exp given" if row.get("lse") else row["kernel"]
            lines.append(
                f"| {name} | {row['dtype']} | {row.get('channels', '')} | {rows} x {columns} | {warps} | "
                f"{row['registers']} | {row['spilled']} | {row['shared'] / 1024:.0f} | {row.get('issued', '')} | "
                f"{8 * row['special'] if 'special' in row else ''} |"
            )
    return "\n".join(lines)


def memory(results: dict[str, Any]) -> str:
    """Return weights and peaks of the full-size backbones, in GiB."""
    lines = [
        f"Counted on the meta device by `scripts/memory.py`, bfloat16, one image, torch {results['torch']}, "
        f"diffusers {results['diffusers']}. Beside the weights: the peaks of encoding, of one plain forward, and of a "
        "whole search with inversion, whose two maps are in it. Last, what keeping every head's map of one forward "
        "would take.",
        "",
        "| model | grid | weights GiB | encode | forward | search | two maps | every head |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["models"]:
        sizes = [row[key] / 2**30 for key in ("weights", "encode", "forward", "search", "maps", "every_head")]
        numbers = " | ".join(f"{size:.2f}" if size < 10 else f"{size:.1f}" for size in sizes)
        lines.append(f"| {row['model']} | {row['grid'][0]} x {row['grid'][1]} | {numbers} |")
    return "\n".join(lines)


def engines(results: dict[str, Any]) -> str:
    """Return what jobs over many images take with each engine, and what an image costs apart from the fixed cost."""
    commits = sorted({run["commit"] for run in results["runs"]})
    lines = [
        f"{results['machine']}, commit `{'`, `'.join(commits)}`, by `python scripts/engines.py PHOTOS`. CPU seconds "
        "and memory are those of all processes together; figures are medians of the runs. The ratios are to the loop "
        "that is faster, and to the one that takes less CPU time."
    ]
    rows = [merge_runs(list(runs)) for _, runs in itertools.groupby(sorted(results["runs"], key=name_run), name_run)]
    order = [*dict.fromkeys(name_run(run) for run in results["runs"])]
    rows.sort(key=lambda row: (row["inputs"][0].isdecimal(), row["images"], order.index(name_run(row))))
    for name, group in itertools.groupby(rows, lambda row: row["inputs"]):
        shown = list(group)
        loops = [row for row in shown if row["engine"].startswith("plain loop")]
        seconds, cpu = (min(loop[key] for loop in loops) for key in ("seconds", "cpu"))
        head = f"{shown[0]['images']:,} {'small pictures' if name[0].isdecimal() else name}"
        lines += [
            "",
            f"| {head} | images a second | ratio | CPU s | ratio | first file, s | MiB | different files | runs |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in shown:
            figures = [f"{row['images'] / row['seconds']:.2f}", f"{seconds / row['seconds']:.2f}"]
            figures += [f"{row['cpu']:.1f}", f"{row['cpu'] / cpu:.2f}", f"{row['first']:.1f}", f"{row['memory']:.0f}"]
            figures += [str(row["different"]), str(row["runs"])]
            lines.append(f"| {row['engine']} | {' | '.join(figures)} |")
    lines += ["", "| small pictures | CPU ms an image | fixed CPU s |", "| --- | ---: | ---: |"]
    small = [row for row in rows if row["inputs"][0].isdecimal()]
    for few, many in itertools.combinations(sorted(small, key=lambda row: row["images"]), 2):
        if few["engine"] == many["engine"]:
            cost = (many["cpu"] - few["cpu"]) / (many["images"] - few["images"])
            lines.append(f"| {few['engine']} | {cost * 1e3:.2f} | {few['cpu'] - cost * few['images']:.1f} |")
    return "\n".join(lines)


def name_run(run: dict[str, Any]) -> tuple[str, str]:
    """Return the inputs and the engine of a run."""
    return run["inputs"], run["engine"]


def merge_runs(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of the figures of runs of one engine, and the most files that differed."""
    medians = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "cpu", "first", "memory")}
    return {**runs[0], **medians, "different": max(run["different"] for run in runs), "runs": len(runs)}


TABLES = (
    ("docs/datasets.md", "engines", "engines-cpu.json", engines),
    ("docs/performance.md", "speed", "speed-cpu.json", speed),
    ("README.md", "edges-inst", "edges-inst.json", edges),
    ("benchmarks/README.md", "edges-panoptic", "edges-panoptic.json", edges),
    ("benchmarks/README.md", "edges-nuclei", "edges-nuclei.json", edges),
    ("benchmarks/README.md", "propagation", "propagation.json", propagation),
    ("benchmarks/README.md", "propagation-walk", "propagation-walk.json", propagation),
    ("benchmarks/README.md", "propagation-fit", "propagation-fit.json", propagation),
    ("benchmarks/README.md", "quality", "quality-mini.json", quality),
    ("README.md", "student", "speed-cpu.json", student),
    ("benchmarks/README.md", "ablations", "ablations.json", ablations),
    ("benchmarks/README.md", "ablations-rest", "ablations-rest.json", ablations),
    ("benchmarks/README.md", "regions", "regions-cpu.json", regions),
    ("benchmarks/README.md", "evaluation", "evaluation-cpu.json", evaluation),
    ("benchmarks/README.md", "gpu-first", "gpu-*.json", first_contact),
    ("benchmarks/README.md", "gpu", "speed-gpu.json", gpu),
    ("benchmarks/README.md", "backbones", "backbones-gpu-*.json", backbones),
    ("benchmarks/README.md", "memory", "memory.json", memory),
    ("benchmarks/README.md", "kernels", "kernels.json", kernels),
)


def main() -> None:
    """Replace the text between the markers of each table."""
    for page, name, file, table in TABLES:
        path = ROOT / page
        runs = [json.loads(source.read_text()) for source in sorted(RESULTS.glob(file))]
        content = table(runs if "*" in file else runs[0] if runs else None)
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        filled = re.sub(
            pattern,
            lambda match, content=content: f"{match[1]}{content}\n{match[2]}",
            path.read_text(),
            flags=re.DOTALL,
        )
        path.write_text(filled)


if __name__ == "__main__":
    main()
