"""The CPU backend: C++ sources, the code that builds and finds their library, and its operators."""
