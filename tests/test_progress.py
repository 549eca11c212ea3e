"""Progress: rates and times left by hand, on a clock that the test turns."""

import pytest

from xdist import progress
from xdist.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_time_left_does_not_count_the_start_of_the_workers(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("embed", "sentences", 1000) as shown:
        clock[0] += 40  # actors load their models
        shown.update(100)
        clock[0] += 10
        shown.update(300)  # 200 in 10 s: 700 are left, 35 s
        clock[0] += 35
        shown.update(1000)
    first, second, _, last = (" ".join(line.split()) for line in capsys.readouterr().out.splitlines())
    assert first == "embed 100 of 1,000 sentences 10%"
    assert second == "embed 300 of 1,000 sentences 30% 20/s 35 s left"
    assert last == "embed 1,000 sentences 12/s in 1 min 25 s"


def test_without_a_total_the_share_tells_the_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress("read", "rows")
    shown.update(50, 0.1)
    clock[0] += 6
    shown.update(150, 0.3)  # a fifth of the whole in 6 s
    assert " ".join(capsys.readouterr().out.splitlines()[-1].split()) == "read 150 rows 30% 17/s 21 s left"


def test_slow_work_has_a_rate_a_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("finetune", "fits", 4) as shown:
        shown.update(1)
        clock[0] += 20
        shown.update(2)
    first, second, last = (" ".join(line.split()) for line in capsys.readouterr().out.splitlines())
    assert first == "finetune 1 of 4 fits 25%"
    assert second == "finetune 2 of 4 fits 50% 3/min 40 s left"
    assert last == "finetune 2 fits 6/min in 20 s"
    with Progress("finetune", "fits") as shown:
        clock[0] += 1200
        shown.update(1)
    assert " ".join(capsys.readouterr().out.splitlines()[-1].split()) == "finetune 1 fits 3/h in 20 min 00 s"


def test_a_stage_that_fails_claims_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"), Progress("embed", "sentences", 10):
        raise ValueError("broken")
    assert capsys.readouterr().out == ""


def test_next_steps_are_a_table() -> None:
    text = progress.next_steps(75, {"look at the report": "a.html", "compare": "b"})
    assert text == "Done in 1 min 15 s. What to do next:\n  look at the report      a.html\n  compare                 b\n"
