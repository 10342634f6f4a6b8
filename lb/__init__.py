"""The public names of the balancer, wherever they lie: `from lb import open_balancer, Vip`.

Each is imported when it is first asked for (PEP 562), so that no command waits for what it does not use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lb.client.client import Client
    from lb.control.balancer import Balancer
    from lb.control.open import open_balancer
    from lb.errors import LbError
    from lb.model.options import Options
    from lb.model.rule_report import RuleSpec
    from lb.model.rules import Action
    from lb.model.state import Backend, Mode, Service
    from lb.model.vip import Vip
    from lb.paths import Paths

# Name -> module, and its name there.
_PUBLIC = {
    "Action": ("lb.model.rules", "Action"),
    "Backend": ("lb.model.state", "Backend"),
    "Balancer": ("lb.control.balancer", "Balancer"),
    "Client": ("lb.client.client", "Client"),
    "LbError": ("lb.errors", "LbError"),
    "Mode": ("lb.model.state", "Mode"),
    "Options": ("lb.model.options", "Options"),
    "Paths": ("lb.paths", "Paths"),
    "RuleSpec": ("lb.model.rule_report", "RuleSpec"),
    "Service": ("lb.model.state", "Service"),
    "Vip": ("lb.model.vip", "Vip"),
    "open_balancer": ("lb.control.open", "open_balancer"),
}

__all__ = [
    "Action",
    "Backend",
    "Balancer",
    "Client",
    "LbError",
    "Mode",
    "Options",
    "Paths",
    "RuleSpec",
    "Service",
    "Vip",
    "open_balancer",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, found = _PUBLIC[name]
    return getattr(import_module(module), found)
