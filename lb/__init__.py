"""The public names of the balancer, wherever they lie: `from lb import open_balancer, Vip`.

Each is imported when it is first asked for (PEP 562), so that no command waits for what it does not use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lb.balancer import Balancer, open_balancer
    from lb.client import Client
    from lb.errors import LbError
    from lb.filter_report import Wish as RuleSpec
    from lb.model import Backend, Mode, Service
    from lb.options import Options
    from lb.paths import Paths
    from lb.rules import Action
    from lb.vip import Vip

# Name -> module, and its name there.
_PUBLIC = {
    "Action": ("lb.rules", "Action"),
    "Backend": ("lb.model", "Backend"),
    "Balancer": ("lb.balancer", "Balancer"),
    "Client": ("lb.client", "Client"),
    "LbError": ("lb.errors", "LbError"),
    "Mode": ("lb.model", "Mode"),
    "Options": ("lb.options", "Options"),
    "Paths": ("lb.paths", "Paths"),
    "RuleSpec": ("lb.filter_report", "Wish"),
    "Service": ("lb.model", "Service"),
    "Vip": ("lb.vip", "Vip"),
    "open_balancer": ("lb.balancer", "open_balancer"),
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
