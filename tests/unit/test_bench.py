import json
import time
from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from indistill_fx.deploy.bench import bench, example_of, measure
from indistill_fx.deploy.bench_apart import bench_apart
from indistill_fx.deploy.export_onnx import export_onnx
from indistill_fx.errors import ConfigError, ExportError

X = torch.randn(2, 6)


def test_measure_counts_calls_and_orders_medians():
    timings = measure({"short": lambda: time.sleep(0.0002), "long": lambda: time.sleep(0.004)}, seconds=0.1)
    assert list(timings) == ["short", "long"]
    assert timings["long"].median_ms >= 4 > timings["short"].median_ms >= 0.2
    for timing in timings.values():
        assert timing.p95_ms >= timing.median_ms and timing.calls >= 10


def test_measure_interleaves():
    order = []
    measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=1e-9)
    changes = sum(one != two for one, two in pairwise(order[6:]))
    assert len(order) == 2 * (3 + 10 * 2) and changes >= 5


def test_of_slow_calls_fewer_are_timed(monkeypatch):
    """Each took two dozen calls, however long they were."""
    now, made = [0.0], []

    def call(name, seconds):
        now[0] += seconds
        made.append(name)

    monkeypatch.setattr("indistill_fx.deploy.bench.perf_counter", lambda: now[0])
    seconds = {"short": 0.5, "long": 2.5, "longest": 60.0}
    timings = measure({name: partial(call, name, each) for name, each in seconds.items()}, seconds=1.0)
    assert {name: timing.calls for name, timing in timings.items()} == {"short": 10, "long": 4, "longest": 3}
    assert [timing.median_ms for timing in timings.values()] == [500, 2500, 60_000]
    assert Counter(made) == {"short": 3 + 2 * 10, "long": 1 + 4, "longest": 1 + 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench")
    module = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    open_batch, fixed = directory / "open.onnx", directory / "fixed.onnx"
    export_onnx(module, open_batch, X, batch_sizes=(1,))
    export_onnx(module, fixed, X[:1], batch_sizes=(1,), dynamic_batch=False)
    return module, open_batch, fixed


def test_table_has_every_cell_and_survives_json(files):
    module, path, _ = files
    threads = torch.get_num_threads()
    report = bench({"student": module, "file": path}, X, batches=(1, 4), threads=(1, 2), seconds=0.01)
    assert [(r.name, r.runtime, r.batch, r.threads) for r in report.rows] == [
        (name, runtime, batch, count)
        for name, runtime in (("student", "torch eager"), ("file", "onnxruntime fp32"))
        for batch in (1, 4)
        for count in (1, 2)
    ]
    assert all(0 < r.median_ms <= r.p95_ms and r.calls >= 10 for r in report.rows)
    assert {r.size for r in report.rows} == {4 * sum(p.numel() for p in module.parameters()), path.stat().st_size}
    assert json.loads(json.dumps(report.to_json()))["rows"][0]["name"] == "student"
    first = {(r.batch, r.threads): r.median_ms for r in report.rows if r.name == "student"}
    assert [r.speed for r in report.rows] == [first[r.batch, r.threads] / r.median_ms for r in report.rows]
    assert set(report.versions) == {"python", "torch", "onnxruntime"} and "cores" in report.machine
    assert module.training and torch.get_num_threads() == threads


def test_what_cannot_run_is_noted_and_the_rest_timed(files):
    report = bench({"fixed": files[2], "open": files[1]}, X, batches=(1, 4), threads=(1,), seconds=0.01)
    assert [(r.name, r.batch) for r in report.rows] == [("fixed", 1), ("open", 1), ("open", 4)]
    (note,) = report.notes
    assert note.startswith("fixed (onnxruntime fp32) cannot run at batch size 4:")


def test_a_table_without_a_row_is_an_error(files):
    with pytest.raises(ConfigError, match=r"None of these models ran\. fixed .* cannot run at batch size 4:"):
        bench({"fixed": files[2]}, X, batches=(4,), threads=(1,), seconds=0.01)


def test_it_says_what_it_times():
    lines = []
    bench({"one": nn.Linear(3, 2)}, torch.randn(1, 3), batches=(1, 4), threads=(1,), seconds=0.01, say=lines.append)
    assert lines == ["Timing batches of 1 on 1 thread …", "Timing batches of 4 on 1 thread …"]


def test_nothing_to_time():
    with pytest.raises(ConfigError, match="Nothing to time"):
        bench({}, X)
    with pytest.raises(ConfigError, match="`student`: there is no file"):
        bench({"student": "none.onnx"}, X)


def test_a_file_says_what_it_takes(files, tmp_path):
    (x,) = example_of(files[1])
    assert x.shape == (1, 6) and x.dtype == torch.float32
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    image = torch.randn(2, 3, 5, 4)
    export_onnx(module, tmp_path / "pixels.onnx", image, preprocess=(0.5, 0.5), batch_sizes=(1,))
    (x,) = example_of(tmp_path / "pixels.onnx")
    assert x.shape == (1, 5, 4, 3) and x.dtype == torch.uint8 and x.max() > 100
    assert len(bench({"pixels": tmp_path / "pixels.onnx"}, x, batches=(2,), threads=(1,), seconds=0.01).rows) == 1
    export_onnx(module, tmp_path / "open.onnx", image, dynamic_size=True, batch_sizes=(1,))
    with pytest.raises(ConfigError, match=r"leaves the size of its input `input` open.*--input"):
        example_of(tmp_path / "open.onnx")


def test_a_process_of_its_own_gives_the_same_table(files, tmp_path, monkeypatch):
    """It imports nothing from the working directory."""
    _, open_batch, _ = files
    (tmp_path / "json.py").write_text("raise SystemExit('the folder ran code')")
    monkeypatch.chdir(tmp_path)
    report = bench_apart(open_batch, (X,), batches=(3,), threads=(1,), seconds=0.01)
    (row,) = report["rows"]
    assert (row["runtime"], row["batch"], row["threads"]) == ("onnxruntime fp32", 3, 1) and row["median_ms"] > 0


def test_a_process_that_fails_says_why(files):
    with pytest.raises(ExportError, match=r"timed `open.onnx` failed: .*unexpected keyword argument"):
        bench_apart(files[1], (X,), no_such_argument=1)
