"""What a user passes: parameters and gradients in one array, a sequence or a mapping; and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import is_cupy_array

from mlbfgs_core.adapter import (
    LEAF_DTYPES,
    Place,
    accumulation_dtype,
    as_number,
    check_real,
    dtype_name,
    find_overlap,
)

from .backends import backend_of

__all__ = ["Structure", "check_number", "check_writable", "place_of"]

Array = Any
_COMPLEX = ("complex64", "complex128")


class Structure(NamedTuple):
    """Parameters with their names, and the form in which they came."""

    form: str
    """"array", "sequence" or "mapping"."""
    names: tuple[str, ...]
    arrays: tuple[Array, ...]
    source: Any = None
    """The user's own list or mapping, which may come to hold other arrays."""

    @classmethod
    def of(cls, params: Any) -> Structure:
        """The structure of parameters, which are checked.

        Raises
        ------
        TypeError, ValueError
            Anything but plain, writable NumPy or CuPy arrays of a known dtype, none at all, or
            arrays that share memory, which one step would write to twice.
        """
        if isinstance(params, Mapping):
            form, names, arrays = "mapping", tuple(params), tuple(params.values())
            for name in names:
                if not isinstance(name, str):
                    msg = f"`params` must have strings as names, got {name!r}"
                    raise TypeError(msg)
        elif _is_array(params):
            form, names, arrays = "array", ("param0",), (params,)
        elif isinstance(params, Iterable) and not isinstance(params, (str, bytes)) and not _foreign(params):
            form, arrays = "sequence", tuple(params)
            names = tuple(f"param{i}" for i in range(len(arrays)))
        else:
            rule = "must be a NumPy or CuPy array, a sequence or a mapping of such arrays"
            msg = f"`params` {rule}, got {type(params).__name__}"
            raise TypeError(msg)
        if not arrays:
            msg = "`params` must hold at least one array, got none"
            raise ValueError(msg)
        for name, array in zip(names, arrays, strict=True):
            _check_param(name, array)
        _check_memory(names, arrays)
        given = cls(form, names, arrays, params if isinstance(params, (list, Mapping)) else None)
        # Some mappings make a new array at each access.
        return given if given.replaced() is None else given._replace(source=None)

    def replaced(self) -> str | None:
        """The name of a parameter in whose place the user's list or mapping holds another array."""
        if self.source is None:
            return None
        held = dict(enumerate(self.source)) if self.form == "sequence" else self.source
        keys = range(len(self.names)) if self.form == "sequence" else self.names
        pairs = zip(keys, self.names, self.arrays, strict=True)
        return next((name for key, name, array in pairs if held.get(key) is not array), None)

    def check_source(self) -> None:
        """Raise ValueError where the user's list or mapping holds another array than it did, which no step
        would update."""
        if (name := self.replaced()) is not None:
            key = repr(name) if self.form == "mapping" else self.names.index(name)
            rule = f"must keep the arrays that were given (write to one: params[{key}][...] = new)"
            msg = f"`params` {rule}, got another for {name!r}"
            raise ValueError(msg)

    @property
    def params(self) -> Any:
        """The parameters in the form in which they came."""
        if self.form == "array":
            return self.arrays[0]
        return (
            list(self.arrays) if self.form == "sequence" else dict(zip(self.names, self.arrays, strict=True))
        )

    def gradients(self, grads: Any) -> list[Array | None]:
        """One checked gradient or None for each parameter.

        Raises
        ------
        TypeError, ValueError
            Gradients of another form, or one that does not fit its parameter.
        """
        pairs = zip(self.names, self.arrays, self._listed(grads), strict=True)
        return [_checked_gradient(name, param, grad) for name, param, grad in pairs]

    def _listed(self, grads: Any) -> list[Array | None]:
        if self.form == "array":
            return [grads]
        if self.form == "mapping":
            if not isinstance(grads, Mapping):
                msg = f"`grads` must be a mapping with the parameters' names, got {type(grads).__name__}"
                raise TypeError(msg)
            for name in self.names:
                if name not in grads:
                    msg = f"`grads` must hold a gradient or None for every parameter, got none for {name!r}"
                    raise ValueError(msg)
            for name in grads:
                if name not in self.names:
                    msg = f"`grads` must hold the parameters' names only, got {name!r}"
                    raise ValueError(msg)
            return [grads[name] for name in self.names]
        rule = f"must be a sequence of {len(self.names)}, one for each parameter"
        if isinstance(grads, Mapping) or _is_array(grads) or not isinstance(grads, Iterable):
            msg = f"`grads` {rule}, got {type(grads).__name__}"
            raise TypeError(msg)
        listed = list(grads)
        if len(listed) != len(self.names):
            msg = f"`grads` {rule}, got {len(listed)}"
            raise ValueError(msg)
        return listed


def check_number(name: str, value: Any) -> Any:
    """A checked learning rate, momentum or weight decay, as a Python number; a rate that is an array of
    NumPy or CuPy without axes is returned as it is, since its value may change.

    Raises
    ------
    TypeError, ValueError
        Something else, or a number out of range.
    """
    on_device = is_cupy_array(value)
    if (on_device and name != "lr") or (_is_array(value) and (value.ndim or value.dtype.kind not in "fiu")):
        msg = f"`{name}` must be a number, got an array of shape {value.shape} and dtype {value.dtype}"
        raise TypeError(msg)
    if on_device:
        return value
    number = as_number(name, value)
    if not isinstance(number, (int, float)):
        msg = f"`{name}` must be a number, got {type(value).__module__}.{type(value).__name__}"
        raise TypeError(msg)
    number = check_real(name, number)
    return value if name == "lr" and isinstance(value, np.ndarray) else number


def check_writable(name: str, array: Any) -> None:
    """Raise ValueError where a parameter cannot be updated in place."""
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        msg = f"`params` must be arrays that can be updated in place, got a read-only array for {name!r}"
        raise ValueError(msg)


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray) or is_cupy_array(x)


def _foreign(x: Any) -> bool:
    """Whether it is an array or a tensor of another library, over which one could iterate."""
    return hasattr(x, "dtype") and hasattr(x, "shape")


def _is_plain(x: Any) -> bool:
    """Whether an array is its values and no more: no mask, no unit, no rules of its own."""
    return type(x) is np.ndarray or isinstance(x, np.memmap) or is_cupy_array(x)


def _check_param(name: str, array: Any) -> None:
    if not _is_array(array):
        msg = f"`params` must be NumPy or CuPy arrays, got {type(array).__name__} for {name!r}"
        raise TypeError(msg)
    if not _is_plain(array):
        rule = "must be plain arrays, without a mask, a unit or rules of their own"
        msg = f"`params` {rule}, got {type(array).__name__} for {name!r}; `numpy.asarray` gives its values"
        raise TypeError(msg)
    if dtype_name(array) not in (*LEAF_DTYPES, *_COMPLEX):
        rule = f"must be of one of the dtypes {(*LEAF_DTYPES, *_COMPLEX)}"
        msg = f"`params` {rule}, got {array.dtype} for {name!r}"
        raise TypeError(msg)
    check_writable(name, array)


def place_of(array: Array) -> Place:
    """Where an array of NumPy or CuPy lies."""
    start = array.data.ptr if is_cupy_array(array) else array.__array_interface__["data"][0]
    return Place(start, array.dtype.itemsize, array.shape, array.strides)


def _check_memory(names: tuple[str, ...], arrays: tuple[Array, ...]) -> None:
    found = find_overlap([place_of(array) for array in arrays])
    if found is None:
        return
    one, other = names[found.first], names[found.second]
    told = "" if found.certain else " (or may do so: whether they do is too hard to decide)"
    if found.first == found.second:
        msg = f"`params` must hold each value once, got {one!r}, which overlaps itself in memory{told}"
    else:
        msg = f"`params` must not share memory, got {one!r} and {other!r}, which overlap{told}"
    raise ValueError(msg)


def _checked_gradient(name: str, param: Array, grad: Any) -> Array | None:
    if grad is None:
        return None
    if type(grad) is type(param) is np.ndarray and grad.shape == param.shape and grad.dtype == param.dtype:
        return grad
    if isinstance(grad, np.generic) and isinstance(param, np.ndarray):
        grad = np.asarray(grad)  # what NumPy makes of a 0-d result
    elif isinstance(grad, np.matrix):
        grad = np.asarray(grad)  # what SciPy makes of a sum over a sparse matrix
    if not _is_plain(grad) or isinstance(grad, np.ndarray) != isinstance(param, np.ndarray):
        kind = "NumPy" if isinstance(param, np.ndarray) else "CuPy"
        msg = f"`grads` must hold a {kind} array or None for {name!r}, got {type(grad).__module__}."
        msg += type(grad).__name__
        raise TypeError(msg)
    place = backend_of(param)
    if backend_of(grad) is not place:
        msg = f"`grads` must lie on {place} for {name!r}, got an array on {backend_of(grad)}"
        raise ValueError(msg)
    if grad.shape != param.shape:
        msg = f"`grads` must have the shape {param.shape} for {name!r}, got {grad.shape}"
        raise ValueError(msg)
    if grad.dtype != param.dtype:
        _check_dtype(name, param, grad)
    return grad


def _check_dtype(name: str, param: Array, grad: Array) -> None:
    """Raise TypeError unless a gradient of another dtype has that of its parameter's averages."""
    allowed = [dtype_name(param)]
    if dtype_name(param) not in (*_COMPLEX, accumulation_dtype(param)):
        allowed.append(accumulation_dtype(param))
    if dtype_name(grad) not in allowed:
        msg = f"`grads` must be of the dtype {' or '.join(allowed)} for {name!r}, got {grad.dtype}"
        raise TypeError(msg)
