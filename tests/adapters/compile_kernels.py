"""Compile the Triton kernels for NVIDIA GPUs, which works without a GPU.

It is a separate program, since Triton decides when it is imported whether to compile or to interpret.
"""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mlbfgs_torch import fused

CAPABILITIES = (75, 90)
"""Compute capabilities of the oldest GPUs that Triton supports, and of an H100."""
DTYPES = [  # of averages, and of gradients, parameters and history
    ("fp32", "fp32"),
    ("fp32", "bf16"),
    ("fp64", "fp64"),
]
SHORT = ("history", "grad", "param", "value", "z")
FLAGS = ("keep", "valid", "turn")
NUMBERS = ("stride", "slots", "n")
CONSTANTS = {"ROWS": 10, "WIDTH": 32, "EXPONENT": 0.175, "BLOCK": fused._BLOCK}


def kind(name, dtype, short):
    if name in NUMBERS:
        return "i64"
    return f"*{short if name in SHORT else 'i1' if name in FLAGS else 'i64' if name == 'slot' else dtype}"


def main():
    functions = [x for x in vars(fused).values() if isinstance(x, triton.JITFunction)]
    kernels = [function for function in functions if "BLOCK" in function.arg_names]
    for kernel in kernels:
        for roots in (3, None) if "ROOTS" in kernel.arg_names else (None,):
            constants = {
                (place,): roots if name == "ROOTS" else CONSTANTS.get(name, True)
                for place, name in enumerate(kernel.arg_names)
                if name.isupper()
            }
            for dtype, short in DTYPES:
                signature = {
                    name: "constexpr" if name.isupper() else kind(name, dtype, short)
                    for name in kernel.arg_names
                }
                for capability in CAPABILITIES:
                    source = ASTSource(kernel, signature, constants)
                    triton.compile(source, target=GPUTarget("cuda", capability, 32), options=fused._OPTIONS)
    sys.stdout.write(" ".join(kernel.fn.__name__ for kernel in kernels))


if __name__ == "__main__":
    main()
