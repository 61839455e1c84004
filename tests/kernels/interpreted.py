# SPDX-License-Identifier: BSD-3-Clause
"""Where the numbers of the Triton kernels are computed: on a GPU, or in Triton's interpreter, which
counts bfloat16 wrongly and enters functions slowly. Both are mended here."""

import os

import pytest
import torch
from triton import language as tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def prepare(module):
    """To be called at the top of a file of numbers, with the module of the kernels."""
    if DEVICE == "cuda":
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    # A GPU rounds float32 to bfloat16 to nearest, the interpreter cuts off.
    cast = InterpreterBuilder.cast_impl

    def round_to_nearest(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.tensor(source.data).bfloat16().view(torch.int16).numpy()
            return TensorHandle(rounded.view("uint16"), tl.bfloat16)
        return cast(self, source, target)

    InterpreterBuilder.cast_impl = round_to_nearest

    # It keeps bfloat16 as bit patterns, and tl.dot multiplies those.
    dot = InterpreterBuilder.create_dot

    def of_numbers(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype("uint32") << 16).view("float32"), tl.float32)

    def dot_of_numbers(self, a, b, *rest):
        return dot(self, of_numbers(a), of_numbers(b), *rest)

    InterpreterBuilder.create_dot = dot_of_numbers

    # The interpreter takes 2 ms to enter a function, as it patches the language anew each time. In
    # the kernels that is needed; what they call may be plain Python.
    for name, function in list(vars(module).items()):
        if isinstance(function, InterpretedFunction) and not any(
            argument.startswith("BLOCK") for argument in function.arg_names
        ):
            setattr(module, name, function.fn)
