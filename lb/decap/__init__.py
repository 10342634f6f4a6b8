"""Decapsulation of tunnelled packets on a backend."""
