# SPDX-License-Identifier: BSD-3-Clause
"""The process in which a kernel runs, started by harness.py: pickled requests and answers."""

import ctypes
import pickle
import sys

import numpy as np

SCHEDULES = ("ascending", "descending", "random")
POISON = 0xFF


class Device:
    """A kernel's library, and the buffers of the call that goes on."""

    def __init__(self, library):
        self.library = ctypes.CDLL(library)
        self.library.emu_allocate.restype = ctypes.c_void_p
        self.library.emu_findings.restype = ctypes.c_char_p
        self.buffers = []  # (address, bytes, array or None, name)

    def call(self, function, arguments, check, schedule, seed, seconds):
        """Status, arrays after the call, findings, buffers that were written past their end."""
        library = self.library
        library.emu_configure(
            int(check), SCHEDULES.index(schedule), ctypes.c_uint64(seed), int(seconds)
        )
        library.emu_forget_findings()
        self.buffers = []
        values = [self.value(*argument) for argument in arguments]
        status = getattr(library, function)(*values)
        arrays = [
            self.view(p, array).copy() for p, _, array, _ in self.buffers if array is not None
        ]
        overrun = [name for p, nbytes, _, name in self.buffers if not self.end_is_intact(p, nbytes)]
        library.emu_forget_buffers()
        for address, nbytes, _, _ in self.buffers:
            library.emu_free(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))
        return status, arrays, library.emu_findings().decode(), overrun

    def value(self, kind, value, name):
        """One argument of the launcher, as ctypes passes it."""
        if kind == "null":
            return ctypes.c_void_p(None)
        if kind == "number":
            return value
        if kind == "Struct":
            fields = {field: self.value(*argument) for field, argument in value.items()}
            types = [(field, type(v)) for field, v in fields.items()]
            struct = type("Struct", (ctypes.Structure,), {"_fields_": types})
            return ctypes.byref(struct(**{field: v.value for field, v in fields.items()}))
        if kind == "Workspace":
            array, nbytes, item = None, value, 4
        else:
            array, nbytes, item = np.ascontiguousarray(value), value.nbytes, value.itemsize
        initialised = kind in ("In", "InOut")
        address = self.library.emu_allocate(ctypes.c_size_t(nbytes))
        if initialised:
            self.view(address, array)[...] = array
        self.library.emu_register(
            *(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), name.encode()),
            *(int(kind == "In"), int(initialised), item),
        )
        self.buffers.append((address, nbytes, array, name))
        return ctypes.c_void_p(address)

    @staticmethod
    def view(address, array):
        memory = (ctypes.c_ubyte * array.nbytes).from_address(address)
        return np.frombuffer(memory, array.dtype).reshape(array.shape)

    @staticmethod
    def end_is_intact(address, nbytes):
        """The bytes up to the guard page, which begins at a multiple of 16."""
        slack = -nbytes % 16
        memory = (ctypes.c_ubyte * slack).from_address(address + nbytes)
        return all(byte == POISON for byte in memory)


def serve(library):
    device = Device(library)
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(device.call(*request), sys.stdout.buffer, protocol=5)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
