"""Per-step cost and memory with 1, 2 and 4 processes, compared with a model for 8 to 4,096 GPUs.

Every process gets a model's parameters as PyTorch's own engines lay them out (replicated as under DDP,
owned under ZeRO, sharded by FSDP2), and gradients; only the optimizer's step is timed, and `MLBFGS` and
AdamW take turns. The model (`benchmarks/scaling_model.py`) says what a step keeps, moves and sends. Bytes
must agree exactly; times are predicted from the speed of copying, of one small operation and of one small
all-reduce, all of them measured in the same run with as many processes.

``python3 -m nox -s bench -- scaling --write`` puts tables and plot in docs/scaling.md.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import mlbfgs_core as core
from benchmarks import scaling_model as model
from mlbfgs_core import adapter
from mlbfgs_torch import MLBFGS, units
from tests.distributed.processes import on_ranks

__all__ = ["LAYOUTS", "SHAPES", "agrees", "counted", "timed"]

DOCS = Path(__file__).parents[1] / "docs"
LAYOUTS = ("DDP", "ZeRO", "FSDP2")
NAMES = ("MLBFGS", "AdamW")
COUNTS = (1, 2, 4)
LARGE = [(2000, 256), *[(1024, 256), (256, 1024)] * 4]
SMALL = [(1024,), (256,), (256,)] * 4 + [(1000,)]
SHAPES = [*LARGE, *SMALL]
"""The shapes of embeddings, and of four layers of two matrices with biases and scales."""
SIZED = {"momentum_buffer", "exp_avg", "exp_avg_sq"} | {
    entry.name
    for entry in adapter.layout(core.Config(), [torch.empty(1)], adapter.one_block(1))
    if entry.leaf is not None
}
"""Names of the parameter-sized arrays in an optimizer's state."""
VIEWS = {
    *("view", "_unsafe_view", "detach", "slice", "select", "expand", "unsqueeze", "permute", "t", "alias"),
    *("unbind", "split", "split_with_sizes", "empty", "empty_like", "new_empty", "as_strided"),
    *("_record_function_enter_new", "_record_function_exit"),
}
"""Operations without a kernel."""
Shapes = Sequence[tuple[int, ...]]
Settings = dict[str, Any]
Figures = dict[str, Any]
Measured = dict[int, list[dict[str, Figures]]]
"""For each number of processes, a list over ranks of the figures by layout."""


class Operations(TorchDispatchMode):
    """Counts operations that have a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


class Layers(nn.Module):
    """Parameters without a forward pass."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        values = (0.01 * torch.randn(shape, generator=generator) for shape in shapes)
        self.params = nn.ParameterList(map(nn.Parameter, values))


class Contestant:
    """An optimizer on parameters in a layout, with the gradients of a noisy quadratic."""

    def __init__(self, layout: str, name: str, shapes: Shapes, settings: Settings | None = None) -> None:
        module = Layers(shapes)
        if layout == "FSDP2":
            fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.params = list(module.parameters())
        generator = torch.Generator().manual_seed(1 + (dist.get_rank() if layout == "FSDP2" else 0))
        locals_ = [local(param.detach()) for param in self.params]
        self.noise = [1e-4 * torch.randn(part.shape, generator=generator) for part in locals_]
        self.grads = [torch.zeros_like(part) for part in locals_]
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = like(grad, param)
        self.sign = 1.0
        self.outer = _optimizer(layout, name, self.params, settings or {})
        self.inner: Optimizer = getattr(self.outer, "optim", self.outer)

    def own_sizes(self) -> list[int]:
        """Number of values of each parameter that this process updates."""
        params = (param for group in self.inner.param_groups for param in group["params"])
        return [local(param).numel() for param in params]

    def evaluate(self) -> None:
        """Write the gradient in place."""
        self.sign = -self.sign
        for param, grad, noise in zip(self.params, self.grads, self.noise, strict=True):
            torch.add(local(param.detach()), noise, alpha=self.sign, out=grad)

    def asked(self) -> tuple[bool, bool]:
        """Whether the next step makes a check and a refresh."""
        return asked(self.inner)

    def window(self, steps: int) -> dict[str, float]:
        """Mean milliseconds of a step in wall-clock and CPU time, and how often it checked and refreshed."""
        wall = cpu = 0.0
        checks = refreshes = 0
        for _ in range(steps):
            self.evaluate()
            check, refresh = self.asked()
            checks, refreshes = checks + check, refreshes + refresh
            dist.barrier()
            start, used = time.perf_counter(), time.process_time()
            self.outer.step()
            wall += time.perf_counter() - start
            cpu += time.process_time() - used
        return {
            "wall": 1e3 * wall / steps,
            "cpu": 1e3 * cpu / steps,
            "check": checks / steps,
            "refresh": refreshes / steps,
        }

    def held(self) -> tuple[int, int]:
        """Bytes of memory of the state: of parameter-sized arrays, and of all others."""
        found: dict[bool, dict[int, int]] = {True: {}, False: {}}
        for entry in self.inner.state.values():
            for name, value in entry.items():
                if isinstance(value, Tensor):
                    storage = local(value).untyped_storage()
                    found[name in SIZED][storage.data_ptr()] = storage.nbytes()
        return sum(found[True].values()), sum(found[False].values())

    def recorded_step(self) -> dict[str, Any]:
        """What a step sends, and how many operations it runs."""
        self.evaluate()
        check, refresh = self.asked()
        with recording() as (reduced, sent), CommDebugMode() as all_calls:
            self.outer.step()
        result = {"check": check, "refresh": refresh, "reduced": reduced, "sent": sent}
        return {**result, "calls": all_calls.get_total_counts()}


def local(tensor: Any) -> Tensor:
    """This process's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, param: Tensor) -> Tensor:
    """This process's part as a tensor sharded like the parameter."""
    if not isinstance(param, DTensor):
        return part
    placed = {"shape": param.shape, "stride": param.stride(), "run_check": False}
    return DTensor.from_local(part, param.device_mesh, param.placements, **placed)


def _optimizer(layout: str, name: str, params: list[nn.Parameter], settings: Settings) -> Optimizer:
    given = {"lr": 1e-3, **settings} if name == "MLBFGS" else {"lr": 1e-6, "fused": True}
    if layout != "ZeRO":
        return (MLBFGS if name == "MLBFGS" else AdamW)(params, **given)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns about features it uses itself

    owned = partial(MLBFGS, shard_group=dist.group.WORLD) if name == "MLBFGS" else AdamW
    return ZeroRedundancyOptimizer(params, owned, **given)


@contextmanager
def recording() -> Iterator[tuple[list[int], list[int]]]:
    """Float32 numbers in each all-reduce; and bytes of each broadcast of which this process is the source."""
    reduced: list[int] = []
    sent: list[int] = []
    all_reduce, broadcast = dist.all_reduce, dist.broadcast

    def sum_up(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.append(tensor.nbytes // 4)
        return all_reduce(tensor, *args, **kwargs)

    def tell(tensor: Tensor, src: int, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes if src == dist.get_rank() else 0)
        return broadcast(tensor, src, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", sum_up), mock.patch.object(dist, "broadcast", tell):
        yield reduced, sent


def counted(layout: str, shapes: Shapes, steps: int, settings: Settings | None = None) -> Figures:
    """What `MLBFGS` keeps in this process, and what each of its steps except the first sends."""
    contestant = Contestant(layout, "MLBFGS", shapes, settings)
    contestant.evaluate()
    contestant.outer.step()
    records = [contestant.recorded_step() for _ in range(steps)]
    return {"held": contestant.held(), "sizes": contestant.own_sizes(), "records": records}


def timed(layout: str, shapes: Shapes, windows: int, steps: int) -> Figures:
    """Time both optimizers in turn, and measure what they keep and how fast this machine is meanwhile."""
    contestants = {name: Contestant(layout, name, shapes) for name in NAMES}
    for contestant in contestants.values():
        contestant.window(12)  # all memory has been touched
    engine = getattr(contestants["AdamW"].outer, "_sync_params", lambda: None)
    result: Figures = {name: {"windows": []} for name in contestants}
    speeds = []
    for _ in range(windows):
        speeds.append(speed(engine))
        for name, contestant in contestants.items():
            result[name]["windows"].append(contestant.window(steps))
    for name, contestant in contestants.items():
        result[name] |= {"held": contestant.held(), "sizes": contestant.own_sizes()}
    result["speed"] = {key: statistics.median(each[key] for each in speeds) for key in speeds[0]}
    return result


def all_layouts(windows: int, steps: int) -> dict[str, Figures]:
    """Everything that one process measures."""
    return {
        layout: timed(layout, SHAPES, windows, steps) | {"counted": counted(layout, SHAPES, 6)}
        for layout in LAYOUTS
    }


def speed(engine: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a byte moved, of a small operation, of a small all-reduce, and of what the engine itself
    does in a step; all processes do the same at once."""
    source = torch.ones(2**23)
    target, one, few = torch.empty_like(source), torch.ones(1), torch.ones(23)
    return {
        "byte": seconds(lambda: target.copy_(source), 4) / (2 * source.nbytes),
        "operation": seconds(lambda: one.mul_(1.0), 500),
        "all_reduce": seconds(lambda: dist.all_reduce(few), 50),
        "engine": seconds(engine, 3),
    }


def asked(optimizer: Optimizer) -> tuple[bool, bool]:
    """Whether an optimizer's next step makes a check and a refresh; only ours ever does."""
    found = getattr(optimizer, "_units", None)
    if not found:
        return False, False
    check, refresh, *_ = core.Method(found[0].config).upcoming(found[0].state).tolist()
    return check, refresh


def seconds(work: Callable[[], Any], times: int) -> float:
    """Mean time of some calls that all processes begin together."""
    work()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def operations(leaves: int, steps: int = 60) -> dict[str, float]:
    """Number of operations of a step with this many large parameters, and what check and refresh add."""
    params = [nn.Parameter(0.01 * torch.randn(300, 300)) for _ in range(leaves)]
    optimizer = MLBFGS(params)
    found: dict[tuple[bool, bool], int] = {}
    for step in range(steps):
        for param in params:
            param.grad = param.detach() + 1e-4 * torch.randn_like(param)
        upcoming = asked(optimizer)
        # As on a GPU, whose memory NumPy cannot use.
        with mock.patch.object(units, "HOSTS", ()), Operations() as counted:
            optimizer.step()
        if step > 0:  # the first one creates the state
            found[upcoming] = counted.number
    plain = found[False, False]
    return {
        "leaves": leaves,
        "step": plain,
        "check": found[True, False] - plain,
        "refresh": found[False, True] - plain,
    }


def merged(ranks: Sequence[Figures], name: str) -> dict[str, float]:
    """An optimizer's figures over all processes: the slowest time, the mean CPU time, the largest state."""

    def median(rank: Figures, key: str) -> float:
        return statistics.median(window[key] for window in rank[name]["windows"])

    return {
        "wall": max(median(rank, "wall") for rank in ranks),
        "cpu": statistics.mean(median(rank, "cpu") for rank in ranks),
        "sized": max(rank[name]["held"][0] for rank in ranks),
        "coefficients": max(rank[name]["held"][1] for rank in ranks),
        "check": statistics.mean(window["check"] for window in ranks[0][name]["windows"]),
        "refresh": statistics.mean(window["refresh"] for window in ranks[0][name]["windows"]),
        **{key: statistics.median(rank["speed"][key] for rank in ranks) for key in ranks[0]["speed"]},
    }


def predicted(layout: str, ranks: Sequence[Figures], name: str, at: Sequence[Figures]) -> dict[str, float]:
    """Milliseconds of a step by purpose; `at` holds the operations at two numbers of leaves."""
    own, sizes = merged(ranks, name), max((rank[name]["sizes"] for rank in ranks), key=sum)
    if name == "AdamW":
        parts = {"bytes": 4 * model.ADAMW_MOVED * sum(sizes) * own["byte"], "launches": 0.0, "reduces": 0.0}
    else:
        config, owned = core.Config(), layout == "ZeRO"
        often = {"step": 1.0, "check": own["check"], "refresh": own["refresh"]}
        leaves = sum(size > model.SMALL for size in sizes) + 1
        start, slope = start_and_slope(at, often)
        calls = sum(often[kind] * len(each) for kind, each in model.reductions(config, owned=owned).items())
        parts = {
            "bytes": model.bytes_moved(config, often) * sum(sizes) * own["byte"],
            "launches": (start + slope * leaves) * own["operation"],
            "reduces": (layout != "DDP") * calls * own["all_reduce"],
        }
    return {kind: 1e3 * value for kind, value in (*parts.items(), ("engine", own["engine"]))}


def start_and_slope(at: Sequence[Figures], often: dict[str, float]) -> tuple[float, float]:
    """Operations of an average step without leaves, and operations for each leaf."""
    few, many = (sum(often[kind] * each[kind] for kind in often) for each in at)
    slope = (many - few) / (at[1]["leaves"] - at[0]["leaves"])
    return few - slope * at[0]["leaves"], slope


def cases(measured: Measured) -> Iterator[tuple[str, int, list[Figures], list[Figures]]]:
    """Layout, number of processes, the figures of all ranks, and those of one process alone."""
    for layout in LAYOUTS:
        for count, ranks in measured.items():
            yield layout, count, [rank[layout] for rank in ranks], [measured[1][0][layout]]


def measured_table(measured: Measured, at: Sequence[Figures]) -> Iterator[str]:
    """Times with their ratios, memory, and what the model says."""
    yield f"{sum(map(math.prod, SHAPES)):,} float32 parameters in {len(SHAPES)} tensors"
    machine = f"{os.cpu_count()} cores of {platform.machine()}"
    yield f"{machine}, PyTorch {torch.__version__}, gloo, one thread a process, {time.strftime('%Y-%m-%d')}"
    yield f"{'':23}{'wall-clock':^25}{'CPU of a process':^25}{'state of a rank':^20}{'predicted':^16}"
    columns = f"{'ms/step':>9}{'x AdamW':>8}{'x one':>8}" * 2
    yield f"{'layout':6}{'procs':>6} {'':10}{columns}{'MB':>10}{'bytes':>8}{'ms':>9}{'/ wall':>7}"
    for layout, count, ranks, alone in cases(measured):
        peer = merged(ranks, "AdamW")
        for name in NAMES:
            own, one = merged(ranks, name), merged(alone, name)
            line = f"{layout:6}{count:6d} {name:10}"
            for key in ("wall", "cpu"):
                line += f"{own[key]:9.2f}{own[key] / peer[key]:8.2f}{own[key] / one[key]:8.2f}"
            guess = sum(predicted(layout, ranks, name, at).values())
            line += f"{own['sized'] / 1e6:10.2f}{own['coefficients']:8.0f}"
            yield f"{line}{guess:9.2f}{guess / own['wall']:7.2f}"


def parts_table(measured: Measured, at: Sequence[Figures]) -> Iterator[str]:
    """The parts of the model's time of `MLBFGS`, and the speeds of this run behind them."""
    yield f"{'':12}{'predicted ms for':^42}{'speeds of this run':^36}"
    kinds = "".join(f"{kind:>10}" for kind in ("bytes", "launches", "reduces", "engine"))
    yield f"{'layout':6}{'procs':>6}{kinds}{'GB/s':>10}{'us/launch':>12}{'us/all-reduce':>16}"
    for layout, count, ranks, _ in cases(measured):
        own = merged(ranks, "MLBFGS")
        parts = "".join(f"{value:10.2f}" for value in predicted(layout, ranks, "MLBFGS", at).values())
        speeds = f"{1e-9 / own['byte']:10.1f}{1e6 * own['operation']:12.2f}{1e6 * own['all_reduce']:16.0f}"
        yield f"{layout:6}{count:6d}{parts}{speeds}"


def sent_table(measured: Measured) -> Iterator[str]:
    """The numbers in each all-reduce of a step as counted, and whether the formulas agree exactly."""
    columns = f"{'step':>8}{'and a check':>14}{'and a refresh':>16}"
    yield f"{'layout':6}{'procs':>6}{columns}{'bytes broadcast by rank 0':>28}{'formulas':>11}"
    for layout, count, ranks, _ in cases(measured):
        records = ranks[0]["counted"]["records"]
        seen = {(record["check"], record["refresh"]): record for record in records}
        kinds = [seen[False, False], seen[True, False], seen[False, True]]
        step, check, refresh = ("+".join(map(str, record["reduced"])) or "none" for record in kinds)
        agree = "agree" if all(agrees(layout, rank["counted"]) for rank in ranks) else "DIFFER"
        told = f"{sum(kinds[0]['sent']):28,}{agree:>11}"
        yield f"{layout:6}{count:6d}{step:>8}{check:>14}{refresh:>16}{told}"


def agrees(layout: str, found: Figures) -> bool:
    """Whether a process keeps and sends exactly what the formulas say."""
    config, owned = core.Config(), layout == "ZeRO"
    numbers = model.reductions(config, owned=owned)
    state = model.state_bytes(config, found["sizes"], absent=2 * owned)
    told = model.broadcast_bytes(sum(found["sizes"])) if owned else 0
    return found["held"] == state and all(
        sum(record["sent"]) == told
        and record["calls"] == len(record["reduced"]) + len(record["sent"])
        and sorted(record["reduced"]) == (sorted(_expected(record, numbers)) if layout != "DDP" else [])
        for record in found["records"]
    )


def _expected(record: Figures, numbers: dict[str, tuple[int, ...]]) -> Iterator[int]:
    for kind, each in numbers.items():
        if kind == "step" or record[kind]:
            yield from each


def write(parts: dict[str, list[str]]) -> None:
    """Put the tables in the marked parts of docs/scaling.md."""
    path = DOCS / "scaling.md"
    text = path.read_text()
    for name, lines in parts.items():
        before, found, rest = text.partition(f"<!-- {name} -->\n```text\n")
        _, end, after = rest.partition("```\n<!-- end -->")
        if not found or not end:
            msg = f"`{path}` must have a part {name!r}, got none"
            raise ValueError(msg)
        text = "\n".join([before + found.rstrip(), *(line.rstrip() for line in lines), end + after])
    path.write_text(text)


def main() -> None:
    """Print all tables; with ``--write`` also put them in docs/scaling.md, with the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="fewer windows, of fewer steps")
    parser.add_argument("--write", action="store_true", help="update docs/scaling.md and docs/scaling.png")
    options = parser.parse_args()
    windows, steps = (2, 4) if options.short else (7, 20)
    at = [operations(1), operations(9)]
    start, slope = start_and_slope(at, model.rates(core.Config()))
    measured = {count: on_ranks(count, all_layouts, windows, steps) for count in COUNTS}
    launches = f"launches of a mean step: {start:.0f}, and {slope:.0f} for each leaf, counted on this CPU"
    parts = {
        "measured": list(measured_table(measured, at)),
        "parts": list(parts_table(measured, at)),
        "sent": list(sent_table(measured)),
        "projected": [*model.table(list(model.projections((start, slope)))), launches],
        "needed": list(model.needed()),
        "latencies": list(model.latencies()),
    }
    for name, lines in parts.items():
        print(f"\n{name}", *lines, sep="\n")
    if options.write:
        write(parts)
        model.draw((start, slope), DOCS / "scaling.png")


if __name__ == "__main__":
    main()
