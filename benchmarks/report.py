"""How large and how quick report pages are, in a real browser; and the pictures of docs/.

    python -m benchmarks.report measure [--only NAME] [--json FILE] [--resume]
    python -m benchmarks.report pictures [--runs DIR]     docs/pictures; DIR is what `indistill-fx demo -o DIR` left, else it is made
    python -m benchmarks.report table                     the table of docs/report.md

Needs chromium and chromium-driver. Seconds are of one thread, and of a machine that may be busy: `write / trace` is the ratio to read.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from indistill_fx.demo.run import run_demo
from indistill_fx.passes.align import align_traced
from indistill_fx.passes.capture.trace import trace
from indistill_fx.report import alignment_page, alignment_svg, charts_of, curves_svg, read_runs, run_page, see, write
from indistill_fx.runs.load import load
from tests.browser.conftest import start
from tests.browser.screenshots import main as take_screenshots

HOME = Path(__file__).parent.parent
RESULTS, PICTURES = HOME / "benchmarks" / "results" / "report.json", HOME / "docs" / "pictures"
PAIRS = {
    "resnet50-resnet18": ("torchvision:resnet50", "torchvision:resnet18"),
    "resnet152-resnet50": ("torchvision:resnet152", "torchvision:resnet50"),
    "vit_large-vit_small": ("timm:vit_large_patch16_224", "timm:vit_small_patch16_224"),
}
COUNT = "let n = 0; const walk = document.createTreeWalker(document); while (walk.nextNode()) n++; return n"
UNFOLD = """for (const b of document.querySelectorAll('.fold')) b.click();
for (const b of document.querySelectorAll('.layer:not(.fold)')) if (b.getAttribute('aria-expanded') === 'false') b.click();"""
SCROLL = """const done = arguments[0], times = []; let y = 0, end = document.documentElement.scrollHeight - innerHeight;
function frame(now) { times.push(now); y += 40; scrollTo(0, y); if (y < end && times.length < 400) requestAnimationFrame(frame);
  else done(times.slice(1).map((t, k) => t - times[k])); }
requestAnimationFrame(frame);"""


def page_of(teacher: str, student: str) -> tuple[str, dict[str, float]]:
    """The page, and the seconds it took."""
    torch.manual_seed(0)
    x, began = torch.randn(2, 3, 224, 224), time.perf_counter()
    models = trace(load(teacher), x, role="teacher"), trace(load(student), x, role="student")
    traced = time.perf_counter()
    found = align_traced(*models)
    aligned = time.perf_counter()
    text = alignment_page(found.value, see(found.value, *models, found.report, names=(teacher, student)))
    written = time.perf_counter()
    return text, {"trace": traced - began, "align": aligned - traced, "write": written - aligned}


def in_browser(page: Path, profile: Path) -> dict[str, Any]:
    """Nodes before and after unfolding, what was asked for, what went wrong, and frames while scrolling."""
    driver = start(profile)
    try:
        size = {"width": 1440, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get_log("browser"), driver.get_log("performance")
        began = time.perf_counter()
        driver.get(page.as_uri())
        loaded = time.perf_counter() - began
        messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        asked = [s["request"]["url"] for s in sent if s["documentURL"] == page.as_uri()]
        found = {"load_seconds": round(loaded, 2), "requests": len(asked), "errors": len(driver.get_log("browser"))}
        found |= {
            "nodes": driver.execute_script(COUNT),
            "arcs": driver.execute_script("return document.querySelectorAll('.arc').length"),
        }
        frames = driver.execute_async_script(SCROLL)
        found |= {"frames": len(frames), "frame_ms_median": round(median(frames), 1)}
        found["frame_ms_p95"] = round(quantiles(frames, n=20)[-1], 1)
        driver.execute_script(UNFOLD)
        return found | {"nodes_unfolded": driver.execute_script(COUNT)}
    finally:
        driver.quit()


def measure(only: str | None, target: Path, *, resume: bool) -> None:
    told = json.loads(target.read_text()) if resume and target.exists() else {}
    results: dict[str, Any] = told.get("pages", {})
    for name, pair in PAIRS.items():
        if (only and only != name) or (resume and name in results):
            continue
        text, seconds = page_of(*pair)
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "page.html"
            page.write_text(text, encoding="utf-8")
            seen = in_browser(page, Path(folder) / "profile")
        own = {f"{key}_seconds": round(value, 3) for key, value in seconds.items()}
        results[name] = {"bytes": len(text.encode()), **own, **seen}
        print(name, results[name], flush=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.platform()}
        target.write_text(json.dumps({**about, "versions": versions, "pages": results}, indent=2) + "\n")


def pictures(runs: Path | None) -> None:
    torch.manual_seed(0)
    teacher, student = PAIRS["resnet50-resnet18"]
    x = torch.randn(2, 3, 224, 224)
    models = trace(load(teacher), x, role="teacher"), trace(load(student), x, role="student")
    found = align_traced(*models)
    names = (teacher, student)
    seen = see(found.value, *models, found.report, names=names)
    write(PICTURES / "alignment.svg", alignment_svg(seen))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        demo = home / "demo"
        if runs is None:
            run_demo(demo)
        else:
            shutil.copytree(runs, demo)
        write(PICTURES / "curves.svg", curves_svg(charts_of(read_runs(demo))))
        write(home / "alignment.html", alignment_page(found.value, seen))
        write(home / "run.html", run_page(demo))
        take_screenshots(PICTURES, home / "alignment.html", home / "run.html")


def table(source: Path) -> str:
    told = json.loads(source.read_text())
    lines = [
        f"Measured {told['date'][:10]}, torch {told['versions']['torch']}, on one thread of a busy two-core machine.",
        "",
        "| page | KB | seconds to write | write / trace | DOM nodes | unfolded | requests | errors | ms a frame, scrolling: median, p95 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in told["pages"].items():
        ratio = row["write_seconds"] / row["trace_seconds"]
        cells = (
            name.replace("-", " → "),
            f"{row['bytes'] / 1000:.0f}",
            f"{row['write_seconds']:.2f}",
            f"{ratio:.3f}",
            f"{row['nodes']:,}",
            f"{row['nodes_unfolded']:,}",
            f"{row['requests'] - 1} beside the page",
            str(row["errors"]),
            f"{row['frame_ms_median']:.0f}, {row['frame_ms_p95']:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "pictures", "table"])
    parser.add_argument("--only", choices=list(PAIRS))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--runs", type=Path)
    chosen = parser.parse_args()
    if chosen.what == "measure":
        measure(chosen.only, chosen.json, resume=chosen.resume)
    elif chosen.what == "pictures":
        pictures(chosen.runs)
    else:
        print(table(chosen.json))


if __name__ == "__main__":
    main()
