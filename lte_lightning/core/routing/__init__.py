"""What the routers decide: losses, statistics, calibration."""
