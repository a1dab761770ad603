"""The formulas of `benchmarks/scaling_model.py`: what processes keep and send, byte for byte."""

from __future__ import annotations

import functools

import pytest

import mlbfgs_core as core
from benchmarks import scaling
from benchmarks import scaling_model as model
from tests.distributed.processes import on_ranks

SHAPES = [(300, 450), (7, 5), (11,), (1,), (450, 150)]
"""Two large parameters, of which shards are small; most are divided by no number of processes."""
SETTINGS = {
    "default": {},
    "bfloat16": {"history_size": 5, "history_dtype": "bfloat16", "check_every": 3},
    "fixed": {"preconditioner": "none", "adaptive": False, "update_every": 4},
    "fit": {"preset": "fit", "update_every": 5, "momentum": 0.9},
    "blocks": {"blocks": "parameter"},
    "no pairs": {"history_size": 0},
}
HALF = 2


def everything():
    """For each layout and setting, what one process keeps and sends.

    Except for blocks under ZeRO, where blocks that other processes own have empty leaves too.
    """
    return {
        (layout, name): scaling.counted(layout, SHAPES, 6, settings)
        for layout in scaling.LAYOUTS
        for name, settings in SETTINGS.items()
        if name == "default" or (layout != "DDP" and (layout, name) != ("ZeRO", "blocks"))
    }


@functools.cache
def counted(count):
    return on_ranks(count, everything)


def config_of(name):
    rest = {key: value for key, value in SETTINGS[name].items() if key not in ("blocks", "momentum")}
    return core.Config(**rest), [[i] for i in range(len(SHAPES))] if name == "blocks" else None


@pytest.mark.parametrize("count", [2, 4])
def test_state_takes_the_bytes_of_the_formula_on_every_rank(count):
    for rank in counted(count):
        for (layout, name), found in rank.items():
            config, blocks = config_of(name)
            absent = 2 if layout == "ZeRO" else 0
            assert found["held"] == model.state_bytes(config, found["sizes"], blocks=blocks, absent=absent)


@pytest.mark.parametrize("count", [2, 4])
def test_parameter_sized_state_is_divided_and_nothing_is_lost(count):
    total = sum(rows * columns for rows, columns in [(300, 450), (7, 5), (11, 1), (1, 1), (450, 150)])
    per_parameter = {
        "default": 16 * 4,
        "bfloat16": 10 * 2 + 6 * 4,
        "fixed": 15 * 4,
        "fit": 25 * 4,
        "no pairs": 2 * 4,
    }
    for name, expected in per_parameter.items():
        for layout in scaling.LAYOUTS if name == "default" else ("ZeRO", "FSDP2"):
            held = [rank[layout, name]["held"][0] for rank in counted(count)]
            assert sum(held) == expected * total * (count if layout == "DDP" else 1)


@pytest.mark.parametrize("count", [2, 4])
def test_a_step_sends_the_numbers_of_the_formula_and_nothing_else(count):
    for rank in counted(count):
        for (layout, name), found in rank.items():
            config, blocks = config_of(name)
            numbers = model.reductions(config, len(blocks or [0]), owned=layout == "ZeRO")
            kinds = set()
            for record in found["records"]:
                expected = list(numbers["step"])
                expected += numbers["check"] if record["check"] else ()
                expected += numbers["refresh"] if record["refresh"] else ()
                assert sorted(record["reduced"]) == sorted(expected if layout != "DDP" else [])
                assert record["calls"] == len(record["reduced"]) + len(record["sent"])
                kinds.add((record["check"], record["refresh"]))
            assert {(False, False), *([(False, True)] if config.takes_pairs else [])} <= kinds
            assert ((True, False) in kinds) == config.is_adaptive


@pytest.mark.parametrize("count", [2, 4])
def test_owners_broadcast_each_parameter_once(count):
    for layout in scaling.LAYOUTS:
        for rank in counted(count):
            found = rank[layout, "default"]
            own = 4 * sum(found["sizes"]) if layout == "ZeRO" else 0
            assert all(sum(record["sent"]) == own for record in found["records"])
            assert model.broadcast_bytes(sum(found["sizes"])) == 4 * sum(found["sizes"])


def test_the_benchmark_says_so_where_one_byte_differs():
    rank, _ = counted(2)
    found = rank["FSDP2", "default"]
    assert scaling.agrees("FSDP2", found)
    sized, coefficients = found["held"]
    assert not scaling.agrees("FSDP2", {**found, "held": (sized, coefficients + 1)})
    *rest, last = found["records"]
    assert not scaling.agrees("FSDP2", {**found, "records": [*rest, {**last, "calls": last["calls"] + 1}]})
    assert not scaling.agrees("FSDP2", {**found, "records": [*rest, {**last, "reduced": [13, 2]}]})


def test_reductions_by_hand():
    """m = 5: 2 m products, |g|^2, its square once whitened and the scatter; then the norm of the update."""
    assert model.reductions(core.Config()) == {"step": (13, 1), "check": (2, 3), "refresh": (2, 3, 22)}
    paper = core.Config(preset="paper")
    assert model.reductions(paper, 3)["step"] == (63,)
    assert model.rates(paper) == {"step": 1.0, "check": 0.0, "refresh": 1 / 50}


def test_bytes_moved_by_hand():
    """The history twice; 4 values in the projection, 8 for averages, 3 in the combination, 5 at the end."""
    plain = {"step": 1.0, "check": 0.0, "refresh": 0.0}
    assert model.bytes_moved(core.Config(), plain) == 4 * (4 * 5 + 4 + 8 + 3 + 5)
    assert model.bytes_moved(core.Config(history_dtype="bfloat16"), plain) == HALF * 20 + 4 * 20
    bare = core.Config(preconditioner="none", adaptive=False, history_size=3)
    assert model.bytes_moved(bare, plain, momentum=False) == 4 * (4 * 3 + 1 + 6 + 2 + 3)
    assert model.bytes_moved(core.Config(history_size=0), plain) == 4 * (3 + 3 + 3 + 5)
    often = {"step": 1.0, "check": 0.5, "refresh": 0.1}
    assert model.bytes_moved(core.Config(), often) == pytest.approx(4 * (40 + 0.5 * 5 + 0.1 * (10 + 22)))


def test_a_small_all_reduce_takes_what_nccl_says():
    """Its own estimate in a log of 16 H100s in two nodes: https://github.com/NVIDIA/nccl/issues/1453."""
    assert model.all_reduce_seconds(model.H100, 16, 128) == pytest.approx(25.214764e-6, rel=2e-3)
    assert model.all_reduce_seconds(model.H100, 8, 0) == pytest.approx((6.8 + 2 * 7 * 0.6) * 1e-6)
    assert model.all_reduce_seconds(model.H100, 1, 0) == pytest.approx(6.8e-6)


def test_projection_by_hand():
    point = model.project(10**9, 8)
    assert point.memory["default"] == pytest.approx((16 + 3) * 4 * 10**9 / 8)
    assert point.memory["bfloat16 history"] == pytest.approx((10 * 2 + (6 + 3) * 4) * 10**9 / 8)
    assert point.memory["AdamW"] == 16 * 10**9 / 8
    assert point.adamw == pytest.approx(28 * 10**9 / 8 / 3.35e12)
    assert point.sharding == pytest.approx(7 / 8 * 8e9 / 450e9)
    assert point.compute == pytest.approx(6e9 * 8192 / (0.4 * 989e12))
    assert model.project(10**9, 64).sharding == pytest.approx(63 / 64 * 8e9 / 400e9)
    assert model.fewest_gpus("default", 10**9) == 2  # 76 GB, of which 60 fit in a GPU
    assert model.fewest_gpus("AdamW", 10**9) == 1


def test_layers_are_those_of_llama_3():
    for parameters, layers in [(8e9, 32), (70e9, 80), (405e9, 126)]:
        assert model.H100.layers(parameters) == pytest.approx(layers, rel=0.12)
