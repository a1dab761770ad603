"""Parameters that are views: those that PyTorch resolves lazily train; those that overlap are refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mlbfgs_torch import MLBFGS
from mlbfgs_torch.memory import check_memory
from tests.trainers.helpers import FAST, assert_same

pytestmark = pytest.mark.backends("torch")

LAZY = {
    "conj": lambda z: z.conj(),
    "mH": lambda z: z.mH,
    "transposed conj": lambda z: z.t().conj(),
    "part of a conj": lambda z: z.conj()[:, 1:],
    "imag of a conj": lambda z: z.conj().imag,
    "row of an imag": lambda z: z.conj().imag[1],
    "number of an imag": lambda z: z.conj().imag[0, 0],
    "nothing of a conj": lambda z: z.conj()[:0],
    "negated": torch._neg_view,
    "negated and conjugated": lambda z: torch._neg_view(z.conj()),
    "negated real part": lambda z: torch._neg_view(z.real),
    "channels last": lambda z: (
        z.reshape(1, 2, 2, 1).expand(2, 2, 2, 2).to(memory_format=torch.channels_last).conj()
    ),
}
"""Views that PyTorch resolves when they are read."""


def base(dtype=torch.complex128):
    return torch.randn(2, 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)).to(dtype)


def resolved(view):
    """The same values, with the same strides, stored in memory without lazy views."""
    return nn.Parameter(view.detach().resolve_conj().resolve_neg().clone())


def grads(param, number):
    """Of a quadratic whose curvature differs from value to value."""
    curvature = torch.linspace(0.5, 2, max(1, param.numel()), dtype=torch.float64)[: param.numel()]
    value = param.detach().resolve_conj().resolve_neg() * (1 + 0.1 * (number % 3))
    return value * curvature.reshape(param.shape).to(value.real.dtype)


@pytest.mark.parametrize(
    "settings",
    [FAST, {"preset": "fit", "update_every": 3, "decoupled_weight_decay": False}, {"momentum": 0.0}],
    ids=str,
)
@pytest.mark.parametrize("lazy", LAZY)
def test_a_lazily_resolved_view_trains_as_its_values_do(lazy, settings, coefficients):
    view = nn.Parameter(LAZY[lazy](base()))
    assert view.is_conj() or view.is_neg()
    start = resolved(view)
    runs = []
    for lead in (view, start):
        beside = nn.Parameter(torch.ones(3, dtype=lead.dtype))  # in one pack
        params = [lead, beside]
        optimizer = MLBFGS(params, lr=0.05, weight_decay=0.1, **settings)
        for number in range(8):
            for param in params:
                param.grad = grads(param, number)
            optimizer.step()
        runs.append([param.detach().resolve_conj().resolve_neg() for param in params])
        if lead.numel():
            assert not torch.equal(runs[-1][0], LAZY[lazy](base()).resolve_conj().resolve_neg())
    assert_same(*runs)
    assert view.is_conj() or view.is_neg()


@pytest.mark.parametrize("lazy", ["imag of a conj", "negated real part"])
def test_a_negated_view_moves_the_way_adamw_moves_it(lazy):
    """Both take one step from the same place against the same gradient."""
    ends = []
    for make in (torch.optim.AdamW, MLBFGS):
        z = base()
        param = nn.Parameter(LAZY[lazy](z))
        optimizer = make([param], lr=0.05)
        before = param.detach().clone()
        param.square().sum().backward()
        optimizer.step()
        ends.append([torch.sign(param.detach() - before), torch.sign(torch.view_as_real(z - base()))])
    assert_same(*ends)


@pytest.mark.parametrize("lazy", LAZY)
def test_training_through_autograd_reaches_the_minimum(lazy):
    z = base()
    param, target = nn.Parameter(LAZY[lazy](z)), 0.5
    optimizer = MLBFGS([param], lr=0.5, preset="fit")
    for _ in range(60):
        optimizer.zero_grad()
        (param - target).abs().square().sum().backward()
        optimizer.step()
    assert torch.all((param - target).abs() < 1e-3)


@pytest.mark.parametrize("kind", ["conj", "neg"])
@pytest.mark.parametrize("count", [1, 2], ids=["alone", "packed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_a_lazily_resolved_gradient_is_read_as_it_is(kind, count, dtype, coefficients):
    runs = []
    for lazy in (False, True):
        params = [
            nn.Parameter(base().to(dtype) if dtype.is_complex else base().real.clone()) for _ in range(count)
        ]
        optimizer = MLBFGS(params, lr=0.05, **FAST)
        for number in range(6):
            for param in params:
                grad = grads(param, number)
                if lazy and kind == "neg":
                    grad = torch._neg_view(-grad)
                elif lazy:
                    grad = grad.conj().resolve_conj().conj() if dtype.is_complex else (-1j * grad).conj().imag
                param.grad = grad
                assert not lazy or grad.is_conj() or grad.is_neg()
            optimizer.step()
        runs.append([param.detach() for param in params])
    assert_same(*runs)


@pytest.mark.parametrize("lazy", LAZY)
def test_a_lazily_resolved_view_travels_with_its_run(lazy, tmp_path):
    def begin(number):
        return nn.Parameter(LAZY[lazy](base() * number))

    def go(param, optimizer, steps):
        for number in steps:
            param.grad = grads(param, number)
            optimizer.step()

    param = begin(1)
    optimizer = MLBFGS([("x", param)], lr=0.05, **FAST)
    go(param, optimizer, range(5))
    optimizer.save_state(tmp_path / "run")
    state, here = copy.deepcopy(optimizer.state_dict()), param.detach().clone()
    go(param, optimizer, range(5, 9))
    for way in ("file", "dictionary", "added group"):
        other = begin(3)
        if way == "added group":
            resumed = MLBFGS([("first", nn.Parameter(torch.ones(2, dtype=torch.float64)))], lr=0.05, **FAST)
            resumed.add_param_group({"params": [("x", other)]})
            resumed.param_groups.pop(0)
        else:
            resumed = MLBFGS([("x", other)], lr=0.05, **FAST)
        if way == "file":
            resumed.load_state(tmp_path / "run")
        else:
            resumed.load_state_dict(state)
            other.data.copy_(here)
        torch.testing.assert_close(other.detach(), here, rtol=0, atol=0)
        go(other, resumed, range(5, 9))
        torch.testing.assert_close(other.detach(), param.detach(), rtol=0, atol=0)


def test_a_view_may_be_resolved_during_a_run():
    runs = []
    for resolve in (False, True):
        param = nn.Parameter(base().conj())
        optimizer = MLBFGS([param], lr=0.05, **FAST)
        for number in range(10):
            if resolve and number == 4:
                param.data = param.data.resolve_conj().clone()
            if resolve and number == 7:
                param.data = param.data.conj().resolve_conj().conj()
            param.grad = grads(param, number)
            optimizer.step()
        runs.append([param.detach().resolve_conj()])
    assert_same(*runs)


W = torch.arange(1.0, 17.0).reshape(4, 4)

OVERLAPPING = {
    "transposed": lambda w: (w, w.T),
    "the same": lambda w: (w, w[:]),
    "all but the ends": lambda w: (w[:-1], w[1:]),
    "a part": lambda w: (w, w[2, 1:3]),
    "crossing": lambda w: (w[1], w[:, 2]),
    "two steps and three": lambda w: (w.view(-1)[::2], w.view(-1)[::3]),
    "another dtype": lambda w: (w, w.view(torch.int32).view(torch.float32)[0]),
    "through NumPy": lambda w: (w, torch.from_numpy(w.numpy()[3:])),
    "complex and its real part": lambda w: (torch.view_as_complex(w.view(8, 2)), w.view(8, 2)[:, 0]),
    "conjugated": lambda w: (torch.view_as_complex(w.view(8, 2)), torch.view_as_complex(w.view(8, 2)).conj()),
    "without memory": lambda w: (w.to("meta"),) * 2,
    "a number": lambda w: (w[2, 2], w[2]),
}
APART = {
    "halves": lambda w: (w.view(-1)[:8], w.view(-1)[8:]),
    "even and odd": lambda w: (w.view(-1)[::2], w.view(-1)[1::2]),
    "columns": lambda w: w.unbind(1),
    "checkerboard": lambda w: (w[::2, ::2], w[::2, 1::2], w[1::2, ::2], w[1::2, 1::2]),
    "quarters": lambda w: (w[:2, :2], w[:2, 2:], w[2:, :2], w[2:, 2:]),
    "real and imaginary parts": lambda w: (
        torch.view_as_complex(w.view(8, 2)).real.unbind()
        + torch.view_as_complex(w.view(8, 2)).conj().imag.unbind()
    ),
    "empty ones": lambda w: (w, w[:0], w[2:2]),
    "without memory": lambda w: (w.to("meta"), w.to("meta")),
    "columns without memory": lambda w: w.to("meta").unbind(1),
}


@pytest.mark.parametrize("kind", OVERLAPPING)
def test_parameters_that_share_memory_are_refused_by_name(kind):
    first, second = OVERLAPPING[kind](W.clone())
    words = "`params` must not share memory, got 'enc' and 'dec', which do"
    with pytest.raises(ValueError, match=words):
        MLBFGS(
            [("enc", nn.Parameter(first)), ("mid", nn.Parameter(W.clone())), ("dec", nn.Parameter(second))]
        )
    with pytest.raises(ValueError, match="got 'param0' and 'param1', which do"):
        MLBFGS([{"params": [nn.Parameter(first)]}, {"params": [nn.Parameter(second)], "history_size": 2}])


@pytest.mark.parametrize("kind", APART)
def test_views_of_one_storage_that_do_not_overlap_train_as_copies_do(kind):
    runs = []
    for make in (lambda view: view, torch.clone):
        params = [nn.Parameter(make(view)) for view in APART[kind](W.clone())]
        optimizer = MLBFGS(params, lr=0.05, **FAST)
        if params[0].is_meta:
            return
        for number in range(8):
            for param in params:
                param.grad = grads(param, number)
            optimizer.step()
        runs.append([param.detach() for param in params])
    assert_same(*runs)


def test_tied_parameters_are_one():
    tied = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": tied, "b": nn.Linear(3, 3), "c": tied})
    assert MLBFGS(model.named_parameters())._partitions()[0].members[-1].name == "b.bias"
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = MLBFGS([tied.bias, tied.bias], lr=0.05)
    alone = nn.Parameter(tied.bias.detach().clone())
    other = MLBFGS([alone], lr=0.05)
    for param, one in ((tied.bias, optimizer), (alone, other)):
        param.grad = torch.ones(3)
        one.step()
    assert torch.equal(tied.bias, alone)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(1).expand(3),
        lambda: torch.ones(2, 1).expand(2, 4),
        lambda: torch.ones(1, device="meta").expand(3),
        lambda: torch.arange(5.0).unfold(0, 3, 1),
        lambda: torch.ones(1, dtype=torch.complex64).expand(3).conj(),
    ],
)
def test_parameters_that_cannot_be_updated_in_place_are_refused_by_name(make):
    with pytest.raises(
        ValueError, match=r"`params` must be tensors that can be updated in place, .* for 'w'"
    ):
        MLBFGS([("w", nn.Parameter(make()))])


def test_parameters_that_come_to_share_memory_during_a_run_are_refused_with_nothing_changed():
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
    optimizer = MLBFGS(params, lr=0.05, **FAST)
    for param in params:
        param.grad = torch.ones(4)
    optimizer.step()
    params[1].data, before = params[0].data.view(2, 2).t(), params[0].detach().clone()
    params[1].grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="must not share memory, got 'param0' and 'param1'"):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_an_added_group_that_shares_memory_is_refused_and_not_added():
    param = nn.Parameter(torch.ones(4))
    optimizer = MLBFGS([param])
    group = {"params": [nn.Parameter(torch.ones(1)), nn.Parameter(param.data[1:])]}
    with pytest.raises(ValueError, match="must not share memory, got 'param0' and 'param2'"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_views_overlap_where_their_addresses_do():
    """Against the sets of addresses, for views drawn at random."""
    generator, memory, verdicts = np.random.default_rng(0), torch.zeros(64), []
    for _ in range(300):
        views = []
        while len(views) < 2:
            shape = tuple(int(n) for n in generator.integers(1, 4, size=generator.integers(1, 4)))
            strides = tuple(int(n) for n in generator.integers(1, 9, size=len(shape)))
            offset = int(generator.integers(0, 12))
            places = memory.new_tensor(range(64)).as_strided(shape, strides, offset).reshape(-1).tolist()
            if len(set(places)) == len(places):
                views.append((memory.as_strided(shape, strides, offset), set(places)))
        expected = bool(views[0][1] & views[1][1])
        verdicts.append(expected)
        try:
            check_memory([(str(i), view) for i, (view, _) in enumerate(views)])
            found = False
        except ValueError:
            found = True
        assert found == expected
    assert 50 < sum(verdicts) < 250
