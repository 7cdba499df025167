"""Every metric that the dashboard and the documents name exists in /metrics of a running server."""

import json
import pathlib
import re
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "e2e"))
from harness import ROOT, Server, generate  # noqa: E402

DASHBOARD = ROOT / "deploy/grafana/gla-server.json"
FOLDERS = [ROOT / name for name in ("proto", "kernels", "server", "client", "deploy", "tests")]
DOCUMENTS = sorted(ROOT.glob("*.md")) + [path for folder in FOLDERS
                                         for path in sorted(folder.rglob("*.md"))]
OURS = r"\b(?:gla|process)_[a-z0-9_]+"


def expressions():
    dashboard = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


@pytest.fixture(scope="module")
def series():
    """Name -> list of label sets, of a server that has answered one request."""
    with Server() as server:
        generate(server, max_new_tokens=3)
        found = {}
        for line in server.http("/metrics")[1].splitlines():
            if match := re.match(r"^(\w+)(?:\{(.*)\})? \S+$", line):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
                found.setdefault(match[1], []).append(labels)
        assert server.stop() == 0
    return found


@pytest.mark.parametrize("expression", expressions())
def test_the_dashboard_asks_for_what_exists(expression, series):
    names = re.findall(OURS, expression)
    assert names, f"expected a metric of ours in {expression}"
    for name in names:
        assert name in series, f"{name} is not in /metrics"
        grouping = re.findall(r"by \(([^)]*)\)", expression)
        labels = {label.strip() for group in grouping for label in group.split(",")}
        # Prometheus itself adds job and instance
        for label in labels - {"job", "instance"}:
            assert any(label in have for have in series[name]), f"{name} has no label {label}"


def test_dashboard_panels_have_distinct_ids_and_do_not_overlap():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_metric_of_ours_is_on_the_dashboard(series):
    asked = {name for expression in expressions() for name in re.findall(OURS, expression)}
    have = {re.sub(r"_(bucket|sum|count)$", "", name) for name in series if name.startswith("gla_")}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    assert have <= shown, f"not shown: {sorted(have - shown)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_what_exists(document, series):
    cmake = "\n".join(path.read_text() for folder in FOLDERS
                      for path in folder.rglob("CMakeLists.txt"))
    for name in re.findall(r"\bgla_[a-z0-9_]+\b(?!\.py)", document.read_text()):
        known = name in series or f"{name}_bucket" in series or re.search(rf"\b{name}\b", cmake)
        assert known, f"{document.name} names {name}, which is neither a metric nor a target"
