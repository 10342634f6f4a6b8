"""The daemon's process: listener, systemd, tasks."""
