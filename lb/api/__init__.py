"""The HTTP API: routes, bodies, who may do what."""
