"""An XDP load balancer. What programs use of it is imported from here:

    from lb import Backend, Paths, Vip, open_balancer

Each name is imported from its module when it is first asked for, so that a command pays only for what it uses.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lb.client.client import Client
    from lb.control.balancer import Balancer
    from lb.control.open import open_balancer
    from lb.errors import (
        AlreadyExists,
        Busy,
        Conflict,
        DaemonError,
        DataplaneError,
        InvalidInput,
        LbError,
        NoRoute,
        NotFound,
        PruneRequired,
        StoreError,
    )
    from lb.firewall.firewall import Firewall, open_firewall
    from lb.model.health_check import HealthCheck
    from lb.model.options import Options
    from lb.model.report import Report, Status
    from lb.model.rule_report import ApplyOptions, FilterReport, RuleSpec
    from lb.model.rules import Action, At, Rate, Rule
    from lb.model.state import Backend, Interface, Mode, Service, State, XdpMode
    from lb.model.vip import Vip
    from lb.paths import Paths

_MODULES = {
    "lb.client.client": ("Client",),
    "lb.control.balancer": ("Balancer",),
    "lb.control.open": ("open_balancer",),
    "lb.errors": (
        "AlreadyExists",
        "Busy",
        "Conflict",
        "DaemonError",
        "DataplaneError",
        "InvalidInput",
        "LbError",
        "NoRoute",
        "NotFound",
        "PruneRequired",
        "StoreError",
    ),
    "lb.firewall.firewall": ("Firewall", "open_firewall"),
    "lb.model.health_check": ("HealthCheck",),
    "lb.model.options": ("Options",),
    "lb.model.report": ("Report", "Status"),
    "lb.model.rule_report": ("ApplyOptions", "FilterReport", "RuleSpec"),
    "lb.model.rules": ("Action", "At", "Rate", "Rule"),
    "lb.model.state": ("Backend", "Interface", "Mode", "Service", "State", "XdpMode"),
    "lb.model.vip": ("Vip",),
    "lb.paths": ("Paths",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Action",
    "AlreadyExists",
    "ApplyOptions",
    "At",
    "Backend",
    "Balancer",
    "Busy",
    "Client",
    "Conflict",
    "DaemonError",
    "DataplaneError",
    "FilterReport",
    "Firewall",
    "HealthCheck",
    "Interface",
    "InvalidInput",
    "LbError",
    "Mode",
    "NoRoute",
    "NotFound",
    "Options",
    "Paths",
    "PruneRequired",
    "Rate",
    "Report",
    "Rule",
    "RuleSpec",
    "Service",
    "State",
    "Status",
    "StoreError",
    "Vip",
    "XdpMode",
    "open_balancer",
    "open_firewall",
]


def __getattr__(name: str) -> Any:
    """PEP 562."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
