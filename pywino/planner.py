# SPDX-License-Identifier: BSD-3-Clause
"""Chooses the kernel of a call: measured once, kept in memory and on disk, deterministic after.

The candidates of a call are PyTorch's own kernel and, on the CPU, the two tiles with the fewest
operations; on a GPU, every kernel that stays in the error class of the call. Each is called three
times on tensors of the call's signature; the fastest wins, PyTorch wherever it is not beaten by
3 %. A plan holds for a bucket of signatures: batch, height and width are rounded up
(`bucket`), everything else is exact. What depends on more than a signature (the zeros of a weight)
has a key and contenders of its op's own: `measured`.

    PYWINO_PLAN=measure   The default: measures what is not in this machine's file in the user's
                          cache folder.
    PYWINO_PLAN=static    Nothing is measured, read or written: the operation count decides.
    PYWINO_PLAN=off       PyTorch's kernel always.
    PYWINO_PLAN=<file>    That file's plans. If it exists it is only read, and the operation count
                          decides what it lacks, so that every run and rank chooses alike; if not,
                          calls are measured and written to it.

Under `torch.use_deterministic_algorithms` nothing is measured: a stored plan or the operation count
decides.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import platform
import sys
import tempfile
import threading
import time
import warnings
from collections import OrderedDict
from typing import NamedTuple

import torch

from pywino import _native as native
from pywino import backends
from pywino.backends import TILES, Call

log = logging.getLogger("pywino.planner")

FORMAT = 1  # of the file; a file of another format is ignored
CAPACITY = 4096  # plans in memory and in the file
CALLS = 3  # of each candidate, where its two best times agree
MOST_CALLS = 9
AGREE = 1.2
SECONDS = 0.2  # of measuring a signature; the first calls are always made
SPARSE = ("unstructured", "blocks")  # kernels of the CPU that skip zeros
MARGIN = 0.97  # a kernel must take less than this part of PyTorch's time
# Multiplications per thread of a direct call that is measured whole; larger ones are measured on a
# part.
WORK = 2e9


class Plan(NamedTuple):
    """What runs a call: (backend, algorithm), the latter None for "aten"."""

    backend: str
    algorithm: str | None
    source: str = "static"  # "measured" | "stored" | "static" | "off" | "only"
    seconds: dict = {}  # noqa: RUF012 (never written) of each that was measured: "aten", "f2", …

    @property
    def tile(self):
        """m of F(m x m, 3 x 3), 1 for the direct kernel, 0 for PyTorch's kernel."""
        return 1 if self.algorithm == "direct" else TILES.get(self.algorithm, 0)


class Candidate(NamedTuple):
    """A way to run a call, with its time (None where it was not measured) or the reason why it
    cannot or would not run."""

    backend: str
    algorithm: str | None
    seconds: float | None
    reason: str | None


PYTORCH = Plan("aten", None, "only")

_measure = {}  # op -> function(call) -> function(algorithm or None) -> callable to be timed
_memos = []  # dicts of results derived from plans, emptied with them
_forced = None  # (backend, algorithm) in `force`


def register(op, runners):
    """`runners(call)` makes tensors of that signature and returns a function from an algorithm,
    None for PyTorch, to a callable without arguments which is timed."""
    _measure[op] = runners


def memo():
    """A new dict for results that hold as long as the plans do."""
    _memos.append({})
    return _memos[-1]


def remember(memo, key, value):
    """Puts a result into a memo, which never grows beyond `CAPACITY`."""
    if len(memo) >= CAPACITY:
        memo.clear()
    memo[key] = value
    return value


def choose(call, algorithm="auto", backend="auto"):
    """The `Plan` of a `Call`. An explicit choice that cannot run raises RuntimeError with the
    reason.

    `call.op` names the op; `describe` makes a call from tensors.
    """
    if _forced is not None and backend == "auto" and algorithm == "auto":
        backend, algorithm = _forced
        if backends.can_run(backend, call, algorithm) is not None:
            return PYTORCH
    if backend == "aten":
        require("aten", call, algorithm)
        return PYTORCH
    names = backends.of_device(call.device) or ("cpu",) if backend == "auto" else (backend,)
    able = [name for name in names if backends.can_run(name, call, algorithm) is None]
    if not able:
        if backend == "auto" and algorithm == "auto":
            return PYTORCH
        require(names[0], call, algorithm)
    if algorithm != "auto":
        return Plan(able[0], algorithm, "only")
    plan = _plans.lookup(call)
    if backend not in ("auto", plan.backend):  # the user's word: the best of that backend's
        return Plan(backend, _best_of(backend, call, plan.seconds), plan.source, plan.seconds)
    return plan


def measured(call, what, times):
    """The `Plan` of a call on a weight of a certain kind, which `what` names: a stored one, or one
    made and stored from the seconds that `times()` gives by `label`, PyTorch's as "aten". None
    where nothing is stored and nothing may be measured."""
    if mode() != "measure":
        return None
    stride, size = call.stride, call.kernel
    return _plans.measured(
        f"{_key(call)} s{stride[0]},{stride[1]} r{size[0]},{size[1]} {what}", times
    )


def require(backend, call, algorithm="auto"):
    """Raises RuntimeError with `can_run`'s reason where there is one."""
    reason = backends.can_run(backend, call, algorithm)
    if reason is not None:
        raise RuntimeError(
            f"pywino.{call.op}: backend={backend!r}, algorithm={algorithm!r} cannot run this call: "
            f'{reason}; use backend="auto", algorithm="auto", or torch.nn.functional.conv2d'
        )


def candidates(call):
    """Every way to run a `Call`, as a list of `Candidate`: what was measured has a time, the rest a
    reason."""
    plan = choose(call)
    found = [Candidate("aten", None, plan.seconds.get("aten"), None)]
    for name in ("cpu", "triton", "cuda"):
        reason = backends.can_run(name, call)
        if reason is not None:
            found.append(Candidate(name, None, None, reason))
            continue
        best = [f"f{tile}" for tile in best_tiles(call)]
        for algorithm in TILES if name == "cpu" else ("direct", *TILES):
            seconds = plan.seconds.get(label(name, algorithm))
            reason = backends.can_run(name, call, algorithm)
            if reason is None and seconds is None:
                if name != "cpu":
                    reason = backends.loses_accuracy(call, algorithm)
                elif algorithm not in best[:2]:
                    reason = f"more operations than {best[0]} and {best[1]}"
            found.append(Candidate(name, algorithm, seconds, reason))
    return found


def label(backend, algorithm):
    """The name of a kernel among measured times: "aten", "f4" (on the CPU), "cuda f4"."""
    if backend == "aten":
        return "aten"
    return algorithm if backend == "cpu" else f"{backend} {algorithm}"


def kernel_plan(name):
    """The `Plan` that a `label` names."""
    if name == "aten":
        return PYTORCH
    backend, _, algorithm = name.rpartition(" ")
    return Plan(backend or "cpu", algorithm, "only")


def _measured_kernels(call):
    """Labels of the kernels of our own that are timed for a call."""
    if call.device == "cpu":
        return [f"f{tile}" for tile in best_tiles(call)[:2]]
    return [
        label(name, algorithm)
        for name in backends.of_device(call.device)
        for algorithm in ("direct", *TILES)
        if backends.can_run(name, call, algorithm) is None
        and backends.loses_accuracy(call, algorithm) is None
    ]


def _best_of(backend, call, seconds):
    """The algorithm of a backend that was fastest, or has the fewest operations."""
    times = {
        kernel_plan(name).algorithm: time
        for name, time in seconds.items()
        if kernel_plan(name).backend == backend
    }
    if times:
        return min(times, key=times.get)
    for tile in best_tiles(call):
        algorithm = f"f{tile}"
        if backend == "cpu" or backends.loses_accuracy(call, algorithm) is None:
            return algorithm
    return "f2"


def describe(
    op,
    input,
    weight,
    padding=0,
    dilation=1,
    *,
    stride=1,
    groups=1,
    precision="default",
    cached=False,
):
    """The `Call` of `op` on a 4-d convolution input and weight; their device, dtype and layout
    decide, not their values."""
    pair = lambda value: (value, value) if isinstance(value, int) else tuple(value)  # noqa: E731
    n, c, h, w = input.shape
    return Call(
        op,
        n,
        c,
        h,
        w,
        weight.shape[0],
        pair(padding),
        pair(dilation),
        input.dtype,
        backends.is_channels_last(input),
        input.device.type,
        precision,
        cached,
        # A weight in the Winograd domain is larger than its kernel.
        (3, 3)
        if op.startswith(("winograd_relu_conv2d", "winograd_domain_conv2d"))
        else tuple(weight.shape[2:]),
        pair(stride),
        groups,
        backends.allows_tf32(input),
    )


# --- operation counts ---


def operation_count(call, tile):
    """Floating point multiplications of a call's products: by F(tile x tile, 3 x 3) with the tiles
    that stick out, or, for tile 0, directly."""
    height, width = call.output_size
    if tile == 0:
        return call.n * call.k * call.c * 9 * height * width
    return _tiles(call, tile) * (tile + 2) ** 2 * call.c * call.k


def best_tiles(call):
    """The tiles, the one with the least estimated work first."""
    return sorted(TILES.values(), key=lambda tile: _estimate(call, tile))


def _tiles(call, tile):
    """Number of tiles of a call's output, over all d x d phases of a dilation d."""
    count = call.n
    for size, d in zip(call.output_size, call.dilation):
        # Of the d phases, size % d have one row more than the others.
        count *= (size % d) * -(-(size // d + 1) // tile) + (d - size % d) * -(-(size // d) // tile)
    return count


# A transform's work per tile and channel, a filter's per pair of channels, in multiplications of
# the product stage: from measured times of the kernels. They do not decide where there is a
# measurement, only what is worth one.
_TRANSFORM_IN = {2: 100, 4: 240, 6: 500}
_TRANSFORM_OUT = {2: 50, 4: 90, 6: 110}
_TRANSFORM_FILTER = {2: 400, 4: 900, 6: 1600}
# The operation-count rule picks a tile whose estimated work is less than this part of the direct
# one: the estimate knows nothing of memory.
_STATIC_GAIN = 0.55


def _estimate(call, tile):
    """`operation_count` and the transforms, which work on whole vectors of channels."""
    c, k = (-(-channels // 16) * 16 for channels in (call.c, call.k))
    transforms = _tiles(call, tile) * (c * _TRANSFORM_IN[tile] + k * _TRANSFORM_OUT[tile])
    if not call.cached:
        transforms += c * k * _TRANSFORM_FILTER[tile]
    return operation_count(call, tile) + transforms


def _static(call):
    if call.device != "cpu":
        return Plan("aten", None)  # a GPU's kernels are chosen by measurement alone
    tile = best_tiles(call)[0]
    if _estimate(call, tile) < _STATIC_GAIN * operation_count(call, 0):
        return Plan("cpu", f"f{tile}")
    return Plan("aten", None)


# --- buckets ---


def bucket(call):
    """The call that stands for all of its bucket: N rounded up to a power of two; H and W exact to
    32 (there the tiles that stick out matter), then rounded up to one of eight steps an octave."""
    return call._replace(n=1 << (call.n - 1).bit_length(), h=_step(call.h), w=_step(call.w))


def _step(size):
    if size <= 32:
        return size
    step = 1 << (size.bit_length() - 4)
    return -(-size // step) * step


def _key(call):
    """The bucket of a call as a readable string, for the file."""
    b = bucket(call)
    if b.device == "cpu":
        isa = native.host.isa() if native.loaded else "none"
        place = f"cpu threads{torch.get_num_threads()} {isa}"
    else:
        gpu = torch.cuda.get_device_name().replace(" ", "_")
        place = f"{gpu} {'tf32' if b.tf32 else 'ieee'}"
    return (
        f"{b.op} n{b.n} c{b.c} h{b.h} w{b.w} k{b.k} "
        f"p{b.padding[0]},{b.padding[1]} d{b.dilation[0]},{b.dilation[1]} "
        f"{str(b.dtype).removeprefix('torch.')} "
        f"{'channels_last' if b.channels_last else 'contiguous'} "
        f"{place} {b.precision} "
        f"{'cached' if b.cached else 'transforms'}"
    )


# --- measuring ---


def _timed(call):
    """Seconds of PyTorch's kernel and of ours, by `label`; `runners` know PyTorch's as None."""
    part = _part(call)
    runners = _measure[call.op](part)
    names = [None, *_measured_kernels(call)]
    # Autocast and a deterministic fill of new memory would be timed too; gradients need no graph
    # here.
    with torch.no_grad(), torch.autocast(call.device, enabled=False):
        runs = {name: runners(name) for name in names}
        return _scaled(_least_seconds(runs, CALLS, call.device, SECONDS), call, part)


def race(runs, calls, device="cpu"):
    """name -> its least seconds in `calls` calls, taken in turns; on a GPU those between two events
    on the current stream. Nobody may capture that: ask `may_measure` before."""
    return _least_seconds(runs, calls, device, float("inf"))


def _least_seconds(runs, calls, device, seconds):
    """On the CPU there are more calls, for at most `SECONDS`, while a contender's best time stands
    alone: the system takes milliseconds to give new memory, and other programs take a core. After
    `seconds` only first calls are still made."""
    seconds_of = _seconds_on(device)
    times = {name: [] for name in runs}
    start = time.perf_counter()
    for done in range(max(calls, MOST_CALLS)):
        if done >= calls and (device != "cpu" or all(map(_agree, times.values()))):
            break
        for name, run in runs.items():
            times[name].append(seconds_of(run))
            limit = seconds if done < calls else min(seconds, SECONDS)
            if time.perf_counter() - start > limit and all(times.values()):
                return {name: min(taken) for name, taken in times.items()}
    return {name: min(taken) for name, taken in times.items()}


def _agree(times):
    least, *others = sorted(times)
    return not others or others[0] <= AGREE * least


def _seconds_on(device):
    return _seconds_on_gpu if device == "cuda" else _seconds_on_cpu


def _seconds_on_cpu(run):
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


def _seconds_on_gpu(run):
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _scaled(seconds, call, part):
    """Times of the whole call from those of its part."""
    factor = operation_count(call, 0) / operation_count(part, 0)
    return {name or "aten": t * factor for name, t in seconds.items()}


def _part(call):
    """The call, or one with fewer images or rows where the whole would take too long to measure."""
    if call.device != "cpu":
        return call
    limit = WORK * torch.get_num_threads()
    if call.dtype == torch.float16:
        limit /= 8  # PyTorch's float16 convolution is that slow on CPUs without float16 arithmetic
    part = call._replace(n=min(call.n, max(1, int(limit / operation_count(call._replace(n=1), 0)))))
    for axis, name in enumerate(("h", "w")):
        excess = operation_count(part, 0) / limit
        if excess > 1:
            # A multiple of every tile and phase, so that no tile sticks out that would not in the
            # whole.
            step, size = 12 * call.dilation[axis], getattr(call, name)
            part = part._replace(**{name: min(size, max(step, int(size / excess) // step * step))})
    return part


# --- plans in memory and on disk ---


class _Plans:
    """The plans of this process: an LRU dict and its file."""

    def __init__(self):
        self.lock = threading.RLock()
        self.clear()

    def clear(self):
        with self.lock:
            self.plans = OrderedDict()
            self.mode = None  # read from the environment at the first look-up
            self.path = None
            self.writes = False
            self.complained = False
            for memo in _memos:
                memo.clear()

    def after_fork(self):
        # Another thread of the parent may hold the lock, and would never release it here.
        self.lock = threading.RLock()

    def lookup(self, call):
        if self.mode is None:
            self.open()
        if self.mode == "off":
            return Plan("aten", None, "off")
        if self.mode == "static":
            return _static(call)
        return self.measured(_key(call), lambda: _timed(call)) or _static(call)

    def measured(self, key, times):
        with self.lock:  # one measurement at a time, and one for each signature
            plan = self.plans.get(key)
            if plan is not None:
                self.plans.move_to_end(key)
                return plan
            if not self.writes or not _may_measure():
                return None
            start = time.perf_counter()
            seconds = times()
            fastest = min(seconds, key=seconds.get)
            wins = seconds[fastest] < MARGIN * seconds["aten"]
            best = kernel_plan(fastest if wins else "aten")
            plan = best._replace(source="measured", seconds=seconds)
            self.plans[key] = plan
            while len(self.plans) > CAPACITY:
                self.plans.popitem(last=False)
            times = ", ".join(f"{name} {1e3 * t:.3f} ms" for name, t in seconds.items())
            took = time.perf_counter() - start
            log.info(
                "%s: %s; chose %s in %.0f ms",
                key,
                times,
                label(plan.backend, plan.algorithm),
                1e3 * took,
            )
            self.save()
            return plan

    def open(self):
        with self.lock:
            if self.mode is not None:  # another thread was here first
                return
            mode = os.environ.get("PYWINO_PLAN", "measure")
            if mode in ("off", "static"):
                self.mode = mode
                return
            if mode in ("", "measure"):
                self.path, self.writes = default_path(), True
            else:
                self.path = pathlib.Path(mode).expanduser()
                self.writes = not self.path.exists()
            self.plans.update(read(self.path))
            self.mode = "measure"

    def save(self):
        """Adds this process's plans to the file, which other processes may have written since it
        was read."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first reading has said it
            merged = {**read(self.path), **self.plans}
        try:
            write(self.path, dict(list(merged.items())[-CAPACITY:]))
        except OSError as error:
            if not self.complained:
                log.warning("plans are kept in memory only: cannot write %s: %s", self.path, error)
            self.complained = True


def _may_measure():
    # A dispatch mode would see, and perhaps record, the calls that are measured.
    return (
        not torch.are_deterministic_algorithms_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


def default_path():
    """The file of this machine in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    tag = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:12]
    return (
        pathlib.Path(folder) / "pywino" / f"plans-{tag}.json"
    )  # a home folder may be shared by several machines


def machine():
    """What a plan depends on beside its signature."""
    return {
        "cpu": _cpu_model(),
        "isas": list(native.host.isas()) if native.loaded else [],
        "torch": torch.__version__,
        "pywino": getattr(sys.modules.get("pywino"), "__version__", ""),
    }


@functools.cache
def _cpu_model():
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def read(path):
    """The plans in a file, by key. A file that is damaged or from another machine is ignored with a
    warning."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        return _ignored(path, f"it cannot be read ({error})")
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            return _ignored(path, f"its format is {content['format']!r}, not {FORMAT}")
        if content["machine"] != machine():
            return _ignored(
                path, f"it was made on another machine or version: {content['machine']}"
            )
        return {key: _plan_from(entry) for key, entry in content["plans"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return _ignored(path, f"it is damaged ({type(error).__name__}: {error})")


def _plan_from(entry):
    backend, algorithm = entry["backend"], entry["algorithm"]
    known = (*SPARSE, *TILES) if backend == "cpu" else ("direct", *TILES)
    if (backend, algorithm) != ("aten", None) and (
        backend not in ("cpu", "cuda", "triton") or algorithm not in known
    ):
        raise ValueError(f"no such plan: {backend!r}, {algorithm!r}")
    seconds = {name: float(t) for name, t in entry["seconds"].items()}
    if not {"aten", label(backend, algorithm)} <= seconds.keys():
        raise ValueError(f"a plan without its times: {entry}")
    return Plan(backend, algorithm, "stored", seconds)


def _ignored(path, why):
    warnings.warn(f"pywino: the plans in {path} are ignored: {why}", stacklevel=2)
    return {}


def write(path, plans):
    """Writes plans to a file, whole or not at all."""
    entries = {
        key: {"backend": p.backend, "algorithm": p.algorithm, "seconds": p.seconds}
        for key, p in plans.items()
    }
    content = {"format": FORMAT, "machine": machine(), "plans": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


_plans = _Plans()
os.register_at_fork(after_in_child=_plans.after_fork)


def mode():
    """ "measure", "static" or "off", as PYWINO_PLAN says."""
    if _plans.mode is None:
        _plans.open()
    return _plans.mode


def may_measure():
    """Whether a kernel of another op may be measured here and now."""
    return mode() == "measure" and _plans.writes and _may_measure()


def reset():
    """Forgets every plan in memory and reads PYWINO_PLAN and the file again at the next call."""
    _plans.clear()


@contextlib.contextmanager
def force(backend, algorithm="auto"):
    """Every call that leaves the choice open takes this one, or PyTorch's kernel where it cannot
    run."""
    global _forced
    before, _forced = _forced, (backend, algorithm)
    forget_routes()
    try:
        yield
    finally:
        _forced = before
        forget_routes()


def forget_routes():
    """Empties what was derived from the plans, but keeps the plans."""
    for memo in _memos:
        memo.clear()
