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
SOURCES = {"rdt/v1/denoiser.proto": ("python", "pyi", "grpc_python"), "open_inference.proto": ("python", "pyi")}
"""What is made of each. Clients of the Open Inference Protocol have their own stubs."""
PB = PROTO.parent / "service" / "rpc" / "pb"


def generate(directory: Path) -> None:
    """Raises `RuntimeError` if protoc fails; it has said why."""
    for source, kinds in SOURCES.items():
        with tempfile.TemporaryDirectory() as made:
            outputs = [f"--{kind}_out={made}" for kind in kinds]
            if protoc.main(["protoc", f"-I{PROTO}", f"-I{files('grpc_tools') / '_proto'}", *outputs, source]) != 0:
                raise RuntimeError(f"protoc failed on {source}")
            for path in Path(made, source).parent.iterdir():
                code = path.read_text(encoding="utf-8").replace("from rdt.v1 import", "from service.rpc.pb import")
                (directory / path.name).write_text(code, encoding="utf-8")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PB)
