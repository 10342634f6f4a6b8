"""The desired state and reports, as values."""
