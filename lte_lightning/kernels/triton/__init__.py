"""The Triton backend: kernels for one token, few and many, and their operators."""
