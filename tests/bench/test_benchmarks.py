"""The benchmarks' bookkeeping: what is listed, kept and shown. What they measure is no test's business."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import turns
from bench.catalog import benchmarks
from bench.record import RESULTS, Columns, Result, Row, gpu, of_other_models, stored_results, table, tables
from scripts.benchmarks import PAGE, page


def row(unit: str) -> Row:
    return Row(case="a case", ours=2.0, peer=3.0, peer_name="the peer", unit=unit)


def test_the_page_of_benchmarks_is_what_the_stored_results_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(stored_results()), "python -m scripts.benchmarks"


def test_every_stored_result_belongs_to_a_benchmark_and_has_its_own_name() -> None:
    results = stored_results()
    assert {result.name for result in results} <= set(benchmarks())
    assert {result.file_name for result in results} == {path.name for path in RESULTS.glob("*.json")}


def test_a_ratio_is_above_1_where_ours_is_better() -> None:
    assert row("s").ratio == 1.5
    assert row("ms").ratio == 1.5
    assert row("images/s").ratio == 2 / 3


def test_a_result_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    result = Result.of("startup", [row("s"), row("images/s")])
    path = result.store(tmp_path)
    assert path.name == result.file_name
    assert stored_results(tmp_path) == [result]


def test_a_benchmark_may_have_columns_of_its_own_and_further_tables(tmp_path: Path) -> None:
    rows = [
        {"model": "ViT-B/32", "batch": 1024, "ours_per_s": 8394.4},
        {"model": "b", "batch": 2, "ours_per_s": 0.5},
    ]
    result = Result.of("startup", rows, device=gpu("NVIDIA H100 80GB HBM3"), more={"Variants": [row("s")]})
    assert result.store(tmp_path).name == "startup.h100.json"
    assert stored_results(tmp_path) == [result]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables(result).splitlines()]
    assert lines[0] == ["model", "batch", "ours per s"]
    assert lines[2:4] == [["ViT-B/32", "1,024", "8,394"], ["b", "2", "0.5"]]
    assert lines[5] == ["Variants"]


def test_a_stored_command_names_no_place_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--data", str(tmp_path / "sets"), "--seeds", "3", "a/b.csv"])
    assert Result.of("mini", []).command == "python -m bench.mini --data SETS --seeds 3 a/b.csv"


def test_a_later_run_keeps_the_lines_of_models_that_it_does_not_measure(tmp_path: Path) -> None:
    lines: list[Columns] = [{"model": "a", "per_s": 1.0}, {"model": "b", "per_s": 2.0}]
    Result.of("step", lines, device="h100", more={"Losses": lines, "Only a": lines[:1]}).store(tmp_path)
    kept = of_other_models("step", "h100", {"a"}, tmp_path)
    assert kept == {"": lines[1:], "Losses": lines[1:]}
    assert of_other_models("step", "h200", {"a"}, tmp_path) == {}


def test_a_gpu_goes_by_the_name_that_people_use() -> None:
    full = ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090", "Apple M2 Pro", "Tesla T4")
    assert [gpu(name) for name in full] == ["h200", "a100-sxm4-80gb", "rtx 4090", "m2 pro", "t4"]


def test_a_table_has_a_line_for_each_row_and_columns_that_line_up() -> None:
    lines = table([row("s").columns(), row("images/s").columns()]).splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "a case",
        "2",
        "3",
        "the peer",
        "s",
        "1.5",
    ]
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1


def test_the_sides_take_turns_and_warm_rounds_are_not_counted() -> None:
    took: list[str] = []
    left, right = iter([100.0, 1.0, 3.0, 2.0]), iter([100.0, 5.0, 4.0, 6.0])

    def side(name: str, figures: object) -> float:
        took.append(name)
        assert hasattr(figures, "__next__")
        return float(next(figures))

    found = turns.medians({"left": lambda: side("left", left), "right": lambda: side("right", right)}, 3)
    assert found == {"left": 2.0, "right": 5.0}
    assert all(set(took[i : i + 2]) == {"left", "right"} for i in range(0, 8, 2))


def test_the_list_of_benchmarks_says_what_each_measures() -> None:
    shown = subprocess.run([sys.executable, "-m", "bench"], check=True, capture_output=True, text=True).stdout
    assert {"startup", "serving", "latency"} <= set(benchmarks())
    for name, about in benchmarks().items():
        assert about.endswith(".")
        assert f"python -m bench.{name} " in shown
        assert about in shown
