"""Python code from the .proto files: `python proto/generate.py [DIRECTORY]`; without one, where the server has it.

protoc writes imports for files that lie where their package says. Ours lie in `service.rpc.pb`, so that
one import line is put right.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).parent
SOURCE = "rdt/v1/denoiser.proto"
PB = PROTO.parent / "service" / "rpc" / "pb"


def generate(directory: Path) -> None:
    """Raises `RuntimeError` if protoc fails; it has said why."""
    with tempfile.TemporaryDirectory() as made:
        outputs = [f"--{kind}_out={made}" for kind in ("python", "pyi", "grpc_python")]
        if protoc.main(["protoc", f"-I{PROTO}", f"-I{files('grpc_tools') / '_proto'}", *outputs, SOURCE]) != 0:
            raise RuntimeError(f"protoc failed on {SOURCE}")
        for path in Path(made, SOURCE).parent.iterdir():
            code = path.read_text(encoding="utf-8").replace("from rdt.v1 import", "from service.rpc.pb import")
            (directory / path.name).write_text(code, encoding="utf-8")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PB)
