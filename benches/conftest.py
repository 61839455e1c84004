# SPDX-License-Identifier: BSD-3-Clause
"""One fixture, `compare`: errors first, then interleaved rounds; tables and JSON at the end.

    @pytest.mark.benchmark(group="forward")           # the table; its title is the docstring
    @pytest.mark.layers(full=LAYERS, default=QUICK)   # a row a layer; what a run leaves out is said
    def test_forward(compare, layer):
        compare(ours, {"nchw": f, "channels_last": g}, reference=h, limit=2.5e-6)

`@pytest.mark.environment(NAME="value", OTHER=None)` runs its rows in one process of their own, with
these variables set or removed. `@pytest.mark.full_only` is left out of the default run.
"""

import collections
import datetime
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(
    0, str(Path(__file__).parent)
)  # the benches import each other's registry; importlib mode adds nothing
import tables

# Both sides allocate their output in every call. With glibc's defaults a large one is mapped and
# page-faulted each time, which costs a convolution of 30 MB about a quarter: that would be measured
# instead of the kernels. Read at program start.
TUNABLES = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
# A process of its own writes what it measured to this file instead of tables.
_CHILD = os.environ.get("PYWINO_BENCH_CHILD")
_RESTARTED = "PYWINO_BENCH_RESTARTED"

_BUDGET_S = (0.8, 1.0)  # of measuring, a row; in a full run
_ROUNDS = (5, 60)
_SLOW_S, _SLOW_ROUNDS = 2.0, 3  # a default run takes no more rounds than these of what is slow
_CLEAN = 3  # so many undisturbed samples make a median

_rows: dict[str, dict] = {}  # table -> {"title": …, "rows": {name: row}}
_left_out: dict[str, str] = {}  # table -> what
_records: dict[str, dict] = {}  # node id -> what its own process measured


# ------------------------------------------------------------------------------------------ session


def pytest_addoption(parser):
    group = parser.getgroup("pywino benches")
    group.addoption(
        "--bench-full", action="store_true", help="every layer of every table, every peer"
    )
    group.addoption("--bench-threads", type=int, help="torch.set_num_threads of every contender")
    group.addoption(
        "--bench-results", help="folder for JSON and Markdown (default: benches/results/<cpu>)"
    )


def pytest_configure(config):
    for line in (
        "layers(full, default): rows of a table",
        "environment(**variables)",
        "full_only: not by default",
    ):
        config.addinivalue_line("markers", line)
    started_by_command = tuple(config.invocation_params.args) == tuple(sys.argv[1:])
    glibc = platform.libc_ver()[0] == "glibc"
    if glibc and started_by_command and not _CHILD and _RESTARTED not in os.environ:
        config.pluginmanager.getplugin(
            "capturemanager"
        ).stop_global_capturing()  # give exec the true stdout
        sys.stdout.flush()
        environment = os.environ | {"GLIBC_TUNABLES": TUNABLES, _RESTARTED: "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    if config.getoption("--bench-threads"):
        torch.set_num_threads(config.getoption("--bench-threads"))
    # Plans of this run: those in the user's cache may have been measured on a busy machine.
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    os.environ["PYWINO_PLAN"] = str(Path(folder.name) / "plans.json")


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("layers")
    if marker is None:
        return
    full, default = marker.kwargs["full"], marker.kwargs["default"]
    chosen = full if metafunc.config.getoption("--bench-full") else default
    if len(chosen) < len(full):
        group = metafunc.definition.get_closest_marker("benchmark").kwargs["group"]
        _left_out[group] = f"{len(full) - len(chosen)} of {len(full)} layers"
    metafunc.parametrize("layer", chosen, ids=str)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--bench-full"):
        return
    out = [item for item in items if item.get_closest_marker("full_only")]
    every = collections.Counter(_table(i) for i in items if i.get_closest_marker("benchmark"))
    for table, count in collections.Counter(map(_table, out)).items():
        _left_out[table] = "all" if count == every[table] else f"{count} of {every[table]} rows"
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


def _table(item) -> str:
    return item.get_closest_marker("benchmark").kwargs["group"]


def _row_name(item) -> str:
    return item.callspec.id if hasattr(item, "callspec") else item.name.removeprefix("test_")


# --------------------------------------------------------------------------- processes of their own


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A row with an environment: measured once by a child for the whole group, then replayed into
    `benchmark` here."""
    marker = pyfuncitem.get_closest_marker("environment")
    if marker is None or _CHILD or not set(pyfuncitem.fixturenames) & {"compare"}:
        return None
    if pyfuncitem.nodeid not in _records:
        group = [
            i for i in pyfuncitem.session.items if i.get_closest_marker("environment") == marker
        ]
        _records.update(
            _measure_elsewhere(pyfuncitem.config, [i.nodeid for i in group], marker.kwargs)
        )
    record = _records.get(
        pyfuncitem.nodeid, {"outcome": "failed", "text": "its process ended before this row"}
    )
    if record["outcome"] == "skipped":
        pytest.skip(record["text"])
    if record["outcome"] == "failed":
        pytest.fail(record["text"], pytrace=False)
    benchmark = pyfuncitem.funcargs["benchmark"]
    samples = record["samples"]
    if samples and benchmark.enabled:
        # pytest-benchmark has no door for samples taken elsewhere, but it lets the clock be chosen
        # (by marker): this one shows, round by round, the recorded times.
        clock = iter([moment for sample in samples for moment in (0.0, sample)])
        benchmark._timer = lambda: next(clock)
        benchmark.pedantic(lambda: None, rounds=len(samples))
    if record["row"]:
        _keep(pyfuncitem, benchmark, record["row"])
    return True


def _measure_elsewhere(
    config, nodeids: list[str], variables: dict[str, str | None]
) -> dict[str, dict]:
    environment = dict(os.environ)
    for name, value in variables.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    own = sys.orig_argv[1 : len(sys.orig_argv) - len(config.invocation_params.args)]
    flags = ["-q", "-p", "no:cacheprovider", f"--rootdir={config.rootpath}"]
    flags += [
        flag
        for flag in ("--bench-full", "--benchmark-only", "--benchmark-disable")
        if flag in sys.argv
    ]
    if config.getoption("--bench-threads"):
        flags.append(f"--bench-threads={config.getoption('--bench-threads')}")
    ids = [str(config.rootpath / nodeid) for nodeid in nodeids]
    with tempfile.TemporaryDirectory() as folder:
        environment["PYWINO_BENCH_CHILD"] = str(Path(folder) / "records.json")
        done = subprocess.run(
            [sys.executable, *own, *flags, *ids],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            return json.loads(Path(environment["PYWINO_BENCH_CHILD"]).read_text())
        except (OSError, ValueError):
            text = f"its process ended with status {done.returncode}:\n{done.stdout[-2000:]}"
            return {nodeid: {"outcome": "failed", "text": text} for nodeid in nodeids}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if _CHILD and (report.when == "call" or not report.passed):
        text = (
            report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        )
        record = {
            "outcome": report.outcome,
            "text": text.removeprefix("Skipped: "),
            "samples": [],
            "row": None,
        }
        benchmark = item.funcargs.get("benchmark") if hasattr(item, "funcargs") else None
        if report.passed and benchmark is not None:
            record["row"] = dict(benchmark.extra_info)
            record["samples"] = list(benchmark.stats.stats.data) if benchmark.stats else []
        _records[item.nodeid] = record
        Path(_CHILD).write_text(json.dumps(_records))
    return report


# ------------------------------------------------------------------------------------------ compare


@pytest.fixture
def compare(benchmark, request):
    """The door to timing: compare(ours, peers, *, reference=None, limit=None, ...).

    ours: a function, or a dict of candidates; three quick calls each choose the one to measure.
    peers: name -> function.
    reference: a function that gives the float64 result.
    limit: relative L2 error that ours may have; a dict of them by candidate; or "no worse" than the
        best peer in the denominator.
    view: takes of every output what the reference computes.
    denominator: names of peers; the ratio is the fastest of them (default: of all) over ours.
    bounds: ratio above which a candidate's measurement is marked as broken.
    same: do the peers compute the same function? Where not, they are timed only; nor is a peer
        checked that returns None.
    calls: so many calls make one sample, for what takes microseconds.
    overhead: say how many microseconds more (+) or less (-) ours takes.
    rounds: the least; three in a default run, where a round takes more than two seconds.
    extra: a function of the milliseconds by contender that gives more columns of the row.
    note: a line below the table.
    """

    def run(
        ours,
        peers,
        *,
        reference=None,
        limit=None,
        view=lambda y: y,
        denominator=None,
        bounds=None,
        same=True,
        calls=1,
        overhead=False,
        rounds=_ROUNDS[0],
        extra=lambda ms: {},
        note="",
    ):
        denominator = tuple(denominator or peers)
        candidates = ours if isinstance(ours, dict) else {"": ours}
        errors, peers_error = {}, {}
        if reference is not None:
            errors, peers_error = _check(
                candidates, peers if same else {}, view, reference, limit, denominator
            )
        chosen = _quickest(candidates)
        contenders = {"ours": candidates[chosen], **peers}
        if calls > 1:
            contenders = {name: _repeat(function, calls) for name, function in contenders.items()}
        full = request.config.getoption("--bench-full")
        samples = _interleave(benchmark, contenders, rounds, full)
        if samples is None:  # --benchmark-disable: the errors were the test
            return

        ms = {name: 1e3 * _estimate(s) / calls for name, s in samples.items()}
        columns = extra(ms)
        base = min(denominator, key=ms.get)
        name = _row_name(request.node)
        row = {
            "algorithm": chosen,
            "ms": ms.pop("ours"),
            "peers_ms": ms,
            "against": base,
            "ratios": dict(ms),
            "error": errors.get(chosen),
            "peers_error": peers_error,
            "rounds": len(samples["ours"]),
            "clean": min(sum(clean for _, clean in s) for s in samples.values()),
            "extra": columns,
            "note": note,
            "environment": _environment(),
        }
        row["ratios"] = {name: value / row["ms"] for name, value in ms.items()}
        row["ratio"] = row["ratios"][base]
        if overhead:
            more = 1e3 * (row["ms"] - ms[base])
            row["note"] = f"{name}: {more:+.1f} µs a call. {note}".strip()
        row["suspect"] = row["ratio"] > (bounds or {}).get(chosen, math.inf)
        _keep(request.node, benchmark, row)

    return run


def _check(candidates, peers, view, reference, limit, denominator) -> tuple[dict, dict]:
    """Relative L2 errors of ours and of the peers, by names that both may have; asserts that ours
    hold the limit."""
    exact = reference().double()
    norm = exact.norm()

    def error(output):
        return float((view(output).double() - exact).norm() / norm)

    outputs = ((name, function()) for name, function in peers.items())
    theirs = {name: error(output) for name, output in outputs if output is not None}
    best = min((theirs[name] for name in denominator if name in theirs), default=math.nan)
    errors = {}
    for name, function in candidates.items():
        errors[name] = error(function())
        # One part in fifty: two correctly rounded results differ by chance.
        allowed = (
            1.02 * best
            if limit == "no worse"
            else limit[name]
            if isinstance(limit, dict)
            else limit
        )
        text = f"{name or 'ours'}: relative error {errors[name]:.3g} against float64"
        text += f" is above {allowed} (PyTorch: {best:.3g})"
        assert allowed is None or errors[name] <= allowed, text
    return errors, theirs


def _quickest(candidates: dict) -> str:
    if len(candidates) == 1:
        return next(iter(candidates))
    best = {}
    for name, function in candidates.items():
        function()
        best[name] = min(_sample(function)[0] for _ in range(3))
    return min(best, key=best.get)


def _repeat(function, calls):
    def repeated():
        for _ in range(calls):
            function()

    return repeated


def _runnable() -> int:
    """How many threads of the machine want a core now, this one among them."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
    except OSError:
        return 1


def _switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class _Watch:
    """Was a sample undisturbed? Nothing but torch's own threads, which stay awake for a while after
    a call, wanted a core before and after it, and none of them was taken off one."""

    def __enter__(self):
        deadline = time.perf_counter() + 0.03
        while not self._alone() and time.perf_counter() < deadline:
            time.sleep(0.001)
        self.quiet = self._alone()
        self.switches = _switches()
        return self

    def __exit__(self, *_):
        self.clean = self.quiet and _switches() == self.switches and self._alone()

    @staticmethod
    def _alone():
        return _runnable() <= torch.get_num_threads()


def _sample(function) -> tuple[float, bool]:
    with _Watch() as watch:
        start = time.perf_counter()
        function()
        seconds = time.perf_counter() - start
    return seconds, watch.clean


def _interleave(benchmark, contenders, least, full) -> dict[str, list[tuple[float, bool]]] | None:
    """One sample of each peer, then one of ours, taken by pytest-benchmark, and so on; name ->
    [(seconds, clean)]."""
    ours = contenders["ours"]
    peers = {name: function for name, function in contenders.items() if name != "ours"}
    if not benchmark.enabled:
        benchmark.pedantic(ours)
        return None
    for function in contenders.values():
        function()
    once = sum(_sample(function)[0] for function in contenders.values())
    if once > _SLOW_S and not full:
        least = min(least, _SLOW_ROUNDS)
    rounds = max(least, min(_ROUNDS[1], int(_BUDGET_S[full] / once)))

    samples = {name: [] for name in peers}
    clean = []
    watch = _Watch()

    def setup():
        for name, function in peers.items():
            samples[name].append(_sample(function))
        watch.__enter__()

    def teardown():
        watch.__exit__()
        clean.append(watch.clean)

    benchmark.pedantic(ours, setup=setup, teardown=teardown, rounds=rounds)
    return {"ours": list(zip(benchmark.stats.stats.data, clean, strict=True)), **samples}


def _estimate(samples: list[tuple[float, bool]]) -> float:
    """Median of the undisturbed samples; the lower quartile of all where there are too few of
    these."""
    clean = [seconds for seconds, undisturbed in samples if undisturbed]
    if len(clean) >= _CLEAN:
        return statistics.median(clean)
    return sorted(seconds for seconds, _ in samples)[len(samples) // 4]


# ------------------------------------------------------------------------------------------ results


def _native():
    from pywino import _native

    return _native


def _environment() -> dict:
    native = _native()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "isa": native.host.isa() if native.host else None,
        "allocator": "tunables" if os.environ.get("GLIBC_TUNABLES") == TUNABLES else "default",
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA"),
    }


def cpu_name() -> str:
    """Model, family and model number: cloud machines hide the first one."""
    info = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", _cpuinfo(), re.M)[:3][::-1])
    if "model name" not in info:
        return platform.processor() or platform.machine()
    return f"{info['model name']} family {info.get('cpu family')} model {info.get('model')}"


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _machine() -> dict:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["pywino"] = _machine() | _environment()


def _keep(item, benchmark, row: dict) -> None:
    benchmark.extra_info.update(row)
    _put(item, {_row_name(item): row})


def _put(item, rows: dict[str, dict]) -> None:
    """Rows of a table, into this run's and into its file: a run that is ended keeps what it has."""
    name, title = _table(item), " ".join((item.function.__doc__ or "").split())
    _rows.setdefault(name, {"title": title, "rows": {}})["rows"].update(rows)
    if _CHILD:
        return
    slug = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    default = Path(__file__).parent / "results" / slug
    folder = Path(item.config.getoption("--bench-results") or default)
    tables.update(folder, name, title, _machine(), rows)


def pytest_terminal_summary(terminalreporter):
    if _CHILD:
        return
    for name, content in _rows.items():
        terminalreporter.write_line("")
        terminalreporter.write_line(
            tables.markdown({"table": name, "machine": _machine(), **content})
        )
    for name, what in _left_out.items():
        terminalreporter.write_line(f"left out of {name}: {what} (--bench-full runs them)")


# ----------------------------------------------------------------------------------------- fixtures


@pytest.fixture
def report(benchmark, request):
    """The door to tables of other things than times: report(rows, note=""), where rows() gives
    {name of a row: {column: text}}."""

    def run(rows, note=""):
        common = {"note": note, "environment": _environment()}
        cells = benchmark.pedantic(rows)
        _put(request.node, {name: {"cells": cells[name], **common} for name in cells})

    return run


@pytest.fixture
def native():
    """The native library; rows that need it are skipped, with the reason, where there is none."""
    module = _native()
    if not module.loaded:
        pytest.skip(f"no native library: {module.reason}")
    return module


@pytest.fixture
def full(request) -> bool:
    return request.config.getoption("--bench-full")
