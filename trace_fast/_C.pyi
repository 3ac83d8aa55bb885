"""The native core: addresses of contiguous arrays and their sizes; see csrc/trace_fast.h."""

def instruction_sets() -> list[str]:
    """Instruction sets this machine runs, slowest first."""

def instruction_set() -> str:
    """The one in use: the fastest unless set otherwise."""

def has_cuda() -> bool:
    """Whether it was built with the CUDA kernels."""

def set_instruction_set(name: str) -> None:
    """Use another of `instruction_sets()`."""

def accumulate_attention(
    total: int,
    query: int,
    key: int,
    batch: int,
    heads: int,
    tokens: int,
    channels: int,
    weight: float,
    scale: float,
    num_threads: int,
) -> None: ...
def readout(
    query: int,
    key: int,
    values: int,
    batch: int,
    heads: int,
    tokens: int,
    channels: int,
    columns: int,
    scale: float,
    parts: int,
    lse: int,
    num_threads: int,
) -> None: ...
def readout_backward(
    grad: int,
    delta: int,
    query: int,
    key: int,
    values: int,
    lse: int,
    batch: int,
    heads: int,
    tokens: int,
    channels: int,
    columns: int,
    scale: float,
    grad_query: int,
    grad_key: int,
    grad_values: int,
    num_threads: int,
) -> None: ...
def accumulate_resized(
    total: int,
    attention: int,
    batch: int,
    height: int,
    width: int,
    target_height: int,
    target_width: int,
    weight: float,
    num_threads: int,
) -> None: ...
def step_kl(previous: int, current: int, batch: int, tokens: int, kl: int, num_threads: int) -> None: ...
def abdiv(attention: int, batch: int, height: int, width: int, abdiv: int, num_threads: int) -> None: ...
def step_kl_abdiv(
    previous: int,
    current: int,
    batch: int,
    height: int,
    width: int,
    kl: int,
    abdiv: int,
    num_threads: int,
) -> None: ...
def suppress_nonmaxima(edges: int, batch: int, height: int, width: int, suppressed: int, num_threads: int) -> None: ...
def thin(mask: int, batch: int, height: int, width: int, thinned: int, num_threads: int) -> None: ...
def match_contours(
    detected: int,
    truth: int,
    batch: int,
    height: int,
    width: int,
    distance: float,
    matched_detected: int,
    matched_truth: int,
    num_threads: int,
) -> None: ...
def count_matches(
    edges: int,
    truths: int,
    ignored: int,
    groups: int,
    thresholds: int,
    annotators: int,
    height: int,
    width: int,
    levels: int,
    num_groups: int,
    distance: float,
    thins: bool,
    counts: int,
    group_counts: int,
    num_threads: int,
) -> None: ...
def label_regions(
    barrier: int,
    batch: int,
    height: int,
    width: int,
    diagonal: bool,
    labels: int,
    counts: int,
    num_threads: int,
) -> None: ...
def flood_fill(
    seeds: int,
    barrier: int,
    batch: int,
    height: int,
    width: int,
    diagonal: bool,
    claim_barrier: bool,
    labels: int,
    num_threads: int,
) -> None: ...
def random_walk(
    masks: int,
    edges: int,
    batch: int,
    count: int,
    height: int,
    width: int,
    radius: int,
    beta: float,
    steps: int,
    walked: int,
    num_threads: int,
) -> None: ...
def merge_masks(
    masks: int,
    count: int,
    height: int,
    width: int,
    iou: float,
    groups: int,
    num_threads: int,
) -> None: ...
def unite_masks(
    masks: int,
    groups: int,
    count: int,
    pixels: int,
    unions: int,
    merged: int,
    num_threads: int,
) -> None: ...

# only with has_cuda(); addresses are of a GPU's memory, stream is a cudaStream_t

def cuda_label_roots(
    barrier: int,
    batch: int,
    height: int,
    width: int,
    diagonal: bool,
    roots: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_flood_fill(
    seeds: int,
    barrier: int,
    batch: int,
    height: int,
    width: int,
    diagonal: bool,
    claim_barrier: bool,
    labels: int,
    keys: int,
    fronts: int,
    sizes: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_random_walk(
    masks: int,
    others: int,
    powers: int,
    ahead: int,
    reach: int,
    count: int,
    height: int,
    width: int,
    steps: int,
    affinities: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_shared_pixels(
    masks: int,
    count: int,
    pixels: int,
    words: int,
    shared: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_unite_masks(
    masks: int,
    groups: int,
    count: int,
    pixels: int,
    merged: int,
    device: int,
    stream: int,
) -> None: ...
