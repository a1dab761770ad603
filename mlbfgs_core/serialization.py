"""One neutral, versioned checkpoint: saved in one framework, resumed in another.

A file has the safetensors format: arrays, and a header of text. Nothing in it is ever executed.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .preconditioner import Matrix, preconditioner_of
from .snapshot import (
    Snapshot,
    arrays_by_name,
    check_layout,
    check_names,
    matched,
    settings_of,
    shape_settings,
)
from .state import RENAMED, State, layout, matrices_of, with_leaf_arrays

__all__ = ["load_state", "save_state"]

Array = Any
StrPath = str | os.PathLike[str]
FORMAT, VERSION = "mlbfgs", 2
"""The only entry of the header, and the version of its content."""
ABANDONED_AFTER = 3600
"""Seconds since the last write to a temporary file."""
_NO_DIGEST = "0" * 64
"""Stands in the header while the file is hashed."""
_DTYPES = {
    "BOOL": "bool",
    "I32": "int32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}


def save_state(path: StrPath, snapshots: Sequence[Snapshot]) -> None:
    """Write a checkpoint that every adapter can read; the file is either the old one or the new one.

    Parameters
    ----------
    path : path-like
        A file; an existing one is replaced once the new one is complete and on the disk.
    snapshots : sequence of Snapshot
        Their arrays must be such that `numpy.asarray` takes them.

    Raises
    ------
    ValueError
        Names, blocks and arrays that do not belong together.
    OSError
        The file cannot be written, for instance because the disk is full. The old one is untouched.
    ImportError
        Without the package safetensors.

    Notes
    -----
    Writes the state, the parameters and the momentum, without leaves that never had a gradient, and reads
    the file once for its SHA-256. A process killed meanwhile leaves a file ``.NAME.*.tmp`` next to it, which
    is never read, and which a later call removes once it is an hour old.

    Examples
    --------
    >>> import tempfile
    >>> from mlbfgs_core import Config, Method
    >>> x = np.ones(3)
    >>> path = Path(tempfile.mkdtemp()) / "run.safetensors"
    >>> save_state(path, [Snapshot(("x",), ((0,),), Method(Config()).init([x]), (x,), (None,))])
    >>> load_state(path)[0].params
    (array([1., 1., 1.]),)
    """
    safetensors = _safetensors()
    if not snapshots:
        msg = "`snapshots` must hold at least one, got none"
        raise ValueError(msg)
    arrays: dict[str, Array] = {}
    parts = []
    for number, snapshot in enumerate(snapshots):
        config = settings_of(snapshot.state)
        check_names(snapshot.names, snapshot.blocks, "`snapshots`")
        own = dict(arrays_by_name(snapshot))
        matrices = matrices_of(snapshot.state)
        check_layout(config, snapshot.names, snapshot.blocks, own, "`snapshots`", matrices)
        arrays.update({f"{number}/{name}": np.asarray(array, order="C") for name, array in own.items()})
        parts.append(
            {
                "names": snapshot.names,
                "blocks": snapshot.blocks,
                "history_size": config.history_size,
                "history_dtype": config.history_dtype,
                "preconditioner": config.preconditioner,
                **({"matrices": matrices} if any(matrices) else {}),
            }
        )
    header = {FORMAT: json.dumps({"version": VERSION, "sha256": _NO_DIGEST, "parts": parts})}
    target = Path(path).resolve()
    _remove_abandoned(target)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        safetensors.numpy.save_file(arrays, str(partial), header)
        with partial.open("r+b") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            start = file.read(8 + int.from_bytes(file.read(8), "little")).find(_NO_DIGEST.encode())
            file.seek(8 + start)
            file.write(digest.encode())
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(mode)  # that of any new file; safetensors makes it private
        partial.replace(target)
    except safetensors.SafetensorError as error:
        msg = f"cannot write {target}: {error}"
        raise OSError(msg) from error
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(target.parent)


def load_state(path: StrPath, like: Sequence[Snapshot] | None = None) -> list[Snapshot]:
    """Read a checkpoint, all of which is checked first.

    Parameters
    ----------
    path : path-like
        A file that `save_state` or an adapter has written.
    like : sequence of Snapshot, optional
        What is to be resumed: the file must hold the same names, blocks, shapes and dtypes, and the result
        has their order. Only the shapes and dtypes of these arrays are read, so they may be abstract.

    Returns
    -------
    list of Snapshot
        NumPy arrays that may be read-only. A leaf that never had a gradient has arrays of zeros.

    Raises
    ------
    ValueError
        A file that is truncated, damaged, of a newer version, of another format, or of another model.
    OSError
        The file cannot be read.
    ImportError
        Without the package safetensors; or, for bfloat16 arrays, without ml-dtypes.

    Notes
    -----
    Holds the file's content twice while it reads. The checksum finds damage, not forgery; but no content
    is ever executed, and memory is bounded by the file's size.

    Examples
    --------
    See `save_state`.
    """
    found = _read(path)
    if like is None:
        return found
    where = f"`path` ({os.fspath(path)})"
    if len(found) != len(like):
        msg = f"{where} must hold {len(like)} sets of parameters with a state of their own, got {len(found)}"
        raise ValueError(msg)
    return [matched(found, wanted, where) for wanted in like]


def _read(path: StrPath) -> list[Snapshot]:
    safetensors = _safetensors()
    data = Path(path).read_bytes()
    try:
        content = dict(safetensors.deserialize(data))
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        header = json.loads(metadata.get(FORMAT, "null"))
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise _refusal(path, f"must be a whole safetensors file, got: {error}") from error
    if not isinstance(header, dict):
        raise _refusal(path, f"must be a checkpoint of {FORMAT}, got a file that tells {sorted(metadata)}")
    if header.get("version") not in range(1, VERSION + 1):
        rule = f"must be of a version up to {VERSION} of the format, which this release reads"
        raise _refusal(path, f"{rule}, got {header.get('version')!r}: a newer release of mlbfgs may read it")
    if not _is_intact(data, 8 + length, str(header.get("sha256"))):
        raise _refusal(path, "must have the content of its checksum: it is damaged")
    del data
    try:
        arrays = {name: _as_numpy(entry) for name, entry in content.items()}
        result = [_parse(part, f"{number}/", arrays) for number, part in enumerate(header["parts"])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _refusal(path, f"must hold what its header tells, got: {error!r}") from error
    if arrays or not result:
        raise _refusal(path, f"must hold what its header tells, got more: {sorted(arrays)[:3]}")
    return result


def _is_intact(data: bytes, end: int, digest: str) -> bool:
    if not re.fullmatch("[0-9a-f]{64}", digest):
        return False
    start = data.find(digest.encode(), 0, end)
    hashed = hashlib.sha256(memoryview(data)[:start])
    hashed.update(_NO_DIGEST.encode())
    hashed.update(memoryview(data)[start + len(_NO_DIGEST) :])
    return hashed.hexdigest() == digest


def _parse(part: dict[str, Any], prefix: str, arrays: dict[str, Array]) -> Snapshot:
    """One snapshot; takes its arrays out of the dictionary."""
    names, blocks = tuple(part["names"]), tuple(map(tuple, part["blocks"]))
    check_names(names, blocks, "the header")
    own = {name[len(prefix) :]: arrays.pop(name) for name in list(arrays) if name.startswith(prefix)}
    if "preconditioner" in part:
        preconditioner = part["preconditioner"]
    else:  # a file of version 1
        preconditioner = "diagonal" if part["metric"] else "none"
        own = {_of_today(name): array for name, array in own.items()}
        own.setdefault("grad_scale", np.ones_like(own["length"]))
    config = shape_settings(part["history_size"], part["history_dtype"], preconditioner)
    matrices = [
        None if sides is None else Matrix(*sides) for sides in part.get("matrices", [None] * len(names))
    ]
    check_layout(config, names, blocks, own, "the file", matrices)
    values: dict[str, Any] = dict.fromkeys(State._fields, ())
    leaves: dict[str, list[Array | None]] = {
        name: [None] * len(names) for name in preconditioner_of(config).names
    }
    params = [own[f"params/{name}"] for name in names]
    for entry in layout(config, params, blocks, matrices):
        if entry.leaf is None:
            values[entry.name] = own[entry.name]
        else:  # without memory
            dtype = _numpy_dtype(entry.dtype)
            first = np.eye(entry.shape[-1], dtype=dtype) if entry.is_basis else np.zeros((), dtype)
            array = own.get(f"{entry.name}/{names[entry.leaf]}", np.broadcast_to(first, entry.shape))
            leaves.setdefault(entry.name, [None] * len(names))[entry.leaf] = array
    state = with_leaf_arrays(State(**values), {name: tuple(arrays) for name, arrays in leaves.items()})
    momentum = tuple(own.get(f"momentum/{name}") for name in names)
    return Snapshot(names, blocks, state, tuple(params), momentum)


def _of_today(name: str) -> str:
    """Today's name of an array, or of a leaf's array, that has this name in a file of version 1."""
    field, slash, leaf = name.partition("/")
    return RENAMED.get(field, field) + slash + leaf


def _as_numpy(entry: dict[str, Any]) -> Array:
    name = _DTYPES.get(entry["dtype"])
    if name is None:
        msg = f"unknown dtype {entry['dtype']}"
        raise ValueError(msg)
    return np.frombuffer(entry["data"], _numpy_dtype(name)).reshape(entry["shape"])


def _numpy_dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _safetensors() -> ModuleType:
    try:
        import safetensors.numpy
    except ImportError as error:
        msg = "checkpoints need the package safetensors: python3 -m pip install 'mlbfgs[checkpoint]'"
        raise ImportError(msg) from error
    return safetensors


def _refusal(path: StrPath, rule: str) -> ValueError:
    return ValueError(f"`path` ({os.fspath(path)}) {rule}")


def _remove_abandoned(target: Path) -> None:
    """Remove the files that killed processes have left; a live process writes more often than this."""
    for partial in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # another process may have removed it
            if time.time() - partial.stat().st_mtime > ABANDONED_AFTER:
                partial.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system lets a folder be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
