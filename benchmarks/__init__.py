"""Load generators and contenders; every script ends with one JSON line. Results are kept in `results/`."""
