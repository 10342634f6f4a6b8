"""Scripts of health checks, which the daemon runs as root: only files that nobody else can change."""

from __future__ import annotations

from lb.errors import InvalidInput
from lb.host.trusted_file import fault_of_program
from lb.model.health_check import HealthCheck, Kind
from lb.model.state import Service, State


def check_scripts(before: State, goal: State) -> None:
    """Those that were set before are looked at when they run. Raises InvalidInput."""
    with_scripts = [(service, check) for service in goal.services if (check := _script_of(service))]
    if not with_scripts:
        return
    known = {service.vip: service.options.health for service in before.services}
    for service, check in with_scripts:
        if known.get(service.vip) != check and (fault := fault_of_program(check.command[0])):
            raise InvalidInput(f"vip {service}: health check script {fault}")


def _script_of(service: Service) -> HealthCheck | None:
    check = service.options.health
    return check if check and check.kind is Kind.SCRIPT else None
