"""The chart: speeds out of rows, and drawing saved files."""

import json

import pytest

from adm_rt.benchmarking import chart


def row(baseline, ours_ms, baseline_ms, name="64 forward"):
    return {
        "name": name,
        "sizes": "batch 1",
        "threads": 1,
        "ours": "native",
        "baseline": baseline,
        "ours_ms": ours_ms,
        "baseline_ms": baseline_ms,
        "processor": "a processor",
        "isa": "avx2",
    }


def test_speeds_are_relative_to_eager():
    rows = [row("eager", 2.0, 6.0), row("torch", 2.0, 3.0)]
    assert chart.speeds(rows) == {
        ("64 forward", "batch 1", 1): {"eager": (1, 6.0), "native": (3, 2.0), "torch": (2, 3.0)}
    }
    with pytest.raises(ValueError, match="no row against eager"):
        chart.speeds(rows[1:])


def test_another_run_of_a_case_has_its_own_eager():
    rows = [row("eager", 2.0, 6.0), row("eager", 4.0, 9.0), row("compile", 4.0, 3.0)]
    (bars,) = chart.speeds(rows).values()
    assert bars == {"eager": (1, 6.0), "native": (3, 2.0), "compile": (3, 3.0)}


def test_saved_rows_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra 'bench')")
    files = []
    for i, name in enumerate(("64 forward", "64 step")):
        files.append(tmp_path / f"{i}.json")
        rows = [row("eager", 2e3, 6e3, name), row("onnxruntime", 2e3, 3e3, name)]
        files[-1].write_text(json.dumps(rows))
    picture = tmp_path / "chart.png"
    assert chart.main([*map(str, files), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))
    assert chart.main([str(picture)]) == 2
