# SPDX-License-Identifier: BSD-3-Clause
import pytest
import torch
import torch.nn.functional as F

from pywino import planner, testing
from pywino.testing import assert_close_to_reference, max_over_rms, relative_l2


@pytest.fixture
def results():
    """(actual, reference in float64, peer): two float32 results that both round the reference."""
    input, weight = torch.randn(1, 8, 12, 12), torch.randn(8, 8, 3, 3)
    reference = F.conv2d(input.double(), weight.double())
    peer = F.conv2d(input, weight)
    return peer.clone(), reference, peer


def test_measures_by_hand():
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_l2(torch.tensor([3.0, 5.0]), reference) == pytest.approx(1 / 5)
    assert max_over_rms(torch.tensor([3.0, 5.0]), reference) == pytest.approx(1 / 12.5**0.5)
    assert relative_l2(reference, reference) == max_over_rms(reference, reference) == 0
    assert relative_l2(torch.ones(2), torch.zeros(2)) == pytest.approx(2**0.5)  # no division by 0
    assert max_over_rms(torch.empty(0), torch.empty(0)) == 0


def test_equal_results_pass(results):
    assert_close_to_reference(*results, k=1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y * (1 + 1e-5), "relative L2 error"),
        (lambda y: y + torch.eye(10) * 1e-3, "relative L2 error"),
        (lambda y: y.index_put((torch.tensor(0),) * 4, y[0, 0, 0, 1] + 1e-4), "error"),
        (lambda y: y.index_put((torch.tensor(0),) * 4, torch.tensor(float("nan"))), "error nan"),
        (lambda y: y.roll(1, -1), "relative L2 error"),
        (lambda y: y[..., :-1], "shape"),
        (lambda y: y.double(), "dtype"),
    ],
)
def test_injected_errors_fail(results, spoil, message):
    actual, reference, peer = results
    with pytest.raises(AssertionError, match=f"conv: .*{message}"):
        assert_close_to_reference(spoil(actual), reference, peer, k=4, what="conv")


def test_one_wrong_pixel_of_many_fails_by_the_maximum():
    reference = torch.ones(1_000_000, dtype=torch.float64)
    peer = reference.float() * (1 + 1e-6)
    actual = peer.clone()
    actual[0] += 1e-5  # too little for the relative L2 of a million
    with pytest.raises(AssertionError, match="max / rms"):
        assert_close_to_reference(actual, reference, peer, k=4)


def test_k_times_the_error_of_the_peer_is_the_limit():
    reference = torch.randn(1000, dtype=torch.float64)
    noise = torch.randn(1000, dtype=torch.float64) * 1e-4
    peer = (reference + noise).float()
    assert_close_to_reference((reference + 2.9 * noise).float(), reference, peer, k=3)
    with pytest.raises(AssertionError):
        assert_close_to_reference((reference + 3.1 * noise).float(), reference, peer, k=3)


def test_values_that_are_not_finite_must_be_in_the_same_places(results):
    actual, reference, peer = results
    peer[0, 0, 0, 0] = float("inf")
    with pytest.raises(AssertionError):
        assert_close_to_reference(actual, reference, peer, k=4)
    actual[0, 0, 0, 0] = float("inf")
    assert_close_to_reference(actual, reference, peer, k=4)


@pytest.mark.native
def test_force_backend():
    call = planner.describe(
        "winograd_conv2d", torch.empty(1, 64, 56, 56), torch.empty(64, 64, 3, 3)
    )
    with testing.force_backend("aten"):
        assert planner.choose(call).backend == "aten"
    with testing.force_backend("cpu", "f2"):
        assert planner.choose(call).tile == 2
        assert planner.choose(call._replace(stride=(2, 2))).backend == "aten"
    assert planner.choose(call).tile in (4, 6)


@pytest.mark.native
def test_force_isa(isa):
    from pywino import _native

    assert _native.host.isa() == isa


@pytest.mark.native
def test_force_isa_names_the_choices():
    with pytest.raises(ValueError, match="portable"), testing.force_isa("mmx"):
        pass
