"""Pages, pictures and text of an alignment and of runs: what they show, that names stay text, and that nothing is needed."""

from __future__ import annotations

import json
import re
import warnings
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from indistill_fx.errors import ConfigError
from indistill_fx.passes.align import align_traced
from indistill_fx.passes.capture.trace import trace
from indistill_fx.report import (
    alignment_mermaid,
    alignment_page,
    alignment_svg,
    charts_of,
    curves_svg,
    read_runs,
    run_page,
    see,
    see_plan,
    to_png,
)
from indistill_fx.report.curves import Chart, Curve, ticks
from indistill_fx.report.models import COLUMNS, model_rows
from indistill_fx.report.svg import shorten
from indistill_fx.runs.load import keep_export
from tests.report_samples import NASTY, leave_run, nasty_plan, network


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, text):
        self.texts.setdefault(self.inside, []).append(text)

    def classed(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if name in (attributes.get("class") or "").split()]


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    return trace(network(8, 7), x, role="teacher"), trace(network(4, 2), x, role="student")


@pytest.fixture(scope="module")
def alignment(models):
    return align_traced(*models)


def check_page(page: str) -> Reader:
    """One file that loads nothing and runs no script but ours."""
    reader = Reader(page)
    scripts = [attributes for tag, attributes in reader.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    assert not [tag for tag, _ in reader.tags if tag in ("img", "link", "iframe", "object", "base")]
    for _, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset")]
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(a["content"] for tag, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "\x00" not in page and "\x1b" not in page
    return reader


def test_the_page_has_an_arc_and_a_card_for_every_pair_and_a_row_for_every_block(models, alignment):
    page = alignment_page(alignment.value, see(alignment.value, *models, alignment.report))
    reader = check_page(page)
    arcs = [arc["data-pair"] for arc in reader.classed("arc")]
    assert arcs == ["1", "2", "embedding"]
    assert [card["id"] for card in reader.classed("card")] == ["pair-1", "pair-2", "pair-embedding"]
    assert len(reader.classed("folded")) == 2  # the teacher's 6 unpaired blocks of each stage
    data = json.loads("".join(reader.texts["script"])[: page.index("(() =>")].split("(() =>")[0])
    assert {row[0] for row in data["rows"].values()} >= {"layer1", "layer2", "fc"}
    assert len(reader.tags) < 2000
    for pair in alignment.value.pairs:
        assert f"{len(pair.kept)} of {pair.teacher_shape[1]} channels" in page


def test_every_operation_is_in_exactly_one_row(models, alignment):
    seen = see(alignment.value, *models, alignment.report)
    for column, model in ((seen.teacher, models[0]), (seen.student, models[1])):
        rows = list(column.rows)
        assert [row.first for row in rows] == [0, *(row.last for row in rows[:-1])]
        assert rows[-1].last == len(column.operations) == len(model.graph_module.graph.nodes) - 1
        assert sum(row.macs for row in rows) == column.macs == model.macs
        assert all(source < k for k, operation in enumerate(column.operations) for source in operation.reads)


def test_a_plan_for_other_models_is_refused(models, alignment):
    with pytest.raises(ConfigError, match="does not fit"):
        see(nasty_plan("x"), *models)


def test_the_picture_has_an_arc_for_every_pair_and_only_literal_colours(models, alignment):
    text = alignment_svg(see(alignment.value, *models, alignment.report))
    root = ElementTree.fromstring(text)
    arcs = [element for element in root.iter() if "arc" in element.get("class", "").split()]
    assert len(arcs) == len(alignment.value.pairs) + 1
    assert "var(" not in text and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "layer1: 8×8×8" in text


def test_mermaid_has_a_link_for_every_pair(models, alignment):
    text = alignment_mermaid(see(alignment.value, *models))
    assert text.startswith("flowchart LR\n")
    assert text.count("<==>") == 2 and text.count("<-.->") == 1
    assert f'"{alignment.value.pairs[0].score:.2f}, 4 channels"' in text


def test_a_text_transformer_is_drawn_too():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    net = nn.Sequential(nn.Embedding(11, 8), encoder)
    x = torch.randint(0, 11, (2, 5))
    found = trace(net, x, role="teacher"), trace(net, x, role="student")
    plan = align_traced(*found)
    check_page(alignment_page(plan.value, see(plan.value, *found, plan.report)))
    assert "5 tokens" in alignment_svg(see(plan.value, *found))


@pytest.mark.parametrize("name", NASTY)
def test_names_are_text_wherever_they_come_from(tmp_path, name):
    leave_run(tmp_path / "run", name=name, error=name, about={"model": name, name: {name: [name]}})
    reader = check_page(run_page(tmp_path / "run"))
    shown = re.sub("[\x00\x1b]", "\ufffd", name)
    assert shown + "0" in "".join(reader.texts["code"])
    seen = see_plan(nasty_plan(name))
    titles = [
        element.text or "" for element in ElementTree.fromstring(alignment_svg(seen)).iter() if "title" in element.tag
    ]
    assert any(
        title.startswith(shown + "0") or title.replace("\n", " ").startswith(shown.replace("\n", " ") + "0")
        for title in titles
    )
    labels = re.findall(r'\["(.*?)"\]', alignment_mermaid(seen))
    assert labels and not any(set(label.replace("<br>", "")) & set('<>"`\n[]{}') for label in labels)


@settings(max_examples=25, deadline=None)
@given(name=st.text(max_size=80))
def test_any_name_makes_a_well_formed_picture(name):
    seen = see_plan(nasty_plan(name))
    ElementTree.fromstring(alignment_svg(seen))
    assert len(alignment_mermaid(seen).splitlines()) == 15


def test_a_run_directory_may_have_a_nasty_name(tmp_path):
    home = tmp_path / "<b onclick=x>'\"🦜"
    leave_run(home)
    assert "<b onclick" not in check_page(run_page(home)).get_starttag_text() and "&lt;b onclick" in run_page(home)


def test_runs_of_a_folder_are_compared_in_the_order_they_began(tmp_path):
    for k, name in enumerate(("labels", "kd", "indistill")):
        leave_run(tmp_path / name, started=f"2026-01-0{k + 1}")
    runs = read_runs(tmp_path)
    assert [run.name for run in runs] == ["labels", "kd", "indistill"]
    charts = charts_of(runs)
    assert charts[0].title == "Validation accuracy"
    assert [curve.name for curve in charts[0].curves] == ["labels", "kd", "indistill", "the distilled runs' teacher"]
    assert charts[0].curves[0].points == ((3.0, 0.7), (4.0, 0.8), (5.0, 0.9))
    page = run_page(tmp_path)
    check_page(page)
    assert "Comparison of 3 runs" in page and "90.00%" in page


@pytest.mark.parametrize("gone", ["run.json", "metrics.jsonl", "plan.json"])
def test_what_is_gone_is_said_and_the_rest_is_shown(tmp_path, gone):
    leave_run(tmp_path / "run")
    whole = check_page(run_page(tmp_path / "run"))
    assert gone not in "".join(text for texts in whole.texts.values() for text in texts if "is missing" in text)
    (tmp_path / "run" / gone).unlink()
    page = run_page(tmp_path / "run")
    check_page(page)
    assert re.search(f"{gone} (is missing|cannot be read)", page)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"run.json": "{"}, "run.json cannot be read"),
        ({"run.json": "[1]"}, "run.json is not the record"),
        ({"run.json": '{"schedule": 3, "environment": [], "settings": null, "command": {}}'}, "no schedule"),
        ({"metrics.jsonl": "\x00\x01{torn"}, "Lines of metrics.jsonl that are damaged and are left out: 1."),
        (
            {"metrics.jsonl": '{"stage": 1}\n[]\n{"stage": "a"}\n'},
            "Lines of metrics.jsonl that have an unknown form and are left out: 3.",
        ),
        (
            {"metrics.jsonl": '{"stage": "main", "epoch": 1, "loss": NaN}\n'},
            "Epochs whose loss is not finite (NaN or infinity): 1.",
        ),
        (
            {"metrics.jsonl": '{"stage": "main", "epoch": 1, "loss": "<b>"}\n'},
            "Epochs whose loss is not finite (NaN or infinity): 1.",
        ),
        ({"plan.json": '{"schema_version": 9}'}, "plan.json is damaged, or from"),
        ({"student.safetensors": "no tensors"}, "–"),
        ({"compress.json": "{"}, "compress.json cannot be read"),
    ],
)
def test_damaged_files_are_survived_and_told(tmp_path, damage, said):
    leave_run(tmp_path / "run")
    for name, text in damage.items():
        (tmp_path / "run" / name).write_text(text)
    page = run_page(tmp_path / "run")
    check_page(page)
    assert said in page


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"status": "running", "updated": "noon"}, "its last update was at noon"),
        ({"status": "stopped", "error": "SIGTERM"}, "was stopped: SIGTERM"),
        ({"status": "failed", "error": "loss is nan"}, "failed: loss is nan"),
    ],
)
def test_an_unfinished_run_says_so(tmp_path, told, said):
    leave_run(tmp_path / "run", **told)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:3]))
    page = run_page(tmp_path / "run")
    assert said in page and "1 of 3 epochs" in page and "student.safetensors is missing" in page


def test_no_run_at_all_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no run in"):
        run_page(tmp_path)
    with pytest.raises(ConfigError, match="not a directory"):
        run_page(tmp_path / "nowhere")


def test_exported_numbers_are_in_the_table(tmp_path):
    leave_run(tmp_path / "run")
    (tmp_path / "run" / "export.json").write_text('{"macs": 1.5e6, "latency_ms": 2.5, "int8_value": 0.875}')
    page = run_page(tmp_path / "run")
    assert "1.5 M" in page and "2.5 ms" in page and "87.50%" in page


def cells(page: str, heading: str) -> list[list[str]]:
    """The rows of the tables in a section."""
    section = page.split(f"<h2>{heading}</h2>")[1].split("</section>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", section, re.DOTALL)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_layers_are_listed_with_what_they_cost(tmp_path):
    """Teacher beside student; runs of the same models share one list, and one that was not traced has none."""
    layers = [
        {"name": "conv<1>", "op": "conv", "shape": [8, 4, 4], "parameters": 216, "macs": 3456},
        {"name": "fc", "op": "linear", "shape": [5], "parameters": 45, "macs": 40},
        {"name": "odd", "op": "linear", "shape": [5], "parameters": "many", "macs": 40},
    ]
    models = {
        "teacher": {"name": "Large", "parameters": 261, "macs": 3496, "layers": layers},
        "student": {"name": "Small", "parameters": 45, "macs": 40, "layers": layers[1:2]},
    }
    for name in ("a", "b"):
        leave_run(tmp_path / name, models=models)
    leave_run(tmp_path / "c", models={"student": {"name": "Other", "parameters": 5}})
    page = run_page(tmp_path)
    check_page(page)
    assert cells(page, "Layers") == [
        ["Layer", "Operation", "Output", "Parameters", "MACs"],
        ["conv&lt;1&gt;", "conv", "8×4×4", "216", "3.46 k"],
        ["fc", "linear", "5", "45", "40"],
        ["All 2", "", "", "261", "3.5 k"],
        ["Layer", "Operation", "Output", "Parameters", "MACs"],
        ["fc", "linear", "5", "45", "40"],
        ["All 1", "", "", "45", "40"],
    ]
    assert "<h2>Layers</h2>" not in run_page(tmp_path / "c")


def test_a_compression_shows_every_step_and_the_widths(tmp_path):
    leave_run(tmp_path / "run")
    assert "<h2>Compression</h2>" not in run_page(tmp_path / "run")
    step = {"metric": "accuracy", "latency_ms": None, "divergence": None}
    steps = [
        step | {"name": "teacher", "macs": 2000, "parameters": 300, "shown": "90.00%"},
        step
        | {
            "name": "norms fitted",
            "macs": 1000,
            "parameters": 150,
            "shown": "70.00%",
            "divergence": 0.25,
            "start": True,
        },
        step | {"name": "trained", "macs": 1000, "parameters": 150, "shown": "89.00%"},
    ]
    told = {"steps": steps, "widths": {"layer1.conv": [16, 8], "odd": 3}}
    (tmp_path / "run" / "compress.json").write_text(json.dumps(told))
    page = run_page(tmp_path / "run")
    check_page(page)
    assert cells(page, "Compression") == [
        ["Step", "Accuracy", "MACs", "Parameters", "Divergence from the teacher"],
        ["teacher", "90.00%", "2 k", "300", "–"],
        ["norms fitted (training starts here)", "70.00%", "1 k", "150", "0.25"],
        ["trained", "89.00%", "1 k", "150", "–"],
        ["Layer", "Teacher", "Student"],
        ["layer1.conv", "16", "8"],
    ]


def test_a_chain_has_a_teacher_an_assistant_and_a_student(tmp_path):
    models = [{"name": name, "parameters": n, "macs": 10 * n} for name, n in (("Big", 900), ("Mid", 90), ("Small", 9))]
    for k in (1, 2):
        pair = {"teacher": models[k - 1], "student": models[k]}
        leave_run(tmp_path / f"step-{k}", started=f"2026-01-0{k}", models=pair, teacher_accuracy=0.9 + k / 100)
    runs = read_runs(tmp_path)
    assert [(row.label, row.role, row.model, row.cells[2], row.cells[3]) for row in model_rows(runs)] == [
        ("teacher", "teacher", "Big", "900", "9 k"),
        ("step-1", "assistant", "Mid", "90", "900"),
        ("step-2", "student", "Small", "9", "90"),
    ]
    assert [curve.name for curve in charts_of(runs)[0].curves if curve.level] == [
        "teacher of step-1",
        "teacher of step-2",
    ]


def test_a_teacher_that_is_a_run_is_not_listed_twice_and_is_no_student(tmp_path):
    big, small = {"name": "Big", "parameters": 900}, {"name": "Small", "parameters": 9, "macs": 7}
    leave_run(tmp_path / "teacher", models={"student": big}, teacher_accuracy=None)
    for name in ("labels", "kd"):
        leave_run(tmp_path / name, models={"teacher": big | {"macs": 5}, "student": small})
    rows = {row.label: row for row in model_rows(read_runs(tmp_path))}
    assert {label: row.role for label, row in rows.items()} == {
        "teacher": "teacher",
        "labels": "student",
        "kd": "student",
    }
    assert [rows[name].cells[3] for name in ("teacher", "labels", "kd")] == ["5", "7", "7"]
    assert re.search("<span>best student.{1,5}s accuracy: (kd, labels|labels, kd)</span>", run_page(tmp_path))


def test_a_student_of_its_own_kind_is_a_student(tmp_path):
    same = {"name": "Net", "parameters": 9}
    for name in ("kd", "labels"):
        leave_run(tmp_path / name, models={"teacher": same, "student": same})
    assert [row.role for row in model_rows(read_runs(tmp_path))] == ["teacher", "student", "student"]


def test_the_teachers_export_is_found_through_the_run(tmp_path):
    leave_run(tmp_path / "teacher")
    assert keep_export(tmp_path / "teacher", size=3, latency_ms=2.5, int8_size=None) is None
    assert keep_export(tmp_path / "teacher", int8_size=1024) is None
    assert json.loads((tmp_path / "teacher" / "export.json").read_text()) == {
        "size": 3,
        "latency_ms": 2.5,
        "int8_size": 1024,
    }
    for spec in (str(tmp_path / "teacher"), f"models.py:make@{tmp_path / 'teacher' / 'student.safetensors'}"):
        leave_run(tmp_path / "kd", about={"teacher": spec})
        teacher = model_rows(read_runs(tmp_path / "kd"))[0]
        assert teacher.cells[COLUMNS.index("Latency")] == "2.5 ms"
        assert teacher.cells[COLUMNS.index("int8 size")] == "1.0 KiB"
    for nothing in ("torchvision:resnet50", 3, None, "\0", "n" * 5000):
        leave_run(tmp_path / "kd", about={"teacher": nothing})
        assert model_rows(read_runs(tmp_path / "kd"))[0].cells[COLUMNS.index("Latency")] == "–"


def test_an_export_that_cannot_be_kept_says_so(tmp_path):
    assert "Reports of this run will lack" in (keep_export(tmp_path / "nowhere", size=3) or "")


def test_a_run_has_one_colour_in_all_charts_and_a_lone_epoch_its_value(tmp_path):
    for k, name in enumerate(("labels", "kd")):
        leave_run(tmp_path / name, name=f"layer{k}", started=f"2026-01-0{k + 1}")
    charts = {chart.title: chart for chart in charts_of(read_runs(tmp_path))}
    assert [curve.colour for curve in charts["Validation accuracy"].curves] == [0, 1, None]
    assert [curve.colour for curve in charts["Loss, warm-up of layer1"].curves] == [1]
    assert ">0.25</text>" in curves_svg([Chart("t", "epoch", (Curve("a", ((1, 0.25),)),))])


def test_curves_that_cannot_be_drawn_are_left_out():
    chart = Chart("t", "epoch", (Curve("a", ((1, float("nan")), (2, 1.0))), Curve("b", ())))
    root = ElementTree.fromstring(curves_svg([chart]))
    assert len([element for element in root.iter() if element.tag.endswith("circle")]) == 1
    assert "There are no measurements" in curves_svg([Chart("t", "epoch", ())])


@given(st.floats(-1e12, 1e12), st.floats(0, 1e12))
def test_ticks_span_the_range(low, span):
    marks = ticks(low, low + span)
    slack = 1e-6 * (abs(low) + span)
    assert marks[0] <= low + slack and marks[-1] >= low + span - slack
    assert 2 <= len(marks) <= 13


@given(st.text(), st.integers(1, 40))
def test_short_texts_keep_their_ends(text, length):
    short = shorten(text, length)
    assert len(short) <= max(length, 1) and (short == text or "…" in short)


def test_png_is_a_png():
    try:
        import cairosvg  # noqa: F401
    except (ImportError, OSError):
        pytest.skip("no CairoSVG or no libcairo2: pip install 'indistill-fx[png]', apt-get install libcairo2")
    assert to_png(alignment_svg(see_plan(nasty_plan("layer"))), width=300).startswith(b"\x89PNG")


def test_png_without_cairosvg_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cairosvg", None)
    with pytest.raises(ConfigError, match=r"pip install 'indistill-fx\[png\]'"):
        to_png("<svg/>")


def test_the_commands_write_what_is_asked_for(tmp_path, capsys):
    from indistill_fx.cli import run

    leave_run(tmp_path / "run")
    page, svg = tmp_path / "page.html", tmp_path / "curves.svg"
    assert run(["report", str(tmp_path / "run"), "-o", str(page), "--svg", str(svg)]) == 0
    check_page(page.read_text(encoding="utf-8"))
    ElementTree.parse(svg)
    assert run(["report", str(tmp_path / "run")]) == 2
    assert run(["report", str(tmp_path / "run"), "-o", str(tmp_path / "no" / "page.html")]) == 2
    assert "nothing to write" in capsys.readouterr().err
    models = tmp_path / "models.py"
    models.write_text(
        "from tests.report_samples import network\ndef big():\n    return network(8, 1)\ndef small():\n    return network(4, 1)\n"
    )
    sides = [f"{models}:big", f"{models}:small", "--input", "3x16x16"]
    assert run(["align", *sides, "--html", str(page), "--svg", str(svg), "--mermaid"]) == 0
    assert capsys.readouterr().out.startswith("flowchart LR")
    check_page(page.read_text(encoding="utf-8"))
    ElementTree.parse(svg)
