"""Bad input: an error of the right kind that names the argument, the rule and the value."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import array_api_compat.numpy as numpy_namespace
import numpy as np
import pytest

import mlbfgs_core as core
from mlbfgs_core import adapter
from tests.helpers import arrays_of

LEAF = np.ones((2, 3))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"history_size": -1}, ValueError, "`history_size` must be >= 0, got -1"),
        ({"history_size": 2.5}, TypeError, "`history_size` must be an int, got 2.5"),
        ({"history_size": True}, TypeError, "`history_size`"),
        ({"update_every": 0}, ValueError, "`update_every` must be >= 1, got 0"),
        ({"update_every": "often"}, TypeError, "`update_every` must be an int, got 'often'"),
        ({"check_every": -1}, ValueError, "`check_every` must be >= 1, got -1"),
        ({"adaptive": 1}, TypeError, "`adaptive` must be a bool, got 1"),
        ({"signal_to_noise": -1.0}, ValueError, "`signal_to_noise` must be finite and >= 0, got -1.0"),
        ({"noise_floor": float("inf")}, ValueError, "`noise_floor` must be finite and >= 0, got inf"),
        ({"beta": 1.0}, ValueError, r"`beta` must be None or in \[0, 1\), got 1.0"),
        ({"beta": float("nan")}, ValueError, "`beta`"),
        ({"beta": "0.9"}, TypeError, "`beta`"),
        ({"min_cosine": 1.0}, ValueError, "`min_cosine`"),
        ({"shrinkage": -0.1}, ValueError, r"`shrinkage` must be in \[0, 1\], got -0.1"),
        ({"shrinkage": 1.1}, ValueError, r"`shrinkage` must be in \[0, 1\], got 1.1"),
        ({"shrinkage": "no"}, TypeError, "`shrinkage`"),
        ({"precondition_frequency": 0}, ValueError, "`precondition_frequency` must be >= 1, got 0"),
        ({"max_preconditioner_dim": 2.5}, TypeError, "`max_preconditioner_dim` must be an int, got 2.5"),
        ({"factor_beta": 1.0}, ValueError, r"`factor_beta` must be in \[0, 1\), got 1.0"),
        ({"preconditioner": "kron"}, ValueError, "`preconditioner` must be one of .*, got .kron."),
        ({"clip_factor": 0.5}, ValueError, "`clip_factor` must be finite and >= 1, got 0.5"),
        ({"preconditioner_power": 1.5}, ValueError, r"`preconditioner_power` must be in \[0, 1\], got 1.5"),
        ({"preconditioner_beta": 1.0}, ValueError, "`preconditioner_beta`"),
        ({"step_length": "long"}, ValueError, "`step_length` must be one of .*, got 'long'"),
        ({"history_dtype": "int8"}, ValueError, "`history_dtype` must be None or one of .*, got 'int8'"),
        ({"damping": 0.5}, TypeError, "`damping` must be None or three numbers .*, got 0.5"),
        ({"damping": (0.1, 5.0)}, TypeError, "`damping`"),
        ({"damping": (2.0, 5.0, 0.5)}, ValueError, "sigma_L < 1 < sigma_H"),
        ({"damping": (0.1, 5.0, 0.0)}, ValueError, "0 < tau_0 <= 1"),
        ({"preset": "best"}, ValueError, "`preset` must be None or one of .*, got 'best'"),
        ({"memory": 3}, TypeError, "unknown setting `memory`"),
        ({"beta": np.float32(1.5)}, ValueError, r"`beta` must be None or in \[0, 1\), got 1.5"),
        ({"beta": np.asarray(-1)}, ValueError, "`beta` must be None or .*, got -1"),
        ({"beta": np.asarray([0.5])}, TypeError, r"`beta` must be None or .*, got array\(\[0.5\]\)"),
        ({"beta": [0.5]}, TypeError, r"`beta` must be None or .*, got \[0.5\]"),
        ({"beta": np.True_}, TypeError, "`beta`"),
        ({"beta": True}, TypeError, "`beta`"),
        ({"beta": 0.5j}, TypeError, "`beta`"),
        ({"min_cosine": np.complex64(0.5)}, TypeError, "`min_cosine`"),
        ({"history_size": np.float64(5)}, TypeError, "`history_size` must be an int, got 5.0"),
        ({"history_size": np.asarray(True)}, TypeError, "`history_size` must be an int"),
        ({"history_size": np.int8(-1)}, ValueError, "`history_size` must be >= 0, got -1"),
        ({"update_every": np.asarray([3])}, TypeError, r"`update_every` must be an int, got array\(\[3\]\)"),
        ({"check_every": [2]}, TypeError, r"`check_every` must be an int, got \[2\]"),
        ({"damping": (np.float32(2), 5.0, 0.5)}, ValueError, "sigma_L < 1 < sigma_H"),
        ({"damping": (0.1, 5.0, np.asarray([0.5]))}, TypeError, "`damping`"),
    ],
)
def test_setting_out_of_range_is_refused(settings, error, words):
    with pytest.raises(error, match=words):
        core.Config(**settings)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble, np.asarray], ids=repr)
def test_numbers_of_numpy_are_numbers(kind):
    given = core.Config(
        history_size=np.int64(3),
        update_every=np.asarray(7, dtype=np.int32),
        check_every=np.uint8(4),
        beta=kind(0.5),
        noise_floor=kind(2),
        damping=[kind(0.25), kind(8.0), kind(0.5)],
    )
    plain = core.Config(
        history_size=3, update_every=7, check_every=4, beta=0.5, noise_floor=2.0, damping=(0.25, 8.0, 0.5)
    )
    assert given == plain
    assert hash(given) == hash(plain)
    numbers = (given.history_size, given.update_every, given.check_every)
    assert {type(value) for value in numbers} == {int}
    assert {type(value) for value in (given.beta, *given.damping)} == {float}


def test_explicit_settings_win_over_the_preset():
    config = core.Config(preset="lbfgs", history_size=3, min_cosine=0.2)
    assert (config.history_size, config.min_cosine, config.update_every, config.beta) == (3, 0.2, 1, 0.0)


def test_a_preset_is_a_name_for_settings_and_none_of_them():
    config = core.Config(preset="lbfgs")
    assert not hasattr(config, "preset")
    assert config == core.Config(**vars(config))
    assert dataclasses.replace(config, history_size=3) == core.Config(preset="lbfgs", history_size=3)


@pytest.mark.parametrize(
    ("old", "words"),
    [
        ({"metric_power": 0.0}, "`metric_power`; it is now `preconditioner_power`, and 0 is `precond"),
        ({"metric_beta": 0.9}, "`metric_beta`; it is now `preconditioner_beta`"),
    ],
)
def test_an_old_name_of_a_setting_is_refused_with_the_new_one(old, words):
    with pytest.raises(TypeError, match=f"unknown setting {words}"):
        core.Config(**old)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("histroy_size", "did you mean `history_size`"),
        ("memory_size", "`history_size` is its name here"),
        ("betas", "leave it out: there is nothing like it here"),
        ("line_search_fn", "leave it out: steps have a length of their own"),
        ("colour", "the settings are preset, history_size, .*, history_dtype$"),
    ],
)
def test_an_unknown_setting_is_refused_with_what_to_do_instead(given, words):
    with pytest.raises(TypeError, match=f"unknown setting `{given}`; {words}"):
        core.Config(**{given: 1})


@pytest.mark.parametrize("preset", ["best", 5, ["fit"], {"fit"}, {}])
def test_what_is_no_preset_is_refused_by_its_name(preset):
    with pytest.raises(ValueError, match=r"`preset` must be None or one of .*, got ") as raised:
        core.Config(preset=preset)
    assert str(raised.value).endswith(repr(preset))


def test_a_marked_default_in_a_signature_is_as_true_as_its_value():
    plain = inspect.signature(core.Config.__init__.__wrapped__).parameters
    marked = inspect.signature(adapter.with_preset(core.Config.__init__.__wrapped__, marked=True)).parameters
    assert list(marked) == list(plain)
    for name in (*adapter.SETTINGS, "preset"):
        assert marked[name].default == plain[name].default
        assert repr(marked[name].default) == repr(plain[name].default)
        assert bool(marked[name].default) is bool(plain[name].default)


@pytest.mark.parametrize("preset", ["default", "paper", "formulas", "lbfgs", "fit"])
@pytest.mark.parametrize("marked", [False, True])
def test_defaults_that_a_tool_hands_back_do_not_take_the_place_of_the_presets(preset, marked):
    make = adapter.with_preset(core.Config.__init__.__wrapped__, marked=marked)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(make).parameters.items()
        if name in adapter.SETTINGS
    }

    def made(**settings):
        config = object.__new__(core.Config)
        make(config, **{**defaults, "preset": preset, **settings})
        return config

    assert made() == core.Config(preset=preset)
    assert made(history_size=3) == core.Config(preset=preset, history_size=3)


@pytest.mark.parametrize("power", [0.0, 0.3])
def test_settings_of_an_older_version_are_translated(power):
    old = {"history_size": 4, "metric_power": power, "metric_beta": 0.9, "preset": "fit", "lr": 0.1}
    today = adapter.settings_of_today(old)
    assert today.pop("lr") == 0.1  # what is no setting stays
    own = {"preconditioner_power": power} if power else {"preconditioner": "none"}
    assert core.Config(**today) == core.Config(history_size=4, preconditioner_beta=0.9, **own)
    assert old["metric_power"] == power


@pytest.mark.parametrize(
    ("preset", "momentum", "nesterov", "shrinks"),
    [
        (None, 0.9, True, True),
        ("default", 0.9, True, True),
        ("paper", 0.9, False, False),
        ("formulas", 0.9, False, False),
        ("lbfgs", 0.0, False, False),
        ("fit", 0.0, False, False),
    ],
)
def test_presets_say_what_momentum_is_and_whether_pairs_are_freed_of_noise(
    preset, momentum, nesterov, shrinks
):
    assert adapter.preset_momentum(preset) == momentum
    assert adapter.preset_nesterov(preset) is nesterov
    config = core.Config(preset=preset)
    assert config.shrinks is shrinks
    assert (config.shrinkage < 1) is shrinks


RECIPE = {
    "history_size": 10,
    "update_every": 50,
    "beta": 0.999,
    "damping": (0.01, 1.5, 0.99),
    "step_length": "unit",
}
FORMULAS = {
    "history_size": 10,
    "update_every": 20,
    "beta": 0.9,
    "damping": (0.01, 10.0, 0.9),
    "step_length": "none",
}
NOT_PUBLISHED = {
    "adaptive": False,
    "noise_floor": 0.0,
    "min_cosine": 0.0,
    "shrinkage": 1.0,
    "preconditioner": "none",
    "history_dtype": None,
}


@pytest.mark.parametrize(("preset", "values"), [("paper", RECIPE), ("formulas", FORMULAS)])
def test_paper_preset_is_the_published_recipe_and_formulas_the_bare_method(preset, values):
    """The recipe: run-SLIM.sh and opt/slimblock.py of the authors' code, https://github.com/yuehniu/mL-BFGS."""
    config = core.Config(preset=preset)
    assert {name: getattr(config, name) for name in values} == values
    assert {name: getattr(config, name) for name in NOT_PUBLISHED} == NOT_PUBLISHED
    assert not config.uses_noise
    assert adapter.default_rate(config.step_length) == 0.1
    assert (adapter.preset_momentum(preset), adapter.preset_nesterov(preset)) == (0.9, False)


def test_pairs_are_freed_of_noise_only_where_it_is_known_and_wanted():
    assert core.Config(shrinkage=0.0).shrinks
    assert not core.Config(shrinkage=1.0).shrinks
    assert not core.Config(adaptive=False).shrinks


@pytest.mark.parametrize("ask", [adapter.preset_momentum, adapter.preset_nesterov])
def test_an_unknown_preset_has_no_momentum(ask):
    with pytest.raises(ValueError, match=r"`preset` must be None or one of .*, got 'best'"):
        ask("best")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([],), ValueError, "`leaves` must hold at least one array, got none"),
        (([np.ones(2, dtype=int)],), TypeError, r"`leaves`\[0\] must be of one of the dtypes .*, got int64"),
        (([LEAF, np.ones(2, dtype=complex)],), TypeError, r"`leaves`\[1\] .*, got complex128"),
        (([LEAF], ((0,), (0,))), ValueError, "`blocks` must hold each leaf index 0..1 exactly once"),
        (([LEAF, LEAF], ((0,),)), ValueError, "`blocks` must hold each leaf index 0..1 exactly once"),
        (([LEAF], ((0,), ())), ValueError, "non-empty blocks"),
    ],
)
def test_leaves_that_cannot_be_optimized_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        core.Method(core.Config(), *arguments[1:]).init(arguments[0])


@pytest.mark.backends("array_api_strict")
def test_leaves_on_several_devices_are_refused():
    import array_api_strict as xp

    leaves = [xp.ones(2), xp.ones(2, device=xp.Device("device1"))]
    with pytest.raises(ValueError, match="`leaves` must be on one device, got"):
        core.Method(core.Config()).init(leaves)


def test_namespace_without_the_history_dtype_is_refused():
    with pytest.raises(ValueError, match=r"`history_dtype` must be a dtype of .*numpy, got 'bfloat16'"):
        core.Method(core.Config(history_dtype="bfloat16")).init([LEAF])


def test_config_of_the_wrong_kind_is_refused():
    with pytest.raises(TypeError, match="`config` must be a Config, got dict"):
        core.Method({"history_size": 3}).init([LEAF])


@pytest.mark.parametrize(
    ("params", "grads", "error", "words"),
    [
        ([LEAF], [LEAF[:1]], ValueError, r"`grads`\[0\] must have the shape \(2, 3\), got \(1, 3\)"),
        ([LEAF[0]], [LEAF], ValueError, r"`params`\[0\] must have the shape \(2, 3\), got \(3,\)"),
        ([LEAF], [LEAF, LEAF], ValueError, "`grads` must hold 1 leaves, got 2"),
        (
            [LEAF],
            [LEAF.astype(np.float32)],
            TypeError,
            r"`grads`\[0\] must have the parameter's dtype float64, got float32$",
        ),
        (
            [LEAF.astype(np.float16)],
            [LEAF],
            TypeError,
            r"`grads`\[0\] must have the parameter's dtype float16 or float32, got float64$",
        ),
        (
            [LEAF],
            [LEAF.astype(int)],
            TypeError,
            r"`grads`\[0\] must be of a real floating-point dtype, got int64",
        ),
        ([None], [LEAF], TypeError, r"`params`\[0\] must be an array, got None"),
        ([LEAF], [None], ValueError, "`grads` must hold at least one array, got only None"),
    ],
)
def test_gradients_that_do_not_match_are_refused_before_anything_changes(params, grads, error, words):
    config = core.Config()
    state = core.Method(config).init([LEAF])
    method = core.Method(config)
    for verb in (method.step, method.observe, method.project):
        with pytest.raises(error, match=words):
            verb(state, params, grads)
    fresh = core.Method(config).init([LEAF])
    np.testing.assert_equal(arrays_of(state), arrays_of(fresh))


def test_blocks_that_are_not_the_states_are_refused():
    config = core.Config()
    state = core.Method(config).init([LEAF, LEAF])
    with pytest.raises(ValueError, match="`blocks` must be the state's 1 blocks, got 2"):
        core.Method(config, blocks=((0,), (1,))).step(state, [LEAF, LEAF], [LEAF, LEAF])


def test_clipped_direction_asks_for_the_parameters():
    config = core.Config(preset="fit")
    with pytest.raises(ValueError, match="`params` must be given with step_length='clip', got None"):
        core.Method(config).direction(core.Method(config).init([LEAF]), [LEAF])


@pytest.mark.parametrize(
    ("names", "blocks", "error", "words"),
    [
        (["a"], "layers", ValueError, "`blocks` must be .*, got 'layers'"),
        (["a", "b"], "layer", ValueError, "`blocks`='layer' needs names with dots"),
        (["a"], 3, TypeError, "`blocks` must be .*, got 3"),
        (["a"], lambda name: [name], TypeError, r"`blocks` must give a hashable label, got \['a'\] for 'a'"),
        (["a", "a"], "all", ValueError, "`names` must be distinct"),
        ([], "all", ValueError, "`names` must hold at least one leaf, got none"),
    ],
)
def test_partition_that_cannot_be_formed_is_refused(names, blocks, error, words):
    with pytest.raises(error, match=words):
        core.partition(names, blocks)


def test_kernels_refuse_an_empty_tile():
    with pytest.raises(ValueError, match="`tile` must be an int >= 1, got 0"):
        core.Kernels(numpy_namespace, tile=0)


ON_THE_HOST = {
    "config.py": {"numpy"},
    "overlap.py": {"numpy"},
    "reference.py": {"numpy"},
    "snapshot.py": {"numpy"},
    "serialization.py": {"numpy", "safetensors", "ml_dtypes"},
}
"""What files that never see a device may import; the last two packages when they are needed."""


def test_core_imports_no_framework():
    script = (
        "import sys, numpy, mlbfgs_core as core\n"
        "method, x = core.Method(core.Config()), numpy.ones(3)\n"
        "method.step(method.init([x]), [x], [x])\n"
        "loaded = {'torch', 'jax', 'cupy', 'scipy', 'optax', 'safetensors', 'ml_dtypes'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    for path in Path(core.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
            )
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            roots = {name.partition(".")[0] for name in names}
            allowed = {*sys.stdlib_module_names, "array_api_compat", "array_api_extra"}
            allowed |= ON_THE_HOST.get(path.name, set())
            assert roots <= allowed, (path.name, roots - allowed)


def test_public_names_are_those_that_exist():
    assert all(hasattr(core, name) for name in core.__all__)
    assert all(hasattr(adapter, name) for name in adapter.__all__)
    fixed = {"Config", "Method", "State", "inverse_hessian", "plan_memory", "spectrum"}
    assert fixed | {"load_state", "save_state"} <= set(core.__all__)
    assert len(core.__all__) <= 18
    assert not set(core.__all__) & set(adapter.__all__)
