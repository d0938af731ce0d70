from __future__ import annotations

import sys
import types
from typing import Any

import kombu
import pytest
from celery import Celery, Task
from celery.worker import control

import gw_celery as gw
from gw_celery import errors
from gw_celery.worker import bootsteps, options, serving, start_notices, startup


@pytest.fixture
def declared(app: gw.App) -> gw.App:
    @app.remote(gpu=gw.Gpu("A100"))
    async def embed(x): ...

    @app.cls(gpu=gw.Gpu("A100"))
    class Ranker:
        @gw.method()
        def rank(self, x): ...

    @app.remote(gpu=gw.Gpu("H100", 2))
    async def generate(x): ...

    @app.remote
    async def anywhere(x): ...

    app.celery.finalize()
    return app


def consumed(app: gw.App, *queues: str) -> list[str]:
    """The queues that a worker with ``-Q`` and these names consumes."""
    selected = app.celery.amqp.queues
    selected.select(queues)
    startup.expand_families(selected, [app.registry])
    return sorted(selected.consume_from)


def prepared(app: gw.App, *queues: str, pool: Any = "prefork") -> serving.Plan:
    return startup.prepare(worker_of(app.celery, *queues, pool=pool), [app.registry])


def worker_of(app: Celery, *queues: str, pool: Any = "prefork") -> Any:
    app.amqp.queues.select(queues)
    given = {"pool_cls": pool, "prefetch_multiplier": 4, "concurrency": 1, "options": {}}
    return types.SimpleNamespace(app=app, **given)


@pytest.fixture(autouse=True)
def _control_commands_stay(monkeypatch) -> None:
    for name in ("data", "meta"):
        monkeypatch.setattr(control.Panel, name, dict(getattr(control.Panel, name)))


@pytest.fixture
def cuda(monkeypatch) -> None:
    """This process has imported a torch whose CUDA is up."""
    cuda = types.SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))


@pytest.mark.usefixtures("cuda")
def test_prefork_is_refused_where_cuda_is_up_and_services_are_served(declared) -> None:
    with pytest.raises(errors.ConfigurationError, match="CUDA is up in the worker's main process"):
        prepared(declared, "gpu.A100")
    assert prepared(declared, "celery").served == []


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("pool", ["solo", "gw_celery.pool:TaskPool"])
def test_a_pool_that_does_not_fork_does_not_mind_cuda(declared, pool, monkeypatch) -> None:
    monkeypatch.setenv("GW_FAKE_GPUS", "A100")
    assert prepared(declared, "gpu.A100", pool=pool).served


@pytest.mark.usefixtures("cuda")
def test_prefork_that_spawns_does_not_mind_cuda(declared) -> None:
    worker = worker_of(declared.celery, "gpu.A100")
    worker.pool_start_method = "spawn"
    assert startup.prepare(worker, [declared.registry]).served


def test_a_worker_that_serves_gets_time_to_load(declared) -> None:
    declared.celery.conf.gw_start_timeout = 900.0
    worker = worker_of(declared.celery, "gpu.A100")
    startup.prepare(worker, [declared.registry])

    assert declared.celery.conf.worker_proc_alive_timeout > 900
    assert declared.celery.conf.worker_cancel_long_running_tasks_on_connection_loss is False
    assert worker.prefetch_multiplier == 1


@pytest.mark.parametrize(("configured", "asked"), [(4, 4), (None, 3)])
def test_a_prefetch_of_the_users_is_kept(declared, configured, asked) -> None:
    if configured is not None:
        declared.celery.conf.worker_prefetch_multiplier = configured
    worker = worker_of(declared.celery, "gpu.A100")
    worker.prefetch_multiplier = asked
    startup.prepare(worker, [declared.registry])

    assert worker.prefetch_multiplier == asked


def test_a_family_expands_to_the_queues_of_its_services(declared) -> None:
    assert consumed(declared, "gpu.A100") == ["gpu.A100.Ranker", "gpu.A100.embed"]
    assert consumed(declared, "gpu.H100x2") == ["gpu.H100x2.generate"]


def test_the_queues_of_a_family_are_those_that_clients_declare(declared) -> None:
    declared.celery.conf.task_create_missing_queue_type = "quorum"
    assert consumed(declared, "gpu.H100x2") == ["gpu.H100x2.generate"]
    queue = declared.celery.amqp.queues.consume_from["gpu.H100x2.generate"]
    assert queue.queue_arguments == {"x-queue-type": "quorum"}


def test_the_family_gpu_is_no_prefix(declared) -> None:
    assert consumed(declared, "gpu") == ["gpu.anywhere"]


def test_a_service_and_other_queues_are_consumed_as_they_are(declared) -> None:
    assert consumed(declared, "gpu.A100.embed", "celery") == ["celery", "gpu.A100.embed"]


@pytest.mark.parametrize("queue", ["gpu.T4", "cpu.rank", "gpu.A100.gone"])
def test_a_family_without_a_service_is_refused_with_those_that_are(declared, queue) -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        consumed(declared, queue)
    assert f"-Q {queue}: no service belongs to this family or queue" in str(caught.value)
    assert "gpu, gpu.A100, gpu.H100x2" in str(caught.value)


def test_a_plain_queue_of_the_project_may_be_named_as_a_family_is(declared, celery_app) -> None:
    assert consumed(declared, "cpu", "gpu.A100.embed") == ["cpu", "gpu.A100.embed"]

    other = gw.App("other", celery=celery_app)
    assert consumed(other, "cpu", "gpu") == ["cpu", "gpu"]


def test_a_plain_queue_of_the_configuration_may_be_named_as_a_family_is(celery_app) -> None:
    celery_app.conf.task_queues = [kombu.Queue("celery"), kombu.Queue("gpu")]
    startup.expand_families(celery_app.amqp.queues, [])

    assert sorted(celery_app.amqp.queues.consume_from) == ["celery", "gpu"]


def test_a_worker_serves_what_its_queues_name(declared) -> None:
    plan = prepared(declared, "gpu.A100")

    assert [service.name for service in plan.served] == ["embed", "Ranker"]
    assert plan.pool == "prefork"
    assert plan.pipes is not None


def test_a_worker_of_other_queues_serves_nothing_and_is_left_alone(declared) -> None:
    before = declared.celery.conf.worker_proc_alive_timeout
    plan = prepared(declared, "celery", pool="eventlet")

    assert plan.served == []
    assert plan.pipes is None
    assert declared.celery.conf.worker_proc_alive_timeout == before


def test_apps_of_another_celery_app_are_not_served(declared) -> None:
    other = Celery("other", broker="memory://", set_as_current=False)
    other.finalize()
    for name in [name for name in other.tasks if not name.startswith("celery.")]:
        del other.tasks[name]
    worker = worker_of(other, "gpu.A100.embed")

    with pytest.raises(errors.ConfigurationError, match="none: is the module"):
        startup.prepare(worker, [declared.registry])


@pytest.mark.parametrize("pool", ["prefork", "threads", "gw_celery.pool:TaskPool", "eventlet"])
def test_a_bare_family_that_no_service_belongs_to_is_said_with_those_that_are(
    declared, pool, caplog
) -> None:
    plan = prepared(declared, "cpu", "celery", pool=pool)

    start_notices.log(declared.celery, plan)
    assert "-Q cpu: no service belongs to this family" in caplog.text
    assert caplog.text.rstrip().endswith("families here: gpu, gpu.A100, gpu.H100x2")
    if pool != "gw_celery.pool:TaskPool":  # which logs by itself
        assert bootsteps.ServingStep in declared.celery.steps["worker"]


def test_a_worker_of_families_that_are_there_is_told_nothing(declared, caplog) -> None:
    start_notices.log(declared.celery, prepared(declared, "gpu", "celery"))
    assert caplog.text == ""

    without = startup.prepare(worker_of(Celery("plain", set_as_current=False), "gpu"), [])
    assert start_notices.strays(without) == []


@pytest.mark.filterwarnings("ignore:.*is already registered")  # Celery 5.7 says so, too
def test_a_plain_task_that_took_the_place_of_a_service_is_refused(declared) -> None:
    class Plain(Task):
        name = f"{__name__}.embed"

    declared.celery.register_task(Plain())

    with pytest.raises(errors.DeclarationError, match="of the plain Celery task"):
        prepared(declared, "gpu.A100")


@pytest.mark.parametrize(
    "pool", ["threads", "gevent", "eventlet", "celery.concurrency.gevent:TaskPool"]
)
def test_a_pool_that_cannot_serve_is_refused_with_those_that_can(declared, pool) -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        prepared(declared, "gpu.A100", pool=pool)
    assert "cannot serve embed, Ranker" in str(caught.value)
    assert "celery -A proj gw worker" in str(caught.value)
    assert "-P prefork or solo" in str(caught.value)


@pytest.mark.parametrize(("alias", "name"), [("prefork", "prefork"), ("solo", "solo")])
def test_a_pool_is_known_by_its_alias_and_by_its_class(declared, alias: str, name: str) -> None:
    from celery import concurrency

    assert prepared(declared, "gpu.A100", pool=alias).pool == name
    pool_cls = concurrency.get_implementation(alias)
    assert prepared(declared, "gpu.A100", pool=pool_cls).pool == name


def test_what_does_not_load_by_celerys_signal_needs_no_pipes(declared, monkeypatch) -> None:
    monkeypatch.setenv("GW_FAKE_GPUS", "A100")
    assert prepared(declared, "gpu.A100", pool="gw_celery.pool:TaskPool").pipes is None


def test_contradictions_are_refused_before_anything_starts(declared) -> None:
    declared.celery.conf.result_serializer = "json"
    with pytest.raises(errors.ConfigurationError, match="result_serializer"):
        prepared(declared, "gpu.A100")

    declared.celery.conf.gw_start_timout = 3
    with pytest.raises(errors.ConfigurationError, match="did you mean"):
        prepared(declared, "celery")


def test_a_queue_whose_service_is_not_loaded_is_refused_at_run_time(declared) -> None:
    prepared(declared, "gpu.A100.embed")
    answer = control.Panel.data["add_consumer"](None, "gpu.H100x2.generate")

    assert "this worker has not loaded its service; it serves gpu.A100.embed" in answer["error"]
    assert "-Q gpu.H100x2.generate" in answer["error"]


# -- devices --

OURS = "gw_celery.pool:TaskPool"


def test_only_our_pool_gives_devices_to_its_processes(declared, monkeypatch) -> None:
    monkeypatch.setenv("GW_FAKE_GPUS", "T4")
    assert prepared(declared, "gpu.A100").allotment is None
    with pytest.raises(errors.ConfigurationError, match="needs 1 x A100"):
        prepared(declared, "gpu.A100", pool=OURS)


def test_a_worker_of_our_command_serves_the_families_of_its_machine(declared, monkeypatch) -> None:
    monkeypatch.setenv("GW_FAKE_GPUS", "A100:2")
    worker = worker_of(declared.celery, "celery", pool=OURS)
    worker.options[options.KEY] = options.WorkerOptions()
    plan = startup.prepare(worker, [declared.registry])

    assert sorted(plan.queues) == ["gpu.A100.Ranker", "gpu.A100.embed", "gpu.anywhere"]
    assert worker.concurrency == 2 * 4
    assert worker.options == {}, "no step of the worker is to see it"


def pool_of(allows: int) -> Any:
    def refusal(slots: int) -> str | None:
        return f"{slots} do not fit" if slots > allows else None

    return types.SimpleNamespace(limit=2, refusal=refusal)


@pytest.mark.parametrize(
    ("command", "arguments"), [("pool_grow", {"n": 3}), ("autoscale", {"max": 5, "min": 1})]
)
def test_what_does_not_fit_is_refused_at_run_time(
    declared, command: str, arguments: dict[str, int]
) -> None:
    prepared(declared, "gpu", pool=OURS)
    state = types.SimpleNamespace(consumer=types.SimpleNamespace(pool=pool_of(allows=4)))
    assert control.Panel.data[command](state, **arguments) == {"error": "5 do not fit"}


GPU_POOL = "gw_celery.pool:TaskPool"


@pytest.mark.parametrize(
    ("queues", "consumed"),
    [
        (["cpu"], ["cpu.tidy", "cpu.measured", "gw.control"]),
        (["cpu.measured", "gw.control"], ["cpu.measured", "gw.control"]),
        (["cpu.tidy"], ["cpu.tidy"]),
        (["celery"], ["celery"]),
    ],
)
def test_a_worker_with_probes_or_benchmarks_consumes_the_queue_of_beats_tasks(
    app: gw.App, queues: list[str], consumed: list[str]
) -> None:
    app.remote(gpu=gw.Gpu("CPU"))(tidy)
    app.remote(gpu=gw.Gpu("CPU"), benchmark_dataset=[{"x": 1}])(measured)
    plan = prepared(app, *queues, pool=GPU_POOL)
    assert sorted(app.celery.amqp.queues.consume_from) == sorted(consumed)
    assert sorted(plan.queues) == sorted({*consumed} - {"gw.control"}), "no work to scale for"


async def tidy(x): ...


async def measured(x): ...


def test_a_project_that_makes_no_queues_by_itself_is_warned_and_served(
    app: gw.App, caplog: pytest.LogCaptureFixture
) -> None:
    app.celery.conf.update(
        task_create_missing_queues=False, task_queues=[kombu.Queue("cpu.measured")]
    )
    app.remote(gpu=gw.Gpu("CPU"), benchmark_dataset=[{"x": 1}])(measured)
    prepared(app, "cpu.measured", pool=GPU_POOL)
    assert list(app.celery.amqp.queues.consume_from) == ["cpu.measured"]
    assert "task_queues lacks gw.control" in caplog.text


def test_a_stock_worker_consumes_the_queue_of_beats_tasks_where_it_is_told_to(app: gw.App) -> None:
    app.remote(gpu=gw.Gpu("CPU"), benchmark_dataset=[{"x": 1}])(measured)
    prepared(app, "cpu.measured")
    assert list(app.celery.amqp.queues.consume_from) == ["cpu.measured"]
    prepared(app, "gw.control")
    assert list(app.celery.amqp.queues.consume_from) == ["gw.control"]


@pytest.mark.parametrize(
    ("queues", "pool"), [(["cpu"], GPU_POOL), (["cpu", "gw.control"], "prefork")]
)
def test_every_worker_declares_the_queue_of_beats_tasks_alike(
    app: gw.App, queues: list[str], pool: str
) -> None:
    app.celery.conf.update(task_queue_max_priority=10, task_create_missing_queue_type="quorum")
    app.remote(gpu=gw.Gpu("CPU"), benchmark_dataset=[{"x": 1}])(measured)
    prepared(app, *queues, pool=pool)
    consumed = app.celery.amqp.queues.consume_from
    assert consumed["gw.control"].queue_arguments is None
    assert consumed["gw.control"] is app.celery.amqp.queues["gw.control"]
    assert consumed["cpu.measured"].queue_arguments["x-max-priority"] == 10


@pytest.mark.parametrize("pool", ["prefork", GPU_POOL])
def test_every_worker_knows_the_commands_that_are_broadcast(app: gw.App, pool: str) -> None:
    app.remote(gpu=gw.Gpu("CPU"))(tidy)
    prepared(app, "cpu", pool=pool)
    assert {"gw_probe_tick", "gw_benchmark_tick", "gw_best_score"} <= set(control.Panel.data)


class Scaler:
    """Celery's autoscaler, and ours."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool

    def force_scale_up(self, slots: int) -> None:
        self.pool.limit += slots

    def force_scale_down(self, slots: int) -> None:
        self.pool.limit -= slots


@pytest.mark.parametrize(("command", "slots"), [("pool_grow", 4), ("pool_shrink", 0)])
def test_our_autoscaler_lets_an_operator_resize_the_pool(
    declared, command: str, slots: int
) -> None:
    prepared(declared, "gpu", pool=OURS)
    pool = pool_of(allows=4)
    controller = types.SimpleNamespace(autoscaler=Scaler(pool))
    consumer = types.SimpleNamespace(pool=pool, controller=controller)
    answer = control.Panel.data[command](types.SimpleNamespace(consumer=consumer), n=2)
    assert (answer, pool.limit) == ({"ok": f"now {slots} slots"}, slots)
    answer = control.Panel.data[command](types.SimpleNamespace(consumer=consumer), n=-2)
    assert (answer, pool.limit) == ({"error": "-2 slots: give 1 or more"}, slots)
    controller.autoscaler = object()
    answer = control.Panel.data[command](types.SimpleNamespace(consumer=consumer), n=0)
    assert "not supported with autoscale" in answer["error"]


def test_workers_with_our_pool_have_our_autoscaler_unless_the_project_chose_one(declared) -> None:
    worker = worker_of(declared.celery, "gpu", pool=OURS)
    startup.prepare(worker, [declared.registry])
    assert worker.autoscaler_cls == "gw_celery.autoscale:Autoscaler"
    declared.celery.conf.worker_autoscaler = "celery.worker.autoscale:Autoscaler"
    worker = worker_of(declared.celery, "gpu", pool=OURS)
    startup.prepare(worker, [declared.registry])
    assert not hasattr(worker, "autoscaler_cls")
