# SPDX-License-Identifier: BSD-3-Clause
"""Error measures against float64, and contexts that force a backend or an instruction set."""

import contextlib

import torch

from pywino import _native as native
from pywino import planner


def relative_l2(actual, reference):
    """||actual - reference|| / ||reference||, computed in float64; 0 for equal tensors, empty ones
    too."""
    actual, reference = actual.detach().double(), reference.detach().double()
    error, size = (actual - reference).norm().item(), reference.norm().item()
    return error / size if size else error


def max_over_rms(actual, reference):
    """The largest absolute error, in units of the reference's root mean square."""
    actual, reference = actual.detach().double(), reference.detach().double()
    if not reference.numel():
        return 0.0
    error, rms = (actual - reference).abs().max().item(), reference.square().mean().sqrt().item()
    return error / rms if rms else error


def assert_close_to_reference(actual, reference, peer, k, what=""):
    """Asserts that `actual` is at most k times as far from a float64 reference as PyTorch's own
    result in the same dtype.

    Args:
        actual: the result to judge.
        reference: the same in float64.
        peer: PyTorch's own result in actual's dtype.
        k: how many times PyTorch's error is allowed, in both `relative_l2` and `max_over_rms`. No
            less than one rounding of the dtype is ever asked for.
        what: opens the message.

    Values that are not finite in the peer must be the same there; everywhere else both must be
    finite."""
    what = what and f"{what}: "
    assert actual.shape == peer.shape == reference.shape, (
        f"{what}shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    )
    assert actual.dtype == peer.dtype, f"{what}dtype {actual.dtype}, expected {peer.dtype}"
    finite = peer.isfinite()
    torch.testing.assert_close(
        actual[~finite], peer[~finite], rtol=0, atol=0, equal_nan=True, msg=lambda m: what + m
    )
    actual, reference, peer = actual[finite], reference[finite], peer[finite]
    rounding = torch.finfo(peer.dtype).eps / 2
    for name, measure in (("relative L2", relative_l2), ("max / rms", max_over_rms)):
        ours, theirs = measure(actual, reference), measure(peer, reference)
        limit = k * max(theirs, rounding)
        assert ours <= limit, (  # also where ours is NaN
            f"{what}{name} error {ours:.3g} is more than {limit:.3g}, {k} times PyTorch's own "
            f"{theirs:.3g}"
        )


@contextlib.contextmanager
def force_backend(backend, algorithm="auto"):
    """Calls that leave the choice open take this backend and algorithm, or PyTorch's kernel where
    it cannot run."""
    with planner.force(backend, algorithm):
        yield


@contextlib.contextmanager
def force_isa(name):
    """The CPU kernels of one instruction set ("amx", "avx512bf16", "avx512", "avx2", "portable") in
    the whole process.

    Raises RuntimeError where the native library is not loaded, ValueError where this build or
    processor lacks the set."""
    with native.force_isa(name):
        planner.forget_routes()
        try:
            yield
        finally:
            planner.forget_routes()
