"""The report: the results of sweeps and runs as pictures and one page."""
