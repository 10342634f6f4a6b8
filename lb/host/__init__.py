"""The Linux host: routes, neighbours, interfaces, capabilities and the SSH session."""
