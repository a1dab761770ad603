"""`MLBFGS` for parameters held in arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import mlbfgs_core as core
from mlbfgs_core import adapter
from mlbfgs_core.adapter import Blocks, BlockSpec, Matrix, MatrixAxes, PreconditionerName, Preset, StepLength

from . import checkpoint
from .arguments import Structure, check_number
from .backends import backend_of
from .layout import Member, real
from .unit import Unit

__all__ = ["MLBFGS"]


class MLBFGS:
    """mL-BFGS: quasi-Newton training from momentum-averaged curvature pairs.

    Parameters
    ----------
    params : array, sequence of arrays or mapping of names to arrays
        NumPy or CuPy arrays of any shape and strides, of float16, bfloat16, float32, float64, complex64
        or complex128, which `step` updates in place. Without names they are "param0", "param1", ...
    lr : float or 0-d array, optional
        Root mean square of a step's changes, before momentum, with the default ``step_length="rms"``; by
        default 1e-3, or 0.1 with another `step_length`.
    momentum : float, optional
        Momentum on the direction; by default the preset's: 0 for "lbfgs" and "fit", else 0.9.
    weight_decay : float
        Parameters shrink by ``lr * weight_decay`` per step, as in AdamW.
    preset : {"default", "paper", "formulas", "lbfgs", "fit"} or None
        As in `mlbfgs_core.Config`.
    history_size, ..., history_dtype
        The settings `history_size` to `history_dtype` are those of `mlbfgs_core.Config`, which explains them;
        those not given are the preset's.
    blocks : {"all", "layer", "parameter"} or callable
        Which parameters share curvature; a callable maps a parameter's name to a label.
    matrix_axes : mapping or callable, optional
        Which axes make the matrices of ``preconditioner="kronecker"``: for a parameter's name (a callable
        gets its shape, too) how many leading axes count stacked layers, and how many of the next form the
        rows, all others forming the columns; None for a parameter without a matrix. By default (0, 1): the
        first axis against the rest.
    nesterov : bool, optional
        Whether the momentum looks ahead (Nesterov's), as in `torch.optim.SGD`, or is heavy-ball. The
        default preset looks ahead, the others do not.
    maximize : bool
        Maximize instead of minimizing.

    Attributes
    ----------
    params : array, list of arrays or dict
        The arrays that were given.
    lr, momentum, weight_decay
        May be assigned between steps.
    units : tuple of Unit
        One core state for each device that holds parameters.

    Raises
    ------
    ValueError, TypeError
        Settings out of range; no parameters, or some that are not plain arrays of these dtypes, cannot be
        written to, or share memory.

    Notes
    -----
    A step whose gradients hold a NaN or an infinity changes nothing; `diagnostics` counts it. Complex
    parameters count as pairs of reals. Memory with default settings: ``(2 * history_size + 6) * 4`` bytes
    per float32 parameter, and 4 more during a step (12 for a parameter that is small or not contiguous), and
    with ``preconditioner="kronecker"`` ``2 * (a^2 + b^2) * 4`` for each matrix of a x b;
    `mlbfgs_core.plan_memory` gives the exact figure without the momentum's array. No step
    waits for a GPU, except the first after a start, a load or a change of `config`; with parameters in
    several places each step waits, since a NaN in one of them skips the step of all.

    References
    ----------
    Niu et al., TMLR 2023, arXiv:2307.13744. Difference from the paper: see `mlbfgs_core.Config`;
    ``preset="paper"`` is the published method with its authors' settings.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([3.0, 4.0])
    >>> opt = MLBFGS(x, lr=0.5, momentum=0.0)
    >>> opt.step(2 * x)
    >>> round(float(np.sqrt(np.mean((x - [3.0, 4.0]) ** 2))), 6)
    0.5
    """

    @adapter.with_preset
    def __init__(
        self,
        params: Any,
        lr: Any = None,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        *,
        preset: Preset | None = None,
        history_size: int = 5,
        update_every: int = 50,
        adaptive: bool = True,
        check_every: int | None = None,
        signal_to_noise: float = 4.0,
        noise_floor: float = 4.0,
        beta: float | None = None,
        min_cosine: float = 0.2,
        shrinkage: float = 0.5,
        damping: tuple[float, float, float] | None = None,
        step_length: StepLength = "rms",
        clip_factor: float = 2.0,
        preconditioner: PreconditionerName = "diagonal",
        preconditioner_power: float = 1.0,
        preconditioner_beta: float = 0.99,
        factor_beta: float = 0.95,
        precondition_frequency: int = 10,
        max_preconditioner_dim: int = 2048,
        history_dtype: str | None = None,
        blocks: BlockSpec = "all",
        matrix_axes: MatrixAxes = None,
        nesterov: bool | None = None,
        maximize: bool = False,
    ) -> None:
        config = core.Config(**adapter.settings_in(locals()))
        if not isinstance(maximize, bool):
            msg = f"`maximize` must be a bool, got {maximize!r}"
            raise TypeError(msg)
        self.nesterov = adapter.preset_nesterov(preset) if nesterov is None else nesterov
        numbers = {
            "lr": adapter.default_rate(config.step_length) if lr is None else lr,
            "momentum": adapter.preset_momentum(preset) if momentum is None else momentum,
            "weight_decay": weight_decay,
        }
        numbers = {name: check_number(name, value) for name, value in numbers.items()}
        structure = Structure.of(params)
        partition = core.partition(structure.names, blocks)
        shapes = [array.shape for array in structure.arrays]
        likes = [real(array).shape for array in structure.arrays]
        matrices = adapter.matrices_in(config, structure.names, shapes, matrix_axes, likes)
        self._form(structure, partition, matrices, config, maximize)
        self.lr, self.momentum, self.weight_decay = numbers.values()

    def _form(
        self,
        structure: Structure,
        blocks: Blocks,
        matrices: Sequence[Matrix | None],
        config: core.Config,
        maximize: bool,
    ) -> None:
        """Make one unit for each place where parameters lie, each with its own part of the blocks."""
        self._structure, self._blocks, self._matrices = structure, blocks, matrices
        self._maximize = maximize
        self._momentum = 0.0
        self._watch = adapter.Watch("MLBFGS")
        places: dict[Any, list[int]] = {}
        for index, array in enumerate(structure.arrays):
            places.setdefault(backend_of(array), []).append(index)
        self._places = list(places.values())
        units = []
        for backend, indices in places.items():
            members = [Member.of(structure.names[i], structure.arrays[i], matrices[i]) for i in indices]
            place = {index: new for new, index in enumerate(indices)}
            own = [tuple(place[i] for i in block if i in place) for block in blocks]
            units.append(Unit(backend, config, members, tuple(block for block in own if block)))
        self.units = tuple(units)

    @property
    def params(self) -> Any:
        """The parameters, in the form in which they were given."""
        return self._structure.params

    @property
    def lr(self) -> Any:
        """Learning rate."""
        return self._lr

    @lr.setter
    def lr(self, value: Any) -> None:
        self._lr = check_number("lr", value)

    @property
    def momentum(self) -> float:
        """Momentum on the direction; its buffers are allocated once it is not zero."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float) -> None:
        self._momentum = check_number("momentum", value)
        if self._momentum != 0:
            for unit in self.units:
                unit.remember_momentum()

    @property
    def nesterov(self) -> bool:
        """Whether the momentum looks ahead."""
        return self._nesterov

    @nesterov.setter
    def nesterov(self, value: bool) -> None:
        if not isinstance(value, bool):
            msg = f"`nesterov` must be a bool, got {value!r}"
            raise TypeError(msg)
        self._nesterov = value

    @property
    def weight_decay(self) -> float:
        """Decoupled weight decay."""
        return self._weight_decay

    @weight_decay.setter
    def weight_decay(self, value: float) -> None:
        self._weight_decay = check_number("weight_decay", value)

    @property
    def config(self) -> core.Config:
        """All settings. New ones hold from the next step on; they may not change the state's shapes.

        Raises
        ------
        ValueError
            From an assignment: another `history_size`, `history_dtype` or `preconditioner`, or, with
            Kronecker factors, `max_preconditioner_dim`.
        """
        return self.units[0].config

    @config.setter
    def config(self, config: core.Config) -> None:
        if not isinstance(config, core.Config):
            msg = f"`config` must be a Config, got {type(config).__name__}"
            raise TypeError(msg)
        checkpoint.check_shapes("config", config, self.units)
        for unit in self.units:
            unit.config = config

    def step(self, grads: Any) -> None:
        """Take one step: update the parameters in place.

        Parameters
        ----------
        grads : array, sequence or mapping
            In the form of the parameters. Each gradient has the shape and the dtype of its parameter (or
            float32 for one of half precision) and lies in the same place; None for a parameter that must not
            move.
            They are not written to.

        Raises
        ------
        ValueError, TypeError
            Gradients that do not fit the parameters; a parameter whose shape, strides or dtype have been
            changed since it was given, or that has been made read-only; a list or dictionary of parameters
            in which another array has taken the place of one. Nothing has changed then.

        Notes
        -----
        If all gradients are None, nothing happens, and nothing is counted.
        """
        self._check(writes=True)
        given = self._structure.gradients(grads)
        work = []
        for unit, indices in zip(self.units, self._places, strict=True):
            own = [given[i] for i in indices]
            if any(grad is not None for grad in own):
                work.append((unit, unit.project(own, self._maximize)))
        verdict = None if len(work) <= 1 else all(bool(part.seen.finite) for _, part in work)
        for unit, part in work:
            finite = part.seen.finite if verdict is None else unit.constant(verdict)
            numbers = (self._lr, self._momentum, self._weight_decay)
            unit.advance(part, finite, *numbers, nesterov=self.nesterov)
        self._watch.see(unit.accepted for unit, _ in work)

    def diagnostics(self) -> list[core.Diagnostics]:
        """Figures of the last step, one record for each device; reading a value may wait for it."""
        return [unit.diagnostics() for unit in self.units]

    def block_names(self) -> list[tuple[str, ...]]:
        """A short name for each block of each record in `diagnostics`, from the parameters' names."""
        return [adapter.block_names(unit.names, unit.blocks) for unit in self.units]

    def state_dict(self) -> dict[str, Any]:
        """Everything except the parameters, under flat names; see `load_state_dict`.

        Returns
        -------
        dict
            Copies: arrays of the parameters' library, numbers and strings, so that
            ``numpy.savez(file, **opt.state_dict())`` (or ``cupy.savez``) stores it. "history/NAME" is of
            the shape ``(2, m, *shape)``, the averages, "exp_avg_sq/NAME" and "momentum_buffer/NAME" are of
            the parameter's shape (with a last axis of 2 for a complex one); "left_factor/NAME",
            "left_basis/NAME", "right_factor/NAME" and "right_basis/NAME" are stacks of square matrices, for a
            parameter that has such factors; "unit0/FIELD" are the fields of
            `mlbfgs_core.State` for the first device; "lr", "momentum", "weight_decay",
            "nesterov" (0 or 1) and "settings" are the hyperparameters.
        """
        numbers = {"lr": self._lr, "momentum": self._momentum, "weight_decay": self._weight_decay}
        numbers["nesterov"] = float(self.nesterov)
        return checkpoint.encode(self.units, numbers)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of an optimizer with the same parameters and blocks.

        Parameters
        ----------
        state_dict : mapping
            From `state_dict`, or what ``numpy.load`` made of it; NumPy arrays are moved to the parameters'
            device. The hyperparameters and settings in it replace this optimizer's.

        Raises
        ------
        ValueError, TypeError
            A state of other parameters, blocks or settings that fix shapes; a parameter that `step` would
            refuse because of its form. Nothing has changed then.

        Notes
        -----
        With the same parameters the run continues bit for bit.
        """
        self._check(writes=False)
        loaded = checkpoint.decode(state_dict, self.units)
        nesterov = bool(loaded.numbers.pop("nesterov"))
        numbers = {name: check_number(name, value) for name, value in loaded.numbers.items()}
        for unit, part in zip(self.units, loaded.parts, strict=True):
            unit.restore(*part)
        self.config = loaded.config
        self.lr, self.momentum, self.weight_decay = numbers.values()
        self.nesterov = nesterov

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Write parameters, state and momentum to a file that the adapters for other frameworks read too.

        Parameters
        ----------
        path : path-like
            A file, by convention ``*.safetensors``; an existing one is replaced once the new one is complete.

        Raises
        ------
        ValueError
            A parameter whose shape, strides or dtype have been changed.
        OSError, ImportError
            As `mlbfgs_core.save_state`.

        Notes
        -----
        Parameters are known by their names. Hyperparameters are not in the file. Waits for the device.

        Examples
        --------
        >>> import tempfile
        >>> import numpy as np
        >>> path = tempfile.mkdtemp() + "/run.safetensors"
        >>> MLBFGS({"x": np.ones(3)}).save_state(path)
        >>> core.load_state(path)[0].names
        ('x',)
        """
        self._check(writes=False)
        core.save_state(path, [unit.snapshot() for unit in self.units])

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Resume from a file of `save_state`, whichever adapter has written it.

        Parameters
        ----------
        path : path-like

        Raises
        ------
        ValueError
            A damaged file, or one of other parameters, blocks, shapes or dtypes; a parameter that `step`
            would refuse because of its form. Nothing has changed then.
        OSError, ImportError
            As `mlbfgs_core.load_state`.

        Notes
        -----
        Sets the parameters' values too. Hyperparameters and settings stay those of this optimizer.
        """
        self._check(writes=True)
        loaded = core.load_state(path, [unit.snapshot() for unit in self.units])
        for unit, snapshot in zip(self.units, loaded, strict=True):
            unit.resume(snapshot)

    def _check(self, *, writes: bool) -> None:
        self._structure.check_source()
        for unit in self.units:
            unit.check(writes=writes)

    def __getstate__(self) -> dict[str, Any]:
        self._check(writes=False)
        return {
            "structure": self._structure._replace(source=None),
            "blocks": self._blocks,
            "matrices": self._matrices,
            "config": self.config,
            "maximize": self._maximize,
            "nesterov": self.nesterov,
            "numbers": (self._lr, self._momentum, self._weight_decay),
            "parts": [(*unit.export(), unit.groups) for unit in self.units],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._form(*(state[name] for name in ("structure", "blocks", "matrices", "config", "maximize")))
        for unit, part in zip(self.units, state["parts"], strict=True):
            unit.restore(*part)
        self.lr, self.momentum, self.weight_decay = state["numbers"]
        self.nesterov = state["nesterov"]

    def __repr__(self) -> str:
        sizes = [sum(member.size for member in unit.members) for unit in self.units]
        places = [unit.backend for unit in self.units]
        held = ", ".join(f"{n:,} values on {place}" for n, place in zip(sizes, places, strict=True))
        own, default = self.config.preconditioner, core.Config().preconditioner
        usual = {**vars(core.Config(preconditioner=own)), "preconditioner": default}
        words = {"lr": self._lr, "momentum": self._momentum, "weight_decay": self._weight_decay}
        words |= {name: value for name, value in vars(self.config).items() if value != usual[name]}
        return f"MLBFGS({held}; {', '.join(f'{name}={value}' for name, value in words.items())})"
