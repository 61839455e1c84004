# SPDX-License-Identifier: BSD-3-Clause
"""The benches' own machinery: the registry, the tables, and the `compare` fixture on functions that
take no time but on its clock."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHES = Path(__file__).parents[1] / "benches"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benches_{name}", BENCHES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


layers = load("layers")
tables = load("tables")


# ----------------------------------------------------------------------------------------- layers


def test_layers_are_the_ones_that_are_promised():
    assert (len(layers.LAYERS), len(layers.UNDILATED), len(layers.DENSE)) == (25, 19, 17)
    every = layers.LAYERS + layers.ADVERSARIAL
    assert len({layer.name for layer in every}) == len(every)
    assert set(layers.QUICK) < set(layers.LAYERS)
    assert len(layers.QUICK) == 10
    assert {layer.dilation for layer in layers.SAPNET} == {1, 2, 4, 8}
    # VGG-16's conv1_2, by hand: 2 * 9 * 64 * 64 * 224 * 224.
    assert layers.LAYERS[0].flops == 3_699_376_128


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layer_tensors(memory_format):
    layer = layers.Layer("l", 2, 5, 7, 9, 4, dilation=2)
    x, w, b = layer.tensors(torch.bfloat16, memory_format)
    assert (x.shape, w.shape, b.shape) == ((2, 5, 7, 9), (4, 5, 3, 3), (4,))
    assert x.dtype == w.dtype == b.dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=memory_format)
    assert w.is_contiguous(memory_format=memory_format)
    assert torch.equal(x, layer.tensors(torch.bfloat16)[0])  # values do not depend on the format
    assert not torch.equal(x, layer.tensors(torch.bfloat16, seed=1)[0])


# ----------------------------------------------------------------------------------------- tables


def row(ratio, **changes):
    environment = {"date": "2026-01-02T03:04:05", "torch": "2", "threads": 2, "isa": "avx2"}
    environment["allocator"] = "default"
    base = {"algorithm": "f4", "ms": 1.0, "peers_ms": {"nchw": ratio}, "ratios": {"nchw": ratio}}
    base |= {"against": "nchw", "ratio": ratio, "error": 1e-6, "peers_error": {}, "clean": 9}
    return base | {"rounds": 9, "note": "", "environment": environment, "suspect": False} | changes


MACHINE = {"cpu": "a processor", "cores": 2, "system": "s"}


def test_geometric_mean_and_losses():
    content = {
        "table": "t",
        "title": "T",
        "machine": MACHINE,
        "rows": {"a": row(8.0), "b": row(0.5)},
    }
    text = tables.markdown(content)
    assert "geometric mean 2.00×, least 0.50×, most 8.00×, rows 2, losses 1 (b)." in text
    assert "| a | f4 | 1 | 8 | 8.00 | 1e-06 |  |" in text
    assert "`*`" not in text
    assert "`?`" not in text


def test_odd_rows_are_marked():
    rows = {"a": row(4.5, suspect=True), "b": row(2.0, clean=1)}
    text = tables.markdown({"table": "t", "title": "T", "machine": MACHINE, "rows": rows})
    assert "| 4.50? |" in text
    assert "| 2.00* |" in text
    assert "`*`: the machine was busy" in text
    assert "`?`: more than" in text


def test_new_rows_replace_old_ones_and_the_rest_stays(tmp_path):
    tables.update(tmp_path, "t", "T", MACHINE, {"a": row(1.0), "b": row(2.0)})
    tables.update(tmp_path, "t", "T", MACHINE, {"b": row(4.0), "c": row(8.0)})
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert {name: r["ratio"] for name, r in rows.items()} == {"a": 1.0, "b": 4.0, "c": 8.0}
    assert "rows 3" in (tmp_path / "t.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"t.json", "t.md"}


def test_places_are_filled_and_found_stale(tmp_path):
    results = tmp_path / "results"
    tables.update(results, "forward", "Forward", MACHINE, {"a": row(3.0)})
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table: forward -->\nold\n<!-- end table -->\nbetween\n"
        "<!-- table: summary -->\n<!-- end table -->\n"
        "<!-- table: absent -->\n<!-- end table -->\nafter\n"
    )
    arguments = [str(page), "--results", str(results)]
    assert tables.main([*arguments, "--check"]) == 1
    assert "old" in page.read_text()
    assert tables.main(arguments) == 0
    text = page.read_text()
    assert tables.main([*arguments, "--check"]) == 0
    assert text.startswith("before\n<!-- table: forward -->\n**forward**: Forward\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| forward | Forward | 1 | 3.00× | 3.00× | 3.00× | 0 |" in text
    assert text.count("Not measured yet") == 1


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    tables.write_whole(path, "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tables.write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------- seconds per epoch


def test_seconds_per_epoch_stand_beside_the_papers(monkeypatch):
    epochs = load("epochs")
    assert epochs.GROWN == 448  # 128 (1 - 0.9) / (1 - 0.9731) = 476, in steps of 32
    built = []
    monkeypatch.setattr(epochs, "_step", lambda *arguments: built.append(arguments))
    seen = {}

    def compare(ours, peers, *, extra, **options):
        seen.update(options, ours=list(ours), peers=list(peers), extra=extra)

    epochs.compare_epochs(compare, False, "alexnet", epochs.BATCHES[0])
    assert ("alexnet", "all_cnn_c", "winograd_relu", 64, 0) in built
    assert len(built) == 1 + 3 + 3
    assert seen["denominator"] == ("SC-CNN",)
    # 60000 images are 937.5 steps of 64.
    assert seen["extra"]({"ours": 1000.0, "C-CNN": 320.0, "SC-CNN": 2000.0}) == {
        "C-CNN s/epoch (the paper)": "300 (20)",
        "SC-CNN s/epoch (the paper)": "1.88e+03 (53)",
        "SWR-CNN s/epoch (the paper)": "938 (24)",
    }
    built.clear()
    epochs.compare_epochs(compare, True, "vgg16", epochs.SPARSITIES[-1])
    assert built[-1] == ("vgg16", "all_cnn_c", "winograd_relu", 448, 80)
    ms = {"ours": 1.0, "C-CNN": 1.0, "SC-CNN": 1.0, "SWR-CNN + DBS": 448.0}
    columns = seen["extra"](ms)
    assert columns["SWR-CNN + DBS s/epoch (the paper)"] == "50 (12)"
    assert columns["SWR-CNN s/epoch (the paper)"] == "0.391 (17)"
    assert "2.86×" in seen["note"]
    epochs.compare_epochs(compare, True, "resnet32", epochs.BATCHES[-1])
    assert built[-1] == ("resnet32", "all_cnn_c", "winograd_relu", 448, 0)


def test_the_papers_tables_are_whole():
    epochs = load("epochs")
    for (model, by), table in epochs.PAPER.items():
        rows = epochs.SPARSITIES if by == "sparsity" else epochs.BATCHES
        assert list(table) == [row.value for row in rows], model
        assert {len(figures) for figures in table.values()} == {4 if by == "sparsity" else 3}


def curve(table, pattern, ratios, peer=None):
    rows = {}
    for percent, ratio in ratios.items():
        ratios_of = {"nchw": ratio} if peer is None else {"nchw": 9.0, peer: ratio}
        rows[f"vgg-128x112-b1-{pattern}-{percent}"] = row(
            ratio if peer is None else 9.0, ratios=ratios_of
        )
    return {"table": table, "title": "T", "machine": MACHINE, "rows": rows}


def test_break_even(tmp_path):
    """Against F.conv2d in the spatial domain, against our dense kernel in the Winograd domain; a
    straight line between the points."""
    spatial = curve("sparse_conv_break_even", "unstructured", {0: 0.5, 50: 0.8, 70: 1.2, 90: 4.0})
    domain = curve("sparse_winograd_break_even", "blocks", {0: 1.5, 50: 2.0}, "dense F(4x4,3x3)")
    curves = tables.break_even([spatial, domain])
    assert curves == {
        "Winograd domain, blocks of 16×1": [(0, pytest.approx(1.5)), (50, pytest.approx(2.0))],
        "spatial 3×3, anywhere": [
            (x, pytest.approx(y)) for x, y in ((0, 0.5), (50, 0.8), (70, 1.2), (90, 4.0))
        ],
    }
    for content in (spatial, domain):
        (tmp_path / f"{content['table']}.json").write_text(json.dumps(content))
    page = tmp_path / "page.md"
    page.write_text("<!-- table: break_even -->\n<!-- end table -->\n")
    options = ["--results", str(tmp_path), "--picture", str(tmp_path / "picture.png")]
    assert tables.main([str(page), *options]) == 0
    text = page.read_text()
    assert "| spatial 3×3, anywhere | 0.50× | 0.80× | 1.20× | 4.00× | 60 % |" in text
    assert "| Winograd domain, blocks of 16×1 | 1.50× | 2.00× |  |  | 0 % |" in text
    assert "\nGeometric means over vgg-128x112-b1.\n" in text
    assert (tmp_path / "picture.png").stat().st_size > 1000
    never = curve("sparse_conv_break_even", "blocks", {0: 0.2, 90: 0.9})
    assert "| 0.20× | 0.90× | never |" in tables._break_even_table([never])


# ---------------------------------------------------------------------------------------- compare

# The clock of these benches: time passes where something sleeps, and a little at each look, since
# who waits for a clock to move must not wait for ever. A plugin, so that it is there before
# conftest.py and pytest-benchmark take the true one, in the processes that they start too.
CLOCK = """
import time

now = 0.0

def sleep(seconds):
    global now
    now += seconds

def look():
    global now
    now += 1e-9
    return now

time.sleep, time.perf_counter = sleep, look
"""

TINY = '''
import os, time
import pytest, torch

X = torch.arange(4.0)

def sleep(ms, error=0.0):
    def function():
        time.sleep(ms / 1e3)
        return X * 2 + error
    return function

exact = lambda: X.double() * 2

@pytest.mark.benchmark(group="plain")
def test_plain(compare):
    """a title over
    two lines"""
    peers = {"slow": sleep(8), "fast": sleep(4), "other": sleep(1, error=1.0)}
    compare({"f2": sleep(6), "f4": sleep(2)}, peers, reference=exact, limit={"f2": 0, "f4": 0},
            denominator=("slow", "fast"), bounds={"f4": 1.5}, note="A note.")

@pytest.mark.benchmark(group="slow")
def test_slow(compare):
    compare(sleep(1500), {"p": sleep(1500)})

@pytest.mark.benchmark(group="calls")
def test_calls(compare):
    compare(sleep(1), {"p": sleep(2)}, calls=5, overhead=True)

@pytest.mark.benchmark(group="formats")
def test_formats(compare):
    compare({"nchw": sleep(1), "last": sleep(2)}, {"nchw": sleep(4, error=1.0), "last": sleep(6)},
            reference=exact, limit=0)

@pytest.mark.benchmark(group="more")
def test_more(compare):
    compare(sleep(1000), {"p": sleep(2000)}, rounds=3,
            extra=lambda ms: {"s each (theirs)": f"{ms['ours'] / 1e3:g} ({ms['p'] / 1e3:g})"})

@pytest.mark.benchmark(group="wrong")
def test_wrong(compare):
    compare(sleep(1, error=1e-3), {"p": sleep(1)}, reference=exact, limit=1e-5)

@pytest.mark.benchmark(group="worse")
def test_worse(compare):
    compare(sleep(1, error=2e-3), {"p": sleep(1, error=1e-3)}, reference=exact, limit="no worse")

@pytest.mark.benchmark(group="elsewhere")
@pytest.mark.environment(TINY_VARIABLE="set", GLIBC_TUNABLES=None)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_elsewhere(compare, index):
    """another process"""
    if index == 2:
        pytest.skip("not here")
    assert os.environ["TINY_VARIABLE"] == "set"
    assert "GLIBC_TUNABLES" not in os.environ
    assert index == 0, "the second one fails"
    compare(sleep(1), {"p": sleep(3)}, reference=exact, limit=0, note=f"in {os.getpid()}")

@pytest.mark.benchmark(group="rows")
@pytest.mark.layers(full=("a", "b", "c"), default=("b",))
def test_rows(compare, layer):
    compare(sleep(1), {"p": sleep(1)}, note=os.environ.get("GLIBC_TUNABLES", ""))

@pytest.mark.benchmark(group="cells")
def test_cells(report):
    """not of times"""
    found = {"ours": {"size": "3", "PSNR": "22.5"}, "theirs": {"PSNR": "20.1", "year": "2021"}}
    report(lambda: found, note="A note on cells.")

@pytest.mark.benchmark(group="partly")
@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.full_only)])
def test_partly(compare, index):
    compare(sleep(1), {"p": sleep(1)})

@pytest.mark.benchmark(group="long")
@pytest.mark.full_only
def test_long(compare):
    compare(sleep(1), {"p": sleep(1)})

@pytest.mark.benchmark(group="plain")
@pytest.mark.full_only
def test_that_kills(compare):
    os.kill(os.getpid(), 9)
'''


def run_tiny(folder, *more):
    """Runs the tiny bench in a folder: its output, and how it ended."""
    for name in ("conftest.py", "tables.py", "runs.py"):
        shutil.copy(BENCHES / name, folder)
    (folder / "bench_tiny.py").write_text(TINY)
    (folder / "clock.py").write_text(CLOCK)
    (folder / "pytest.ini").write_text(
        "[pytest]\npython_files = bench_*.py\n"
        "addopts = -p clock --import-mode=importlib --benchmark-timer=clock.look\n"
    )
    root = str(Path(__file__).parents[1])
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYWINO_BENCH", "PYTEST"))
    }
    path = [str(folder), root, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    options = [
        "--benchmark-only",
        "--benchmark-json=saved.json",
        "--bench-results=results",
        "--bench-threads=1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", ".", *options, *more],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr, done.returncode


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run of the tiny bench: (its output, folder of results, saved JSON of pytest-benchmark)."""
    folder = tmp_path_factory.mktemp("benches")
    output, _ = run_tiny(folder)
    saved = folder / "saved.json"
    saved = json.loads(saved.read_text()) if saved.exists() else None
    return output, folder / "results", saved


def rows(tiny, table):
    return json.loads((tiny[1] / f"{table}.json").read_text())["rows"]


def test_ours_and_a_peer_of_the_same_name_have_their_own_errors(tiny):
    (row,) = rows(tiny, "formats").values()
    assert (row["algorithm"], row["against"], row["ratio"]) == (
        "nchw",
        "nchw",
        pytest.approx(4, 1e-3),
    )
    assert row["error"] == 0 == row["peers_error"]["last"]
    assert row["peers_error"]["nchw"] > 0.1


def test_compare_measures_the_better_candidate_against_the_better_peer(tiny):
    output, results, _ = tiny
    (plain,) = rows(tiny, "plain").values()
    assert plain["algorithm"] == "f4"
    assert plain["against"] == "fast"
    assert plain["ms"] == pytest.approx(2, rel=1e-3)
    assert plain["ratio"] == pytest.approx(2, rel=1e-3)
    assert plain["ratios"]["slow"] == pytest.approx(4, rel=1e-3)
    assert plain["ratios"]["other"] == pytest.approx(0.5, rel=1e-3)
    assert plain["error"] == 0
    assert plain["peers_error"]["fast"] == 0 < plain["peers_error"]["other"]
    assert plain["environment"]["threads"] == 1
    text = (results / "plain.md").read_text()
    assert text in output
    assert "**plain**: a title over two lines" in text
    assert "A note." in text
    assert plain["suspect"]
    assert not any(row["suspect"] for row in rows(tiny, "rows").values())


def test_compare_hands_ours_to_pytest_benchmark(tiny):
    saved = {b["name"]: b for b in tiny[2]["benchmarks"]}
    plain = saved["test_plain"]
    assert plain["group"] == "plain"
    assert plain["extra_info"]["ratio"] == rows(tiny, "plain")["plain"]["ratio"]
    assert plain["stats"]["median"] == pytest.approx(2e-3, rel=1e-3)
    assert plain["stats"]["rounds"] == 53  # 0.8 s of 15 ms a round
    assert saved["test_slow"]["stats"]["rounds"] == 3
    assert tiny[2]["machine_info"]["pywino"]["threads"] == 1


def test_a_run_that_is_killed_keeps_the_rows_before(tmp_path):
    _, status = run_tiny(tmp_path, "--bench-full", "-k", "plain or slow or kills")
    assert status == -9
    (slow,) = json.loads((tmp_path / "results" / "slow.json").read_text())["rows"].values()
    assert slow["rounds"] == 5
    rows = json.loads((tmp_path / "results" / "plain.json").read_text())["rows"]
    assert list(rows) == ["plain"]
    assert rows["plain"]["ratio"] == pytest.approx(2, rel=1e-3)


def test_a_place_may_name_its_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for cpu, date, ratio in (("old", "2026-01-02", 2.0), ("new", "2026-01-03", 3.0)):
        measured = row(ratio)
        measured["environment"] = measured["environment"] | {"date": date}
        tables.update(tmp_path / cpu, "forward", "Forward", MACHINE, {"a": measured})
    page = "<!-- table: forward{} -->\n<!-- end table -->\n"
    assert "| 2.00 |" in tables.fill(page.format(" of old"), None)
    assert "| 3.00 |" in tables.fill(page.format(" of old"), tmp_path / "new")
    assert "| 3.00 |" in tables.fill(page.format(""), None)
    assert "Not measured" in tables.fill(page.format(" of another"), None)


def test_rows_that_say_their_own_columns(tiny):
    output, results, _ = tiny
    text = (results / "cells.md").read_text()
    assert text in output
    assert text.startswith(
        "**cells**: not of times\n\n|  | size | PSNR | year |\n|---|---|---|---|\n"
        "| ours | 3 | 22.5 |  |\n| theirs |  | 20.1 | 2021 |\n\nA note on cells.\n"
    )
    page = "<!-- table: summary -->\n<!-- end table -->\n"
    filled = tables.fill(page, results)
    assert "| plain |" in filled
    assert "cells" not in filled


def test_calls_are_divided(tiny):
    (calls,) = rows(tiny, "calls").values()
    assert calls["ms"] == pytest.approx(1, rel=1e-3)
    assert calls["ratio"] == pytest.approx(2, rel=1e-3)
    assert calls["note"] == "calls: -1000.0 µs a call."


def test_a_row_may_have_columns_and_rounds_of_its_own(tiny):
    (more,) = rows(tiny, "more").values()
    assert more["rounds"] == 3
    assert more["peers_ms"] == pytest.approx({"p": 2000}, rel=1e-3)
    text = (tiny[1] / "more.md").read_text()
    assert "| error | PyTorch's error | s each (theirs) |" in text
    assert "| 1 (2) |" in text


def test_errors_come_before_times(tiny):
    output, results, _ = tiny
    assert "relative error 0.000267 against float64 is above 1e-05" in output
    assert not (results / "wrong.json").exists()
    assert not (results / "worse.json").exists()
    assert "3 failed" in output  # wrong, worse, and one elsewhere


def test_rows_with_an_environment_run_elsewhere(tiny):
    output, _, saved = tiny
    found = rows(tiny, "elsewhere")
    assert list(found) == ["0"]
    assert found["0"]["ratio"] == pytest.approx(3, rel=1e-3)
    assert found["0"]["environment"]["allocator"] == "default"
    replayed = {b["name"]: b for b in saved["benchmarks"]}["test_elsewhere[0]"]
    assert replayed["stats"]["rounds"] == found["0"]["rounds"]
    assert replayed["stats"]["median"] == pytest.approx(1e-3, rel=1e-3)
    assert "the second one fails" in output
    assert "1 skipped" in output


def test_what_was_left_out_is_said(tiny):
    output, results, _ = tiny
    assert list(rows(tiny, "rows")) == ["b"]
    assert "left out of rows: 2 of 3 layers" in output
    assert "left out of long: all" in output
    assert "left out of partly: 1 of 2 rows" in output
    assert list(rows(tiny, "partly")) == ["0"]
    assert not (results / "long.json").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's tunables")
def test_kernel_tables_run_with_the_tunables(tiny):
    (only,) = rows(tiny, "rows").values()
    assert only["note"].startswith("glibc.malloc.mmap_threshold=")
    assert only["environment"]["allocator"] == "tunables"
