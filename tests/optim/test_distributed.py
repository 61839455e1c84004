# SPDX-License-Identifier: BSD-3-Clause
"""Two processes over gloo against one: the same weights, the same decisions, and no hang."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

SCRIPT = """
import datetime, os, sys
import torch, torch.distributed as dist
from torch import nn
from pywino.optim import DynamicBatchController, DynamicBatchSampler, DynamicBatchSGDM
from pywino.optim import find_capacity

store, rank, ranks, out, dies = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4], sys.argv[5]
torch.set_num_threads(1)
if ranks > 1:
    dist.init_process_group("gloo", f"file://{store}", datetime.timedelta(seconds=60), ranks, rank)
torch.manual_seed(0)
x = torch.randn(403, 6, dtype=torch.float64)  # 403 = 12 * 32 + 19: an uneven last batch
y = (x.sum(1) > 0).long()
model = net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
if ranks > 1:
    model = nn.parallel.DistributedDataParallel(net)
opt = DynamicBatchSGDM(model.parameters(), lr=0.02, batch_size=19)
sampler = DynamicBatchSampler(x, opt, seed=0)
control = DynamicBatchController(opt, epochs=6, every=1, warmup=0.2)
sizes = []
while not control.done:
    for indices in sampler:
        if dies == "yes" and rank == 1 and control.epoch == 1:
            os._exit(9)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x[indices]), y[indices]).backward()
        opt.step()
        sizes.append(opt.batch_size)
    # Each rank has its own opinion; the mean decides on all of them. One process has the mean.
    control.step(control.epoch % 4 + (rank - (ranks - 1) / 2) * 10)
capacity = find_capacity(net, nn.functional.cross_entropy, x, y, limit=64 + 32 * rank)
torch.save([net.state_dict(), sizes, control.state_dict(), capacity], f"{out}/{rank}of{ranks}.pt")
"""


def start(folder, rank, ranks, dies="no"):
    command = [sys.executable, "-c", SCRIPT, folder / "store", rank, ranks, folder, dies]
    return subprocess.Popen(
        list(map(str, command)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, seconds):
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"hung for {seconds} s:\n{process.communicate()[0][-2000:]}")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    processes = [start(tmp_path, 0, 1)] + [start(tmp_path, rank, 2) for rank in (0, 1)]
    for process in processes:
        text = finish(process, 120)
        assert process.returncode == 0, text
    one, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("0of1", "0of2", "1of2")
    )
    assert len(set(one[1])) > 1
    assert one[1] == first[1] == second[1]
    assert one[2] == first[2] == second[2]
    assert first[3] == second[3] == 64  # the least of both
    for name, value in one[0].items():
        assert torch.equal(first[0][name], second[0][name])
        torch.testing.assert_close(first[0][name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_a_dead_rank_gives_a_message(tmp_path):
    processes = [start(tmp_path, rank, 2, dies="yes") for rank in (0, 1)]
    begin = time.monotonic()
    text = finish(processes[0], 90)
    finish(processes[1], 10)
    assert processes[1].returncode == 9
    assert processes[0].returncode not in (0, None)
    assert "Connection closed by peer" in text or "Connection reset by peer" in text, text
    assert time.monotonic() - begin < 90
