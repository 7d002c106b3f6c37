"""A small sample of `make torture`, and its table: losses are counted, and what cannot run is skipped by name."""

import time

import pytest
from torture import damage, fuzz, hostile, kills, rows
from torture.rows import Outcome, Skipped, in_child, run_row, to_table


SAMPLES = {
    "kill -9 before every change of files: encoding": 3,
    "kill -9 before every change of files: sampling, PNG": 3,
    "damaged file: results": 4,
    "damaged file: samples, drawn again": 4,
    "fuzz: results": 1,
    "fuzz: recipe": 1,
    "fuzz: settings in an image": 1,
    "hostile file: images": 3,
}


@pytest.mark.parametrize("name", SAMPLES)
def test_nothing_is_lost(name):
    assert {module.__name__ for module in (damage, fuzz, hostile, kills)} and name in rows.ROWS
    outcome = run_row(name, SAMPLES[name])
    assert outcome.skipped is None and outcome.num_tries == SAMPLES[name]
    assert outcome.losses == []


def fail(folder) -> None:
    raise ValueError("gone")


@pytest.fixture
def own_rows(monkeypatch):
    monkeypatch.setattr(rows, "ROWS", {})


def test_losses_are_counted(own_rows):
    rows.row("planted", 10)(
        lambda shared: [("good", lambda folder: None), ("bad", fail), ("good", lambda folder: None)]
    )
    outcome = run_row("planted")
    assert outcome.losses == ["bad: ValueError: gone"]
    assert to_table([outcome]).splitlines()[2:] == [
        "| planted | 30 | 20 | 1 |",
        "",
        "Lost: planted: bad: ValueError: gone",
    ]


def test_what_cannot_run_is_skipped_by_name(own_rows):
    @rows.row("disk")
    def tries(shared):
        raise Skipped("only root")
        yield

    outcome = run_row("disk")
    assert outcome == Outcome("disk", skipped="only root", seconds=outcome.seconds)
    assert "Skipped: disk: only root" in to_table([outcome])


def test_what_hangs_is_ended():
    ended = in_child(lambda: time.sleep(1000), limit_s=0.1)
    assert ended.code < 0 and ended.text == "no end within 0.1 s"


def test_a_hungry_child_meets_its_limit():
    ended = in_child(lambda: bytearray(1 << 31), max_bytes=1 << 28)
    assert ended.code == 1 and "MemoryError" in ended.text
