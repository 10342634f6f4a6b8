"""What the operator asked for and what is reported, as values."""
