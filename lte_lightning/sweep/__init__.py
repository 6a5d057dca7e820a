"""Sweeps: the fits of a comparison, their runners, their outcomes."""
