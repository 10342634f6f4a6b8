"""The errors of filters. Each message names the thing and what to do.

FilterError
├── ExpressionError       libpcap does not understand the expression; the message is what tcpdump would print
├── InvalidFilter         a classic program that the kernel would refuse
├── UnsupportedPrimitive  the filter asks for something that the hook cannot answer
├── TooLong               the filter does not fit into one eBPF program
├── InvalidSet            a file of prefixes that cannot be read or has a line that is none
├── SelftestFailed        the translated program answers otherwise than the kernel's own classic BPF
└── DumpError             a capture cannot begin or go on: an interface, a file; the message is what tcpdump would print
    ├── DamagedFile       a file ends within a packet, or breaks the rules of its format; what came before is intact
    └── NotWritten        the disk is full, or the like; what was written before it is intact
"""


class FilterError(Exception):
    """Base of everything this package raises on purpose."""


class ExpressionError(FilterError):
    pass


class InvalidFilter(FilterError):
    pass


class UnsupportedPrimitive(FilterError):
    pass


class TooLong(FilterError):
    pass


class InvalidSet(FilterError):
    pass


class SelftestFailed(FilterError):
    pass


class DumpError(FilterError):
    pass


class DamagedFile(DumpError):
    pass


class NotWritten(DumpError):
    """`written`: how many records of the last call are in the file."""

    def __init__(self, message: str, written: int) -> None:
        super().__init__(message)
        self.written = written
