# SPDX-License-Identifier: BSD-3-Clause
"""The one `torch.library.Library` of pywino, and what every op does with it."""

import torch

# Schemas, fakes and gradients are Python, so that everything traces and differentiates also where
# the native library could not be built. That library only adds kernels, before or after this file
# is imported.
library = torch.library.Library("pywino", "DEF")


def define(schema, kernel=None, fake=None):
    """Defines an op. `kernel` serves every device that has no kernel of its own; `fake` gives
    shape, dtype and true strides."""
    name = schema.partition("(")[0]
    library.define(schema)
    if kernel is not None:
        for key in ("CPU", "CUDA", "XPU", "MPS"):
            library.impl(name, kernel, key)
    torch.library.register_fake(f"pywino::{name}", fake, lib=library)


def differentiable(name, backward, setup_context):
    """Registers the gradient of an op; one that is made of ops with gradients is differentiable
    again."""
    torch.library.register_autograd(
        f"pywino::{name}", backward, setup_context=setup_context, lib=library
    )


def once_differentiable(name, remedy):
    """Registers a gradient that raises: `name` is itself part of a gradient."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"pywino::{name} is not differentiable: double backward is not implemented for this "
            f"op; {remedy}"
        )

    torch.library.register_autograd(
        f"pywino::{name}", backward, setup_context=lambda ctx, inputs, output: None, lib=library
    )


def autocast(name):
    """Under autocast the op takes its floating point arguments in the dtype that the user asked
    for, as F.conv2d does.

    `torch.library.register_autocast` would freeze one dtype at registration.
    """
    op = getattr(torch.ops.pywino, name).default
    for device in ("cpu", "cuda"):
        key = f"Autocast{device.upper()}"
        off = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args, device=device, off=off):
            dtype = torch.get_autocast_dtype(device)
            with torch._C._ExcludeDispatchKeyGuard(off):
                return op(*(_cast(arg, device, dtype) for arg in args))

        library.impl(name, kernel, key)


def _cast(arg, device, dtype):
    # float64 stays, as in PyTorch's own autocast.
    if (
        isinstance(arg, torch.Tensor)
        and arg.is_floating_point()
        and arg.device.type == device
        and arg.dtype != torch.float64
    ):
        return arg.to(dtype)
    return arg
