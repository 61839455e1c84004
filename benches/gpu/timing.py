# SPDX-License-Identifier: BSD-3-Clause
"""Times on a device: calls are queued without a pause, with a mark between the samples.

A clock has `mark()`, a moment in the device's queue; `between(a, b)`, seconds; `wait()`, until the
queue is empty; `is_lost()`, whether the device fails every call; and `graph(calls)`, a function
that replays these calls. `CUDA` and `Processor` are the two that exist; tests bring their own.
"""

import statistics
import time

import torch

SAMPLE_S = 200e-6  # a sample has so many calls that it takes about this long
SAMPLES = 50
LONG_S = 0.1  # calls so long that 50 samples take more than this get fewer
FEWEST = 7
COLD_BYTES = 120e6  # twice the L2 of an H200: buffers that rotate over more are read from memory


class CUDA:
    """CUDA events in the current stream."""

    device = "cuda"

    def __init__(self):
        # One for all captures: memory that the allocator has given to a stream stays with it.
        self.stream = torch.cuda.Stream()
        self.spoiled = False

    def mark(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, end):
        return 1e-3 * start.elapsed_time(end)

    def wait(self):
        torch.cuda.synchronize()

    def is_lost(self):
        """Whether an earlier error has left this process's context unusable: every call fails, or
        the allocator still believes in a capture that failed."""
        if self.spoiled:
            return True
        try:
            return torch.ones(2, device="cuda").sum().item() != 2
        except RuntimeError:
            return True

    def graph(self, calls):
        """Captures the calls, after one run of them on the same stream, as PyTorch asks."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for call in calls:
                call()
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        self.spoiled = True
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                for call in calls:
                    call()
        finally:  # a capture that fails leaves its stream the current one
            torch.cuda.set_stream(current)
        self.spoiled = False
        return graph.replay


class Processor:
    """Wall clock, for the dry run: what runs there has ended when it returns."""

    device = "cpu"
    graph = None

    def mark(self):
        return time.perf_counter()

    def between(self, start, end):
        return end - start

    def wait(self):
        pass

    def is_lost(self):
        return False


def clock_of(device: str):
    return CUDA() if device == "cuda" else Processor()


def interleaved(clock, runs: list, rounds: int) -> list[list[float]]:
    """Seconds of each run in each round, the order turned round in every second one: A B, B A, …

    Nothing waits between two samples, so a device that is slower than its queue is filled shows its
    own time alone."""
    order, marks = [], [clock.mark()]
    for turn in range(rounds):
        for index in range(len(runs))[:: -1 if turn % 2 else 1]:
            runs[index]()
            order.append(index)
            marks.append(clock.mark())
    clock.wait()
    seconds = [[] for _ in runs]
    for index, start, end in zip(order, marks, marks[1:]):
        seconds[index].append(clock.between(start, end))
    return seconds


def once(clock, run) -> float:
    """Seconds of one call, roughly: it decides how many calls make a sample."""
    for _ in range(2):
        run()
    clock.wait()
    return min(interleaved(clock, [run], 3)[0])


def calls_in_sample(seconds: float) -> int:
    return max(1, min(100, round(SAMPLE_S / seconds))) if seconds > 0 else 100


def rounds_for(seconds: float, samples: int = SAMPLES) -> int:
    """How many samples of this length are taken."""
    if samples * seconds <= LONG_S:
        return samples
    return max(min(FEWEST, samples), int(LONG_S / seconds))


def summary(seconds: list[float], calls: int = 1) -> dict:
    """Median and interquartile range in µs a call, and the number of samples."""
    us = [1e6 * s / calls for s in seconds]
    low, _, high = statistics.quantiles(us, method="inclusive") if len(us) > 1 else us * 3
    return {"us": statistics.median(us), "iqr_us": high - low, "samples": len(us), "calls": calls}


def rotating(tensors: tuple, most: int = 64) -> list[tuple]:
    """`tensors` and as many copies of them as together exceed `COLD_BYTES`."""
    size = sum(t.numel() * t.element_size() for t in tensors)
    copies = max(1, min(most, -int(-COLD_BYTES // max(size, 1))))
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(copies - 1))]


def compare(clock, contenders: dict, samples: int = SAMPLES, graphs: bool = True) -> dict:
    """name -> {"hot", "cold", "eager"}: summaries, taken in turn, of `function(*tensors)` of each
    contender (function, tensors).

    hot: replays of a graph of calls on the same tensors. cold: of one on tensors that rotate.
    eager: calls from Python. Without graphs, the first two are None; where capturing fails, "graph"
    has the reason.
    """
    found = {name: {"hot": None, "cold": None, "eager": None} for name in contenders}

    def measure(kind, runs, calls):
        rounds = rounds_for(max(s * c for s, c in zip(seconds, calls)), samples)
        for name, s, c in zip(contenders, interleaved(clock, runs, rounds), calls):
            found[name][kind] = summary(s, c)

    run = [lambda f=f, t=t: f(*t) for f, t in contenders.values()]
    seconds = [once(clock, r) for r in run]
    calls = [calls_in_sample(s) for s in seconds]
    measure("eager", [_repeat(r, c) for r, c in zip(run, calls)], calls)
    if graphs and clock.graph:
        try:
            measure("hot", [clock.graph([r] * c) for r, c in zip(run, calls)], calls)
            sets = [[lambda f=f, s=s: f(*s) for s in rotating(t)] for f, t in contenders.values()]
            measure("cold", [clock.graph(s) for s in sets], [len(s) for s in sets])
        except RuntimeError as error:
            for times in found.values():
                times["graph"] = f"{type(error).__name__}: {error}"[:400]
    return found


def _repeat(run, count):
    def repeated():
        for _ in range(count):
            run()

    return repeated
