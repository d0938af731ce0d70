"""Which errors of Redis are an outage, by real server texts of Redis 6, 7 and Valkey 9."""

from __future__ import annotations

from typing import Any

import pytest
from redis import exceptions
from redis._parsers import base

from gw_celery.transport import refusals

REFUSED = [
    "READONLY You can't write against a read only replica.",
    "OOM command not allowed when used memory > 'maxmemory'.",
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist",
    "NOPERM this user has no permissions to run the 'evalsha' command",
    "LOADING Redis is loading the dataset in memory",
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "CLUSTERDOWN The cluster is down",
    "TRYAGAIN Multiple keys request during rehashing of slot",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "NOREPLICAS Not enough good replicas to write.",
    "READONLY You can't write against a read only replica. script: 6b1bf486, on @user_script:1.",
    "ERR Error running script (call to f_6b1b): @user_script:1: @user_script: 1: -OOM command not "
    "allowed when used memory > 'maxmemory'.",
]


def parsed(text: str) -> Exception:
    parser: Any = base.BaseParser
    error: Exception = parser.parse_error(text)
    return error


@pytest.mark.parametrize("text", REFUSED)
def test_a_refusal_of_the_server_is_an_outage(text: str) -> None:
    answer = parsed(text)
    assert (refusals.is_refusal(answer), refusals.is_outage(answer)) == (True, True)


@pytest.mark.parametrize(
    "lost", [exceptions.ConnectionError("reset"), exceptions.TimeoutError(), OSError(104, "reset")]
)
def test_a_lost_connection_is_an_outage_and_not_a_refusal(lost: Exception) -> None:
    assert (refusals.is_refusal(lost), refusals.is_outage(lost)) == (False, True)


@pytest.mark.parametrize(
    "text",
    [
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        "NOSCRIPT No matching script. Please use EVAL.",
        "ERR unknown command 'EVALSHA'",
        "WRONGPASS invalid username-password pair or user is disabled.",
        "BUSYGROUP Consumer Group name already exists",
        "ERR the value is READONLY",
    ],
)
def test_other_errors_are_none(text: str) -> None:
    assert not refusals.is_outage(parsed(text))
