"""Filter rules: specified, compiled, attached."""
