"""What Linux says of routes, neighbours, interfaces, capabilities and the SSH session."""
