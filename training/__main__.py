"""`python -m training` is `rdt-train`."""

import sys

from training.commands import train

sys.exit(train())
