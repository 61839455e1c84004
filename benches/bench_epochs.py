# SPDX-License-Identifier: BSD-3-Clause
"""Seconds per epoch, tables 1 to 6 of "Efficient ensemble sparse convolutional neural networks with
dynamic batch size"; epochs.py says what is measured."""

import pytest
from epochs import BATCHES, SPARSITIES, compare_epochs


@pytest.mark.benchmark(group="epochs_alexnet_sparsity")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.layers(full=SPARSITIES, default=SPARSITIES[-1:])
def test_table_1(compare, native, full, layer):
    """the paper's table 1: a training step of AlexNets on 28 x 28 images by per cent of zeros,
    fp32, batch 128, SWR-CNN against SC-CNN"""
    compare_epochs(compare, full, "alexnet", layer)


@pytest.mark.benchmark(group="epochs_alexnet_batch")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.layers(full=BATCHES, default=BATCHES[:1])
def test_table_2(compare, native, full, layer):
    """the paper's table 2: a training step of AlexNets on 28 x 28 images by batch, fp32, SWR-CNN
    against SC-CNN"""
    compare_epochs(compare, full, "alexnet", layer)


@pytest.mark.benchmark(group="epochs_vgg16_sparsity")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.full_only
@pytest.mark.layers(full=SPARSITIES, default=SPARSITIES)
def test_table_3(compare, native, full, layer):
    """the paper's table 3: a training step of VGG-16s on 32 x 32 images by per cent of zeros,
    fp32, batch 128, SWR-CNN against SC-CNN"""
    compare_epochs(compare, full, "vgg16", layer)


@pytest.mark.benchmark(group="epochs_vgg16_batch")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.full_only
@pytest.mark.layers(full=BATCHES, default=BATCHES)
def test_table_4(compare, native, full, layer):
    """the paper's table 4: a training step of VGG-16s on 32 x 32 images by batch, fp32, SWR-CNN
    against SC-CNN"""
    compare_epochs(compare, full, "vgg16", layer)


@pytest.mark.benchmark(group="epochs_resnet32_sparsity")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.full_only
@pytest.mark.layers(full=SPARSITIES, default=SPARSITIES)
def test_table_5(compare, native, full, layer):
    """the paper's table 5: a training step of ResNet-32s on 32 x 32 images of 100 classes by per
    cent of zeros, fp32, batch 128, SWR-CNN against SC-CNN"""
    compare_epochs(compare, full, "resnet32", layer)


@pytest.mark.benchmark(group="epochs_resnet32_batch")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.full_only
@pytest.mark.layers(full=BATCHES, default=BATCHES)
def test_table_6(compare, native, full, layer):
    """the paper's table 6: a training step of ResNet-32s on 32 x 32 images of 100 classes by
    batch, fp32, SWR-CNN against SC-CNN"""
    compare_epochs(compare, full, "resnet32", layer)
