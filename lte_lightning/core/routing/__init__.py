"""Routing: losses, statistics, calibration."""
