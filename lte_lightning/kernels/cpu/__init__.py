"""The CPU backend: C++ source, how it is built and found, its operator."""
