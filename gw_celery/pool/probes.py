"""Orders probes from the children, and acts on the answers, in the worker's parent.

The pool's loop calls it, by each probe's own period, with or without beat. It needs no broker.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from gw_celery.declare import services
from gw_celery.policy.probes import Answer, Check, Checks, Consequence
from gw_celery.pool import replica
from gw_celery.pool.child_process import ChildProcess
from gw_celery.protocol import frames
from gw_celery.worker.plan import Plan

if TYPE_CHECKING:
    from gw_celery.pool import supervisor

logger = logging.getLogger(__name__)

#: Golden ratio: the fractional parts of its multiples spread the replicas evenly over a period.
_GOLDEN = 0.6180339887498949
#: Minimum part of a period between two calls.
_LEAST_PHASE = 0.1


class ChildProbes:
    """The probes of all children.

    Args:
        plan: names the probes of the services.
        supervisor: holds the children; it advances those that have started, and ends ill ones.
    """

    def __init__(self, plan: Plan, supervisor: supervisor.Supervisor) -> None:
        #: Time at which ``call_due`` has something to do.
        self.next_at = math.inf
        self._declared = plan.probes
        self._services = plan.slots.keys() - {services.PLAIN}
        self._supervisor = supervisor
        self._calls = 0

    def expect_changes(self) -> None:
        """Make the next ``call_due`` check every child, because one may have a new state."""
        self.next_at = -math.inf if self._declared else math.inf

    def call_due(self, now: float) -> None:
        """Call the probes that are due, and count overdue answers; after reports were read."""
        for child in self._supervisor.children():
            checks = self._checks_of(child, now)
            if checks is None:
                continue
            for check, consequence in checks.overdue(now):
                self._act_on(child, check, consequence, now)
                if child not in self._supervisor.children():
                    break
            else:
                for check in checks.due(now):
                    self._calls += 1
                    check.called(self._calls, now)
                    call = (self._calls, check.service, check.probe.method)
                    child.send((frames.Order.PROBE, *call))
        all_checks = (child.checks for child in self._supervisor.children())
        dues = (checks.next_at for checks in all_checks if checks is not None)
        self.next_at = min(dues, default=math.inf)

    def have_started(self, child: ChildProcess, now: float) -> bool:
        """Return whether a child's startup probes have passed; this starts the calls."""
        self.expect_changes()
        checks = self._checks_of(child, now)
        return checks is None or checks.have_started

    def follow(self, child: ChildProcess, report: frames.ReportFields, now: float) -> None:
        self.expect_changes()
        _, call, is_ok, detail, seconds = report
        check = None if child.checks is None else child.checks.find(call)
        if check is not None:
            answer = Answer(is_ok=is_ok, detail=detail, seconds=seconds)
            self._act_on(child, check, check.answered(answer), now)

    def unready(self) -> set[str]:
        """Return the services that are not ready in any loaded child."""
        up = [child.slots.unready for child in self._supervisor.children() if child.state.is_up]
        return set.intersection(*up) if up else set()

    def _checks_of(self, child: ChildProcess, now: float) -> Checks | None:
        """Return a child's probes, adapted to its state; ``None`` while it loads."""
        state, checks = child.state.current, child.checks
        if checks is None:
            if self._declared and state is replica.State.PROBING:
                # Spread the calls, so that the replicas are called one after the other.
                part = (child.number + 1) * _GOLDEN % 1.0
                phase = _LEAST_PHASE + (1.0 - _LEAST_PHASE) * part
                checks = child.checks = Checks(self._declared, phase)
                checks.start(now)
                # Services with a readiness probe are not ready until it has passed once.
                child.slots.unready = checks.unready
        elif state is replica.State.DRAINING:
            if child.is_leaving:
                checks.end()
            else:
                checks.drain()
        elif child.state.is_up:
            wants = bool(self._services - child.slots.unready)
            # A second benchmark may have made the child READY again meanwhile.
            if checks.serve(now) or wants is not child.state.is_ready:
                self._fit(child, now)
        return checks

    def _act_on(
        self, child: ChildProcess, check: Check, consequence: Consequence, now: float
    ) -> None:
        name = f"its {check.probe.kind} probe {check.name}"
        detail = (check.last.detail if check.last is not None else "") or "no reason given"
        why = f"{name} failed ({check.failures} of {check.probe.failures} in a row: {detail})"
        if 0 < check.failures <= check.probe.failures:
            logger.warning("%r failed a probe: %s", child, why)
        if consequence is Consequence.STARTED:
            self._supervisor.advance(child, now)
        elif consequence in (Consequence.CANNOT_START, Consequence.REPLACE):
            if consequence is Consequence.REPLACE:
                child.is_unfit, child.is_ill = not check.has_passed, True
            # Kill it: an ill child may not obey an order to leave, and its inputs must run
            # elsewhere.
            child.reason = why
            self._supervisor.end(child, f"Worker exited prematurely: {why}.")
        elif consequence is Consequence.NOT_READY:
            logger.error("%r takes no inputs of %s until %s passes", child, check.service, name)
            self._fit(child, now)
        elif consequence is Consequence.READY:
            logger.info("%r takes inputs of %s: %s passes", child, check.service, name)
            self._fit(child, now)

    def _fit(self, child: ChildProcess, now: float) -> None:
        unready = set() if child.checks is None else child.checks.unready
        child.slots.unready = unready
        child.state.wants_inputs(now, bool(self._services - unready))
        self._supervisor.pool.slots_changed()
