"""The errors of the kernel side. Each message names the thing and what to do.

XdpError
├── LoadError             a program or its maps cannot be loaded
│   └── CannotCarry       what the maps in force hold has no place in those of another version
├── MapError              a map cannot be read or written
├── AttachError           a program cannot be put on an interface or taken off
│   ├── NoSuchInterface   the interface is not there (any more)
│   └── Occupied          the interface runs a program of someone else
├── NotPermitted          the process lacks a capability
└── NotSupported          this kernel, or this driver, has no such feature
"""


class XdpError(Exception):
    """Base of everything this package raises on purpose."""


class LoadError(XdpError):
    pass


class CannotCarry(LoadError):
    pass


class MapError(XdpError):
    pass


class AttachError(XdpError):
    pass


class NoSuchInterface(AttachError):
    pass


class Occupied(AttachError):
    pass


class NotPermitted(XdpError):
    pass


class NotSupported(XdpError):
    pass
