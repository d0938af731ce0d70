"""The paths and names that others hold: in settings, messages, stored results and scripts.

Whatever moves inside of the package, these stay. That every package ships is in
``test_packaging.py``.
"""

from __future__ import annotations

import ast
import configparser
import importlib
import importlib.metadata
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from kombu.utils.imports import symbol_by_name

import gw_celery
from gw_celery import errors
from tests.processes import ROOT, environment

#: Named in settings, entry points and messages.
SYMBOLS = (
    "gw_celery.pool:TaskPool",
    "gw_celery.autoscale:Autoscaler",
    "gw_celery.cli:gw",
    "gw_celery.testing:FakeClock",
    "gw_celery.testing:in_process",
    "gw_celery.testing:worker",
    "gw_celery_django.apps:GWCeleryConfig",
)
#: Stored in results, and caught by callers; with the built-in or Celery class that each also is.
ERRORS = {
    "BlockingCallError": RuntimeError,
    "BodyExited": Exception,
    "CallTimeout": TimeoutError,
    "ConfigurationError": Exception,
    "ContextLookupError": KeyError,
    "DeclarationError": ValueError,
    "GWCeleryError": Exception,
    "MessageTooLarge": ValueError,
    "NotServedError": Exception,
    "PoisonedInput": Exception,
    "QueueTimeExceeded": Exception,
    "RemoteTaskError": Exception,
    "RemoteTraceback": Exception,
    "SerializationError": ValueError,
    "ServerFailed": Exception,
    "ServerNotFound": Exception,
    "StartupError": Exception,
    "UnknownAttribute": AttributeError,
    "UnreadableMessage": ValueError,
    "UsageError": TypeError,
    "WorkerStopped": Exception,
}
FRONT_DOOR = {
    "App",
    "Gpu",
    "Probe",
    "batched",
    "concurrent",
    "current_batch",
    "hold_id",
    "method",
    "on_enter",
    "on_exit",
    "parameter",
    "preset",
    "register_type",
    "BlockingCallError",
    "BodyExited",
    "CallTimeout",
    "ConfigurationError",
    "ContextLookupError",
    "DeclarationError",
    "GWCeleryError",
    "NotServedError",
    "QueueTimeExceeded",
    "RemoteTaskError",
    "RemoteTraceback",
    "SerializationError",
    "ServerFailed",
    "ServerNotFound",
    "StartupError",
    "UsageError",
}
FIXTURES = {"gw_broker", "gw_clock", "gw_fake_gpus", "gw_in_process", "gw_server", "gw_worker"}
SWEEPS = {"gw_celery.probe_sweep", "gw_celery.benchmark_sweep"}
DISPATCH_UIDS = {
    "worker_init": "gw_celery.worker_init",
    "worker_process_init": "gw_celery.process_init",
    "worker_process_shutdown": "gw_celery.process_shutdown",
    "worker_shutdown": "gw_celery.shutdown",
}
COMMANDS = {
    "gw_status": [],
    "gw_drain": [["replica", "int"]],
    "gw_restart": [["replica", "int"]],
    "gw_probe_tick": [],
    "gw_benchmark_tick": [],
}


def in_a_fresh_process(code: str) -> Any:
    """What ``code`` prints as JSON, in an interpreter that has imported nothing."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_a_path_that_settings_name_resolves(symbol: str) -> None:
    assert callable(symbol_by_name(symbol))


def test_the_entry_point_of_the_command_line_is_installed_as_setup_cfg_says() -> None:
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / "setup.cfg")
    assert parsed["options.entry_points"]["celery.commands"].strip() == "gw = gw_celery.cli:gw"
    (entry,) = [
        one
        for one in importlib.metadata.distribution("gw-celery").entry_points
        if one.group == "celery.commands"
    ]
    assert (entry.name, entry.value) == ("gw", "gw_celery.cli:gw")
    assert set(entry.load().commands) >= {"status", "drain", "restart", "worker"}


@pytest.mark.parametrize(
    ("module", "shown"),
    [
        ("gw_celery.devserver", "gw_celery.devserver"),
        ("gw_celery.simulate", "gw_celery.simulate"),
        ("gw_celery.autoscale.simulate", "gw_celery.simulate"),  # an alias
    ],
)
def test_a_module_that_is_run_says_how(module: str, shown: str) -> None:
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: python -m {shown} " in done.stdout


def test_errors_have_their_names_and_are_what_callers_catch() -> None:
    for name, caught in ERRORS.items():
        found = getattr(errors, name)
        assert (found.__module__, found.__qualname__) == ("gw_celery.errors", name)
        assert issubclass(found, caught), name
        assert issubclass(found, errors.GWCeleryError), name


def test_the_front_door_is_what_is_documented() -> None:
    assert set(gw_celery.__all__) == FRONT_DOOR
    assert len(gw_celery.__all__) == len(FRONT_DOOR)


def _facades() -> list[str]:
    """Our packages that say what they export."""
    files = (ROOT / "gw_celery").rglob("__init__.py")
    named = (file for file in files if "\n__all__" in file.read_text())
    return sorted(
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in named
    )


def _imported_or_defined(file: Path) -> set[str]:
    """The public names that a module makes at its top level, other than by ``import x``."""
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("name", _facades())
def test_a_facade_exports_all_that_it_has_and_nothing_else(name: str) -> None:
    module = importlib.import_module(name)
    exported = set(module.__all__)
    assert all(hasattr(module, one) for one in exported)
    file = Path(str(module.__file__))
    made = {
        one
        for one in _imported_or_defined(file)
        if not isinstance(getattr(module, one, None), types.ModuleType)
    }
    assert made == exported


def test_the_public_packages_are_facades() -> None:
    assert {
        "gw_celery",
        "gw_celery.autoscale",
        "gw_celery.codec",
        "gw_celery.pool",
        "gw_celery.testing",
    } <= set(_facades())


def test_the_fixtures_for_users_have_their_names() -> None:
    plugin = importlib.import_module("gw_celery.testing.fixtures")
    kind = type(pytest.fixture(lambda: None))
    assert {name for name, one in vars(plugin).items() if isinstance(one, kind)} == FIXTURES


_DECLARE = """
import json
import celery
import gw_celery as gw
made = celery.Celery("x", broker="memory://")
gw.preset(made)
app = gw.App("x", celery=made)
@app.cls(
    gpu=gw.Gpu("CPU"),
    probes=[gw.Probe.on("is_well")],
)
class Model:
    size: int = gw.parameter(default=1)
    @gw.method(benchmark_dataset=[{"x": 1}])
    def call(self, x): ...
    @gw.method()
    def is_well(self): ...
"""


def test_receivers_have_their_dispatch_uids() -> None:
    code = f"""{_DECLARE}
from celery import signals
receivers = {{name: getattr(signals, name).receivers for name in {[*DISPATCH_UIDS]}}}
print(json.dumps({{name: [one[0][0] for one in receivers[name]] for name in receivers}}))
"""
    uids = in_a_fresh_process(code)
    assert {name: uid for name, uid in DISPATCH_UIDS.items() if uid in uids[name]} == DISPATCH_UIDS


def test_the_tasks_and_entries_of_beat_have_their_names() -> None:
    code = f"""{_DECLARE}
made.finalize()
schedule = {{name: entry["task"] for name, entry in made.conf.beat_schedule.items()}}
print(json.dumps([[name for name in made.tasks if name.startswith("gw_celery.")], schedule]))
"""
    tasks, schedule = in_a_fresh_process(code)
    assert set(tasks) == SWEEPS
    assert schedule == {name: name for name in SWEEPS}


def test_the_command_line_knows_the_control_commands_and_their_arguments() -> None:
    code = """
import json
from gw_celery import cli
from celery.worker.control import Panel
arguments = {name: about.args or () for name, about in Panel.meta.items()}
print(json.dumps({name: [[arg, kind.__name__] for arg, kind in arguments[name]]
                  for name in arguments if name.startswith("gw_")}))
"""
    known = in_a_fresh_process(code)
    assert {name: known.get(name) for name in COMMANDS} == COMMANDS


def test_messages_carry_our_headers_and_serializer() -> None:
    code = f"""{_DECLARE}
Model(size=2).call.delay(1)
with made.connection_for_read() as connection:
    message = connection.default_channel.basic_get("cpu.Model")
headers = {{key: message.headers[key] for key in message.headers if key.startswith("gw")}}
from kombu.serialization import registry
print(json.dumps([headers, message.content_type, registry.type_to_name[message.content_type]]))
"""
    headers, content_type, serializer = in_a_fresh_process(code)
    assert headers == {"gw_params": '{"size":2}'}
    assert (content_type, serializer) == ("application/x-gw-json", "gw-json")


@pytest.mark.parametrize(
    ("declared", "header"),
    [("workload_calculator=lambda x: 2.0", "gw-workload"), ("max_queue_time=5.0", "gw-enqueued")],
)
def test_what_a_service_declares_travels_in_its_header(declared: str, header: str) -> None:
    code = f"""{_DECLARE}
@app.remote(gpu=gw.Gpu("CPU"), {declared})
async def work(x): ...
work.delay(1)
with made.connection_for_read() as connection:
    message = connection.default_channel.basic_get("cpu.work")
print(json.dumps([key for key in message.headers if key.startswith("gw")]))
"""
    assert in_a_fresh_process(code) == [header]
