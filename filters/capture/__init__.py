"""The programs of a capture, and where they are attached."""
