"""-Z: another user than root for what is left to do once the capture runs.

The capabilities that reading and detaching a capture take are kept; there is nothing else of root's that is.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import struct

from filters.errors import DumpError

_PR_SET_KEEPCAPS = 8  # <linux/prctl.h>
_VERSION_3 = 0x20080522  # <linux/capability.h>
_CAPTURE = sum(1 << number for number in (12, 38, 39))  # CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF


def drop_privileges(user: str, *, keep_capture: bool) -> None:
    """Does nothing for one who is not root. Raises DumpError with tcpdump's words."""
    if os.getuid() != 0:
        return
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise DumpError(f"Couldn't find user '{user}'") from None
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        os.initgroups(user, entry.pw_gid)
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        if keep_capture:
            _checked(libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0))
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
        if keep_capture and entry.pw_uid:
            low, high = _CAPTURE & 0xFFFFFFFF, _CAPTURE >> 32
            sets = struct.pack("=6I", low, low, 0, high, high, 0)  # effective, permitted, inheritable
            _checked(libc.capset(struct.pack("=Ii", _VERSION_3, 0), sets))
    except OSError as error:
        raise DumpError(f"Couldn't change to '{user}': {error.strerror}") from error


def _checked(status: int) -> None:
    if status < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
