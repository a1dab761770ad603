"""Arrays that `mlbfgs_arrays.MLBFGS` must not train as they are: overlapping ones, subclasses with their own
rules, and arrays whose shape, strides or dtype change during a run."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
import time
import types
import warnings

import ml_dtypes
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from mlbfgs_arrays import MLBFGS
from mlbfgs_arrays.arguments import Structure, place_of
from mlbfgs_core import overlap
from mlbfgs_core.overlap import find_overlap
from tests.adapters.test_arrays import FAST, Problem, contents

pytestmark = pytest.mark.backends("numpy")

# Memory.

MATRIX, VECTOR, CUBE = np.ones((4, 5)), np.ones(12), np.ones((3, 4, 5), "float32")
COMPLEX = np.ones((3, 2), complex)
OVERLAPPING = {
    "a matrix and its transpose": (MATRIX, MATRIX.T),
    "one array twice": (MATRIX, MATRIX),
    "an array and a view of all of it": (VECTOR, VECTOR[:]),
    "an array and a copy of its header": (VECTOR, VECTOR.view()),
    "slices that share most values": (VECTOR[:-1], VECTOR[1:]),
    "slices that share one value": (VECTOR[:6], VECTOR[5:]),
    "a part and the whole, turned around": (VECTOR[::-1], VECTOR[3:4]),
    "every second and every third value": (VECTOR[::2], VECTOR[1::3]),
    "a row and a column": (MATRIX[2], MATRIX[:, 3]),
    "blocks that share a corner": (MATRIX[:3, :3], MATRIX[2:, 2:]),
    "a view of one value": (CUBE, CUBE[2, 3, 4, ...]),
    "complex values and their real parts": (COMPLEX, COMPLEX.real),
    "complex values and their imaginary parts, transposed": (COMPLEX, COMPLEX.imag.T),
    "the same bytes in another dtype": (VECTOR, VECTOR.view("float32")),
    "half of the bytes of one value": (VECTOR[:1], VECTOR.view(ml_dtypes.bfloat16)[3:]),
}
APART = {
    "interleaved values": (VECTOR[::2], VECTOR[1::2]),
    "interleaved columns": tuple(MATRIX[:, i] for i in range(5)),
    "blocks side by side": (MATRIX[:, :2], MATRIX[:, 2:], np.ones(3)),
    "real and imaginary parts": (COMPLEX.real, COMPLEX.imag),
    "values between others, turned around": (VECTOR[::-3], VECTOR[::-3][:0], VECTOR[1::3], VECTOR[0:1]),
    "empty views of one array": (VECTOR[:0], VECTOR[:0], MATRIX[:, 2:2]),
    "an array of one value, broadcast along axes of length one": (as_strided(VECTOR[3:4], (1, 1), (0, 0)),),
    "a window whose strides do not nest, yet meets no value twice": (as_strided(VECTOR, (3, 2), (16, 24)),),
}
TWICE = {
    "sliding windows": as_strided(VECTOR, (4, 3), (8, 8)),
    "windows that share one value": as_strided(VECTOR, (3, 4), (24, 8)),
    "a broadcast view": as_strided(VECTOR, (4, 3), (0, 8)),
    "a broadcast view of one value": as_strided(VECTOR[:1], (7,), (0,)),
    "a diagonal Toeplitz matrix": as_strided(VECTOR[5:], (3, 3), (-8, 8)),
    "values that overlap by half": as_strided(VECTOR, (3,), (4,)),
    "strides with a common multiple": as_strided(VECTOR, (4, 3), (16, 24)),
}


@pytest.mark.parametrize("name", OVERLAPPING)
@pytest.mark.parametrize("turned", [False, True])
def test_parameters_that_share_memory_are_refused_by_their_names(name, turned):
    first, second = OVERLAPPING[name][:: -1 if turned else 1]
    with pytest.raises(ValueError, match=r"must not share memory, got 'enc' and 'dec', which overlap$"):
        MLBFGS({"other": np.ones(3), "enc": first, "between": np.ones((2, 2)), "dec": second})
    with pytest.raises(ValueError, match=r"must not share memory, got 'param0' and 'param1', which overlap$"):
        MLBFGS([first, second])


@pytest.mark.parametrize("name", APART)
def test_views_of_one_array_that_share_no_memory_are_trained(name):
    params = [np.copy(x) for x in APART[name]]
    views = [x if x.flags.writeable else x.copy() for x in APART[name]]
    ours, expected = MLBFGS(views, 0.01, **FAST), MLBFGS(params, 0.01, **FAST)
    start = [x.copy() for x in views]
    for _ in range(6):
        ours.step([3 * x for x in views])
        expected.step([3 * x for x in params])
    for view, param, before in zip(views, params, start, strict=True):
        np.testing.assert_allclose(view, param, rtol=1e-9)
        view[...] = before


@pytest.mark.parametrize("name", TWICE)
def test_an_array_that_overlaps_itself_is_refused_by_its_name(name):
    with pytest.raises(
        ValueError, match=r"must hold each value once, got 'w', which overlaps itself in memory$"
    ):
        MLBFGS({"other": np.ones(3), "w": TWICE[name]})


def addresses(array):
    """The address of each byte of each value."""
    (start,) = {array.__array_interface__["data"][0]}
    steps = [np.arange(length) * stride for length, stride in zip(array.shape, array.strides, strict=True)]
    return [
        start + sum(offsets) + byte for *offsets, byte in itertools.product(*steps, range(array.itemsize))
    ]


def test_overlaps_are_those_of_the_addresses_one_by_one():
    random, buffer = np.random.default_rng(0), np.zeros(4000, np.uint8)

    def view():
        axes = random.integers(0, 4)
        shape = tuple(random.integers(1, 5, size=axes))
        strides = tuple(random.integers(-40, 41, size=axes) * random.choice([1, 4]))
        array = np.ndarray((1,), random.choice(["f2", "f4", "f8"]), buffer.data, random.integers(1500, 1700))
        return as_strided(array, shape, strides)

    kinds = {"none": 0, "one": 0, "two": 0}
    for _ in range(1500):
        pair = view(), view()
        one, other = map(addresses, pair)
        found = find_overlap(list(map(place_of, pair)))
        if len(set(one)) < len(one) or len(set(other)) < len(other):
            assert found[:2] == ((0, 0) if len(set(one)) < len(one) else (1, 1))
            kinds["one"] += 1
        elif set(one) & set(other):
            assert found == (0, 1, True)
            kinds["two"] += 1
        else:
            assert found is None
            kinds["none"] += 1
    assert min(kinds.values()) > 100


def test_what_is_too_hard_to_decide_is_refused_and_said_to_be(monkeypatch):
    monkeypatch.setattr(overlap, "_MOST_WORK", 1)
    steps = tuple(8 * step for step in (101, 103, 107, 109, 113))
    values = np.ones(100_000)
    hard = as_strided(values, (9,) * 5, steps), as_strided(values[50:], (9,) * 5, steps)
    with pytest.raises(
        ValueError, match=r"'param0', which overlaps itself in memory \(or may do so: .* hard"
    ):
        MLBFGS(hard[0])
    monkeypatch.setattr(overlap._Blocks, "parts", lambda blocks: ())
    with pytest.raises(ValueError, match=r"'param0' and 'param1', which overlap \(or may do so: .* too hard"):
        MLBFGS(list(hard))


@pytest.mark.parametrize("kind", ["apart", "slices", "columns", "every", "blocks"])
def test_thousands_of_arrays_are_compared_in_a_moment(kind):
    many, large = 5000, np.ones((40, 5000))
    arrays = {
        "apart": lambda: [np.ones(4) for _ in range(many)],
        "slices": lambda: np.split(large.reshape(-1), many),
        "columns": lambda: [large[:, i] for i in range(many)],
        "every": lambda: [large.reshape(-1)[i::many] for i in range(many)],
        "blocks": lambda: (
            [large[:20, i : i + 2] for i in range(0, many, 2)]
            + [large[20:, i : i + 2] for i in range(0, many, 2)]
        ),
    }[kind]()
    start = time.process_time()
    places = list(map(place_of, arrays))
    assert find_overlap(places) is None
    assert time.process_time() - start < 2  # 0.1 to 0.2 s; comparing each two took a minute
    assert find_overlap([*places, place_of(arrays[many // 2][-1:])]) == (many // 2, many, True)


class FakeCupy:
    """The part of a CuPy array that says where it is: there is no memory that could be read."""

    def __init__(self, pointer, shape, strides, dtype="float32"):
        self.data, self.shape, self.strides = types.SimpleNamespace(ptr=pointer), shape, strides
        self.dtype, self.ndim, self.size = np.dtype(dtype), len(shape), int(np.prod(shape))
        self.device = types.SimpleNamespace(id=0)

    @property
    def T(self):
        return FakeCupy(self.data.ptr, self.shape[::-1], self.strides[::-1], self.dtype)


@pytest.fixture
def no_gpu(monkeypatch):
    """CuPy without a GPU."""
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(ndarray=FakeCupy))


BEGIN = 0x7F00_0000_0000


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (FakeCupy(BEGIN, (4, 5), (20, 4)), FakeCupy(BEGIN, (4, 5), (20, 4)).T, True),
        (FakeCupy(BEGIN, (9,), (4,)), FakeCupy(BEGIN + 4, (9,), (4,)), True),
        (FakeCupy(BEGIN, (5,), (8,)), FakeCupy(BEGIN + 4, (5,), (8,)), False),
        (FakeCupy(BEGIN, (5,), (8,), "complex64"), FakeCupy(BEGIN + 4, (5,), (8,)), True),
        (FakeCupy(BEGIN, (5,), (8,)), FakeCupy(BEGIN + 36, (5,), (-8,)), False),
        (FakeCupy(BEGIN, (5,), (8,)), FakeCupy(BEGIN + 32, (5,), (-8,)), True),
        (FakeCupy(BEGIN, (2**35,), (4,)), FakeCupy(BEGIN + 2**36, (2**35,), (4,)), True),
        (FakeCupy(BEGIN, (2**35,), (4,)), FakeCupy(BEGIN + 2**37, (2**35,), (4,)), False),
        (FakeCupy(BEGIN, (0,), (4,)), FakeCupy(BEGIN, (3,), (4,)), False),
    ],
)
def test_arrays_of_cupy_are_compared_without_their_memory(one, other, shared):
    params = {"enc": one, "dec": other, "host": np.ones(3)}
    if not shared:
        assert Structure.of(params).names == ("enc", "dec", "host")
        return
    with pytest.raises(ValueError, match=r"must not share memory, got 'enc' and 'dec', which overlap$"):
        Structure.of(params)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("strides", [(0, 4), (4, 4), (8, 4)])
def test_an_array_of_cupy_that_overlaps_itself_is_refused(strides):
    with pytest.raises(ValueError, match=r"got 'w', which overlaps itself in memory$"):
        Structure.of({"w": FakeCupy(BEGIN, (5, 3), strides)})


def test_a_gradient_may_be_its_parameter_or_another_view_of_it():
    results = []
    for copied in (np.copy, np.asarray):
        params = [np.arange(1.0, 7.0), np.arange(1.0, 7.0).reshape(2, 3)]
        optimizer = MLBFGS(params, 0.05, 0.9, 0.1, **FAST)
        for _ in range(12):
            optimizer.step([copied(params[0][::-1]), copied(params[1])])
        results.append(np.concatenate([x.ravel() for x in params]))
    assert np.array_equal(*results)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_views_of_one_array_survive_copies_and_checkpoints(duplicate, tmp_path):
    values = np.linspace(1, 2, 12)
    params = {"even": values[::2], "odd": values[1::2]}
    optimizer = MLBFGS(params, 0.01, **FAST)

    def train(optimizer):
        for _ in range(5):
            optimizer.step({name: 3 * x for name, x in optimizer.params.items()})

    train(optimizer)
    optimizer.save_state(tmp_path / "run.safetensors")
    twin = duplicate(optimizer)
    train(optimizer)
    train(twin)
    assert contents(twin) == contents(optimizer)
    optimizer.load_state(tmp_path / "run.safetensors")
    train(optimizer)
    assert contents(twin) == contents(optimizer)


# Subclasses.


class WithUnit(np.ndarray):
    """A quantity, as packages for units make them."""


REFUSED = {
    "MaskedArray": lambda: np.ma.masked_array([1.0, 2.0, 3.0], [False, True, False]),
    "matrix": lambda: np.asarray([[1.0, 2.0, 3.0]]).view(np.matrix),
    "recarray": lambda: np.ones(3).view(np.recarray),
    "WithUnit": lambda: np.ones(3).view(WithUnit),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [np.ones(2), x], lambda x: {"w": x}])
def test_subclasses_with_rules_of_their_own_are_refused_by_their_type(kind, wrap):
    with pytest.raises(TypeError, match=f"`params` must be plain arrays, .*, got {kind} for '(param.|w)'"):
        MLBFGS(wrap(REFUSED[kind]()))
    plain = np.asarray(REFUSED[kind]())  # what the message advises
    MLBFGS(plain, 0.1, 0.0).step(plain.copy())
    assert np.all(plain < [1, 2, 3])


def test_a_structured_array_is_refused_by_its_dtype():
    with pytest.raises(TypeError, match=r"`params` must be of one of the dtypes .*, got \[\('a', '<f8'\)"):
        MLBFGS(np.zeros(3, dtype=[("a", "f8"), ("b", "f8")]))


@pytest.mark.parametrize("kind", ["MaskedArray", "recarray", "WithUnit"])
def test_gradients_with_rules_of_their_own_are_refused_before_anything_changes(kind):
    optimizer = MLBFGS({"w": np.ones(3), "v": np.ones(3)}, 0.1)
    optimizer.step({"w": np.ones(3), "v": np.ones(3)})
    before = contents(optimizer)
    with pytest.raises(TypeError, match=f"`grads` must hold a NumPy array or None for 'v', got .*{kind}"):
        optimizer.step({"w": np.ones(3), "v": REFUSED[kind]()})
    assert contents(optimizer) == before


def test_a_gradient_in_a_matrix_is_taken_as_an_array():
    results = []
    for kind in (np.ndarray, np.matrix):
        w = np.linspace(1, 2, 6).reshape(2, 3)
        optimizer = MLBFGS(w, 0.05, **FAST)
        for _ in range(8):
            optimizer.step((2 * w).view(kind))
        results.append(w)
    assert np.array_equal(*results)


def test_a_file_in_memory_is_trained_in_place(tmp_path):
    expected = np.linspace(1, 2, 6)
    np.lib.format.open_memmap(tmp_path / "w.npy", "w+", "float64", (6,))[:] = expected
    mapped = np.load(tmp_path / "w.npy", mmap_mode="r+")
    parts = [mapped[:3], mapped[3:]]
    assert type(parts[0]) is np.memmap
    optimizer, twin = MLBFGS(parts, 0.05, **FAST), MLBFGS([expected[:3], expected[3:]], 0.05, **FAST)
    for _ in range(8):
        optimizer.step([2 * x for x in parts])
        twin.step([2 * x for x in twin.params])
    mapped.flush()
    assert np.array_equal(np.load(tmp_path / "w.npy"), expected)
    with pytest.raises(ValueError, match=r"must not share memory, got 'param0' and 'param1'"):
        MLBFGS([mapped, mapped[1:]])
    with pytest.raises(ValueError, match="got a read-only array for 'param0'"):
        MLBFGS(np.load(tmp_path / "w.npy", mmap_mode="r"))


# A form that is changed during the run.


def reshaped(x):
    x.shape = (x.size // 2, 2)


def flattened(x):
    x.shape = (x.size,)


def narrowed(x):
    x.dtype = "float32"


def made_integer(x):
    x.dtype = "int64"


def swapped(x):
    x.dtype = ">f8"


def made_complex(x):
    x.dtype = "complex128"


def shortened(x):
    x.resize(2, refcheck=False)


def lengthened(x):
    x.resize((x.size + 1,), refcheck=False)


def restrided(x):
    x.strides = (8, 32)


CHANGES = [
    reshaped,
    flattened,
    narrowed,
    made_integer,
    swapped,
    made_complex,
    restrided,
    shortened,
    lengthened,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_parameter_whose_form_changes_is_refused_by_name_and_the_run_is_not_lost(change, tmp_path):
    def start():
        params = {"w": np.linspace(1, 2, 16).reshape(4, 4).copy(), "v": np.linspace(2, 3, 5)}
        return MLBFGS(params, 0.05, 0.9, 0.1, **FAST)

    def train(optimizer, steps=6):
        for _ in range(steps):
            optimizer.step({name: 3 * x for name, x in optimizer.params.items()})

    optimizer, twin = start(), start()
    train(optimizer)
    train(twin, 12)
    before, state = contents(optimizer), optimizer.state_dict()
    optimizer.save_state(tmp_path / "run.safetensors")
    w = optimizer.params["w"]
    with warnings.catch_warnings(action="ignore"):  # NumPy deprecates some of these
        change(w)
    grads = {name: np.ones_like(x) for name, x in optimizer.params.items()}
    told = r"`params` must keep the form .*, shape \(4, 4\), .*float64 for 'w', got shape "
    for refused in (
        lambda: optimizer.step(grads),
        lambda: optimizer.step({"w": None, "v": grads["v"]}),
        lambda: optimizer.save_state(tmp_path / "other.safetensors"),
        lambda: optimizer.load_state(tmp_path / "run.safetensors"),
        lambda: optimizer.load_state_dict(state),
        lambda: pickle.dumps(optimizer),
        lambda: copy.deepcopy(optimizer),
    ):
        with pytest.raises(ValueError, match=told):
            refused()
    assert not (tmp_path / "other.safetensors").exists()
    now = contents(optimizer)
    assert {n: x for n, x in now.items() if n != "param/w"} == {
        n: x for n, x in before.items() if n != "param/w"
    }
    with warnings.catch_warnings(action="ignore"):
        w.dtype = "float64"
        if w.size != 16:
            w.resize(16, refcheck=False)
        w.shape = (4, 4)
        w.strides = (32, 8)
    if change in (shortened, lengthened):
        optimizer.load_state(tmp_path / "run.safetensors")
    train(optimizer)
    assert contents(optimizer) == contents(twin)


def test_a_parameter_that_is_made_read_only_is_refused_until_it_can_be_written_to(tmp_path):
    problem = Problem()
    optimizer, twin = MLBFGS(problem.params(), 0.05, **FAST), MLBFGS(problem.params(), 0.05, **FAST)
    problem.train(optimizer, stop=6)
    expected = problem.train(twin)
    before = contents(optimizer)
    optimizer.save_state(tmp_path / "run.safetensors")
    optimizer.params["hidden.bias"].setflags(write=False)
    for refused in (
        lambda: problem.train(optimizer, 6, 7),
        lambda: optimizer.load_state(tmp_path / "run.safetensors"),
    ):
        with pytest.raises(ValueError, match=r"updated in place, got a read-only array for 'hidden.bias'"):
            refused()
    assert contents(optimizer) == before
    optimizer.save_state(tmp_path / "run.safetensors")
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.params["hidden.bias"].setflags(write=True)
    assert np.array_equal(problem.train(optimizer, 6), expected)


@pytest.mark.parametrize("changed", ["w", "v"])
def test_an_array_in_another_dtype_that_replaces_a_parameter_is_noticed_by_its_gradient(changed):
    params = {"w": np.ones(3, "float32"), "v": np.ones(3, "float32")}
    optimizer = MLBFGS(dict(params), 0.1)  # which cannot see that the user's own dictionary changes
    params[changed] = params[changed].astype("float64")
    before = contents(optimizer)
    with pytest.raises(TypeError, match=f"of the dtype float32 for '{changed}', got float64"):
        optimizer.step({name: 2 * x for name, x in params.items()})
    assert contents(optimizer) == before


def test_a_run_goes_on_in_float64_from_a_state_that_was_widened():
    """As the page on arrays shows; a fresh start from the same values would forget what was learned."""
    curvature = np.geomspace(0.01, 1, 20)
    w = np.ones(20, "float32")
    optimizer = MLBFGS({"w": w}, 0.5, preset="lbfgs")
    for _ in range(40):
        optimizer.step({"w": (curvature * (w - 1 / 3)).astype("float32")})
    assert np.abs(w - 1 / 3).max() > 1e-9
    state = {
        name: x.astype("float64") if getattr(x, "dtype", None) == "float32" else x
        for name, x in optimizer.state_dict().items()
    }
    wide = MLBFGS({"w": w.astype("float64")}, preset="lbfgs")
    wide.load_state_dict(state)
    assert np.array_equal(wide.state_dict()["history/w"], optimizer.state_dict()["history/w"])
    (w,) = wide.params.values()
    for _ in range(150):
        wide.step({"w": curvature * (w - 1 / 3)})
    assert np.abs(w - 1 / 3).max() < 1e-12
