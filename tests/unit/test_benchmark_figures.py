"""What the benchmark against peers makes of its runs."""

from __future__ import annotations

import re
import threading
import xml.etree.ElementTree as ET

import pytest

from benchmarks.peers import figures, gathering, report, systems, window, workloads
from tests.processes import eventually

SLOW = workloads.WORKLOADS["slow"]


def run(system="ours", number=1, **given):
    defaults = {
        "workload": "slow",
        "system": system,
        "round": number,
        "rate": 200.0,
        "p50": 1.0,
        "p99": 1.2,
        "worker_cpu": 0.0005,
        "client_cpu": 0.0005,
        "broker_cpu": 0.0001,
        "pss": 90 * 2**20,
        "is_settled": True,
    }
    return defaults | given


def test_the_ideal_rate_of_a_model_is_full_batches_one_after_another():
    assert SLOW.ideal == pytest.approx(64 / 0.264)
    assert workloads.WORKLOADS["io"].ideal == pytest.approx(1280)
    assert workloads.WORKLOADS["noop"].ideal is None


def test_the_ideal_of_a_real_model_is_the_best_that_it_did_alone():
    runs = [
        {"workload": "minilm", "system": figures.ALONE, "round": n, "rate": rate}
        for n, rate in enumerate((40.0, 60.0, 50.0))
    ]

    assert figures.ideal(workloads.WORKLOADS["minilm"], runs) == 60


def test_a_line_has_the_medians_of_its_rounds_and_their_ranges():
    runs = [run(number=n, rate=rate) for n, rate in enumerate((100.0, 200.0, 220.0))]

    (line,) = figures.lines(SLOW, ["ours", "prefork"], runs)

    assert line.rate == figures.Spread(200.0, 100.0, 220.0)
    assert line.share == pytest.approx(200 / (64 / 0.264))
    assert figures.cells(line, "ours")[1:3] == ["200 (100-220)", "82%"]


def test_latencies_of_a_queue_that_was_not_full_are_called_lower_bounds():
    runs = [run(), run(number=2, is_settled=False)]

    (line,) = figures.lines(SLOW, ["ours"], runs)

    assert figures.cells(line, "ours")[3] == ">= 1000"


def test_the_report_says_how_ours_compares_and_what_failed():
    result = report.Result(
        command="bench",
        machine="2 cores",
        failures={"litserve": "not installed: no such package"},
        runs=[run(), run("prefork", rate=5.0)],
    )

    said = report.markdown(result)

    assert ["slow", "1.20", "40.00/1.00/1.00", "-"] in [
        re.split(" {2,}", line)[:4] for line in said.splitlines()
    ]
    assert "- litserve: not installed: no such package" in said


def test_the_plot_is_xml_with_a_bar_for_each_system():
    result = report.Result(command="bench", machine="", runs=[run(), run("prefork")])

    root = ET.fromstring(report.svg(result))

    bars = [one for one in root if one.tag.endswith("rect")][1:]
    assert len(bars) == 2 * 3


def test_the_page_keeps_its_words_around_the_figures(tmp_path):
    (tmp_path / "images").mkdir()
    page = tmp_path / "benchmarks.md"
    page.write_text(f"Before.\n{report.BEGIN}\nold\n{report.END}\nAfter.\n")

    report.document(report.Result(command="bench", machine="2 cores", runs=[run()]), tmp_path)

    written = page.read_text()
    assert written.startswith("Before.\n")
    assert written.endswith("\nAfter.\n")
    assert "old" not in written
    assert "GPU pool, one replica" in written


def test_a_window_opens_once_all_calls_have_turned_twice_and_closes_after_its_seconds():
    counters = iter([{"worker_cpu": 1.0}, {"worker_cpu": 3.0}])
    measured = window.Window(2, 1, 20.0, 10.0, lambda: next(counters))

    for now in (5.0, 5.5, 6.0, 6.5, 12.0, 16.5):
        measured.done(now - 1.0, now)

    assert measured.is_over
    found = measured.figures()
    assert found["is_settled"]
    assert found["answered"] == 2  # those after 6.5, when the fourth came
    assert found["rate"] == pytest.approx(0.2)
    assert found["worker_cpu"] == pytest.approx(1.0)
    assert found["p50"] == pytest.approx(1.0)


def test_a_window_of_batches_begins_and_ends_at_the_same_place_of_one():
    measured = window.Window(2, 4, 0.0, 1.005, lambda: {"worker_cpu": 0.0})

    # Batches of four, one every second; the first answer opens.
    for now in (n // 4 + n % 4 / 100 for n in range(20)):
        if not measured.is_over:
            measured.done(now - 1.0, now)

    assert measured.figures()["rate"] == pytest.approx(4.0)


def test_a_window_opens_after_the_warm_up_though_not_all_calls_have_turned():
    measured = window.Window(100, 1, 3.0, 1.0, lambda: {"worker_cpu": 0.0})

    for now in (5.0, 8.0, 8.5, 9.0):
        measured.done(0.0, now)

    assert measured.is_over
    assert not measured.figures()["is_settled"]


def test_the_batcher_of_the_threads_pool_gathers_while_its_model_is_busy():
    calls, release = [], threading.Event()

    def model(values):
        calls.append(values)
        release.wait(10)
        return values

    gatherer = gathering.Gatherer(model, max_batch=8, wait=0.0)
    answers = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(gatherer.answer(n))) for n in range(9)
    ]
    for one in threads:
        one.start()
    eventually(lambda: calls and gatherer._waiting.qsize() + len(calls[0]) == 9)
    release.set()
    for one in threads:
        one.join(10)

    assert sorted(answers) == list(range(9))
    assert len(calls) < 9


def test_a_model_that_fails_fails_every_input_of_its_batch():
    gatherer = gathering.Gatherer(lambda values: 1 / 0, max_batch=8, wait=0.0)

    with pytest.raises(ZeroDivisionError):
        gatherer.answer(1)


def test_every_system_has_a_title_of_its_own():
    assert len({one.title for one in systems.SYSTEMS.values()}) == len(systems.SYSTEMS)
