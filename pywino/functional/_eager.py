# SPDX-License-Identifier: BSD-3-Clause
"""Which calls may skip the dispatcher."""

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from pywino.functional.winograd import _only_default_device

_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(*tensors):
    """Whether these (None is allowed) are ordinary tensors in an eager call: no functorch
    transform, forward-mode AD, mode or trace wants to see PyTorch's own functions."""
    return (
        all(t is None or type(t) in _PLAIN for t in tensors)
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and (_len_torch_function_stack() == 0 or _only_default_device())
        and _len_torch_dispatch_stack() == 0
        and _get_tracing_state() is None
    )


def wants_gradients(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
