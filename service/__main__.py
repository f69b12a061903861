"""`python -m service` is `rdt-serve`."""

import sys

from service.cli import serve

sys.exit(serve())
