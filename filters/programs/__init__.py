"""A filter with its actions, loaded into the kernel."""
