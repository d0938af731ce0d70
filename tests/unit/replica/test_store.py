from __future__ import annotations

import json
import multiprocessing
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from gw_celery import conf
from gw_celery.policy import scores
from gw_celery.replica import store

KEY = "a" * 64
FOUND = scores.of("t", [scores.Round(elapsed=0.5, workload=10.0, latencies=(0.1, 0.2))])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "scores"


def test_a_score_is_found_as_it_was_kept(folder: Path) -> None:
    store.Store(folder).keep(KEY, FOUND)
    kept = store.Store(folder).find(KEY)
    assert kept is not None
    assert kept.score == FOUND
    assert 0.0 <= kept.age < 60.0
    assert store.Store(folder).find("b" * 64) is None


def test_only_its_owner_can_read_it(folder: Path) -> None:
    store.Store(folder).keep(KEY, FOUND)
    (file,) = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def rewritten(folder: Path, **changes: Any) -> None:
    store.Store(folder).keep(KEY, FOUND)
    path = folder / f"{KEY}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "c" * 64},
        {"measured_at": None},
        {"measured_at": "yesterday"},
        {"measured_at": 10**400},
        {"score": {}},
        {"score": {**scores.to_json(FOUND), "value": -1}},
        {"score": {**scores.to_json(FOUND), "value": 10**400}},
    ],
)
def test_a_file_that_says_something_else_is_ignored_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    rewritten(folder, **changes)
    assert store.Store(folder).find(KEY) is None
    assert "is ignored, and measured again" in caplog.text


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[]", b"x" * 2_000_000])
def test_a_corrupt_file_is_ignored_with_a_warning_and_written_anew(
    folder: Path, caplog: pytest.LogCaptureFixture, text: bytes
) -> None:
    folder.mkdir(parents=True)
    (folder / f"{KEY}.json").write_bytes(text)
    assert store.Store(folder).find(KEY) is None
    assert "is ignored, and measured again" in caplog.text
    store.Store(folder).keep(KEY, FOUND)
    assert store.Store(folder).find(KEY) is not None


def test_a_link_or_a_pipe_of_somebody_is_not_followed(folder: Path, tmp_path: Path) -> None:
    store.Store(tmp_path).keep(KEY, FOUND)
    folder.mkdir(parents=True)
    (folder / f"{KEY}.json").symlink_to(tmp_path / f"{KEY}.json")
    assert store.Store(folder).find(KEY) is None
    os.mkfifo(folder / f"{'d' * 64}.json")
    assert store.Store(folder).find("d" * 64) is None


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    store.Store(tmp_path / "file").keep(KEY, FOUND)
    assert "gw_score_cache" in caplog.text


def test_a_score_of_the_future_is_no_older_than_now(folder: Path) -> None:
    rewritten(folder, measured_at=time.time() + 1e6)
    kept = store.Store(folder).find(KEY)
    assert kept is not None
    assert kept.age == 0.0


def test_the_oldest_go_when_there_are_too_many(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_MOST", 3)
    for number in range(6):
        store.Store(folder).keep(str(number) * 64, FOUND)
        os.utime(folder / f"{str(number) * 64}.json", (number, number))
    left = sorted(file.name[0] for file in folder.iterdir())
    assert left == ["3", "4", "5"]


def test_what_broken_writers_left_goes_once_it_is_nobodys(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, age in (("old", 7200), ("young", 10)):
        (folder / f"{name}.new").touch()
        os.utime(folder / f"{name}.new", (time.time() - age,) * 2)
    store.Store(folder).keep(KEY, FOUND)
    assert sorted(file.name for file in folder.iterdir()) == [f"{KEY}.json", "young.new"]


def _keep_often(folder: Path) -> None:
    for _ in range(200):
        store.Store(folder).keep(KEY, FOUND)


def test_workers_that_write_at_once_leave_a_whole_score(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_keep_often, args=(folder,)) for _ in range(2)]
    for one in writers:
        one.start()
    while any(one.is_alive() for one in writers):
        store.Store(folder).find(KEY)
    for one in writers:
        one.join()
    assert [one.exitcode for one in writers] == [0, 0]
    assert store.Store(folder).find(KEY) is not None
    assert caplog.text == ""
    assert [file.name for file in folder.iterdir()] == [f"{KEY}.json"]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("gw_celery/scores", "/cache/gw_celery/scores"),
        ("/elsewhere", "/elsewhere"),
        ("~/mine", "/home/me/mine"),
    ],
)
def test_the_folder_is_in_the_users_cache_unless_it_is_named(
    monkeypatch: pytest.MonkeyPatch, given: str, found: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("HOME", "/home/me")
    assert conf.cache_folder(given) == Path(found)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
    assert conf.cache_folder("scores") == Path("/home/me/.cache/scores")


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert conf.cache_folder("scores") is None
