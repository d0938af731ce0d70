"""What a worker decides when it starts: queues, devices, size, and what is refused or warned of."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kombu
import pytest
from billiard import cpu_count
from celery import Celery, Task, concurrency
from celery.worker import control

import gw_celery as gw
from tests.pool_harness import Harness
from tests.unit.worker.starting import GPU_POOL, Typed, Worker, refusal, start


@pytest.fixture
def declared(app: gw.App) -> Celery:
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
    return app.celery


# -- queues and services --


@pytest.mark.parametrize(
    ("queues", "consumed"),
    [
        (["gpu.A100"], ["gpu.A100.Ranker", "gpu.A100.embed"]),
        (["gpu.H100x2"], ["gpu.H100x2.generate"]),
        (["gpu"], ["gpu.anywhere"]),
        (["gpu.A100.embed", "celery"], ["celery", "gpu.A100.embed"]),
        (["cpu", "gpu.A100.embed"], ["cpu", "gpu.A100.embed"]),
    ],
)
def test_a_family_expands_to_the_queues_of_its_services_and_others_stay(
    declared: Celery, queues: list[str], consumed: list[str]
) -> None:
    assert start(declared, *queues, pool="prefork").consumed == consumed


def test_the_queues_of_a_family_are_those_that_clients_declare(declared: Celery) -> None:
    declared.conf.task_create_missing_queue_type = "quorum"
    start(declared, "gpu.H100x2", pool="prefork")
    queue = declared.amqp.queues.consume_from["gpu.H100x2.generate"]
    assert queue.queue_arguments == {"x-queue-type": "quorum"}


@pytest.mark.parametrize("queue", ["gpu.T4", "cpu.rank", "gpu.A100.gone"])
def test_a_family_without_a_service_is_refused_with_those_that_are(
    declared: Celery, queue: str
) -> None:
    said = refusal(declared, queue, pool="prefork")
    assert f"-Q {queue}: no service belongs to this family or queue" in said
    assert "gpu, gpu.A100, gpu.H100x2" in said


def test_plain_queues_of_a_project_may_be_named_as_families_are(celery_app: Celery) -> None:
    gw.App("other", celery=celery_app)
    assert start(celery_app, "cpu", "gpu", pool="prefork").consumed == ["cpu", "gpu"]


def test_plain_queues_of_the_configuration_may_be_named_as_families_are(
    celery_app: Celery,
) -> None:
    celery_app.conf.task_queues = [kombu.Queue("celery"), kombu.Queue("gpu")]
    assert start(celery_app, "celery", "gpu", pool="prefork").consumed == ["celery", "gpu"]


def test_a_worker_serves_what_its_queues_name(declared: Celery) -> None:
    worker = start(declared, "gpu.A100", pool="prefork")
    assert worker.serves == {"embed": "gpu.A100.embed", "Ranker": "gpu.A100.Ranker"}


def test_a_worker_of_other_queues_serves_nothing_and_is_left_alone(declared: Celery) -> None:
    before = dict(declared.conf)
    worker = start(declared, "celery", pool="eventlet")
    assert (worker.serves, worker.prefetch_multiplier) == ({}, 4)
    assert dict(declared.conf) == before


def test_apps_of_another_celery_app_are_not_served(declared: Celery) -> None:
    other = Celery("other", broker="memory://", set_as_current=False)
    other.finalize()
    for name in [name for name in other.tasks if not name.startswith("celery.")]:
        del other.tasks[name]
    assert "none: is the module" in refusal(other, "gpu.A100.embed", pool="prefork")


@pytest.mark.filterwarnings("ignore:.*is already registered")  # Celery 5.7 says so, too
def test_a_plain_task_that_took_the_place_of_a_service_is_refused(declared: Celery) -> None:
    class Plain(Task):
        name = f"{__name__}.embed"

    declared.register_task(Plain())
    assert "of the plain Celery task" in refusal(declared, "gpu.A100", pool="prefork", code=1)


# -- pools --


@pytest.mark.parametrize(
    "pool", ["threads", "gevent", "eventlet", "celery.concurrency.gevent:TaskPool"]
)
def test_a_pool_that_cannot_serve_is_refused_with_those_that_can(
    declared: Celery, pool: str
) -> None:
    said = refusal(declared, "gpu.A100", pool=pool)
    assert "cannot serve embed, Ranker" in said
    assert "celery -A proj gw worker" in said
    assert "-P prefork or solo" in said


@pytest.mark.parametrize("alias", ["prefork", "solo"])
def test_a_pool_is_known_by_its_alias_and_by_its_class(declared: Celery, alias: str) -> None:
    for pool in (alias, concurrency.get_implementation(alias)):
        assert start(declared, "gpu.A100", pool=pool).serves


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have this process have imported a torch whose CUDA answers so, and have a device open."""

    def install(device: str | None = None, **answers: bool) -> None:
        cuda = types.SimpleNamespace(**{name: lambda it=it: it for name, it in answers.items()})
        monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
        if device is not None:  # one descriptor stands for a device of the GPU's driver
            monkeypatch.setattr(os, "readlink", lambda path: device)

    return install


@pytest.mark.parametrize("answer", ["is_initialized", "_is_in_bad_fork"])
def test_prefork_is_refused_where_cuda_is_up_and_services_are_served(
    declared: Celery, torch: Callable[..., None], answer: str
) -> None:
    torch(**{"is_initialized": False, answer: True})
    said = refusal(declared, "gpu.A100", pool="prefork")
    assert f"CUDA is up in the worker's main process (torch.cuda.{answer}() is true)" in said
    for words in ("do not touch CUDA when modules are imported", GPU_POOL):
        assert words in said
    assert start(declared, "celery", pool="prefork").serves == {}


@pytest.mark.parametrize("answers", [{}, {"is_initialized": False}])
def test_prefork_is_refused_where_the_device_of_cuda_is_open(
    declared: Celery, torch: Callable[..., None], answers: dict[str, bool]
) -> None:
    torch("/dev/nvidia-uvm", **answers)
    assert "/dev/nvidia-uvm is open" in refusal(declared, "gpu.A100", pool="prefork")


@pytest.mark.parametrize(
    "answers", [{}, {"is_initialized": False}, {"is_initialized": False, "_is_in_bad_fork": False}]
)
def test_a_process_without_cuda_or_with_nvml_alone_may_fork(
    declared: Celery, torch: Callable[..., None], answers: dict[str, bool]
) -> None:
    torch("/dev/nvidia0", **answers)
    assert start(declared, "gpu.A100", pool="prefork").serves


def test_a_pool_that_does_not_fork_does_not_mind_cuda(
    declared: Celery, torch: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GW_FAKE_GPUS", "A100")
    torch(is_initialized=True)
    assert start(declared, "gpu.A100", pool="solo").serves
    assert start(declared, "gpu.A100", pool="prefork", pool_start_method="spawn").serves
    assert start(declared, "gpu.A100", pool=GPU_POOL).consumed


# -- settings --


def test_a_worker_that_serves_gets_time_to_load(declared: Celery) -> None:
    declared.conf.gw_start_timeout = 900.0
    worker = start(declared, "gpu.A100", pool="prefork")
    assert declared.conf.worker_proc_alive_timeout > 900
    assert declared.conf.worker_cancel_long_running_tasks_on_connection_loss is False
    assert worker.prefetch_multiplier == 1


@pytest.mark.parametrize(("configured", "asked"), [(4, 4), (None, 3)])
def test_a_prefetch_of_the_users_is_kept(
    declared: Celery, configured: int | None, asked: int
) -> None:
    if configured is not None:
        declared.conf.worker_prefetch_multiplier = configured
    worker = start(declared, "gpu.A100", pool="prefork", prefetch_multiplier=asked)
    assert worker.prefetch_multiplier == asked


def test_contradictions_are_refused_before_anything_starts(declared: Celery) -> None:
    declared.conf.result_serializer = "json"
    assert "result_serializer" in refusal(declared, "gpu.A100", pool="prefork")
    declared.conf.gw_start_timout = 3
    assert "did you mean" in refusal(declared, "celery", pool="prefork")


@pytest.mark.parametrize("logfile", [None, "/nowhere/at/all/worker.log", "%n%I.log"])
def test_a_log_that_cannot_be_written_is_no_obstacle(
    declared: Celery, logfile: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        start(declared, "gpu.T4", pool="prefork", logfile=logfile)
    assert caught.value.code == 78
    assert "no service belongs to this family" in caplog.text


def test_workers_with_our_pool_have_our_autoscaler_unless_the_project_chose_one(
    declared: Celery,
) -> None:
    assert vars(start(declared, "gpu"))["autoscaler_cls"] == "gw_celery.autoscale:Autoscaler"
    declared.conf.worker_autoscaler = "celery.worker.autoscale:Autoscaler"
    assert "autoscaler_cls" not in vars(start(declared, "gpu"))


# -- the queue of beat's tasks --


async def tidy(x): ...


async def measured(x): ...


@pytest.fixture
def measuring(app: gw.App) -> Celery:
    app.remote(gpu=gw.Gpu("CPU"))(tidy)
    app.remote(gpu=gw.Gpu("CPU"), benchmark_dataset=[{"x": 1}])(measured)
    return app.celery


@pytest.mark.parametrize(
    ("queues", "pool", "consumed"),
    [
        (["cpu"], GPU_POOL, ["cpu.measured", "cpu.tidy", "gw.control"]),
        (["cpu.measured", "gw.control"], GPU_POOL, ["cpu.measured", "gw.control"]),
        (["cpu.tidy"], GPU_POOL, ["cpu.tidy"]),
        (["celery"], GPU_POOL, ["celery"]),
        (["cpu.measured"], "prefork", ["cpu.measured"]),
        (["gw.control"], "prefork", ["gw.control"]),
    ],
)
def test_a_worker_with_benchmarks_consumes_the_queue_of_beats_tasks_and_others_where_told(
    measuring: Celery, queues: list[str], pool: str, consumed: list[str]
) -> None:
    assert start(measuring, *queues, pool=pool).consumed == consumed


def test_a_project_that_makes_no_queues_by_itself_is_warned_and_served(
    measuring: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    measuring.conf.update(
        task_create_missing_queues=False, task_queues=[kombu.Queue("cpu.measured")]
    )
    assert start(measuring, "cpu.measured").consumed == ["cpu.measured"]
    assert "task_queues lacks gw.control" in caplog.text


@pytest.mark.parametrize(
    ("queues", "pool"), [(["cpu"], GPU_POOL), (["cpu", "gw.control"], "prefork")]
)
def test_every_worker_declares_the_queue_of_beats_tasks_alike(
    measuring: Celery, queues: list[str], pool: str
) -> None:
    measuring.conf.update(task_queue_max_priority=10, task_create_missing_queue_type="quorum")
    start(measuring, *queues, pool=pool)
    consumed = measuring.amqp.queues.consume_from
    assert consumed["gw.control"].queue_arguments is None
    assert consumed["gw.control"] is measuring.amqp.queues["gw.control"]
    assert consumed["cpu.measured"].queue_arguments["x-max-priority"] == 10


@pytest.mark.parametrize("pool", ["prefork", GPU_POOL])
def test_every_worker_knows_the_commands_that_are_broadcast(measuring: Celery, pool: str) -> None:
    start(measuring, "cpu", pool=pool)
    assert {"gw_probe_tick", "gw_benchmark_tick", "gw_best_score"} <= set(control.Panel.data)


def test_a_queue_whose_service_is_not_loaded_is_refused_at_run_time(declared: Celery) -> None:
    start(declared, "gpu.A100.embed", pool="prefork")
    answer = control.Panel.data["add_consumer"](None, "gpu.H100x2.generate")
    assert "this worker has not loaded its service; it serves gpu.A100.embed" in answer["error"]
    assert "-Q gpu.H100x2.generate" in answer["error"]


# -- devices and size --

GENERATE, EMBED, CPU, ANYWHERE = "gpu.A100.generate", "gpu.L4.embed", "cpu.tokenize", "gpu.anywhere"


@pytest.fixture
def placed(app: gw.App, monkeypatch: pytest.MonkeyPatch) -> Celery:
    """Services of two kinds of GPU that one machine has; ``generate`` has 5 slots a replica."""
    monkeypatch.setenv("GW_FAKE_GPUS", "A100:3,L4")

    @app.remote(gpu=gw.Gpu("A100"))
    @gw.concurrent(max_inputs=4)
    async def generate(x): ...

    @app.remote(gpu=gw.Gpu("L4", memory_gb=12))
    async def embed(x): ...

    @app.remote(gpu=gw.Gpu("CPU"))
    async def tokenize(x): ...

    @app.remote
    async def anywhere(x): ...

    app.celery.conf.broker_url = "redis://"  # a memory:// does not tell what waits in it
    app.celery.finalize()
    return app.celery


@pytest.mark.parametrize("queue", [CPU, ANYWHERE, "celery"])
def test_what_needs_no_kind_does_not_look_at_the_machine(
    placed: Celery, monkeypatch: pytest.MonkeyPatch, queue: str
) -> None:
    monkeypatch.setenv("GW_FAKE_GPUS", "nonsense")
    assert start(placed, queue, slots=99).concurrency == 99
    assert start(placed, queue, slots="auto").concurrency == "auto"


def test_a_kind_that_is_not_there_is_refused_by_the_gpu_pool_alone(
    placed: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GW_FAKE_GPUS", "T4")
    said = refusal(placed, GENERATE)
    assert "needs 1 x A100" in said
    assert "has 1 x T4" in said
    assert start(placed, GENERATE, pool="prefork").serves


@pytest.mark.parametrize("slots", [5, 6, 15])
def test_slots_that_fit_stay(placed: Celery, slots: int) -> None:
    assert start(placed, GENERATE, slots=slots).concurrency == slots


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"slots": 1600},
            "-c 1600, of 5 slots a replica: 320 replicas were asked for, and 3 fit",
        ),
        ({"autoscale": (16, 5)}, "4 replicas were asked for, and 3 fit"),
        ({"typed": Typed(replicas=4)}, "4 replicas were asked for, and 3 fit"),
        ({"typed": Typed(), "autoscale": (4, 1)}, "4 replicas were asked for, and 3 fit"),
    ],
    ids=str,
)
def test_more_than_fits_is_refused(placed: Celery, options: dict[str, Any], said: str) -> None:
    assert said in refusal(placed, GENERATE, **options)


@pytest.mark.parametrize("slots", [cpu_count(), "auto"])
def test_slots_that_no_user_asked_for_are_cut_to_what_fits(
    app: gw.App, monkeypatch: pytest.MonkeyPatch, slots: Any
) -> None:
    """Celery's own default is a slot for each processor."""
    monkeypatch.setenv("GW_FAKE_GPUS", "A100")

    @app.remote(gpu=gw.Gpu("A100"))
    @gw.concurrent(max_inputs=1)
    async def single(x): ...

    fits = 2 if slots == "auto" else min(2, cpu_count())
    assert start(app.celery, "gpu.A100", slots=slots).concurrency == fits


@pytest.mark.parametrize(("queue", "replicas", "slots"), [(GENERATE, 2, 10), (CPU, 7, 14)])
def test_the_setting_counts_replicas(placed: Celery, queue: str, replicas: int, slots: int) -> None:
    placed.conf.gw_replicas = replicas
    assert start(placed, queue, slots=5).concurrency == slots
    placed.conf.gw_replicas = 4
    assert "4 replicas were asked for, and 3 fit" in refusal(placed, GENERATE)


@pytest.mark.parametrize(
    ("queue", "typed", "setting", "slots"),
    [
        (GENERATE, Typed(), None, 15),
        (GENERATE, Typed(replicas=2), None, 10),
        (GENERATE, Typed(), 1, 5),
        (GENERATE, Typed(replicas=3), 1, 15),
        (EMBED, Typed(), None, 4),
        (CPU, Typed(), None, 2),
        (CPU, Typed(replicas=3), None, 6),
    ],
)
def test_replicas_are_those_that_were_asked_for_or_as_many_as_fit(
    placed: Celery, queue: str, typed: Typed, setting: int | None, slots: int
) -> None:
    placed.conf.gw_replicas = setting
    assert start(placed, queue, typed=typed).concurrency == slots


@pytest.mark.parametrize(
    ("typed", "given", "scale"), [(None, (15, 5), (15, 5)), (Typed(), (3, 1), (15, 5))]
)
def test_celerys_autoscale_counts_slots_and_that_of_our_command_replicas(
    placed: Celery, typed: Typed | None, given: tuple[int, int], scale: tuple[int, int]
) -> None:
    worker = start(placed, GENERATE, slots=2, typed=typed, autoscale=given)
    assert (worker.scale, worker.concurrency) == (scale, 2)


@pytest.mark.parametrize(("command", "arguments"), [("pool_grow", {"n": 14}), ("autoscale", None)])
def test_what_does_not_fit_is_refused_at_run_time(
    placed: Celery, command: str, arguments: dict[str, int] | None
) -> None:
    worker = start(placed, GENERATE)
    assert worker.fits(15)
    assert not worker.fits(16)
    pool = types.SimpleNamespace(
        limit=2, refusal=lambda slots: None if worker.fits(slots) else f"{slots} do not fit"
    )
    state = types.SimpleNamespace(consumer=types.SimpleNamespace(pool=pool))
    answer = control.Panel.data[command](state, **(arguments or {"max": 16, "min": 1}))
    assert answer == {"error": "16 do not fit"}


def bounded(app: gw.App, *bounds: tuple[int, int | None], gpu: str = "A100") -> list[str]:
    """The queues of services that declare ``(min_workers, max_workers)``."""
    queues = []
    for number, (least, most) in enumerate(bounds):

        async def body(x): ...

        body.__name__ = body.__qualname__ = f"bounded{number}"
        app.remote(gpu=gw.Gpu(gpu), min_workers=least, max_workers=most)(body)
        queues.append(f"{gw.Gpu(gpu).family}.bounded{number}")
    return queues


@pytest.mark.usefixtures("placed")
@pytest.mark.parametrize(
    ("bounds", "gpu", "expected"),
    [
        ([(1, 2)], "A100", (2, 1)),
        ([(0, 2)], "A100", (2, 0)),
        ([(2, None)], "A100", (3, 2)),
        ([(1, 2), (0, 3)], "A100", (3, 1)),
        ([(1, 2), (0, None)], "A100", (3, 1)),
        ([(0, 1), (2, 3)], "A100", (3, 2)),
        ([(4, 9)], "A100", (3, 3)),
        ([(0, 4)], "CPU", (4, 0)),
        ([(2, None)], "CPU", (2, 2)),
        ([(1, 2), (0, 3)], "CPU", (3, 1)),
    ],
)
def test_replicas_are_as_many_as_the_greediest_service_wants_and_the_neediest_keeps(
    app: gw.App, bounds: list[tuple[int, int | None]], gpu: str, expected: tuple[int, int]
) -> None:
    worker = start(app.celery, *bounded(app, *bounds, gpu=gpu), typed=Typed())
    slots = len(bounds) + 1
    assert worker.scale == tuple(slots * bound for bound in expected)


def test_a_worker_that_may_go_to_zero_is_scaled_without_bounds(placed: Celery) -> None:
    placed.conf.gw_inactivity_timeout = 60.0
    assert start(placed, GENERATE, typed=Typed()).scale == (15, 0)


@pytest.mark.usefixtures("placed")
@pytest.mark.parametrize(
    ("typed", "setting"), [(None, None), (Typed(replicas=2), None), (Typed(), 2)]
)
def test_a_size_that_was_asked_for_stays(
    app: gw.App, typed: Typed | None, setting: int | None
) -> None:
    app.celery.conf.gw_replicas = setting
    worker = start(app.celery, *bounded(app, (1, 3)), slots=4, typed=typed)
    assert (worker.scale, worker.concurrency) == (None, 4)


@pytest.mark.usefixtures("placed")
def test_bounds_that_were_asked_for_win(app: gw.App) -> None:
    worker = start(app.celery, *bounded(app, (1, 3)), typed=Typed(), autoscale=(2, 2))
    assert worker.scale == (4, 4)


@pytest.mark.usefixtures("placed")
@pytest.mark.parametrize("broker", ["memory://", "filesystem://"])
def test_zero_replicas_are_refused_where_the_worker_learns_of_no_message(
    app: gw.App, broker: str
) -> None:
    queues, typed = bounded(app, (0, 3)), Typed()
    app.celery.conf.broker_url = broker
    assert "does not tell: keep one replica" in refusal(app.celery, *queues, typed=typed)
    assert start(app.celery, *queues, typed=typed, autoscale=(3, 1)).scale == (6, 2)


@pytest.mark.usefixtures("placed")
def test_zero_replicas_are_fine_where_rabbitmq_tells_of_messages(app: gw.App) -> None:
    app.celery.conf.broker_url = "amqp://"
    assert start(app.celery, *bounded(app, (0, 3)), typed=Typed()).scale == (6, 0)


@pytest.mark.parametrize(
    ("typed", "consumed"),
    [
        (Typed("A100", names_queues=False), [GENERATE]),
        (Typed("CPU", names_queues=False), [CPU]),
        (Typed(names_queues=False), [GENERATE, EMBED, ANYWHERE]),
        (Typed(names_queues=True), ["celery"]),
    ],
)
def test_a_worker_of_our_command_consumes_the_families_that_it_takes(
    placed: Celery, typed: Typed, consumed: list[str]
) -> None:
    worker = start(placed, "celery", typed=typed)
    assert worker.consumed == consumed
    assert "gw_options" not in worker.options, "no step of the worker is to see it"


def test_a_worker_for_the_cpu_does_not_look_at_the_gpus(
    placed: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GW_FAKE_GPUS", "nonsense")
    assert start(placed, "celery", typed=Typed("CPU", names_queues=False)).consumed == [CPU]


# -- what Celery does at an error that Redis answers --


@pytest.mark.parametrize(
    ("pool", "url", "is_retried"),
    [
        (GPU_POOL, "redis://localhost", True),
        (GPU_POOL, "sentinel://localhost", True),
        (GPU_POOL, "memory://", False),
        ("prefork", "redis://localhost", False),
    ],
)
def test_an_error_that_redis_answers_ends_no_gpu_worker(
    declared: Celery, pool: str, url: str, is_retried: bool
) -> None:
    declared.conf.broker_url = url
    start(declared, "celery", pool=pool)
    assert declared.conf.broker_channel_error_retry is is_retried


# -- what its log says once --


@pytest.mark.parametrize("pool", ["prefork", "threads", "eventlet"])
def test_a_bare_family_that_no_service_belongs_to_is_said_with_those_that_are(
    declared: Celery, pool: str, caplog: pytest.LogCaptureFixture
) -> None:
    start(declared, "cpu", "celery", pool=pool).begin()
    assert "-Q cpu: no service belongs to this family" in caplog.text
    assert caplog.text.rstrip().endswith("families here: gpu, gpu.A100, gpu.H100x2")


def test_a_worker_of_families_that_are_there_is_told_nothing(
    declared: Celery, celery_app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    start(declared, "gpu", "celery", pool="prefork").begin()
    start(Celery("plain", broker="memory://", set_as_current=False), "gpu", pool="prefork").begin()
    assert caplog.text == ""


@pytest.fixture
def endless(app: gw.App) -> Celery:
    @app.remote(timeout=None)
    async def endless(): ...

    @app.remote(timeout=None, acks_late=False)
    async def acknowledged(): ...

    @app.remote
    async def limited(): ...

    return app.celery


def test_only_tasks_that_redis_would_deliver_again_are_named(
    endless: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    endless.conf.update(
        broker_url="redis://localhost", broker_transport_options={"visibility_timeout": 7200}
    )
    start(endless, "gpu", pool="prefork").begin()
    assert f"tasks without a time limit: {__name__}.endless. Redis" in caplog.text
    assert "['visibility_timeout']=7200 s" in caplog.text


def test_a_broker_that_waits_for_as_long_as_it_takes_is_no_reason_to_warn(
    endless: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    start(endless, "gpu", pool="prefork").begin()
    assert caplog.text == ""


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have a worker of either kind come to where Celery has set up logging."""
    monkeypatch.setenv("GW_FAKE_GPUS", "A100")

    def begin(make: Callable[[], Worker], pool: str = GPU_POOL) -> None:
        if pool != GPU_POOL:
            make().begin()
            return
        with Harness().running(make):
            pass

    return begin


@pytest.mark.parametrize(("pool", "is_said"), [("solo", True), (GPU_POOL, False)])
def test_the_gpu_pool_needs_no_limit_on_redis(
    endless: Celery,
    begun: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    pool: str,
    is_said: bool,
) -> None:
    endless.conf.broker_url = "redis://localhost:1"
    begun(lambda: start(endless, "gpu", pool=pool), pool)
    assert ("tasks without a time limit" in caplog.text) is is_said


@pytest.mark.parametrize(("pool", "is_said"), [("prefork", True), (GPU_POOL, False)])
def test_the_memory_of_a_service_acts_on_the_gpu_pool_only(
    app: gw.App,
    begun: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    pool: str,
    is_said: bool,
) -> None:
    app.remote(gpu=gw.Gpu("A100", memory_gb=10))(tidy)
    begun(lambda: start(app.celery, "gpu.A100", pool=pool), pool)
    assert ("tidy: memory_gb" in caplog.text) is is_said


@pytest.mark.parametrize("typed", [Typed(replicas=1), Typed(), None])
def test_bounds_that_the_worker_does_not_go_by_are_named_with_what_it_goes_by(
    app: gw.App,
    begun: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    typed: Typed | None,
) -> None:
    app.remote(min_workers=1, max_workers=3)(tidy)
    begun(lambda: start(app.celery, "gpu", typed=typed))
    said = "which was given its size (--replicas, --autoscale, -c, gw_replicas): tidy: m"
    assert (said in caplog.text) is not (typed is not None and typed.replicas is None)


def test_a_refused_worker_leaves_its_reason_where_it_would_log(
    declared: Celery, tmp_path: Path
) -> None:
    """Detached, its terminal is gone, and Celery has not set up logging yet."""
    log = tmp_path / "worker.log"
    with pytest.raises(SystemExit) as caught:
        start(declared, "gpu.T4", logfile=str(log))
    assert caught.value.code == 78
    assert "gw_celery: -Q gpu.T4: no service belongs to this family" in log.read_text()
