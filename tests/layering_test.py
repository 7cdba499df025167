"""The arrows between the folders: every #include of kernels, server and client is in this table.

CMake's link lines say the same for our own libraries; headers installed system-wide would slip past
them, so those that belong to one place only are listed here as well.
"""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# A folder and what it may include of ours, beside itself. main is server/*.{cc,h}.
ARROWS = {
    "kernels": set(),
    "base": set(),
    "telemetry": {"base"},
    "model": {"kernels", "base"},
    "store": {"base"},
    "engine": {"model", "store", "base", "telemetry", "kernels"},
    "service": {"engine", "model", "proto", "telemetry", "base"},
    "main": {"service", "engine", "model", "kernels", "telemetry", "base"},
    "client": {"proto"},
}

# What of others belongs to some folders only.
FENCES = {
    r"grpc|google/": {"service", "client"},
    r"prometheus/": {"telemetry"},
    r"httplib": {"telemetry"},
    r"sentencepiece|unicode/|pcre2": {"model"},
    r"hwy/": {"kernels/cpu"},
    r"cu(da|blas|rand)\w*\.h|cuda/|cub/|mma\.h": {"kernels/cuda"},
}

SOURCES = sorted(path for top in ("kernels", "server", "client")
                 for path in (ROOT / top).rglob("*") if path.suffix in (".h", ".cc", ".cu", ".cuh"))


def folder_of(path):
    """The name in ARROWS of a source file, given relative to the root."""
    if path.parts[0] != "server":
        return path.parts[0]
    return path.parts[1] if len(path.parts) > 2 else "main"


def target_of(name, source):
    """The folder in ARROWS that `#include "name"` in `source` leads to; None when not ours."""
    if name.startswith("gla/v1/"):
        return "proto"
    for base in (source.parent, ROOT, ROOT / "server"):
        if (base / name).is_file():
            return folder_of((base / name).resolve().relative_to(ROOT))
    return None


def includes(path):
    return re.findall(r'^\s*#\s*include\s+["<]([^">]+)[">]', path.read_text(), re.M)


def test_there_is_something_to_check():
    assert {folder_of(path.relative_to(ROOT)) for path in SOURCES} >= {"kernels", "model", "client"}


def test_includes_follow_the_arrows():
    wrong = []
    for source in SOURCES:
        path = source.relative_to(ROOT)
        folder = folder_of(path)
        for name in includes(source):
            target = target_of(name, source)
            if target not in (None, folder) and target not in ARROWS[folder]:
                wrong.append(f"{path} includes {name}: expected one of {sorted(ARROWS[folder])}")
    assert not wrong, "\n".join(wrong)


def test_what_belongs_to_one_place_is_included_only_there():
    wrong = []
    for source in SOURCES:
        path = source.relative_to(ROOT)
        places = {folder_of(path), "/".join(path.parts[:2])}
        for name in includes(source):
            for pattern, folders in FENCES.items():
                if target_of(name, source) is None and re.match(pattern, name):
                    if not places & folders:
                        wrong.append(f"{path} includes {name}: expected only in {sorted(folders)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("backend,other", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_backend_does_not_include_the_other(backend, other):
    for source in (ROOT / "kernels" / backend).iterdir():
        assert not any(f"{other}/" in name for name in includes(source)), source


def test_no_backend_conditionals_outside_of_cuda():
    wrong = []
    for source in SOURCES:
        if "cuda" not in source.parts:
            wrong += re.findall(r"^\s*#\s*(?:if|ifdef|elif).*(?:CUDA|__NVCC__|BACKEND).*",
                                source.read_text(), re.M)
    assert not wrong, f"expected the linker to choose the backend, got {wrong}"
