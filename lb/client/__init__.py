"""The API from Python, and the choice between this host and its daemon."""
