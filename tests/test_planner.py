# SPDX-License-Identifier: BSD-3-Clause
import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch

import pywino
from pywino import _native as native
from pywino import backends, planner
from pywino.backends import Call
from pywino.ops._kernels import backend_of

CALL = Call("winograd_conv2d", 1, 32, 20, 20, 32, (1, 1), (1, 1))

pytestmark = pytest.mark.native


@pytest.fixture
def file(monkeypatch, tmp_path):
    """PYWINO_PLAN=<file> that does not exist: measures, and writes there."""
    path = tmp_path / "plans.json"
    use(monkeypatch, path)
    return path


def use(monkeypatch, mode):
    monkeypatch.setenv("PYWINO_PLAN", str(mode))
    planner.reset()


@pytest.fixture
def seconds(monkeypatch):
    """Makes the measured times, and lists the calls that were measured."""
    times = {"aten": 3e-3, "f4": 1e-3, "f6": 2e-3}
    times["calls"] = calls = []

    def timed(call):
        calls.append(call)
        return {name: t for name, t in times.items() if name != "calls"}

    monkeypatch.setattr(planner, "_timed", timed)
    return times


# --- measuring ---


def test_the_fastest_wins_and_is_measured_once(file, seconds):
    plan = planner.choose(CALL)
    assert (plan.backend, plan.algorithm, plan.tile, plan.source) == ("cpu", "f4", 4, "measured")
    seconds["aten"] = 1e-6
    assert planner.choose(CALL) == plan
    assert len(seconds["calls"]) == 1


def test_pytorch_wins_where_it_is_not_beaten_by_the_margin(file, seconds):
    seconds |= {"aten": 1.0e-3, "f4": 0.98e-3, "f6": 5e-3}
    plan = planner.choose(CALL)
    assert (plan.backend, plan.algorithm, plan.tile) == ("aten", None, 0)


def test_real_times(file, caplog):
    caplog.set_level(logging.INFO, "pywino.planner")
    plan = planner.choose(CALL)
    assert set(plan.seconds) == {"aten", *(f"f{t}" for t in planner.best_tiles(CALL)[:2])}
    assert all(0 < t < 1 for t in plan.seconds.values())
    planner.choose(CALL)
    (record,) = caplog.records  # logged once
    assert "winograd_conv2d n1 c32 h20 w20 k32" in record.getMessage()
    assert f"chose {plan.algorithm or 'aten'}" in record.getMessage()


@pytest.mark.parametrize("op", ["", "_backward_input", "_backward_weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_op_can_be_measured(op, dtype):
    call = CALL._replace(op=f"winograd_conv2d{op}", dtype=dtype, channels_last=True)
    if backends.can_run("cpu", call) is not None:
        pytest.skip(backends.can_run("cpu", call))
    times = planner._timed(call)
    assert len(times) == 3
    assert all(0 < t < 1 for t in times.values())


@pytest.mark.parametrize("cached", [True, False])
def test_a_kept_filter_is_no_part_of_the_time(cached):
    run = planner._measure[CALL.op](CALL._replace(cached=cached))("f4")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(), run()
    names = [e.name for e in profile.events()]
    assert "pywino::_winograd_filter" not in names
    made_inside, kept = "pywino::_winograd_convolve", "pywino::_winograd_forward"
    assert names.count(made_inside) == (0 if cached else 2)
    assert names.count(kept) == (2 if cached else 0)


def test_three_calls_of_each_in_turn_and_not_for_long(monkeypatch):
    calls = []
    monkeypatch.setitem(
        planner._measure, CALL.op, lambda call: lambda name: lambda: calls.append(name)
    )
    monkeypatch.setattr(planner, "_seconds_on_cpu", lambda run: (run(), 1e-3)[1])
    planner._timed(CALL)
    f, g = (f"f{t}" for t in planner.best_tiles(CALL)[:2])
    assert calls == [None, f, g] * 3

    calls.clear()
    slow = lambda call: lambda name: lambda: (calls.append(name), time.sleep(0.08))  # noqa: E731
    monkeypatch.setitem(planner._measure, CALL.op, slow)
    planner._timed(CALL)
    assert calls == [None, f, g]


def test_large_calls_are_measured_on_a_part(monkeypatch):
    measured = []
    monkeypatch.setitem(
        planner._measure,
        CALL.op,
        lambda call: measured.append(call) or (lambda name: lambda: time.sleep(1e-3)),
    )
    for huge in (
        CALL._replace(n=512, c=256, k=256, h=56, w=56),
        CALL._replace(n=1, c=512, k=512, h=2000, w=1000, dilation=(2, 2), padding=(2, 2)),
    ):
        times = planner._timed(huge)
        part = measured[-1]
        work = planner.operation_count(part, 0)
        assert work <= 2 * planner.WORK * torch.get_num_threads()
        assert all(a == b or a % 24 == 0 for a, b in zip(part[3:5], huge[3:5]))
        factor = planner.operation_count(huge, 0) / work
        assert times["aten"] > 0.9e-3 * factor
    assert planner._part(CALL) == CALL


def test_times_belong_to_the_signature_not_to_the_values_and_leave_no_trace(file):
    input, weight = torch.full((1, 32, 20, 20), float("nan")), torch.randn(32, 32, 3, 3)
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        planner.choose(planner.describe("winograd_conv2d", input, weight, 1))
    assert torch.equal(torch.get_rng_state(), before)
    key = next(iter(json.loads(file.read_text())["plans"]))
    assert "float32" in key


# --- the file ---


def test_the_file_is_read_again(file, seconds):
    plan = planner.choose(CALL)
    content = json.loads(file.read_text())
    assert content["format"] == planner.FORMAT
    assert content["machine"] == planner.machine()
    planner.reset()
    again = planner.choose(CALL)
    assert again == plan._replace(source="stored")
    assert len(seconds["calls"]) == 1


def test_an_existing_file_is_only_read(file, seconds):
    planner.choose(CALL)
    before = file.read_bytes()
    planner.reset()
    other = CALL._replace(c=64)
    assert planner.choose(other).source == "static"
    assert file.read_bytes() == before
    assert len(seconds["calls"]) == 1


def test_the_default_file_grows(monkeypatch, tmp_path, seconds):
    use(monkeypatch, "measure")
    planner.choose(CALL)
    path = planner.default_path()
    assert path.is_relative_to(tmp_path)  # XDG_CACHE_HOME, by the fixture
    planner.reset()
    planner.choose(CALL._replace(c=64))
    assert len(json.loads(path.read_text())["plans"]) == 2
    assert os.listdir(path.parent) == [path.name]


def test_plans_of_other_processes_are_kept(monkeypatch, seconds):
    use(monkeypatch, "measure")
    planner.choose(CALL)
    path = planner.default_path()
    theirs = {"theirs": planner.Plan("cpu", "f2", "measured", {"aten": 2.0, "f2": 1.0})}
    planner.write(path, planner.read(path) | theirs)
    planner.choose(CALL._replace(c=64))
    assert len(planner.read(path)) == 3


DAMAGED = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "not json": lambda text: "plans",
    "binary": lambda text: b"\xff\xfe\x00",
    "a list": lambda text: "[]",
    "no machine": lambda text: text.replace('"machine"', '"other"'),
    "no seconds": lambda text: text.replace('"seconds"', '"other"'),
    "unknown algorithm": lambda text: text.replace('"algorithm": "f4"', '"algorithm": "f8"'),
    "unknown backend": lambda text: text.replace('"backend": "cpu"', '"backend": "abacus"'),
    "times are text": lambda text: text.replace("0.001", '"fast"'),
    "another format": lambda text: text.replace('"format": 1', '"format": 2'),
    "another cpu": lambda text: text.replace('"cpu": "', '"cpu": "Not ', 1),
    "another torch": lambda text: text.replace(torch.__version__, "1.0"),
    "other instruction sets": lambda text: text.replace('"isas": [', '"isas": ["mmx", '),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("mode", ["file", "measure"])
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning(
    monkeypatch, file, seconds, damage, mode
):
    planner.choose(CALL)
    damaged = DAMAGED[damage](file.read_text())
    damaged = damaged if isinstance(damaged, bytes) else damaged.encode()
    assert damaged != file.read_bytes()
    if mode == "measure":
        file = planner.default_path()
        file.parent.mkdir(parents=True)
        monkeypatch.setenv("PYWINO_PLAN", "measure")
    file.write_bytes(damaged)
    planner.reset()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        plan = planner.choose(CALL)
        planner.choose(CALL._replace(c=64))
    (warning,) = warned
    assert re.search("plans.*are ignored: ", str(warning.message))
    if mode == "file":  # the user's file: left alone
        assert plan.source == "static"
        assert file.read_bytes() == damaged
    else:
        assert plan.source == "measured"
        assert len(planner.read(file)) == 2


@pytest.mark.parametrize("when", ["dump", "fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(monkeypatch, file, seconds, when):
    planner.choose(CALL)
    before = file.read_bytes()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    module, name = {"dump": (json, "dump"), "fsync": (os, "fsync"), "replace": (os, "replace")}[
        when
    ]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            planner.choose(CALL._replace(c=64))
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]
    planner.choose(CALL._replace(c=96))
    assert len(planner.read(file)) == 3


def test_a_killed_writer_leaves_the_old_file(file, seconds):
    planner.choose(CALL)
    before = file.read_bytes()
    code = (
        "import os, pathlib, sys; from pywino import planner;"
        "os.fsync = lambda f: os.kill(os.getpid(), 9);"
        "planner.write(pathlib.Path(sys.argv[1]), {})"
    )
    done = subprocess.run([sys.executable, "-c", code, file], check=False)
    assert done.returncode == -9
    assert file.read_bytes() == before


def test_a_folder_that_cannot_be_written_is_said_once(monkeypatch, tmp_path, seconds, caplog):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    use(monkeypatch, blocked / "plans.json")
    assert planner.choose(CALL).source == "measured"
    planner.choose(CALL._replace(c=64))
    assert caplog.text.count("plans are kept in memory only") == 1


# --- modes ---


def test_off(monkeypatch, seconds):
    use(monkeypatch, "off")
    assert planner.choose(CALL)[:3] == ("aten", None, "off")
    assert planner.choose(CALL, "f2").tile == 2  # the user's word
    assert not seconds["calls"]


def test_static_is_the_operation_count(monkeypatch, tmp_path, seconds):
    use(monkeypatch, "static")
    cached = CALL._replace(cached=True)
    assert planner.choose(cached._replace(c=512, k=512, h=48, w=48)).tile == 6
    assert planner.choose(cached._replace(c=512, k=512, h=14, w=14)).tile == 4  # F6: 18² for 14²
    assert planner.choose(cached._replace(c=3, k=64)).backend == "aten"
    assert planner.choose(CALL._replace(h=1, w=1, padding=(1, 1))).backend == "aten"
    assert not seconds["calls"]
    assert not planner.default_path().exists()


def test_deterministic_algorithms_measure_nothing(monkeypatch, file, seconds):
    seconds |= {"aten": 1e-9}
    measured = planner.choose(CALL)
    assert measured.backend == "aten"
    torch.use_deterministic_algorithms(True)
    try:
        assert planner.choose(CALL) == measured  # what is known is used
        other = planner.choose(CALL._replace(c=256, k=256, cached=True))
        assert (other.source, other.backend) == ("static", "cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(seconds["calls"]) == 1


def test_nothing_is_measured_under_a_dispatch_mode(file, seconds):
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert planner.choose(CALL).source == "static"
    assert not seconds["calls"]


def test_explicit_choices_are_not_measured(file, seconds):
    assert planner.choose(CALL, "f6") == ("cpu", "f6", "only", {})
    assert planner.choose(CALL, backend="aten") == planner.PYTORCH
    with pytest.raises(RuntimeError, match="it covers stride 1"):
        planner.choose(CALL._replace(stride=(2, 2)), "f4")
    assert planner.choose(CALL._replace(stride=(2, 2))) == planner.PYTORCH
    assert not seconds["calls"]
    seconds["aten"] = 1e-9
    assert planner.choose(CALL, backend="cpu").backend == "cpu"


def test_precision_fast_is_its_own_signature(file, seconds):
    planner.choose(CALL)
    planner.choose(CALL._replace(precision="fast"))
    assert len(seconds["calls"]) == 2


# --- buckets ---


def test_bucket_rule():
    def of(n, h, w):
        call = planner.bucket(CALL._replace(n=n, h=h, w=w))
        return call.n, call.h, call.w

    assert of(1, 14, 31) == (1, 14, 31)
    assert of(3, 32, 33) == (4, 32, 36)
    assert of(8, 36, 37) == (8, 36, 40)
    assert of(9, 224, 225) == (16, 224, 240)
    assert of(1, 481, 321) == (1, 512, 352)
    for size in range(1, 3000):
        bucket = of(1, size, 1)[1]
        assert size <= bucket < 1.125 * size + 1
        assert of(1, bucket, 1)[1] == bucket


def test_one_plan_a_bucket_and_exact_rest(file, seconds):
    base = CALL._replace(n=7, h=61, w=62)
    planner.choose(base)
    for change in ({"n": 8}, {"n": 5}, {"h": 63}, {"w": 64}):
        planner.choose(base._replace(**change))
    assert len(seconds["calls"]) == 1
    changes = (
        {"n": 9}, {"h": 65}, {"c": 33}, {"k": 33}, {"padding": (0, 1)}, {"dilation": (1, 2)},
        {"dtype": torch.bfloat16}, {"channels_last": True}, {"cached": True},
        {"op": "winograd_conv2d_backward_input"},
    )  # fmt: skip
    for count, change in enumerate(changes, 2):
        planner.choose(base._replace(**change))
        assert len(seconds["calls"]) == count, change
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        planner.choose(base)
    finally:
        torch.set_num_threads(threads)
    assert len(seconds["calls"]) == count + 1


def test_instruction_sets_have_their_own_plans(file, seconds):
    for name in native.host.isas():
        with pywino.testing.force_isa(name):
            planner.choose(CALL)
    assert len(seconds["calls"]) == len(native.host.isas())


def test_memory_and_file_are_bounded(monkeypatch, file, seconds):
    monkeypatch.setattr(planner, "CAPACITY", 4)
    for c in range(8, 16):
        planner.choose(CALL._replace(c=c))
    assert len(planner._plans.plans) == len(planner.read(file)) == 4
    planner.choose(CALL._replace(c=12))
    assert len(seconds["calls"]) == 8  # the last ones are kept
    planner.choose(CALL._replace(c=16))
    planner.choose(CALL._replace(c=12))  # that were used
    assert len(seconds["calls"]) == 9
    memo = planner.memo()
    for key in range(100):
        planner.remember(memo, key, key)
    assert len(memo) <= 4
    planner._memos.remove(memo)


# --- threads and forks ---


def test_a_thread_that_opens_the_file_late_changes_nothing(file, seconds):
    planner.choose(CALL)
    planner._plans.open()
    assert planner.choose(CALL._replace(c=64)).source == "measured"


def test_concurrent_threads_measure_once(file, monkeypatch):
    calls = []

    def timed(call):
        calls.append(call)
        time.sleep(0.05)
        return {"aten": 3e-3, "f4": 1e-3}

    monkeypatch.setattr(planner, "_timed", timed)
    start = threading.Barrier(8)
    results = []

    def work(i):
        start.wait()
        results.append(planner.choose(CALL._replace(c=8 + i % 2)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 2
    assert {plan.tile for plan in results} == {4}


def test_convolutions_in_threads(file):
    """Layers and functions from many threads at once, first calls included."""
    layer = pywino.WinogradConv2d(16, 16, 3, padding=1)
    inputs = [torch.randn(1, 16, 10 + i, 12) for i in range(4)]
    expected = [layer.to_dense()(x) for x in inputs]
    errors = []

    def work():
        try:
            for _ in range(5):
                for x, y in zip(inputs, expected):
                    with torch.no_grad():
                        torch.testing.assert_close(layer(x), y.detach(), rtol=1e-4, atol=1e-4)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def in_child(queue):
    torch.set_num_threads(1)
    queue.put(planner.choose(CALL._replace(c=24)).source)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_another_thread_holds_the_lock(file, seconds):
    planner.choose(CALL)
    held, release = threading.Event(), threading.Event()

    def hold():
        with planner._plans.lock:
            held.set()
            release.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        child = context.Process(target=in_child, args=(queue,))
        child.start()
    try:
        assert queue.get(timeout=30) == "measured"
    finally:
        release.set()
        holder.join()
        child.join(30)
        if child.is_alive():
            child.kill()


# --- candidates ---


def test_candidates(file, seconds):
    call = CALL._replace(cached=True)
    assert planner.best_tiles(call) == [4, 6, 2]
    found = planner.candidates(call)
    aten, *rest = found
    assert aten == ("aten", None, 3e-3, None)
    by_name = {(c.backend, c.algorithm): c for c in rest}
    assert by_name["cpu", "f4"] == ("cpu", "f4", 1e-3, None)
    assert by_name["cpu", "f6"].seconds == 2e-3
    assert by_name["cpu", "f2"].reason == "more operations than f4 and f6"
    assert by_name["cuda", None].reason == "the tensors are on cpu"
    assert all((c.seconds is None) != (c.reason is None) for c in found)


def test_candidates_of_what_no_kernel_covers(file):
    found = {c.backend: c for c in planner.candidates(CALL._replace(stride=(2, 2)))}
    assert found["cpu"].reason == "it covers stride 1, not (2, 2)"
    assert found["aten"].reason is None


# --- the price ---


def test_price_of_a_look_up():
    """What pywino.conv2d adds to F.conv2d where PyTorch won: a fixed number of Python's calls, as
    benches/bench_planner.py measures their time."""
    input, weight = torch.randn(1, 4, 4, 4), torch.randn(4, 4, 1, 1)
    pywino.conv2d(input, weight, None, 1, 0, 1, 1)  # finds the route
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append((event, frame.f_code.co_name)))
    try:
        pywino.conv2d(input, weight, None, 1, 0, 1, 1)
    finally:
        sys.setprofile(None)
    python = [name for event, name in calls if event == "call"]
    assert python[:2] == ["conv2d", "run_conv2d"]
    assert python[-1] == "run"  # of `_pytorch_route`: nothing was looked for
    assert len(python) <= 10
    assert sum(event == "c_call" for event, _ in calls) <= 20


# --- on a GPU, without one ---


GPU = Call("winograd_conv2d", 8, 64, 56, 56, 64, (1, 1), (1, 1), torch.float16, True, device="cuda")


@pytest.fixture
def gpu(monkeypatch, file):
    """A machine whose GPU has CUDA kernels and no Triton, with invented times."""
    monkeypatch.setattr(native, "why_no_cuda", lambda: None)
    monkeypatch.setitem(
        backends._CHECKS, ("triton", "winograd_conv2d"), lambda call, algorithm: "no Triton"
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Imaginary")
    times = {"aten": 4e-5, "cuda direct": 5e-5, "cuda f2": 3e-5, "cuda f4": 2e-5, "cuda f6": 6e-5}
    asked = []

    def timed(call):
        asked.append(call)
        names = ["aten", *planner._measured_kernels(call)]
        return {name: times[name] for name in names}

    monkeypatch.setattr(planner, "_timed", timed)
    return times, asked


def test_gpu_measures_what_stays_in_the_error_class(gpu):
    plan = planner.choose(GPU)
    assert (plan.backend, plan.algorithm, plan.tile) == ("cuda", "f2", 2)
    assert "cuda f4" not in plan.seconds  # four times the error of a direct one in float16
    reasons = {(c.backend, c.algorithm): c.reason for c in planner.candidates(GPU)}
    assert "4 to 6 times" in reasons["cuda", "f4"]
    assert reasons["triton", None] == "no Triton"
    fast = planner.choose(GPU._replace(precision="fast"))
    assert (fast.backend, fast.algorithm) == ("cuda", "f4")


def test_gpu_plans_are_cudnn_where_it_wins(gpu):
    times, _ = gpu
    times["aten"] = 3e-5
    assert planner.choose(GPU).backend == "aten"
    assert planner.choose(GPU, backend="cuda").algorithm == "f2"  # the user's word
    assert planner.choose(GPU, algorithm="direct") == ("cuda", "direct", "only", {})


def test_gpu_plans_are_stored_and_read(gpu, file):
    _, asked = gpu
    planner.choose(GPU)
    planner.choose(GPU._replace(dtype=torch.float32))
    planner.choose(GPU._replace(dtype=torch.float32, tf32=True))  # another plan
    assert len(asked) == 3
    planner.reset()
    plan = planner.choose(GPU)
    assert (plan.backend, plan.algorithm, plan.source) == ("cuda", "f2", "stored")
    assert len(asked) == 3


def test_gpu_without_measurement_is_cudnn(monkeypatch, gpu):
    monkeypatch.setenv("PYWINO_PLAN", "static")
    planner.reset()
    assert planner.choose(GPU).backend == "aten"


@pytest.mark.parametrize(
    ("change", "algorithm", "reason"),
    [
        ({"channels_last": False}, "direct", "reads channels_last tensors"),
        ({"c": 3}, "direct", "whole 16 bytes, not 3 channels"),
        ({"n": 2**20, "h": 2**6, "w": 2**6}, "direct", "31 bits"),
        ({}, "f4x1", "it has direct, f2, f4 and f6, not f4x1"),
        ({"c": 20000, "k": 20000}, "f4", "351 MB for the least part of the call, more than the"),
        ({"op": "winograd_conv2d_backward_weight"}, "direct", "f2, f4 and f6 for this gradient"),
        ({"op": "winograd_relu_conv2d_backward_input"}, "direct", "no direct convolution"),
        ({"dtype": torch.float64}, "f2", "not float64"),
        ({"device": "cpu"}, "f2", "the tensors are on cpu"),
    ],
)
def test_what_the_cuda_kernels_refuse(gpu, change, algorithm, reason):
    assert reason in backends.can_run("cuda", GPU._replace(**change), algorithm)


@pytest.mark.parametrize("op", ["winograd_conv2d", "winograd_relu_conv2d"])
@pytest.mark.parametrize("gradient", ["_backward_input", "_backward_weight"])
def test_the_cuda_kernels_have_the_gradients(gpu, op, gradient):
    for algorithm in ("f2", "f4", "f6"):
        assert backends.can_run("cuda", GPU._replace(op=op + gradient), algorithm) is None


@pytest.mark.parametrize("op", ["sparse_conv2d", "masked_conv2d"])
def test_the_cuda_kernels_that_skip_take_any_kernel(gpu, op):
    call = GPU._replace(op=op, kernel=(5, 2), c=3, channels_last=False)
    assert backends.can_run("cuda", call) is None
    for change, reason in (
        ({"groups": 3}, "groups=1"),
        ({"dtype": torch.float64}, "not float64"),
        ({"n": 2**20, "h": 2**6, "w": 2**6}, "31 bits"),
        ({"n": 0}, "empty"),
        ({"device": "cpu"}, "the tensors are on cpu"),
    ):
        assert reason in backends.can_run("cuda", call._replace(**change))
    assert "not f2" in backends.can_run("cuda", call, "f2")


@pytest.mark.parametrize("op", ["channel_residual_attention", "conv_lstm_cell"])
def test_gpu_measures_ops_with_one_kernel_a_backend(monkeypatch, gpu, op):
    times, asked = gpu
    monkeypatch.setitem(backends._CHECKS, ("triton", op), lambda call, algorithm: "no Triton")
    call = GPU._replace(op=op, kernel=(1, 1))
    times["cuda direct"] = 2e-5
    assert [backend_of(call, name) for name in ("auto", "cuda", "aten")] == ["cuda", "cuda", None]
    assert backend_of(call, "triton") == "cuda"  # in a gradient: what cannot run is "auto"
    assert len(asked) == 1
    assert backends.can_run("cuda", call, "f2") == "it has one algorithm, not f2"
    assert "not float64" in backends.can_run("cuda", call._replace(dtype=torch.float64))
    other = call._replace(c=65)
    times["aten"] = 2e-5  # ours does not win
    assert backend_of(other, "auto") is None
    assert backend_of(other, "cuda") == "cuda"


@pytest.mark.parametrize(
    ("dtype", "tf32", "precision", "strict"),
    [
        (torch.float16, False, "default", {}),
        (torch.float32, False, "default", {"direct", "f2", "f4", "f6"}),
        (torch.float32, True, "default", {"f4", "f6"}),
        (torch.float32, False, "fast", {}),
    ],
)
def test_precision_of_gpu_kernels(dtype, tf32, precision, strict):
    call = GPU._replace(dtype=dtype, tf32=tf32, precision=precision)
    algorithms = ("direct", "f2", "f4", "f6")
    assert {a for a in algorithms if backends.is_strict(call, a)} == set(strict)


@pytest.mark.parametrize(
    ("image", "device", "runs"),
    [
        ("80-real", (8, 0), True),
        ("80-real", (8, 9), True),
        ("80-real", (9, 0), False),
        ("90a-real", (9, 0), True),
        ("90a-real", (10, 0), False),
        ("120", (12, 1), True),
        ("120", (13, 0), True),
        ("120", (9, 0), False),
        ("89-real", (8, 6), False),
    ],
)
def test_which_images_run(image, device, runs):
    assert native._image_runs(image, device) == runs


def test_a_race_takes_turns_and_keeps_the_least(monkeypatch):
    order, seconds = [], iter([2.2, 5.0, 2.0, 7.0, 4.0, 5.5])
    monkeypatch.setattr(planner, "_seconds_on_cpu", lambda run: run() or next(seconds))
    runs = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    assert planner.race(runs, 3) == {"a": 2.0, "b": 5.0}
    assert order == ["a", "b"] * 3
    monkeypatch.setattr(planner, "_seconds_on_gpu", lambda run: 1.0)
    assert planner.race(runs, 2, "cuda") == {"a": 1.0, "b": 1.0}


def test_a_race_goes_on_while_a_best_time_stands_alone(monkeypatch):
    def race(script, calls=3, device="cpu"):
        times = {name: iter(seconds) for name, seconds in script.items()}
        taken = dict.fromkeys(script, 0)

        def run(name):
            taken[name] += 1
            return next(times[name])

        for kind in ("cpu", "gpu"):
            monkeypatch.setattr(planner, f"_seconds_on_{kind}", lambda run: run())
        runs = {name: lambda name=name: run(name) for name in script}
        best = planner.race(runs, calls, device)
        assert len(set(taken.values())) == 1
        return best, taken.popitem()[1]

    # Disturbed three times, then as it is.
    script = {"aten": [9, 5, 3, 1, 1.1, 1], "f4": [2, 2, 2, 2, 2, 2]}
    assert race(script) == ({"aten": 1, "f4": 2}, 5)
    assert race(script, device="cuda") == ({"aten": 3, "f4": 2}, 3)
    assert race({"aten": [2.0**-i for i in range(20)]}) == ({"aten": 2.0**-8}, 9)
    monkeypatch.setattr(planner, "SECONDS", -1)  # over
    assert race({"aten": script["aten"]}) == ({"aten": 1}, 4)
