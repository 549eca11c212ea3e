"""Variables of the environment, for a while."""

import os

import pytest

from xdist import environ


def test_afterwards_they_are_as_before_and_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDIST_KNOWN", "old")
    for name in ("XDIST_NEW", "XDIST_OTHER", "XDIST_TAKEN"):
        monkeypatch.delenv(name, raising=False)

    def work() -> None:
        with environ.having({"XDIST_KNOWN": "new", "XDIST_NEW": "new", "XDIST_TAKEN": "new"}):
            assert (os.environ["XDIST_KNOWN"], os.environ["XDIST_NEW"]) == ("new", "new")
            monkeypatch.setenv("XDIST_OTHER", "set within")
            del os.environ["XDIST_TAKEN"]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert os.environ["XDIST_KNOWN"] == "old"
    assert os.environ["XDIST_OTHER"] == "set within"
    assert not {"XDIST_NEW", "XDIST_TAKEN"} & set(os.environ)
