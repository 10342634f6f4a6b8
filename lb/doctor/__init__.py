"""Facts of a host -> findings."""
