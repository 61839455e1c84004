# SPDX-License-Identifier: BSD-3-Clause
"""`make gpu-check` without a GPU: the driver on stages that hang, crash and go on, the statistics
on a clock of their own, the tables on rows that were typed, and a dry run of it all."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu import (
    calls,
    check,
    counters,
    cudnn,
    elementwise,
    keep,
    networks,
    ours,
    products,
    report,
    rows,
    skipping,
    smoke,
    timing,
)
from layers import GPU_AIMS, GPU_LAYERS, Layer

from pywino import backends

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------ driver


def script(code: str, name: str = "s", share: float = 1.0, **options) -> check.Stage:
    return check.Stage(name, (sys.executable, "-c", code), share, **options)


def outcomes(tmp_path, *stages, budget=60.0) -> dict[str, check.Outcome]:
    run = check.Run(tmp_path / "out", budget, {"dry_run": True, "budget_s": budget})
    return {outcome.stage: outcome for outcome in run.all(list(stages))}


def test_a_stage_that_crashes_or_hangs_costs_the_others_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "PATIENCE_S", 0.5)
    starts = "import subprocess, sys, time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    starts += "p = subprocess.Popen(['sleep', '60']); open({!r}, 'w').write(str(p.pid));"
    children = [tmp_path / "of hang", tmp_path / "of last"]
    hang = starts.format(str(children[0])) + "print('sleeps', flush=True); time.sleep(60)"
    leave = starts.format(str(children[1])) + "print('fine')"
    start = time.monotonic()
    found = outcomes(
        tmp_path,
        script("import os; os.kill(os.getpid(), 11)", "crash"),
        script("import sys; print('why'); sys.exit(3)", "bad"),
        script(hang, "hang", share=0.1),
        script("print('nothing to do here'); raise SystemExit(77)", "nothing"),
        script(leave, "last", text=True),
        script("", "absent", needs=check.exists("no/such/folder")),
        check.Stage("no program", ("/no/such/program",), 1.0),
        budget=30.0,
    )
    assert time.monotonic() - start < 25
    assert found["crash"].status == "failed: signal SIGSEGV"
    assert found["bad"].status == "failed: exit status 3; why"
    assert found["hang"].status.startswith("killed: it was not done after")
    assert found["hang"].lines == ["sleeps"]
    assert found["nothing"].status == "skipped: nothing to do here"
    assert found["last"].status == "ok"
    assert found["absent"].status == "skipped: there is no no/such/folder in this checkout"
    assert found["no program"].status.startswith("failed: FileNotFoundError")
    for child in children:  # what they started is gone too, or dead and not yet buried
        state = Path(f"/proc/{child.read_text()}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"
    record = json.loads((tmp_path / "out" / "machine.json").read_text())["run"]["stages"]
    assert [stage["stage"] for stage in record] == list(found)
    assert "fine" in (tmp_path / "out" / "tests.txt").read_text()
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "bad | why" in log
    assert "| bad | failed: exit status 3; why |" in (tmp_path / "out" / "tables.md").read_text()


def test_time_that_is_left_goes_to_the_stages_behind(tmp_path):
    code = "import sys, time; print(float(sys.argv[1]) - time.time())"
    show = (sys.executable, "-c", code, "{until}")
    found = outcomes(
        tmp_path,
        check.Stage("first", show, 3.0),
        check.Stage("a", show, 1.0, beside="x"),
        check.Stage("b", show, 2.0, beside="x"),
        check.Stage("last", show, 1.0),
        budget=60.0,
    )
    seconds = {name: float(outcome.lines[0]) for name, outcome in found.items()}
    assert seconds["first"] == pytest.approx(30 - 2.4, abs=2)  # 3 of the shares 3 + 2 + 1
    assert seconds["a"] == pytest.approx(40 - 3.2, abs=3)  # 2 of 2 + 1 of almost everything
    assert seconds["b"] == pytest.approx(seconds["a"], abs=1)
    assert seconds["last"] > 45


def test_stages_side_by_side_run_at_once(tmp_path):
    wait = (
        "import os, time; open({own!r}, 'w')\nwhile not os.path.exists({other!r}): time.sleep(0.01)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    found = outcomes(
        tmp_path,
        script(wait.format(own=a, other=b), "a", beside="x"),
        script(wait.format(own=b, other=a), "b", beside="x"),
    )
    assert found["a"].status == found["b"].status == "ok"


JOURNAL = """
import os, sys, time
from pathlib import Path
from gpu import rows
journal = rows.Journal(Path(sys.argv[1]), time.time() + 60, lambda: False)
def fail():
    raise ValueError("no such kernel")
journal.run("a", lambda: {"value": 1}, layer="A")
journal.run("b", lambda: os._exit(9), layer="B")
journal.run("c", fail)
journal.run("d", lambda: {"value": 4})
journal.lost = lambda: True
journal.run("lost", fail)
journal.lost = lambda: False
journal.until = 0
journal.run("e", lambda: {"value": 5})
journal.close("rows")
"""


def test_a_stage_goes_on_behind_the_row_that_ended_it(tmp_path):
    command = (sys.executable, "-c", JOURNAL, "{journal}")
    found = outcomes(tmp_path, check.Stage("rows", command, 1.0, result="rows.json"))
    assert found["rows"].status == "ok"
    assert found["rows"].starts == 3
    content = json.loads((tmp_path / "out" / "rows.json").read_text())
    by_key = {row["key"]: row for row in content["rows"]}
    assert by_key["a"] == {"stage": "rows", "key": "a", "layer": "A", "value": 1, "failed": None}
    assert by_key["b"]["failed"] == "the process ended in this row"
    assert by_key["c"]["failed"] == "ValueError: no such kernel"
    assert by_key["d"]["value"] == 4
    assert by_key["lost"]["failed"] == "ValueError: no such kernel"
    assert any("the CUDA context is lost" in line for line in found["rows"].lines)
    assert content["left_out"] == {"rows": ["e"]}
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_a_stage_that_makes_no_progress_is_not_started_for_ever(tmp_path):
    stage = script("raise SystemExit(1)", result="rows.json")
    assert outcomes(tmp_path, stage)["s"].starts == 2


def test_two_stages_share_a_result_file(tmp_path):
    for stage, value in (("one", 1), ("two", 2), ("one", 3)):
        journal = rows.Journal(tmp_path / "j", time.time() + 60, lambda: False)
        journal.run(f"row of {stage}", lambda value=value: {"value": value})
        with (tmp_path / "j").open("a") as file:
            file.write('{"key": "torn')
        rows.settle(tmp_path / "j", stage, tmp_path / "r.json")
    found = {row["stage"]: row["value"] for row in rows.load(tmp_path / "r.json")}
    assert found == {"two": 2, "one": 3}


def test_a_row_that_hangs_ends_its_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from gpu import rows; rows.HANGS_S = 0.5;"
        "j = rows.Journal(Path(sys.argv[1]), time.time() + 60, lambda: False);"
        "j.run('a', lambda: time.sleep(60))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "benches"), str(ROOT)])}
    command = [sys.executable, "-c", code, str(tmp_path / "j")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert rows.read(tmp_path / "j")["a"]["failed"] == "the process ended in this row"


@pytest.mark.parametrize(
    ("status", "last", "expected"),
    [
        (0, "x", "ok"),
        (5, "=== 12 deselected in 3.1s ===", "skipped: no test is meant for it"),
        (5, "something else ended with 5", "failed: exit status 5; something else ended with 5"),
        (-9, "", "failed: signal SIGKILL"),
    ],
)
def test_verdicts(status, last, expected):
    assert check.verdict(status, ["line", last, ""] if last else []) == expected


def test_an_interrupted_run_stops_its_stage_and_writes_what_it_has(tmp_path):
    code = (
        "import signal, sys; from pathlib import Path; from gpu import check;"
        "run = check.Run(Path(sys.argv[1]), 60, {'dry_run': True});"
        "signal.signal(signal.SIGTERM, run.interrupted);"
        "quick = check.Stage('quick', (sys.executable, '-c', ''), 1.0);"
        "sleep = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)';"
        "run.all([quick, check.Stage('hang', (sys.executable, '-c', sleep), 1.0)])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "benches"), str(ROOT)])}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    line = next(line for line in process.stdout if re.search(r"hang \| \d+$", line))
    process.terminate()
    assert process.wait(30) == 1
    assert not Path(f"/proc/{line.split()[-1]}").exists()
    stages = json.loads((tmp_path / "machine.json").read_text())["run"]["stages"]
    assert [s["status"] for s in stages] == ["ok", "failed: SIGTERM"]
    assert "failed: SIGTERM" in (tmp_path / "tables.md").read_text()


def test_the_driver_imports_no_torch(folder):
    """It outlives whatever a stage does to a CUDA context."""
    code = (
        "import sys; from pathlib import Path; import check; check.report.page(Path(sys.argv[1]));"
        "assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benches" / "gpu")}
    subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, check=True)


def test_a_bug_in_a_table_costs_no_results(tmp_path, monkeypatch):
    monkeypatch.setattr(check.report, "page", lambda out: 1 / 0)
    assert outcomes(tmp_path, script("print('fine')"))["s"].status == "ok"
    assert "ZeroDivisionError" in (tmp_path / "out" / "tables.md").read_text()


def test_an_unknown_stage_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"no stage nonsense; there are machine, build, "):
        check.main(["--out", str(tmp_path), "--dry-run", "--stages", "machine,nonsense"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match=r"sees no CUDA device.*DRY=1"):
        check.main(["--out", str(tmp_path)])


# -------------------------------------------------------------------------------------- statistics


class Queue:
    """A clock that does not run: functions say how long they take. Its graphs take no time between
    calls, eager ones 5 µs."""

    device = "cpu"

    def __init__(self):
        self.now, self.log, self.gap = 0.0, [], 5e-6

    def mark(self):
        return self.now

    def between(self, start, end):
        return end - start

    def wait(self):
        self.log.append("wait")

    def is_lost(self):
        return False

    def takes(self, name, *seconds):
        moments = list(seconds)

        def run(*_):
            self.now += (moments.pop(0) if len(moments) > 1 else moments[0]) + self.gap
            self.log.append(name)

        return run

    def graph(self, recorded):
        def replay():
            gap, self.gap = self.gap, 0.0
            for call in recorded:
                call()
            self.gap = gap

        return replay


def test_samples_are_taken_in_turn_and_without_waiting():
    clock = Queue()
    clock.gap = 0.0
    a, b = clock.takes("a", 1.0, 2.0, 3.0), clock.takes("b", 10.0)
    assert timing.interleaved(clock, [a, b], 3) == [[1.0, 2.0, 3.0], [10.0, 10.0, 10.0]]
    assert clock.log == ["a", "b", "b", "a", "a", "b", "wait"]


def test_summary_by_hand():
    found = timing.summary([1e-6, 2e-6, 3e-6, 4e-6, 100e-6], calls=2)
    assert found["us"] == pytest.approx(1.5)
    assert found["iqr_us"] == pytest.approx(1.0)  # of 1 and 2: the outlier does not count
    assert (found["samples"], found["calls"]) == (5, 2)
    assert timing.summary([3e-6])["us"] == pytest.approx(3.0)


def test_how_much_is_measured():
    assert timing.calls_in_sample(20e-6) == 10
    assert timing.calls_in_sample(1e-9) == timing.calls_in_sample(0) == 100
    assert timing.calls_in_sample(1.0) == 1
    assert timing.rounds_for(200e-6) == 50  # the promised number
    assert timing.rounds_for(8e-3) == 12
    assert timing.rounds_for(1.0) == 7
    assert timing.rounds_for(1.0, samples=2) == 2


def test_cold_buffers_exceed_the_cache():
    x = torch.zeros(1_000_000)  # 4 MB
    sets = timing.rotating((x, x))
    assert len(sets) == 15  # of 8 MB: 120 MB
    assert len({s[0].data_ptr() for s in sets}) == 15
    assert len(timing.rotating((torch.zeros(1),))) == 64
    assert len(timing.rotating((torch.zeros(1).expand(40_000_000),))) == 1


def test_compare_tells_graphs_from_eager_calls():
    clock = Queue()
    x = torch.zeros(4)
    found = timing.compare(
        clock, {"ours": (clock.takes("a", 20e-6), (x,)), "cudnn": (clock.takes("b", 40e-6), (x,))}
    )
    assert found["ours"]["hot"]["us"] == pytest.approx(20)
    assert found["ours"]["cold"]["us"] == pytest.approx(20)
    assert found["ours"]["eager"]["us"] == pytest.approx(25)
    assert found["cudnn"]["hot"]["us"] == pytest.approx(40)
    assert found["ours"]["hot"]["samples"] == 50
    assert found["ours"]["hot"]["calls"] == 8  # of 25 µs: 200 µs
    assert found["ours"]["cold"]["calls"] == 64
    assert "graph" not in found["ours"]
    eager = timing.compare(clock, {"ours": (clock.takes("a", 20e-6), (x,))}, graphs=False)
    assert eager["ours"]["hot"] is None


def test_a_failing_capture_leaves_the_eager_times():
    clock = Queue()

    def refused(_):
        raise RuntimeError("operation not permitted when stream is capturing")

    clock.graph = refused
    found = timing.compare(clock, {"ours": (clock.takes("a", 20e-6), ())})["ours"]
    assert found["eager"]["us"] == pytest.approx(25)
    assert found["hot"] is None
    assert "not permitted" in found["graph"]


class Stream:
    """torch.cuda's streams, as far as a capture needs them."""

    current = None

    def __enter__(self):
        self.before, Stream.current = Stream.current, self

    def __exit__(self, *_):
        Stream.current = self.before

    def wait_stream(self, other):
        assert other is not self


def test_a_graph_is_captured_on_the_stream_of_its_first_run(monkeypatch):
    main = Stream.current = Stream()
    seen = []

    class Capture:
        def __init__(self, graph, stream):
            self.stream = stream

        def __enter__(self):
            Stream.current = self.stream
            seen.append("begin")

        def __exit__(self, *_):
            seen.append("end")
            if seen[-2] == "bad":
                raise RuntimeError("the capture was invalidated")
            Stream.current = main

    graph = SimpleNamespace(replay=lambda: None)
    for name, stand_in in {
        "Stream": Stream,
        "current_stream": lambda: Stream.current,
        "stream": lambda stream: stream,
        "set_stream": lambda stream: setattr(Stream, "current", stream),
        "CUDAGraph": lambda: graph,
        "graph": Capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    clock = timing.CUDA()

    def call(name="call"):
        assert Stream.current is clock.stream
        seen.append(name)

    assert clock.graph([call, call]) is graph.replay
    assert seen == ["call", "call", "begin", "call", "call", "end"]
    assert Stream.current is main
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.full((2,), 1.0))
    assert not clock.is_lost()
    with pytest.raises(RuntimeError, match="invalidated"):
        clock.graph([lambda: call("bad")])
    assert Stream.current is main
    assert clock.is_lost()  # for this process: the allocator is still in the capture


# ------------------------------------------------------------------------------- what is measured


def test_layers_of_the_gpu():
    names = [layer.name for layer in GPU_LAYERS]
    assert len(set(names)) == len(names) == 49
    assert GPU_LAYERS[:12] == GPU_AIMS
    gflop = {layer.name: round(layer.flops / 1e9, 2) for layer in GPU_LAYERS}
    assert gflop["vgg-64x224-b32"] == 118.38
    assert gflop["vgg-256x28-b32-k512"] == 59.19
    assert gflop["vgg-512x14-b32"] == 29.6
    assert gflop["resnet-512x7-b32"] == 7.4
    assert gflop["lstm-64x481x321-k128"] == 22.77
    assert gflop["deblur-128x128-b32-d4"] == 154.62
    assert {f"sap-32x481x321-d{d}" for d in (1, 2, 4, 8, 16)} < set(names)


def test_settings_of_cudnn_are_all_and_in_order():
    found = cudnn.settings(benchmark=True, small=False)
    assert len({setting.key for setting in found}) == len(found)
    assert {setting.benchmark for setting in found} == {True}
    forward = [s for s in found if s.kind == "forward" and not s.deterministic]
    assert len(forward) == 49 * 4 * 2  # layers, precisions, layouts
    assert found[: len(forward)] == forward
    assert all(s.deterministic for s in found[-len(forward) :])
    gradients = {(s.layer.name, s.kind) for s in found if s.kind != "forward"}
    assert len(gradients) == 14 * 2


def test_settings_reach_pytorch(monkeypatch):
    for name in ("allow_tf32", "benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    layer = Layer("l", 1, 2, 5, 5, 3)
    calls.Setting(layer, "forward", "tf32", "nchw", True, True).apply()
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.deterministic
    calls.Setting(layer, "forward", "fp32", "nchw").apply()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("kind", calls.PASSES)
def test_pytorchs_and_our_functions_agree(kind, monkeypatch):
    layer = Layer("l", 3, 4, 9, 8, 5, dilation=2)
    arguments = calls.tensors(layer, kind, "fp32", "channels_last", "cpu")
    x, w = arguments[0 if kind == "forward" else 1], arguments[1 if kind == "forward" else 2]
    assert (x.shape, w.shape) == ((3, 4, 9, 8), (5, 4, 3, 3))
    leaves = [t.double().requires_grad_() for t in (x, w)]
    y = torch.conv2d(*leaves, padding=2, dilation=2)
    if kind == "forward":
        expected = y + arguments[2].double().reshape(1, -1, 1, 1)
    else:
        g = arguments[0].double()
        expected = torch.autograd.grad(y, leaves, g)[calls.PASSES.index(kind) - 1]
    assert torch.allclose(calls.pytorch(layer, kind)(*arguments).double(), expected, atol=1e-4)
    assert torch.allclose(
        ours.function_of(layer, kind, ours.AUTO)(*arguments).double(), expected, atol=1e-4
    )
    view, result = calls.exact(layer, kind, arguments)
    assert result.dtype == torch.float64
    assert torch.allclose(result, view(expected))
    assert calls.error_of(layer, kind, arguments, expected.detach() * 1.01) == pytest.approx(0.01)


def test_candidates_come_from_the_backends(monkeypatch):
    layer = GPU_LAYERS[0]
    monkeypatch.setattr(backends, "_CHECKS", {})
    assert ours.candidates(layer, "forward", "bf16", "nchw", "cuda") == []
    seen = []

    def only_f4(call, algorithm):
        seen.append(call)
        return None if algorithm == "f4" and call.precision == "default" else "not this one"

    backends.register("triton", "winograd_conv2d", only_f4)
    found = ours.candidates(layer, "forward", "bf16", "channels_last", "cuda")
    assert found == [("triton", "f4", "default"), ours.AUTO]
    assert seen[0].device == "cuda"
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].channels_last
    assert seen[0].output_size == (224, 224)
    assert not seen[0].tf32
    ours.candidates(layer, "forward", "tf32", "channels_last", "cuda")
    assert seen[-1].tf32
    assert ours.candidates(layer, "input gradient", "bf16", "nchw", "cuda") == []


def test_what_leaves_the_error_class_is_no_default():
    assert ours.is_outside("fp16", ("cuda", "f4", "default"), "cuda")
    assert not ours.is_outside("fp16", ("cuda", "f4", "fast"), "cuda")
    assert not ours.is_outside("bf16", ("cuda", "f4", "default"), "cuda")
    assert ours.is_outside("fp32", ("triton", "f6", "default"), "cuda")
    assert not ours.is_outside("fp32", ("cpu", "f6", "default"), "cpu")


def test_a_wrong_kernel_is_found_and_not_timed(monkeypatch):
    layer = Layer("l", 2, 4, 9, 8, 5)
    setting = calls.Setting(layer, "forward", "fp32", "nchw")
    right = ours.check(timing.Processor(), setting, "nchw", ours.AUTO)
    assert right["wrong"] is False
    assert right["error"] < 1e-6
    assert right["rough_us"] > 0
    correct = ours.function_of

    def wrong(*arguments):
        function = correct(*arguments)
        return lambda *t: function(*t) * 1.001

    monkeypatch.setattr(ours, "function_of", wrong)
    found = ours.check(timing.Processor(), setting, "nchw", ours.AUTO)
    assert found["wrong"] is True
    assert found["error"] == pytest.approx(1e-3, rel=0.01)
    assert "rough_us" not in found
    monkeypatch.setattr(
        ours, "function_of", lambda *_: lambda *t: t[0].new_full((2, 5, 9, 8), float("nan"))
    )
    assert ours.check(timing.Processor(), setting, "nchw", ours.AUTO)["wrong"] is True


def test_finalists():
    def row(key, backend, precision, us, wrong=False):
        facts = {"key": key, "backend": backend, "precision": precision, "rough_us": us}
        return facts | {"wrong": wrong, "outside": key == "outside"}

    found = {
        "slow": row("slow", "cuda", "default", 9.0),
        "quick": row("quick", "triton", "default", 2.0),
        "wrong": row("wrong", "cuda", "default", 1.0, wrong=True),
        "outside": row("outside", "cuda", "default", 1.0),
        "fast": row("fast", "cuda", "fast", 1.5),
        "auto": row("auto", "auto", "default", 2.5),
        "other": row("other", "cuda", "default", 0.1),
        "failed": {"key": "failed", "failed": "it crashed"},
    }
    keys = [key for key in found if key != "other"]
    assert [r["key"] for r in ours.finalists(found, keys)] == ["auto", "quick", "fast"]


def test_small_calls_cover_every_op():
    if not ours.candidates(smoke.ODD, "forward", "fp32", "nchw", "cpu"):
        pytest.skip("needs the native library")
    kinds = {call[1] for call in smoke.calls("cpu")}
    assert kinds == {*calls.PASSES, smoke.RELU, *elementwise.KINDS, *skipping.KINDS}


def test_products_are_compared_where_there_are_two_kinds(monkeypatch):
    layer, how = smoke.WIDE, (products.KINDS[0], "bf16", "channels_last", "cuda")
    monkeypatch.setattr(backends, "can_run", lambda *_: None)
    host = SimpleNamespace(why_no_wgmma=lambda: None)
    monkeypatch.setattr(products._native, "host", host)
    assert products.candidates(layer, *how) == ["cuda"]
    host.why_no_wgmma = lambda: "it is no Hopper"
    assert products.candidates(layer, *how) == []
    assert set(products.LAYER_NAMES) <= {layer.name for layer in GPU_LAYERS}


# ------------------------------------------------------------------------------------------ tables


def times(us):
    return {"us": us, "iqr_us": 0.1, "samples": 50, "calls": 1}


def ours_row(layer, backend, us, peer_us, precision="default", **changes):
    both = lambda u: {"hot": times(u), "cold": times(2 * u), "eager": times(u + 5)}  # noqa: E731
    return {
        "stage": "ours",
        "key": f"{layer} {backend} {precision}",
        "step": "time",
        "layer": layer,
        "pass": "forward",
        "mode": "bf16",
        "layout": "channels_last",
        "backend": backend,
        "algorithm": "f4",
        "precision": precision,
        "flops": 1,
        "n": 32,
        "c": int(layer.split("-")[1].split("x")[0]),
        "aims": True,
        "error": 2e-3,
        "cudnn_error": 1.6e-3,
        "failed": None,
        "times": {"ours": both(us), "cudnn": both(peer_us)},
    } | changes


@pytest.fixture
def folder(tmp_path):
    """What a run on a GPU might leave, typed by hand: one layer wins, one loses, one fails."""
    machine = {
        "name": "NVIDIA H200",
        "torch": "2.11",
        "cudnn": 91000,
        "triton": "3.6",
        "cores": 16,
        "date": "2026-01-02T03:04:05",
        "nvidia_smi": {"driver_version": "580"},
        "ceilings": {"GEMM bf16": {"rate": 790e12, "unit": "FLOP/s", **times(1400)}},
        "run": {"dry_run": False, "stages": []},
    }
    (tmp_path / "machine.json").write_text(json.dumps(machine))
    relu = ours_row("resnet-64x56-b32", "cuda", 10, 60)
    relu |= {"pass": "winograd-relu forward", "key": "relu"}
    relu["times"] = {"ours": relu["times"]["ours"], "eager": relu["times"]["cudnn"]}
    relu["times"]["compiled"] = {"hot": times(30), "cold": times(30), "eager": times(30)}
    found = [
        ours_row("vgg-256x56-b32", "auto", 50, 100),
        ours_row("vgg-256x56-b32", "cuda", 40, 100),
        ours_row("vgg-256x56-b32", "triton", 80, 100),
        ours_row("vgg-256x56-b32", "cuda", 25, 100, "fast"),
        ours_row("resnet-256x14-b32", "auto", 20, 10),
        ours_row("vgg-512x28-b32", "cuda", 0, 0, failed="RuntimeError: launch", times=None),
        relu,
    ]
    (tmp_path / "ours.json").write_text(json.dumps({"rows": found, "left_out": {"ours": ["x"]}}))
    setting = calls.Setting(GPU_LAYERS[0], "forward", "bf16", "channels_last", True)
    fast = {"stage": "cudnn-benchmark", "key": setting.key, **setting.facts(), "failed": None}
    fast |= {"error": 1.6e-3, "hot": times(200), "cold": times(210), "eager": times(220)}
    plain = fast | {"layout": "nchw", "benchmark": False, "hot": times(300)}
    fixed = fast | {"deterministic": True, "layout": "nchw", "hot": times(100)}
    fast["kernels"] = [["sm90_fprop", 199.0]]
    content = {"rows": [fast, plain, fixed], "left_out": {}}
    (tmp_path / "cudnn.json").write_text(json.dumps(content))
    return tmp_path


def test_tables_by_hand(folder):
    page = report.page(folder)
    assert "NVIDIA H200, driver 580, torch 2.11, cuDNN 91000, Triton 3.6" in page
    # 2 and 0.5 make 1; `best` and `fast` have one layer.
    assert (
        "| forward | bf16 | 32 | VGG, ResNet | 256 | 1.00 (2) | 2.50 (1) | 4.00 (1) | 0.50 | 1.1 |"
        in page
    )
    assert "| resnet-256x14-b32 | auto f4 default | channels_last | 20 ± 0.1 | 10 | 0.50 |" in page
    assert "| resnet-64x56-b32 | cuda f4 default | channels_last | 10 ± 0.1 | 60 | 30 |" in page
    assert "| ours | vgg-512x28-b32 cuda default | RuntimeError: launch |" in page
    assert "- ours: 1 for lack of time, from `x` on" in page
    # 118.38 GFLOP in 200 µs: 592 TFLOP/s, 75 % of the GEMM's 790.
    line = "| 592 | 75 | channels_last, benchmark=1 | 1.5 | 0.5 | 0.0016 | sm90_fprop |"
    assert line in page
    assert "Dry run" not in page


def test_the_layer_with_its_filter_kept_has_a_column(folder):
    found = rows.load(folder / "ours.json")
    found[0]["times"]["ours, filter kept"] = {"hot": times(25), "cold": None, "eager": times(30)}
    (text, *_) = report.ours_tables(found)
    assert "| auto f4 default | channels_last | 50 ± 0.1 | 100 | 2.00 | 4 | 2 |" in text


def test_kernels_are_those_that_an_event_and_its_children_launched():
    def event(name, kernels=(), children=()):
        kernels = [SimpleNamespace(name=k, duration=us) for k, us in kernels]
        return SimpleNamespace(
            name=name, kernels=kernels, cpu_children=children, cpu_time_total=1.0
        )

    conv = event("aten::cudnn_convolution", [("transpose", 2.0), ("fprop", 30.0)])
    whole = event("label", children=[event("aten::conv2d", children=[conv]), event("add")])
    assert cudnn._launched(whole, "cuda") == [["transpose", 2.0], ["fprop", 30.0]]
    assert cudnn._launched(whole, "cpu") == [["aten::cudnn_convolution", 1.0], ["add", 1.0]]


def test_the_peer_is_cudnns_best_setting(folder):
    found = ours.best_setting(rows.load(folder / "cudnn.json"), GPU_LAYERS[0], "forward", "bf16")
    assert (found.layout, found.benchmark, found.deterministic) == ("channels_last", True, False)
    guess = ours.best_setting([], GPU_LAYERS[0], "forward", "fp32")
    assert (guess.layout, guess.benchmark) == ("channels_last", True)


def test_an_empty_folder_makes_a_page(tmp_path):
    assert "The machine stage wrote nothing." in report.page(tmp_path)


def test_keeping_results(folder, tmp_path):
    kept = keep.keep(folder, tmp_path / "results")
    assert kept.name == "nvidia-h200"
    assert {"machine.json", "cudnn.json", "ours.json"} < {path.name for path in kept.iterdir()}
    content = json.loads((kept / "gpu_forward_bf16.json").read_text())
    ratios = {name: row["ratio"] for name, row in content["rows"].items()}
    assert ratios == {"vgg-256x56-b32": 2.0, "resnet-256x14-b32": 0.5}
    text = (kept / "gpu_forward_bf16.md").read_text()
    assert "losses 1 (resnet-256x14-b32)" in text
    assert "NVIDIA H200, driver 580" in text


def test_a_dry_run_is_not_kept(folder, tmp_path):
    machine = json.loads((folder / "machine.json").read_text())
    machine["run"]["dry_run"] = True
    (folder / "machine.json").write_text(json.dumps(machine))
    with pytest.raises(SystemExit, match="dry run"):
        keep.keep(folder, tmp_path / "results")


def test_counters_are_asked_of_ncu(folder, tmp_path):
    """A stand-in for ncu notes how it was called."""
    tool = tmp_path / "bin" / "ncu"
    tool.parent.mkdir()
    tool.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(tmp_path / 'argv')!r}, 'w').write(json.dumps(sys.argv))\n"
        "log = sys.argv[sys.argv.index('--log-file') + 1]\n"
        """open(log, 'w').write('"ID","Kernel Name","gpu__time_duration.sum"\\n"","","us"\\n"""
        """"0","gemm","7"\\n')\n"""
    )
    tool.chmod(0o755)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(tool.parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "benches"), str(ROOT)]),
    }
    command = [sys.executable, "-m", "gpu.counters", "--out", str(folder)]
    done = subprocess.run(
        [*command, "--until", str(time.time() + 60)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "| gemm | 7 |" in (folder / "profile.txt").read_text()
    argv = json.loads((tmp_path / "argv").read_text())
    assert argv[argv.index("--clock-control") + 1] == "none"
    cases = json.loads(argv[-1])
    assert len(cases) == counters.MOST
    # Our fastest kernel of the first case, then cuDNN's best setting of it.
    assert cases[0]["choice"] == ["cuda", "f4", "fast"]
    assert cases[1] == {
        **{"layer": "vgg-256x56-b32", "mode": "bf16", "layout": "channels_last"},
        **{"choice": None, "benchmark": True},
    }


def test_counters_by_hand():
    text = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum",'
        '"sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active"\n'
        '"","","us","Mbyte","%"\n'
        '"0","gemm<a|b>","12.5","3.2","71.0"\n'
    )
    found = counters.table(text)
    assert "| kernel | time (us) | tensor pipe (%) | DRAM read (Mbyte) |" in found
    assert "| gemm<a/b> | 12.5 | 71.0 | 3.2 |" in found
    assert counters.table("==ERROR== no permission\n") == "ncu printed no counters"


# ----------------------------------------------------------------------------------------- dry run


def dry_run(out: Path, *arguments: str, **variables: str) -> tuple[int, str, Path]:
    """(status, output, folder) of a dry run."""
    if "PYWINO_GPU_CHECK" in os.environ:
        pytest.skip("gpu-check runs this test, and would run itself")
    command = [sys.executable, str(ROOT / "benches" / "gpu" / "check.py"), "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYWINO", "PYTEST"))}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        # A busy machine must not be taken for a stage that hangs.
        [*command, "--dry-run", "--budget", "3000", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr, out


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    return dry_run(tmp_path_factory.mktemp("gpu") / "out")


@pytest.mark.slow
def test_dry_run(dry):
    status, output, out = dry
    assert status == 0, output[-4000:]
    machine = json.loads((out / "machine.json").read_text())
    assert machine["run"]["dry_run"]
    results = {stage["stage"]: stage["status"] for stage in machine["run"]["stages"]}
    assert set(results) == {stage.name for stage in check.stages(True, None)}
    ran = {"machine", "doctor", "memcheck", "tests", "cudnn", "cudnn-benchmark", "ours", "counters"}
    assert {name for name, status in results.items() if status == "ok"} >= ran
    assert all(s == "ok" or s.startswith("skipped: ") for s in results.values())
    assert set(machine["ceilings"]) > {"GEMM bf16", "GEMM fp32", "launch, eager"}
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("log.txt", "machine.json", "cudnn.json", "ours.json", "tables.md", "tests.txt")
    }
    assert len(names) <= 8


@pytest.mark.slow
def test_dry_run_measures_cudnns_settings(dry):
    found = rows.load(dry[2] / "cudnn.json")
    small = [cudnn.settings(benchmark, small=True) for benchmark in (False, True)]
    assert {row["key"] for row in found} == {s.key for part in small for s in part}
    assert {row["failed"] for row in found} == {None}
    assert all(row["eager"]["us"] > 0 for row in found)
    assert all(row["kernels"] for row in found)
    assert all(row["error"] < 1e-2 for row in found if row["pass"] == "forward")


@pytest.mark.slow
def test_dry_run_measures_ours(dry):
    found = rows.load(dry[2] / "ours.json")
    if not found:
        pytest.skip("needs the native library")
    assert {row["failed"] for row in found} == {None}
    kinds = {*ours.OPS, *elementwise.KINDS, *skipping.KINDS, *products.KINDS}
    kinds |= {networks.WHOLE, networks.BLOCK}
    assert {row["pass"] for row in found} == kinds  # nothing is compiled here
    checked = [row for row in found if row["step"] == "check"]
    assert not any(row["wrong"] for row in checked)
    assert {row["backend"] for row in found} == {"cpu", "auto", "layers"}
    for row in found:
        if row["step"] == "time":
            assert row["error"] <= 1.5e-2
            peers = {"cudnn", "eager", "dense", "mma.sync"} & set(row["times"])
            assert len(peers) == 1
            assert row["times"]["ours"]["eager"]["us"] > 0
    page = (dry[2] / "tables.md").read_text()
    assert "No number here is a measurement." in page
    assert "### Ours, winograd-relu training, fp32" in page
    assert "### Ours, LSTM cell forward, bf16" in page
    assert "### Ours, masked streaks 25 %, bf16" in page
    assert "### Ours, SAPNet, fp32" in page


@pytest.mark.slow
def test_without_kernels_of_ours_the_rest_is_measured(tmp_path):
    """As after a build that failed."""
    stages = "machine,memcheck,ours,counters"
    status, output, out = dry_run(tmp_path / "out", "--stages", stages, PYWINO_PURE="1")
    assert status == 0, output[-4000:]
    run = json.loads((out / "machine.json").read_text())["run"]
    results = {stage["stage"]: stage["status"] for stage in run["stages"]}
    assert results.pop("memcheck") == (
        "skipped: no kernel of pywino runs on cpu in this build: nothing to check"
    )
    assert results == {"machine": "ok", "ours": "ok", "counters": "ok"}
    assert json.loads((out / "ours.json").read_text()) == {"rows": [], "left_out": {"ours": []}}
    assert "No kernel of pywino was timed." in output
