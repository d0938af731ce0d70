"""``celery -A proj gw worker``: Celery's worker command with the GPU pool, sized in replicas."""

from __future__ import annotations

from typing import Any

import click
from celery.bin import worker as stock
from celery.bin.base import CeleryCommand, CeleryOption
from click.core import ParameterSource

from gw_celery import conf, errors
from gw_celery.declare import gpu as kinds
from gw_celery.worker.plan import OPTIONS, WorkerOptions

_GROUP = "GPU Worker Options"
_POOL = "gw_celery.pool:TaskPool"
_TYPED = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


class _Command(CeleryCommand):
    """A command with its own options, followed by those of Celery's worker.

    It reads Celery's options at each use, because the user's app may add options to them.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        ours = len(self.params)  # what follows is --help
        params = super().get_params(ctx)
        return [*params[:ours], *stock.worker.params, *params[ours:]]


def _known_kind(ctx: click.Context, _: click.Parameter, kind: str | None) -> str | None:
    if kind is not None:
        try:
            kinds.require_known(kinds.Gpu(kind), lambda: conf.read(ctx.obj.app.conf).gpu_kinds)
        except errors.DeclarationError as exc:
            raise click.BadParameter(f"{kind}: {exc.rule}") from exc
    return kind


@click.command("worker", cls=_Command, context_settings=dict(stock.worker.context_settings))
@click.option(
    "--gpu",
    metavar="KIND",
    callback=_known_kind,
    cls=CeleryOption,
    help_group=_GROUP,
    help="Serve the families of this kind of GPU, such as A100, or CPU. Without it: all families "
    "that the GPUs of this machine can serve, or cpu where they can serve none.",
)
@click.option(
    "--replicas",
    type=click.IntRange(min=1),
    cls=CeleryOption,
    help_group=_GROUP,
    help="Loaded copies of what is served, each on GPUs of its own. Default: the setting "
    "gw_replicas, else as many as fit; 1 without GPUs.",
)
@click.pass_context
def worker(ctx: click.Context, /, gpu: str | None, replicas: int | None, **options: Any) -> Any:
    """Start a worker with the GPU pool, for this process alone.

    It takes the options of `celery worker` except -P and -c; --autoscale MAX,MIN counts replicas.

    \b
    $ celery -A proj gw worker -l INFO
    $ celery -A proj gw worker --gpu A100 --replicas 2
    $ celery -A proj gw worker -Q gpu.A100.generate
    \f

    Args:
        ctx: click's context of this command.
        gpu: kind of GPU whose families the worker serves; ``None``: what the machine can serve.
        replicas: number of replicas, 1 or more; ``None``: the setting, else as many as fit.
        options: the options of Celery's worker command.

    Raises:
        UsageError: (click's) for options that repeat or contradict each other.
    """
    _require_consistent(ctx)
    options["pool"] = _POOL
    options[OPTIONS] = WorkerOptions(
        gpu=gpu, replicas=replicas, names_queues=bool(options.get("queues"))
    )
    # The callback instead of the command: this context holds the parsed and the remaining
    # arguments.
    return ctx.invoke(stock.worker.callback, **options)


def _require_consistent(ctx: click.Context) -> None:
    typed = {name for name in ctx.params if ctx.get_parameter_source(name) in _TYPED}
    wrong = {
        "-P is for `celery worker`: `gw worker` always has the GPU pool": {"pool"},
        "-c counts slots: say --replicas N": {"concurrency"},
        "-Q and --gpu both say what is served: give one of them": {"queues", "gpu"},
        "--autoscale MAX,MIN says how many replicas: leave out --replicas": {
            "autoscale",
            "replicas",
        },
    }
    for message, names in wrong.items():
        if names <= typed:
            raise click.UsageError(message, ctx)
    if "autoscale" in typed and not ctx.params["autoscale"][0]:
        raise click.UsageError(
            "--autoscale MAX,MIN: MAX 0 would serve nothing; give 1 or more", ctx
        )
    if "exclude_queues" in typed and "queues" not in typed:
        raise click.UsageError("-X takes away from what -Q lists: give -Q", ctx)
