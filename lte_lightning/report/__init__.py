"""What sweeps and runs found, as pictures and one page that people look at."""
