# SPDX-License-Identifier: BSD-3-Clause
"""SGD with momentum whose batch size follows learning rate and momentum.

    opt = DynamicBatchSGDM(model.parameters(), lr=0.02, batch_size=128)
    sampler = DynamicBatchSampler(dataset, opt, seed=0)
    control = DynamicBatchController(opt, epochs=30)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2)
    for epoch in range(30):
        for x, y in loader:
            opt.zero_grad()
            loss(model(x), y).backward()
            opt.step()
        control.step(accuracy_on_validation_images)

The optimizer, its sampler and its controller each have `state_dict` and `load_state_dict`; with the
three and the model's, training goes on exactly where it was.
"""

from pywino.optim.capacity import MicroBatches, find_capacity
from pywino.optim.controller import DynamicBatchController
from pywino.optim.sampler import DynamicBatchSampler
from pywino.optim.sgdm import DynamicBatchSGDM, batch_size

__all__ = [
    "DynamicBatchController",
    "DynamicBatchSGDM",
    "DynamicBatchSampler",
    "MicroBatches",
    "batch_size",
    "find_capacity",
]
