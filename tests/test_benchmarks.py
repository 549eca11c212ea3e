"""The benchmarks' arithmetic: operations, turns, medians, ratios, merging, tables, and what is read from the lines of a job."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import costs, evaluation, floor, overhead, results, streaming, texts
from benchmarks.commands import Watched
from benchmarks.measure import Measure, in_turns
from benchmarks.peer import Clock
from xdist import launch
from xdist.progress import Progress

FACTS = {"machine": {"cpu": "abacus", "cores": 2, "gpu": None}, "versions": {"python": "3"}, "date": "2026-01-02", "command": "make bench"}


def test_operations_by_hand() -> None:
    config = SimpleNamespace(hidden_size=4, intermediate_size=6, num_hidden_layers=3)
    # A layer's weights: 4 × 12 + 4 × 4 + 4 × 6 + 6 × 4 = 112, each two operations a token; texts of 2 and 5 tokens.
    linears = 2 * 7 * 112
    attention = 2 * (2 * 2 * 4) + 2 * (5 * 5 * 4)  # logits and weighted sums, a product of 2 × 4 × 2 and 5 × 4 × 5 each
    assert floor.operations(config, [2, 5]) == 3 * (linears + 2 * attention)


def test_the_matmul_rate_is_positive() -> None:
    import torch

    config = SimpleNamespace(hidden_size=8, intermediate_size=16, num_hidden_layers=1)
    assert floor.matmul_rate(config, torch.float32, "cpu", enough=0.001) > 0


def test_sides_take_turns() -> None:
    calls: list[str] = []

    def side(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = in_turns({"ours": lambda: side("ours"), "peer": lambda: side("peer")}, 3)
    assert calls == ["ours", "peer"] * 3
    assert found == {"ours": [1, 3, 5], "peer": [2, 4, 6]}


@pytest.mark.parametrize(("less", "ratio", "best"), [(False, 3.0, 40.0), (True, 1 / 3, 10.0)])
def test_medians_best_and_ratio(less: bool, ratio: float, best: float) -> None:
    entry = results.entry(Measure("m", "s", [10, 40, 30], [9, 10, 20], "a peer", less), FACTS)
    assert (entry["ours"], entry["peer"], entry["ours_best"], entry["repeats"]) == (30, 10, best, 3)
    assert entry["ratio"] == pytest.approx(ratio)
    assert {key: entry[key] for key in FACTS} == FACTS


def test_a_measure_without_a_peer() -> None:
    entry = results.entry(Measure("m", "s", [2.0], note="not measured"), FACTS)
    assert (entry["peer"], entry["peer_best"], entry["ratio"]) == (None, None, None)
    assert results.row(entry) == ["m", "s", "2", "–", "–", "not measured"]


def test_results_are_merged_by_name(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    first = [results.entry(Measure(name, "s", [value]), FACTS) for name, value in (("a", 1.0), ("b", 2.0))]
    assert results.merge(path, first) == first
    again = results.entry(Measure("a", "s", [5.0]), FACTS | {"date": "2026-02-03"})
    merged = results.merge(path, [again])
    assert [(entry["name"], entry["ours"]) for entry in merged] == [("a", 5.0), ("b", 2.0)]
    assert json.loads(path.read_text("utf-8")) == merged == results.merge(path, [])


def test_the_table_lines_up() -> None:
    entries = [
        results.entry(Measure("embedding", "texts/s", [1234.5], [100.0], "the default"), FACTS),
        results.entry(Measure("start", "s", [0.12345]), FACTS),
    ]
    assert results.table(entries).splitlines() == [
        "measure    unit     xdist  peer    ratio  peer is",
        "embedding  texts/s  1,234   100  12.35 ×  the default",
        "start      s        0.123     –        –",
    ]


def test_the_page_keeps_what_people_wrote(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"# Title\n{results.BEGIN}\nold\n{results.END}\nbelow\n", "utf-8")
    entries = [results.entry(Measure("embedding", "texts/s", [300.0, 200.0], [100.0, 50.0], "the default", note="of 35 tokens"), FACTS)]
    results.document(page, entries)
    first = page.read_text("utf-8")
    assert first.startswith(f"# Title\n{results.BEGIN}\n")
    assert first.endswith(f"\n{results.END}\nbelow\n")
    assert "old" not in first
    assert "2026-01-02; cpu abacus, cores 2, python 3." in first
    assert "| embedding | texts/s | 250 | 75 | 300 / 100 | 3.33 × | the default | of 35 tokens |" in first
    assert (tmp_path / "performance.png").read_bytes().startswith(b"\x89PNG")
    results.document(page, entries)
    assert page.read_text("utf-8") == first


def test_the_projects_page_has_its_markers() -> None:
    page = (Path(__file__).parent.parent / "docs" / "performance.md").read_text("utf-8")
    assert page.count(results.BEGIN) == page.count(results.END) == 1


def test_short_sentences_are_joined_to_the_mean() -> None:
    lengths = [27] * 200
    groups = texts.joined(lengths)
    assert [index for group in groups for index in group] == list(range(200))
    assert groups[:3] == [[0], [1, 2], [3]]
    sizes = [sum(lengths[index] for index in group) - 2 * (len(group) - 1) for group in groups]
    assert np.mean(sizes) == pytest.approx(texts.MEAN_TOKENS, abs=0.5)
    assert texts.joined([50, 50]) == [[0], [1]]


def test_many_texts_are_distinct() -> None:
    assert len(set(texts.many(5000))) == len(texts.many(5000)) == 5000


def test_a_clock_leaves_the_first_steps_out() -> None:
    clock = Clock(began=10.0, ends=[(20.0, 100, 1000), (21.0, 200, 3000), (24.0, 300, 9000)])
    assert (clock.seconds, clock.sequences) == (14.0, 300)
    assert clock.rates() == (50.0, 2000.0)
    assert clock.rates(skip=2) == (pytest.approx(100 / 3), 2000.0)


def test_rates_are_read_from_the_lines_of_training() -> None:
    line = {"loss": 1.0, "terms": {}, "sequences_per_second": 10.0, "steps_per_second": 1.0}
    lines = "\n".join(
        launch._line(line | {"step": step, "tokens_per_second": rate}, 30) for step, rate in ((10, 1.0), (20, 1000.0), (30, 3000.0))
    )
    assert overhead.steady(lines) == pytest.approx(1500)


def test_seconds_are_read_from_the_lines_of_prepare(capsys: pytest.CaptureFixture[str]) -> None:
    for stage, unit in (("read", "rows"), ("group", "pairs")):
        with Progress(stage, unit) as progress:
            progress.started -= 10
            progress.update(5000)
    lines = [(0.0, line) for line in capsys.readouterr().out.splitlines()]
    assert streaming.stage_seconds(Watched(25.0, 0.0, lines)) == pytest.approx(20, rel=0.01)
    assert Watched(1.0, 0.0, [(1.0, "  step 1"), (2.0, "  step 2")]).first("step") == 1.0


def test_both_evaluations_agree() -> None:
    given = evaluation.vectors(300)
    assert np.allclose(np.linalg.norm(given, axis=2), 1, atol=1e-5)
    assert 0.1 < evaluation.ours(*given) == evaluation.peer(*given) < 1


def test_costs_follow_the_rates_of_the_plan() -> None:
    plan = {
        "sentences": 1000, "cached": 500, "pairs": 3000, "store_bytes": 500 * 776, "shard_bytes": 1_000_000,
        "seen": {"en": 1000, "es": 1500}, "token_lengths": {"en": [0, 0, 10], "es": [0, 5, 0, 5]},  # two tokens on average in both
        "teacher_sentences_per_second": 100.0, "student_tokens_per_second": 5000.0,
    }  # fmt: skip
    found = costs.estimate(plan, 10_000, prepare_rate=600.0)
    assert found["pairs"] == 30_000
    assert found["prepare"] == pytest.approx(30_000 / 600 / 3600)
    assert found["embed"] == pytest.approx(10_000 / 100 / 3600)
    assert found["train"] == pytest.approx(10 * (1000 * 2 + 1500 * 2) / 5000 / 3600)
    assert found["bytes"] == pytest.approx(10 * (1_000_000 + 1000 * 776))
    assert (
        costs.table(plan, 600.0, 0.5)
        .splitlines()[2]
        .startswith("| 1,000,000 | 3,000,000 | 1.39 h | 2.78 h | 0.278 h | 4.44 h | $2.22 | 1.78 GB |")
    )
