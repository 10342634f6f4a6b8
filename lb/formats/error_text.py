"""An exception -> one line for the operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lb.errors import LbError

if TYPE_CHECKING:  # what imports SQLite waits until a command needs it
    pass


def explain(error: Exception) -> str:
    """One line for the operator: what, and why."""
    if isinstance(error, LbError):
        return str(error)
    if isinstance(error, PermissionError):
        return "not permitted: run as root (CAP_NET_ADMIN and CAP_BPF)"
    if isinstance(error, OSError):
        return f"{error.filename or 'operating system'}: {error.strerror or error}"
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return f"internal error: {words} (set XDP_LB_TRACEBACK=1 for a traceback)"


def is_expected(error: Exception) -> bool:
    return isinstance(error, LbError | OSError)
