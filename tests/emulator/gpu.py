# SPDX-License-Identifier: BSD-3-Clause
"""The same launchers on a real GPU: what tests ask of the emulator they can ask of hardware."""

import ctypes

import numpy as np
import pytest
import torch
from emulator.build import CACHE, CSRC, ROOT, contents, digest, is_for_sm90a, make
from emulator.harness import In, InOut, Out, Struct, Workspace


def missing(source):
    """Why a kernel cannot run on a GPU here, or None."""
    if not torch.cuda.is_available():
        return "no GPU"
    if is_for_sm90a(source) and torch.cuda.get_device_capability() != (9, 0):
        return "wgmma is for sm_90a alone"
    return None


def compile_kernel(source):
    """The library of a .cu file, from nvcc, for the GPU that is there."""
    major, minor = torch.cuda.get_device_capability()
    architecture = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
    folders = {*CSRC.rglob("*"), *source.parent.iterdir()}
    headers = [path for path in folders if path.suffix in (".h", ".cuh", ".cu")]
    key = digest(architecture, source.read_bytes(), *contents(headers))
    target = CACHE / f"{source.stem}-gpu-{key}.so"
    command = ["nvcc", "-std=c++20", "--expt-relaxed-constexpr", "-shared", "-Xcompiler", "-fPIC"]
    command += ["-I", CSRC, "-I", CSRC / "core", "-I", source.parent]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    command += ["-DPYWINO_HAVE_SM90A=1"] if architecture == "90a" else []
    return make(target, [*command, source, "-o", f"{{}}/{target.name}"])


class GpuKernel:
    """A Kernel of harness.py whose calls run on the GPU."""

    def __init__(self, source):
        source = (ROOT / source).resolve()
        if reason := missing(source):
            pytest.skip(reason)
        self.library = ctypes.CDLL(str(compile_kernel(source)))

    def close(self):
        pass

    def call(self, launcher, *arguments, schedule=None, seed=None):
        """As Kernel.call; a GPU has its own schedule."""
        buffers = []
        values = [self.value(argument, buffers) for argument in arguments]
        status = getattr(self.library, launcher)(*values)
        torch.cuda.synchronize()
        assert status == 0, f"{launcher} returned {status}"
        for argument, buffer in buffers:
            if isinstance(argument, Out | InOut):
                array = buffer.cpu().numpy().view(argument.array.dtype)
                argument.array[...] = array.reshape(argument.array.shape)

    def value(self, argument, buffers):
        if isinstance(argument, Struct):
            fields = {name: self.value(v, buffers) for name, v in argument.fields.items()}
            types = [(name, type(v)) for name, v in fields.items()]
            struct = type("Struct", (ctypes.Structure,), {"_fields_": types})
            return ctypes.byref(struct(**{name: v.value for name, v in fields.items()}))
        if argument is None or isinstance(argument, int):
            return ctypes.c_void_p(None) if argument is None else ctypes.c_int64(argument)
        if isinstance(argument, In | Out | InOut):
            nbytes = argument.array.nbytes
        elif isinstance(argument, Workspace):
            nbytes = argument.nbytes
        else:
            return argument
        buffer = torch.full((nbytes,), 0xFF, dtype=torch.uint8, device="cuda")
        if isinstance(argument, In | InOut):
            data = np.ascontiguousarray(argument.array).reshape(-1).view(np.uint8)
            buffer.copy_(torch.from_numpy(data.copy()))
        buffers.append((argument, buffer))
        return ctypes.c_void_p(buffer.data_ptr())
