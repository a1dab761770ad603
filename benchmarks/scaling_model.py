"""Formulas for what a step moves, sends and keeps, and their predictions for clusters that were not measured.

References
----------
[1] Data sheet of NVIDIA's H100 SXM, as listed in https://glennklockwood.com/garden/processors/h100
[2] Grattafiori et al. 2024, "The Llama 3 herd of models", arXiv:2407.21783
[3] NCCL's estimate of its own collectives: https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc;
    on its trees and protocols Hu et al. 2025, arXiv:2507.04786
[4] https://jiahuanglin.xyz/all_lessons/gpu_kernel_serving/18_pytorch_to_kernel.html
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import mlbfgs_core as core

__all__ = [
    "GPUS",
    "H100",
    "PARAMETERS",
    "SETTINGS",
    "Hardware",
    "Projection",
    "State",
    "all_reduce_seconds",
    "broadcast_bytes",
    "bytes_moved",
    "choice",
    "draw",
    "fewest_gpus",
    "latencies",
    "memory",
    "needed",
    "project",
    "projections",
    "rates",
    "reductions",
    "state_bytes",
    "table",
]

PARAMETERS = (10**9, 10**10, 10**11, 10**12)
GPUS = (8, 64, 512, 4096)
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "bfloat16 history": {"history_dtype": "bfloat16"},
}
"""The layouts, from the most memory to the least."""
ADAMW_MOVED, ADAMW_STATE = 7, 2
"""Values per parameter: fused AdamW reads and writes parameter and two moments, and reads the gradient."""
SMALL = 2**16
"""Parameters of at most this many local values lie side by side in one leaf (`mlbfgs_torch`)."""


@dataclass(frozen=True)
class Hardware:
    """Constants of a cluster, all of them from data sheets and literature: replace them with your own."""

    name: str = "H100 SXM, 8 in a node"
    memory: float = 80e9
    """Bytes of a GPU [1]."""
    memory_bandwidth: float = 3.35e12
    """Bytes per second [1]: the peak, so that the times of an optimizer are lower bounds."""
    compute: float = 989e12
    """Dense bfloat16 operations per second [1]."""
    utilization: float = 0.4
    """Fraction of `compute` that forward and backward passes reach: 38 to 43 % in [2]."""
    gpus_per_node: int = 8
    node_bandwidth: float = 450e9
    """Bytes per second and direction of a GPU within a node: half of NVLink's 900 GB/s [1]."""
    network_bandwidth: float = 50e9
    """Bytes per second and direction of a GPU between nodes: 400 Gb/s [2]."""
    reduce_start: float = 6.8e-6
    """Seconds of any small all-reduce: NCCL's own estimate [3] (tree, low-latency protocol)."""
    reduce_node_hop: float = 0.6e-6
    """Seconds from one GPU to the next in a node [3]."""
    reduce_network_hop: float = 5.0e-6
    """Seconds from one node to the next [3]."""
    launch: float = 5e-6
    """Seconds of the host for one operation in eager mode: the lower end of the 5 to 25 us in [4]."""
    tokens: int = 8192
    """Tokens of a GPU in a step: one sequence of [2]'s length."""
    width_by_depth: int = 128
    """Width of a transformer for each of its layers: 102 to 130 in [2]."""
    room: float = 0.75
    """Fraction of `memory` left for parameters, gradients and state; an assumption: the rest is for
    activations and gathered layers."""

    def layers(self, parameters: float) -> float:
        """Layers of a dense transformer, ``12 layers width^2`` parameters."""
        return (parameters / (12 * self.width_by_depth**2)) ** (1 / 3)


H100 = Hardware()


class State(NamedTuple):
    """Bytes of an optimizer's state on one process."""

    sized: int
    """Parameter-sized arrays, including momentum."""
    coefficients: int


class Projection(NamedTuple):
    """One step of one model on one cluster, sharded by FSDP2 over all GPUs, per GPU."""

    parameters: int
    gpus: int
    memory: dict[str, float]
    """Bytes of parameters, gradients and state for each setting, and for "AdamW"."""
    moving: float
    """Seconds to move what the default optimizer moves through memory."""
    reducing: float
    """Seconds of its all-reduces."""
    launching: float
    """Seconds that the host needs to launch its operations, in eager mode."""
    least_reducing: float
    """Seconds of the all-reduces without a preconditioner and with a fixed period."""
    adamw: float
    """Seconds to move what AdamW moves."""
    sharding: float
    """Seconds of FSDP2's two all-gathers and one reduce-scatter."""
    compute: float
    """Seconds of forward and backward passes."""

    @property
    def optimizer(self) -> float:
        """Seconds of the step on the GPU."""
        return self.moving + self.reducing

    def share(self, optimizer: float) -> float:
        """Share of a whole step in which computation and communication of parameters overlap completely."""
        return optimizer / (optimizer + max(self.compute, self.sharding))


def reductions(config: core.Config, blocks: int = 1, *, owned: bool = False) -> dict[str, tuple[int, ...]]:
    """How many numbers each all-reduce sums: at every step, and in addition at a check and at a refresh.

    With `owned` parameters have owners, which cannot know whether the others have all their gradients.
    """
    m = config.history_size
    whitened = config.preconditioner != "none"
    numbers = 2 * m + 1 + whitened + config.is_adaptive + 3 * (config.step_length == "clip")
    lengths = 2 * blocks if owned and config.step_length == "rms" else blocks
    step = (blocks * numbers, lengths) if whitened or owned else (blocks * numbers,)
    products = (2 * blocks, 3 * blocks)
    return {"step": step, "check": products, "refresh": (*products, blocks * (4 * m + 2))}


def rates(config: core.Config) -> dict[str, float]:
    """How often a step does each of these; an adaptive schedule may refresh more often than this."""
    return {
        "step": 1.0,
        "check": 1.0 / config.check_every if config.is_adaptive else 0.0,
        "refresh": 1.0 / config.update_every if config.takes_pairs else 0.0,
    }


def bytes_moved(config: core.Config, often: dict[str, float], *, momentum: bool = True) -> float:
    """Bytes through memory for one float32 parameter and step, if only whole arrays leave the caches.

    The history is read twice. The projection reads the gradient; for the preconditioner it also reads the
    mean square and writes the root; the schedule reads the mean gradient. The averages are read and written,
    and parameter and gradient read for them. The combination reads gradient and root, and writes the
    direction. Momentum and parameter are read and written, with the direction. Without pairs there are no
    averages; for the mean square the gradient is read.
    """
    m, whitened = config.history_size, config.preconditioner != "none"
    project = 1 + 2 * whitened + config.is_adaptive
    observe = 6 + 2 * whitened if config.takes_pairs else 3 * whitened
    combine = 2 + whitened
    apply = 3 + 2 * momentum
    history = 4 * m + often["refresh"] * 2 * m
    other = project + observe + combine + apply + often["check"] * (4 + whitened) + often["refresh"] * 22
    return history * _history_item(config) + 4 * other


def state_bytes(
    config: core.Config,
    sizes: Sequence[int],
    *,
    blocks: Sequence[Sequence[int]] | None = None,
    absent: int = 0,
) -> State:
    """Exact bytes that `mlbfgs_torch.MLBFGS` keeps of float32 parameters of these local sizes.

    Small parameters of a block share a leaf. `absent` leaves are empty and stand for those of other owners. A
    block has a row of reals (two matrices, three numbers for each pair, ten more), and a leaf has a row of
    integers.
    """
    blocks = blocks or [range(len(sizes))]
    leaves = absent
    for block in blocks:
        large = [sizes[i] > SMALL for i in block]
        leaves += sum(large) + (not all(large))
    values = np.broadcast_to(np.float32(0), (sum(sizes),))  # takes no memory
    plan, m = core.plan_memory(config, [values]), config.history_size
    sized = plan.history + plan.averages + plan.preconditioner + 4 * values.size
    return State(sized, 4 * (len(blocks) * (2 * (2 * m) ** 2 + 3 * m + 11) + leaves * (m + 13)))


def broadcast_bytes(size: int) -> int:
    """Bytes that an owner of this many float32 values sends after a step, with any optimizer."""
    return 4 * size


def all_reduce_seconds(hardware: Hardware, gpus: int, size: float) -> float:
    """Seconds of a small all-reduce of this many bytes: up a tree and down again.

    NCCL's estimate [3]: within a node along a chain, between nodes along a binary tree.
    """
    local = min(gpus, hardware.gpus_per_node)
    nodes = gpus / local
    hops = (local - 1) * hardware.reduce_node_hop + math.log2(nodes) * hardware.reduce_network_hop
    return hardware.reduce_start + 2 * hops + 2 * size / _slowest(hardware, gpus)


def memory(config: core.Config, local: float) -> float:
    """Bytes of float32 parameters and gradients, the state, and the direction while a step runs."""
    return state_bytes(config, [math.ceil(local)]).sized + (4 + 4 + 4) * local


def fewest_gpus(name: str, parameters: float, hardware: Hardware = H100) -> int:
    """The smallest power of 2 of GPUs in whose memory a model fits, with named settings or AdamW."""
    gpus = 1
    while _memories(parameters / gpus)[name] > hardware.room * hardware.memory:
        gpus *= 2
    return gpus


def project(
    parameters: int, gpus: int, operations: tuple[float, float] = (0.0, 0.0), hardware: Hardware = H100
) -> Projection:
    """The model at one point; `operations` holds those of a step and those for each leaf."""
    config, least = core.Config(), core.Config(preconditioner="none", adaptive=False)
    local = parameters / gpus
    matrices = 7 * hardware.layers(parameters) + 2  # seven in a layer with gated units, and two embeddings
    leaves = matrices + 1 if local / matrices > SMALL else 1
    gathered = (1 - 1 / gpus) * parameters * (2 + 2 + 4)  # in bfloat16; gradients are summed in float32
    # Rings enter and leave a node through the network cards of all its GPUs.
    ring = hardware.node_bandwidth
    if gpus > hardware.gpus_per_node:
        ring = min(ring, hardware.network_bandwidth * hardware.gpus_per_node)
    return Projection(
        parameters,
        gpus,
        _memories(local),
        moving=bytes_moved(config, rates(config)) * local / hardware.memory_bandwidth,
        reducing=_reducing(config, gpus, hardware),
        launching=(operations[0] + operations[1] * leaves) * hardware.launch,
        least_reducing=_reducing(least, gpus, hardware),
        adamw=4 * ADAMW_MOVED * local / hardware.memory_bandwidth,
        sharding=gathered / ring,
        compute=6.0 * parameters * hardware.tokens / (hardware.compute * hardware.utilization),
    )


def projections(operations: tuple[float, float], hardware: Hardware = H100) -> Iterator[Projection]:
    """The model over the whole grid."""
    for parameters in PARAMETERS:
        for gpus in GPUS:
            yield project(parameters, gpus, operations, hardware)


def table(points: Sequence[Projection], hardware: Hardware = H100) -> Iterator[str]:
    """One line for each point of the grid."""
    yield f"{hardware.name}; {hardware.tokens} tokens for each GPU and step; GB and ms are for each GPU"
    groups = f"{'GB':^27}{'ms of a step':^27}{'ms beside it':^27}{'share of a step':^16}"
    yield f"{'':13}{groups}"
    columns = (
        "default",
        "bfloat16",
        "AdamW",
        "memory",
        "reduces",
        "AdamW",
        "launches",
        "compute",
        "FSDP2",
    )
    yield (
        f"{'params':6}{'GPUs':>6} " + "".join(f"{x:>9}" for x in columns) + f"{'ours':>8}{'AdamW':>8}  choose"
    )
    for p in points:
        held = [p.memory[name] / 1e9 for name in (*SETTINGS, "AdamW")]
        times = [1e3 * x for x in (p.moving, p.reducing, p.adamw, p.launching, p.compute, p.sharding)]
        line = f"{_power(p.parameters):6}{p.gpus:6d} " + "".join(f"{_digits(x):>9}" for x in (*held, *times))
        yield f"{line}{p.share(p.optimizer):8.2%}{p.share(p.adamw):8.2%}  {choice(p, hardware)}"


def choice(p: Projection, hardware: Hardware = H100) -> str:
    """What to set, considering memory first."""
    fits = [name for name in SETTINGS if p.memory[name] <= hardware.room * hardware.memory]
    if not fits:
        return f"{fewest_gpus('bfloat16 history', p.parameters, hardware)} GPUs at least"
    return f"{fits[0]}; latency" if p.reducing > p.moving else fits[0]


def needed(hardware: Hardware = H100) -> Iterator[str]:
    """The smallest number of GPUs for each model and setting."""
    yield f"{'params':6}{'default':>10}{'bfloat16':>10}{'AdamW':>8}"
    for parameters in PARAMETERS:
        gpus = [fewest_gpus(name, parameters, hardware) for name in (*SETTINGS, "AdamW")]
        yield f"{_power(parameters):6}{gpus[0]:10d}{gpus[1]:10d}{gpus[2]:8d}"


def latencies(hardware: Hardware = H100) -> Iterator[str]:
    """The number and time of the all-reduces of a step for each setting."""
    settings: dict[str, dict[str, Any]] = {
        "default": {},
        "adaptive=False": {"adaptive": False},
        'preconditioner="none"': {"preconditioner": "none"},
        "both": {"adaptive": False, "preconditioner": "none"},
    }
    yield f"{'':22}{'calls':>7}{'bytes':>7}" + "".join(f"{f'{gpus} GPUs':>12}" for gpus in GPUS)
    for name, given in settings.items():
        config = core.Config(**given)
        often, sizes = rates(config), reductions(config)
        calls = sum(often[kind] * len(sizes[kind]) for kind in often)
        size = sum(often[kind] * 4 * sum(sizes[kind]) for kind in often)
        times = "".join(f"{1e6 * _reducing(config, gpus, hardware):9.0f} us" for gpus in GPUS)
        yield f"{name:22}{calls:7.2f}{size:7.0f}{times}"


def draw(operations: tuple[float, float], path: Path, hardware: Hardware = H100) -> None:
    """Memory and time of the optimizer against the number of GPUs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    gpus = [2**k for k in range(3, 13)]
    for number, parameters in enumerate(PARAMETERS):
        points = [project(parameters, count, operations, hardware) for count in gpus]
        color, label = f"C{number}", f"{_power(parameters)} parameters"
        for name, dashes in (("default", "-"), ("bfloat16 history", "--"), ("AdamW", ":")):
            left.loglog(gpus, [p.memory[name] / 1e9 for p in points], dashes, color=color)
        right.loglog(gpus, [1e3 * p.optimizer for p in points], color=color, label=label)
        right.loglog(gpus, [1e3 * p.adamw for p in points], ":", color=color, alpha=0.6)
    right.loglog(gpus, [1e3 * p.reducing for p in points], "k-.", label="all-reduces alone")
    least = [1e3 * p.least_reducing for p in points]
    right.loglog(gpus, least, "-.", color="gray", label='with adaptive=False, preconditioner="none"')
    left.axhline(hardware.memory / 1e9, color="k", linewidth=0.8, label="memory of a GPU")
    for dashes, label in (("-", "default"), ("--", "bfloat16 history"), (":", "AdamW")):
        left.plot([], [], dashes, color="k", label=label)
    left.set(ylabel="GB of parameters, gradients and state per GPU", ylim=(2e-3, 2e4))
    right.set(ylabel="ms of an optimizer's step (AdamW dotted)", ylim=(1e-3, 2e5))
    for axes, place in ((left, "lower left"), (right, "upper right")):
        axes.set_xticks(gpus, [str(count) for count in gpus])
        axes.minorticks_off()
        axes.set_xlabel("GPUs")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc=place, ncols=1 if axes is left else 2)
    figure.suptitle(f"Projected, not measured: FSDP2 over all GPUs, {hardware.name}")
    figure.savefig(path, dpi=120)


def _memories(local: float) -> dict[str, float]:
    held = {name: memory(core.Config(**settings), local) for name, settings in SETTINGS.items()}
    return {**held, "AdamW": (4 + 4 + 4 * ADAMW_STATE) * local}


def _reducing(config: core.Config, gpus: int, hardware: Hardware) -> float:
    often, sizes = rates(config), reductions(config)
    return sum(
        often[kind] * all_reduce_seconds(hardware, gpus, 4 * numbers)
        for kind, calls in sizes.items()
        for numbers in calls
    )


def _slowest(hardware: Hardware, gpus: int) -> float:
    return hardware.node_bandwidth if gpus <= hardware.gpus_per_node else hardware.network_bandwidth


def _history_item(config: core.Config) -> int:
    return 2 if config.history_dtype in ("bfloat16", "float16") else 4


def _power(number: int) -> str:
    return f"1e{round(math.log10(number))}"


def _digits(x: float) -> str:
    """About three ticks."""
    return f"{x:,.{max(0, min(3, 2 - math.floor(math.log10(x))))}f}"
