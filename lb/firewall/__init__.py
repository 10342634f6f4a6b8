"""Filter rules: asked for, compiled, attached."""
