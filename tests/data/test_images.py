# SPDX-License-Identifier: BSD-3-Clause
"""Images in memory: values, statistics, splits, labels that are no labels."""

import pytest
import torch
from torch.utils.data import DataLoader

from pywino.data import Images


def images(n=10, channels=2):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, channels, 5, 4), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(n) % 3, ("a", "b", "c"))


def test_one_and_many_are_alike():
    data = images().normalise_()
    x, y = data.batch([3, 7])
    assert x.dtype == torch.float32
    for i, index in enumerate((3, 7)):
        assert torch.equal(x[i], data[index][0])
        assert int(y[i]) == data[index][1]
    loaded, labels = next(iter(DataLoader(data, batch_size=4)))
    assert torch.equal(loaded, data.batch(range(4))[0])
    assert labels.tolist() == [0, 1, 2, 0]


def test_batches_are_made_where_the_images_are():
    here = images(12)
    there = here.to("meta")
    x, y = there.batch([3, 1])
    assert (x.device.type, y.device.type) == ("meta", "meta")
    assert x.shape == (2, *here.images.shape[1:])
    assert here.images.device.type == "cpu"
    assert there.mean.device.type == "meta"


def test_statistics():
    data = images()
    assert torch.equal(data[0][0], data.images[0] / 255)
    data.normalise_()
    x = data.batch(range(10))[0].double()
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(2).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        x.square().mean((0, 2, 3)), torch.ones(2).double(), atol=1e-5, rtol=0
    )
    other = images(4).normalise_(data)
    assert torch.equal(other.std, data.std)


def test_split():
    data = images(100)
    rest, held_out = data.split(0.1, seed=1)
    assert (len(rest), len(held_out)) == (90, 10)
    together = torch.cat([rest.images, held_out.images]).flatten(1)
    wanted = data.images.flatten(1)
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, wanted.tolist()))
    assert torch.equal(data.split(0.1, seed=1)[1].images, held_out.images)
    assert not torch.equal(data.split(0.1, seed=2)[1].images, held_out.images)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range(label):
    labels = torch.tensor([0, label, label])
    with pytest.raises(ValueError, match=rf"in \[0, 3\), got {label} for image 1, and 2 such"):
        Images(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), labels, ("a", "b", "c"))


def test_refusals():
    with pytest.raises(ValueError, match=r"must be \(N, C, H, W\) uint8"):
        Images(torch.zeros(3, 1, 2, 2), torch.zeros(3), ("a",))
    with pytest.raises(ValueError, match=r"one an image \(3\), got \(4,\)"):
        Images(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(4), ("a",))
    with pytest.raises(ValueError, match="fraction must be in"):
        images().split(1.0)
