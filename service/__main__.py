"""`python -m service` is `rdt-serve`."""

import sys

from service.commands import serve

sys.exit(serve())
