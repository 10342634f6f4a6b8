"""The SQLite store of the desired state, and the writers' lock."""
