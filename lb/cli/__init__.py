"""The command line: words -> one call -> lines."""
