"""Test frames, the kernel's classic BPF as the reference, and the comparison."""
