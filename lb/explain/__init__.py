"""A packet sent through the program in force, and why it went where it went."""
