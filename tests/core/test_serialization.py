"""The neutral checkpoint: bit for bit what was saved, the old file or the new one, and no other file."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import sys
import time

import array_api_compat.numpy as xp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import mlbfgs_core as core
from mlbfgs_core import adapter
from mlbfgs_core.kernels import Kernels
from tests.helpers import arrays_of, mapped

pytestmark = pytest.mark.backends("numpy")

NAMES = ("a.weight", "a.bias", "b.weight", "b.bias", "unused.weight")
SHAPES = ((4, 3), (4,), (2, 4), (), (5, 0))
SETTINGS = {
    "default": {"check_every": 1},
    "paper": {"preset": "paper", "update_every": 2},
    "formulas": {"preset": "formulas", "update_every": 2},
    "small": {"preset": "lbfgs", "history_size": 2},
    "half history": {"history_dtype": "float16", "check_every": 1},
}


def gradient(step, params):
    rng = np.random.default_rng(step)
    grads = [3 * param + rng.normal(size=param.shape).astype(param.dtype) for param in params]
    return [*grads[:-1], None]


def go_on(config, snapshot, first, last):
    """Plain steps with heavy-ball momentum; returns a new snapshot."""
    state, params = snapshot.state, [np.array(param) for param in snapshot.params]
    momentum = [np.array(buffer) for buffer in snapshot.momentum[:-1]]
    state = mapped(state, np.array)
    for step in range(first, last):
        update, state = core.Method(config, blocks=snapshot.blocks, kernels=Kernels(xp)).step(
            state, params, gradient(step, params)
        )
        for i, d in enumerate(update[:-1]):
            momentum[i] = np.asarray(0.9 * momentum[i] + d, dtype=d.dtype)
            params[i] = np.asarray(params[i] - 0.1 * momentum[i], dtype=params[i].dtype)
    return core.Snapshot(snapshot.names, snapshot.blocks, state, tuple(params), (*momentum, None))


def start(settings, blocks="layer", dtypes=("float64", "float32", "float64", "float64", "float32")):
    config, partition = core.Config(**settings), core.partition(NAMES, blocks)
    rng = np.random.default_rng(7)
    params = tuple(
        np.asarray(rng.normal(size=shape), dtype=d) for shape, d in zip(SHAPES, dtypes, strict=True)
    )
    state = core.Method(config, partition).init(params, xp=xp)
    momentum = (*(np.zeros_like(param) for param in params[:-1]), None)
    return config, core.Snapshot(NAMES, partition, state, params, momentum)


@pytest.fixture
def run():
    config, snapshot = start(SETTINGS["default"])
    return go_on(config, snapshot, 0, 12)


@pytest.fixture
def saved(run, tmp_path):
    path = tmp_path / "run.safetensors"
    core.save_state(path, [run])
    return path


def assert_same(actual, expected):
    """Equal to the last bit, dtypes and shapes included."""
    assert actual.names == expected.names
    assert actual.blocks == expected.blocks
    ours, others = arrays_of(actual.state), arrays_of(expected.state)
    assert set(ours) == set(others)
    for name in ours:
        for a, b in zip(ours[name], others[name], strict=True):
            assert_array(a, b, name)
    for a, b in zip(actual.params + actual.momentum, expected.params + expected.momentum, strict=True):
        assert_array(a, b, "params and momentum")


def assert_array(a, b, name):
    if b is None:
        assert a is None
        return
    assert (a.shape, a.dtype) == (np.shape(b), np.asarray(b).dtype), name
    assert a.tobytes() == np.asarray(b).tobytes(), name


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_loaded_is_what_was_saved_to_the_last_bit(name, tmp_path):
    config, first = start(SETTINGS[name])
    middle = go_on(config, first, 0, 13)
    assert int(middle.state.pairs[0]) > 0
    core.save_state(tmp_path / "run", [middle, first])
    loaded, untouched = core.load_state(tmp_path / "run")
    assert_same(loaded, middle)
    assert_same(untouched, first)
    assert_same(go_on(config, loaded, 13, 30), go_on(config, middle, 13, 30))


def test_a_bfloat16_history_keeps_its_bits(tmp_path):
    config, first = start({"history_dtype": "float32", "preset": "lbfgs"}, dtypes=("float32",) * 5)
    run = go_on(config, first, 0, 5)
    history = tuple(array.astype(ml_dtypes.bfloat16) for array in run.state.history)
    run = run._replace(state=run.state._replace(history=history))
    core.save_state(tmp_path / "run", [run])
    assert_same(core.load_state(tmp_path / "run")[0], run)


def test_the_same_run_gives_the_same_bytes(run, saved, tmp_path):
    core.save_state(tmp_path / "again", [run])
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_leaves_and_blocks_are_found_by_name_in_any_order(run, saved):
    order = [2, 4, 1, 0, 3]
    names = tuple(NAMES[i] for i in order)
    pick = lambda values: tuple(values[i] for i in order)  # noqa: E731
    blocks = core.partition(names, "layer")
    of_block = [0 if 0 in {order[i] for i in block} else 1 if 2 in {order[i] for i in block} else 2
                for block in blocks]  # fmt: skip
    leaf = {"leaf_steps", "leaf_window", "leaf_prev_window"}
    arrays = {name: pick(value) for name, value in adapter.leaf_arrays(run.state).items()}
    numbers = {
        name: np.asarray(value)[order if name in leaf else of_block]
        for name, value in adapter.coefficients(run.state).items()
        if np.ndim(value)
    }
    state = adapter.with_leaf_arrays(run.state, arrays)._replace(**numbers)
    expected = core.Snapshot(names, blocks, state, pick(run.params), pick(run.momentum))
    (loaded,) = core.load_state(saved, [expected])
    assert_same(loaded, expected)


def test_a_leaf_without_a_gradient_takes_no_room(run, saved):
    names = [name for name, _ in safetensors.deserialize(saved.read_bytes())]
    assert "0/params/unused.weight" in names
    assert "0/history/a.weight" in names
    assert not any(name.endswith("/unused.weight") and "params" not in name for name in names)


def test_every_truncation_is_refused(saved):
    whole = saved.read_bytes()
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    lengths = {0, 1, 7, 8, header, len(whole) - 1, *rng.integers(0, len(whole), 100), *range(9, header, 97)}
    for length in lengths:
        saved.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="must be a whole safetensors file"):
            core.load_state(saved)


def test_every_flipped_bit_is_refused(saved):
    whole = saved.read_bytes()
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    bits = [*range(8 * 40), *rng.integers(0, 8 * header, 500), *rng.integers(0, 8 * len(whole), 500)]
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match="`path`"):
            core.load_state(saved)


def test_appended_bytes_are_refused(saved):
    with saved.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match="whole safetensors file"):
        core.load_state(saved)


def forge(path, change):
    """Rewrite a file with other content and a checksum that fits."""
    arrays = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        header = dict(file.metadata())
    told = json.loads(header["mlbfgs"])
    arrays, parts, more = change(arrays, told["parts"])
    told = {**told, "parts": parts, **(more or {}), "sha256": "0" * 64}
    told = {name: value for name, value in told.items() if value is not None}
    data = safetensors.numpy.save(arrays, {"mlbfgs": told.get("text", json.dumps(told))})
    digest = hashlib.sha256(data).hexdigest()
    path.write_bytes(data.replace(b"0" * 64, digest.encode(), 1))


def changed(part=None, arrays=None, header=None, drop=()):
    def change(old, parts):
        new = {name: array for name, array in old.items() if name not in drop}
        return {**new, **(arrays or {})}, [{**parts[0], **(part or {})}], header

    return change


FORGERIES = {
    "nothing": (changed(), None),
    "newer version": (changed(header={"version": 3}), "up to 2 of the format, .* got 3: a newer release"),
    "no version": (changed(header={"version": None}), "version"),
    "version in words": (changed(header={"version": "one"}), "version"),
    "no object": (changed(header={"text": "[1, 2]"}), "must be a checkpoint of mlbfgs"),
    "no json": (changed(header={"text": "{"}), "safetensors"),
    "huge number": (changed(header={"text": "9" * 5000}), "safetensors"),
    "header in depth": (changed(header={"text": "[" * 100_000}), "safetensors"),
    "no parts": (changed(header={"parts": None}), "what its header tells"),
    "empty parts": (lambda arrays, parts: ({}, [], None), "what its header tells"),
    "parts of numbers": (lambda arrays, parts: (arrays, [1], None), "what its header tells"),
    "parts that are none": (lambda arrays, parts: (arrays, 1, None), "what its header tells"),
    "repeated names": (changed({"names": ["a.weight"] * 5}), "distinct names"),
    "names of numbers": (changed({"names": [1, 2, 3, 4, 5]}), "distinct names"),
    "blocks that overlap": (changed({"blocks": [[0, 1, 2, 3, 4], [0]]}), "exactly once"),
    "blocks of words": (changed({"blocks": [["0", 1, 2, 3, 4]]}), "blocks of ints"),
    "huge memory": (changed({"history_size": 10**9}), "must hold for"),
    "no memory": (changed({"history_size": 0}), "must hold for 'gram' float64 of shape"),
    "history of objects": (changed({"history_dtype": "object"}), "history_dtype"),
    "preconditioner that is not there": (changed({"preconditioner": "none"}), "'exp_avg_sq/.* nothing"),
    "unknown preconditioner": (changed({"preconditioner": "best"}), "`preconditioner` must be one of"),
    "an array less": (changed(drop=["0/gram"]), "must hold for 'gram'"),
    "no counts": (changed(drop=["0/leaf_steps"]), "leaf_steps"),
    "an array more": (changed(arrays={"0/evil": np.zeros(3)}), "must hold for 'evil' nothing"),
    "an array of no part": (changed(arrays={"evil": np.zeros(3)}), "got more: \\['evil'\\]"),
    "another shape": (changed(arrays={"0/mean_params/a.bias": np.zeros(5)}), "mean_params/a.bias"),
    "another dtype": (changed(arrays={"0/pairs": np.zeros(3)}), "'pairs' int32"),
    "counts of another shape": (changed(arrays={"0/leaf_steps": np.zeros(1, np.int32)}), "leaf_steps"),
    "integer parameters": (changed(arrays={"0/params/a.bias": np.zeros(4, np.int32)}), "dtypes"),
    "unsigned arrays": (changed(arrays={"0/pairs": np.zeros(3, np.uint8)}), "unknown dtype U8"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_header_or_array_is_refused(name, run, saved):
    change, message = FORGERIES[name]
    forge(saved, change)
    if message is None:
        assert_same(core.load_state(saved)[0], run)
        return
    with pytest.raises(ValueError, match=message) as caught:
        core.load_state(saved)
    assert str(saved) in str(caught.value)


class _Bomb:
    def __reduce__(self):
        return pytest.fail, ("the file was executed",)


def test_files_of_other_formats_are_refused_and_not_executed(tmp_path):
    path = tmp_path / "file"
    for content in (b"", pickle.dumps(_Bomb()), b"\xff" * 100, (2**63).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="safetensors"):
            core.load_state(path)
    path.write_bytes(safetensors.numpy.save({"x": np.zeros(3)}))
    with pytest.raises(ValueError, match=r"checkpoint of mlbfgs, got a file that tells \[\]"):
        core.load_state(path)
    with pytest.raises(FileNotFoundError):
        core.load_state(tmp_path / "nowhere")


MISMATCHES = {
    "names": ({}, "layer", {"names": ("a.weight", "a.bias", "b.weight", "b.bias", "c")},
              "without \\['c'\\] and with \\['unused.weight'\\]"),
    "blocks": ({}, "all", {}, "must have the blocks"),
    "history": ({"history_size": 4}, "layer", {},
                "'history/a.weight' .* shape \\(2, 4, 4, 3\\), got .* shape \\(2, 5, 4, 3\\)"),
    "history's dtype": ({"history_dtype": "float16"}, "layer", {}, "'history/a.weight' float16"),
    "preconditioner": ({"preconditioner": "none"}, "layer", {}, "preconditioner='none', got one with 'diag"),
    "no pairs": ({"history_size": 0}, "layer", {}, "a run with history_size=0, got one with 5"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_file_of_another_run_is_refused(case, saved):
    settings, blocks, replaced, message = MISMATCHES[case]
    wanted = start(settings, blocks)[1]._replace(**replaced)
    with pytest.raises(ValueError, match=message):
        core.load_state(saved, [wanted])


def test_a_file_of_other_shapes_dtypes_or_sets_is_refused(run, saved):
    params = (np.zeros((3, 4)), *run.params[1:])
    with pytest.raises(ValueError, match=r"'params/a.weight' float64 of shape \(3, 4\), got float64"):
        core.load_state(saved, [run._replace(params=params)])
    params = (run.params[0].astype("float32"), *run.params[1:])
    with pytest.raises(ValueError, match=r"'params/a\.weight' float32"):
        core.load_state(saved, [run._replace(params=params)])
    with pytest.raises(ValueError, match=r"2 sets of parameters .* got 1"):
        core.load_state(saved, [run, run])


def test_what_cannot_be_loaded_is_not_saved(run, tmp_path):
    path = tmp_path / "run"
    faults = [
        ([], "`snapshots` must hold at least one"),
        ([run._replace(names=("x",) * 5)], "distinct names"),
        ([run._replace(blocks=((0, 1),))], "`blocks` must hold each leaf index"),
        ([run._replace(params=(np.zeros((3, 4)), *run.params[1:]))], "must hold for"),
        ([run._replace(momentum=(np.zeros(4), *run.momentum[1:]))], "momentum/a.weight"),
    ]
    for snapshots, message in faults:
        with pytest.raises(ValueError, match=message):
            core.save_state(path, snapshots)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["hash", "sync", "rename"])
def test_a_fault_while_saving_leaves_the_old_file_whole(fault, run, saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    target = {"hash": (hashlib, "file_digest"), "sync": (os, "fsync"), "rename": (os, "replace")}[fault]
    monkeypatch.setattr(*target, fail)
    if fault == "rename":
        monkeypatch.setattr(type(saved), "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        core.save_state(saved, [run._replace(params=tuple(np.zeros_like(p) for p in run.params))])
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_disk_that_is_full_in_the_middle_leaves_the_old_file_whole(run, saved):
    before = saved.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match="cannot write"):
            core.save_state(saved, [run])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_what_killed_processes_left_is_removed_once_it_is_old(run, saved):
    names = [".run.safetensors.a.tmp", ".run.safetensors.b.tmp", ".other.safetensors.a.tmp", "mine.tmp"]
    old, fresh, other, mine = (saved.with_name(name) for name in names)
    for path in (old, fresh, other, mine):
        path.write_bytes(b"partial")
        if path is not fresh:
            os.utime(path, (0, time.time() - 2 * 3600))
    core.save_state(saved, [run])
    assert [path.exists() for path in (old, fresh, other, mine)] == [False, True, True, True]


def test_a_link_is_followed_and_permissions_are_those_of_a_new_file(run, saved, tmp_path):
    link, plain = tmp_path / "latest", tmp_path / "plain"
    link.symlink_to(saved)
    saved.write_bytes(b"old")
    core.save_state(link, [run])
    plain.touch()
    assert link.is_symlink()
    assert_same(core.load_state(saved)[0], run)
    assert saved.stat().st_mode == plain.stat().st_mode


def test_a_renamed_and_transposed_run_goes_on_as_the_same_run(tmp_path):
    """On a problem that is the same in both layouts; the names' order differs."""
    config, first = start({"check_every": 1}, dtypes=("float64",) * 5)
    middle = go_on(config, first, 0, 10)
    other = middle.mapped(
        lambda name: name.replace("weight", "kernel"),
        lambda name, array: np.swapaxes(array, -1, -2) if name.endswith("kernel") else array,
    )
    core.save_state(tmp_path / "run", [other])
    (loaded,) = core.load_state(tmp_path / "run")
    assert loaded.names[0] == "a.kernel"
    assert loaded.state.history[0].shape == (2, 5, 3, 4)
    back = loaded.mapped(
        lambda name: name.replace("kernel", "weight"),
        lambda name, array: np.swapaxes(array, -1, -2) if name.endswith("weight") else array,
    )
    assert_same(back, middle)


def test_without_safetensors_the_error_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"mlbfgs\[checkpoint\]"):
        core.save_state(tmp_path / "run", [run])
