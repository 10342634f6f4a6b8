"""Health checks: one check, the engine that runs them, the path they take, their state over restarts."""
