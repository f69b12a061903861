"""Load generators and contenders; every script ends with one JSON line. Results are kept in `results/`."""

from pathlib import Path

BUNDLED = Path("models/rdt-small/best_model.pt")
