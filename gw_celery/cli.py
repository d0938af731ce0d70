"""``celery -A proj gw ...``: commands for operators of workers with the GPU pool."""

from __future__ import annotations

import json
from typing import Any

import click

from gw_celery import conf, errors
from gw_celery.cluster import held
from gw_celery.pool import dead_letters
from gw_celery.worker import command as worker_command
from gw_celery.worker import commands

#: Maximum characters of a printed line, such as the queues of a worker.
_LONGEST_LINE = 10_000

# Every ``celery`` command imports this plugin; without this call, ``inspect`` refuses ours.
commands.describe()


@click.group("gw")
def gw() -> None:
    """Serve models: start GPU workers, and inspect and control their replicas."""


gw.add_command(worker_command.worker)


def _asks_workers(function: Any) -> Any:
    """Add the options of a command that workers answer: its destination and timeout."""
    destination = click.option(
        "-d", "--destination", multiple=True, help="Node name; all without it."
    )
    timeout = click.option(
        "-t", "--timeout", default=2.0, show_default=True, help="Seconds to wait for answers."
    )
    return destination(timeout(function))


@gw.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document for programs.")
@_asks_workers
@click.pass_context
def status(ctx: click.Context, /, as_json: bool, **reach: Any) -> None:
    """Show each worker's replicas: state, pid, inputs in flight, restarts, devices, last error."""
    answers = _answers(ctx, "gw_status", {}, **reach)
    if as_json:
        click.echo(json.dumps(answers, indent=2, sort_keys=True))
    else:
        for worker in sorted(answers):
            for line in _table(worker, answers[worker]):
                _show(line)
    if not answers:
        raise click.ClickException(
            f"no worker with the GPU pool answered within {reach['timeout']:g} s: start one, "
            f"or correct -A, which must name its app"
        )


@gw.command()
@click.argument("replica", type=int, required=False)
@_asks_workers
@click.pass_context
def drain(ctx: click.Context, /, replica: int | None, **reach: Any) -> None:
    """Drain REPLICA, or all replicas; they stay stopped until a restart."""
    _steer(ctx, "gw_drain", replica, **reach)


@gw.command()
@click.argument("replica", type=int, required=False)
@_asks_workers
@click.pass_context
def restart(ctx: click.Context, /, replica: int | None, **reach: Any) -> None:
    """Replace the child of REPLICA, or of all replicas in turn; inputs in flight finish."""
    _steer(ctx, "gw_restart", replica, **reach)


@gw.command()
@click.option("--requeue", metavar="ID", help="Send the message of this task id again.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document for programs.")
@click.pass_context
def dead(ctx: click.Context, requeue: str | None, as_json: bool) -> None:
    """List the dead letters, or send one of them again."""
    app = ctx.obj.app
    settings = conf.read(app.conf)
    name = settings.dead_letter_queue
    if not name:
        raise click.ClickException("gw_dead_letter_queue is None: name a queue to keep messages")
    with dead_letters.connect(app) as connection:
        queue = dead_letters.queue_of(app, connection, settings)
        if requeue is not None:
            if (message := queue.requeue(requeue)) is None:
                raise click.ClickException(f"no message of task {requeue} is in the queue {name}")
            _show(f"{message.headers['task']}[{requeue}] is in its queue again, with no deaths")
            return
        rows = [dead_letters.summary(message) for message in queue.read()]
    if queue.unreadable:
        _show(f"{queue.unreadable} entries of {name} are skipped: no dead letters", is_error=True)
    if as_json:
        click.echo(json.dumps(rows, indent=2, default=str))
        return
    _show(f"{name}: {len(rows)} dead letters")
    for row in rows:
        _show(
            f"  {row['id']}  {row['task']}  queue {row['queue']}  {row['deaths']} deaths  "
            f"since {row['since']}  by {row['worker']}"
        )


@gw.command()
@click.option("--reclaim", is_flag=True, help="Give back the messages of lost workers.")
@click.pass_context
def holds(ctx: click.Context, /, reclaim: bool) -> None:
    """List the messages that workers hold on a Redis broker.

    With --reclaim, watch the heartbeats for one gw_worker_ttl, and give the messages of lost
    workers back to their queues. This needs no worker.
    """
    app = ctx.obj.app
    ttl = conf.read(app.conf).worker_ttl
    holders = held.holders(app, ttl)
    if holders is None:
        raise click.ClickException("the broker is not a Redis, so that no worker holds messages")
    if reclaim:
        click.echo(f"watching the heartbeats for {ttl:.0f} s", err=True)
        for name, count in holders.reclaim().items():
            _show(f"{name}: {count} messages are back in their queues")
    for one in holders.listed():
        state = "has no heartbeat" if one.silent is None else f"heard {one.silent:.0f} s ago"
        state = "is lost" if one.is_lost else state
        _show(f"{one.incarnation}: {one.messages} messages; {state}")


def _steer(ctx: click.Context, command: str, replica: int | None, **reach: Any) -> None:
    answers = _answers(ctx, command, {"replica": replica}, **reach)
    for worker, answer in sorted(answers.items()):
        _show(f"{worker}: {answer.get('ok') or answer.get('error')}")
    if not answers or any("error" in answer for answer in answers.values()):
        raise click.ClickException("a worker refused" if answers else "no worker answered")


def _answers(
    ctx: click.Context, command: str, arguments: dict[str, Any], destination: Any, timeout: float
) -> dict[str, Any]:
    replies = ctx.obj.app.control.broadcast(
        command,
        arguments=arguments,
        destination=list(destination) or None,
        reply=True,
        timeout=timeout,
    )
    # Workers without the GPU pool answer with this error; the command does not concern them.
    unknown = {"error": f"KeyError({command!r})"}
    answers = (item for reply in replies or () for item in reply.items())
    return {worker: answer for worker, answer in answers if answer != unknown}


def _show(line: str, *, is_error: bool = False) -> None:
    """Print one line, whose values come from others."""
    click.echo(errors.printable(line, _LONGEST_LINE), err=is_error)


def _table(worker: str, answer: dict[str, Any]) -> list[str]:
    if "error" in answer:
        return [f"{worker}: {answer['error']}"]
    consumed, closed = (
        ", ".join(answer[f"{state}_queues"]) or "nothing" for state in ("open", "closed")
    )
    lines = [f"{worker}: {answer['waiting']} waiting; consumes {consumed}; closed: {closed}"]
    if answer.get("outage"):  # older workers have no such key
        lines.append(f"  consuming is paused, results cannot be stored: {answer['outage']}")
    if answer.get("broker_outage"):
        lines.append(f"  consuming is paused: {answer['broker_outage']}")
    if scaling := answer.get("scaling"):
        lines.append(
            f"  autoscaler: {scaling['actual']} replicas, {scaling['desired']} wanted, "
            f"{scaling['least']} to {scaling['most']}: {scaling['why']}"
        )
    for replica in answer["replicas"]:
        line = (
            f"  replica {replica['number']}  {replica['state']:<9} pid {replica['pid'] or '-'}  "
            f"{replica['in_flight']}/{replica['slots']} in flight  {replica['restarts']} restarts"
        )
        if devices := replica.get("devices"):  # older workers have no such key
            line += f"  on {', '.join(devices)}"
        lines.append(f"{line}  {replica['last_error']}".rstrip())
        lines += [f"    {_probed(probe)}" for probe in replica.get("probes", ())]
    for service, score in sorted(answer.get("scores", {}).items()):
        if score["value"] is not None:
            lines.append(f"  {service or 'plain tasks'}: {_scored(score)}")
            lines += [f"    {_benchmarked(benchmark)}" for benchmark in score["benchmarks"]]
    return lines


def _probed(probe: dict[str, Any]) -> str:
    line = f"{probe['kind']} probe {probe['name']}"
    if probe["is_ok"] is None:
        return f"{line} has not answered yet"
    outcome = "passed" if probe["is_ok"] else f"failed, {probe['failures']} in a row"
    detail = f": {probe['detail']}" if probe["detail"] else ""
    return f"{line} {outcome}, in {probe['seconds']:.2g} s{detail}"


def _scored(score: dict[str, Any]) -> str:
    line = f"{score['value']:.4g}/s a replica"
    if score["drift"] is not None:
        line += f", as served; {score['drift']:+.0%} from the benchmark's {score['measured']:.4g}/s"
    elif score["served"] is not None:
        line += ", as served; it has no benchmark"
    return line


def _benchmarked(score: dict[str, Any]) -> str:
    age = score["age"]
    ago = f"{age:.0f} s" if age < 120 else f"{age / 60:.0f} min"
    line = (
        f"{score['task']}: {score['value']:.4g}/s ({score['least']:.4g} to {score['most']:.4g}), "
        f"p50 {1000 * score['p50']:.3g} ms, p95 {1000 * score['p95']:.3g} ms, "
        f"{score['success_rate']:.0%} succeeded, "
        f"measured {ago if age < 7200 else f'{age / 3600:.0f} h'} ago"
    )
    return f"{line}; first failure: {score['failure']}" if score["failure"] else line
