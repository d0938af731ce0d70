"""Health probes of a class task, in Kubernetes' three kinds. Every process loads it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping

from gw_celery import errors
from gw_celery.declare import check

KINDS = ("startup", "liveness", "readiness")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """A method that a replica calls on a schedule to check its health; made by ``Probe.on``.

    A probe fails if the method raises, times out, returns ``False``, or returns a mapping whose
    ``ok`` is falsy.
    """

    method: str
    kind: str
    period_s: float
    timeout_s: float
    failures: int

    @classmethod
    @check.knows_its_keywords("gw.Probe.on")
    def on(
        cls,
        /,
        method: str,
        kind: str = "liveness",
        period_s: float = 30,
        timeout_s: float = 5,
        failures: int = 3,
    ) -> Probe:
        """Declare a probe on a method of the class.

        Args:
            method: name of a ``@gw.method()`` that needs no arguments.
            kind: ``"startup"``: the replica becomes READY only once it passes; ``"liveness"``: a
                failure replaces the child; ``"readiness"``: while it fails, the replica takes no
                inputs of the service.
            period_s: seconds between two calls, over 0.
            timeout_s: seconds after which a call counts as failed, over 0.
            failures: consecutive failures after which the replica acts, 1 or more.

        Returns:
            The probe, for the ``probes`` argument of ``@app.cls``.

        Raises:
            DeclarationError: for an unknown kind, or a number out of range.
        """
        if not isinstance(method, str) or not method:
            raise errors.DeclarationError("method", method, "must be the name of a method")
        if kind not in KINDS:
            raise errors.DeclarationError("kind", kind, f"must be one of {', '.join(KINDS)}")
        return cls(
            method=method,
            kind=kind,
            period_s=check.positive("period_s", period_s),
            timeout_s=check.positive("timeout_s", timeout_s),
            failures=check.integer("failures", failures, 1),
        )


def require_methods(probes: object, methods: Mapping[str, inspect.Signature]) -> tuple[Probe, ...]:
    """Return ``probes`` as a tuple if each is unique and calls one of ``methods``."""
    listed = tuple(probes) if isinstance(probes, list | tuple) else None
    if listed is None or not all(isinstance(probe, Probe) for probe in listed):
        raise errors.DeclarationError("probes", probes, "must be a list of gw.Probe.on(...)")
    seen: set[tuple[str, str]] = set()
    for probe in listed:
        if probe.method not in methods:
            raise errors.DeclarationError(
                "probes",
                probe.method,
                f"names no @gw.method() of the class; it has: {', '.join(sorted(methods)) or '-'}",
            )
        try:
            methods[probe.method].bind()
        except TypeError as exc:
            raise errors.DeclarationError(
                "probes", probe.method, f"is called without arguments by the probe: {exc}"
            ) from exc
        if (probe.method, probe.kind) in seen:
            raise errors.DeclarationError(
                "probes", probe.method, f"is a {probe.kind} probe twice: keep one of the two"
            )
        seen.add((probe.method, probe.kind))
    return listed
