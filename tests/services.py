"""The services that integration tests talk to, none of them with a developer's data in it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from uuid import uuid4

import redis

IN_CI = os.environ.get("CI", "").lower() in {"1", "true"}


class Missing(Exception):
    """Raised when a service that a test needs is not there."""


def listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def redis_at(url: str) -> redis.Redis:
    """Return a client of the embedded server that Celery knows by this URL."""
    return redis.Redis.from_url(
        url.replace("redis+socket://", "unix://").replace("virtual_host=", "db=")
    )


@contextmanager
def redis_on_tcp(port: int = 6379) -> Iterator[tuple[str, str]]:
    """Claim two empty databases of the Redis on its standard port; empty them at the end."""
    if not listens(port):
        raise Missing(f"no Redis listens on 127.0.0.1:{port}")
    claimed: list[redis.Redis] = []
    try:
        for number in range(15, -1, -1):
            client = redis.Redis(port=port, db=number)
            if len(claimed) < 2 and _claim(client):
                claimed.append(client)
            else:
                client.close()
        if len(claimed) < 2:
            raise Missing(f"the Redis on 127.0.0.1:{port} has no two empty databases")
        broker, result = (client.get_connection_kwargs()["db"] for client in claimed)
        yield f"redis://127.0.0.1:{port}/{broker}", f"redis://127.0.0.1:{port}/{result}"
    finally:
        for client in claimed:
            client.flushdb()
            client.close()


def _claim(client: redis.Redis) -> bool:
    # The key says to a test run beside this one that the database is taken.
    return client.dbsize() == 0 and bool(client.set("gw-celery-tests", os.getpid(), nx=True))


@contextmanager
def rabbitmq_vhost(port: int = 5672) -> Iterator[str]:
    """Make a private virtual host on the RabbitMQ on its standard port; delete it at the end.

    ``GW_TEST_RABBITMQ_URL`` names a whole URL instead, where ``rabbitmqctl`` cannot be used.
    """
    if given := os.environ.get("GW_TEST_RABBITMQ_URL"):
        yield given
        return
    if not listens(port):
        raise Missing(f"no RabbitMQ listens on 127.0.0.1:{port}")
    vhost = f"gw-celery-{uuid4().hex[:8]}"
    _rabbitmqctl("add_vhost", vhost)
    try:
        _rabbitmqctl("set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")
        yield f"amqp://guest:guest@127.0.0.1:{port}/{vhost}"
    finally:
        _rabbitmqctl("delete_vhost", vhost)


def _rabbitmqctl(*arguments: str) -> None:
    # Debian keeps it in /usr/sbin, which is not on everybody's PATH.
    program = shutil.which("rabbitmqctl") or shutil.which("rabbitmqctl", path="/usr/sbin")
    if program is None:
        raise Missing("rabbitmqctl is not here to make a vhost: set GW_TEST_RABBITMQ_URL")
    done = subprocess.run(
        [program, "-q", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        raise Missing(f"rabbitmqctl {arguments[0]}: {done.stderr or done.stdout}")


def chromium() -> str:
    """The path of the browser: Debian's package, never a download."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    raise Missing("no chromium on PATH: apt-get install chromium")


@contextmanager
def postgres_database(port: int = 5432) -> Iterator[str]:
    """Make a database on the PostgreSQL on its standard port; drop it at the end."""
    if not listens(port):
        raise Missing(f"no PostgreSQL listens on 127.0.0.1:{port}")
    try:
        import psycopg
    except ImportError as exc:
        raise Missing(f"{exc}: pip install psycopg[binary]") from exc
    name, user = f"gw_celery_{uuid4().hex[:8]}", os.environ.get("PGUSER", "postgres")
    try:
        server = psycopg.connect(
            host="127.0.0.1", port=port, user=user, dbname="postgres", autocommit=True
        )
    except psycopg.OperationalError as exc:
        raise Missing(f"PostgreSQL refuses {user} (PGUSER, PGPASSWORD): {exc}") from exc
    with closing(server):
        server.execute(f"CREATE DATABASE {name}")
        try:
            yield name
        finally:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)")
