"""The command line of xdp-dump."""
