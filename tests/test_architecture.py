"""Which package may import what, read from the sources, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("rdt_core", "service", "training")
MAX_LINES = 400
HTTP = {"fastapi", "starlette", "uvicorn"}
RPC = {"grpc", "grpc_health", "grpc_reflection", "grpc_status"}

MAY_IMPORT = {
    "rdt_core": {"rdt_core", "torch", "tokenizers", "numpy"},
    "training": None,  # anything but the server
    "service": None,
}
NEVER_IMPORTS = {"rdt_core": {"service", "training"}, "training": {"service"}, "service": {"training"}}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything the file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_level(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)} - sys.stdlib_module_names


@pytest.mark.parametrize("package", OURS)
def test_packages_keep_to_their_edges(package: str) -> None:
    for path in sources(package):
        names = top_level(path)
        allowed = MAY_IMPORT[package]
        assert allowed is None or names <= allowed, f"{path} imports {names - allowed}"
        assert not names & NEVER_IMPORTS[package], f"{path} imports {names & NEVER_IMPORTS[package]}"


COMPUTES = ("backends", "batch_halting", "cuda_graph", "eager", "lookahead", "memory", "reference", "static_batch")
"""Modules of the engine that know the model; the others are logic."""


def test_the_engines_logic_knows_no_torch_and_no_transport() -> None:
    modules = {path.stem: path for path in sources("service/engine")}
    assert set(COMPUTES) < set(modules)
    for name, path in modules.items():
        assert not top_level(path) & ({*RPC, *HTTP} | (set() if name in COMPUTES else {"torch", "rdt_core"})), name


def test_http_stays_in_rest() -> None:
    for path in sources("service"):
        relative = path.relative_to(ROOT / "service")
        if relative.parts[0] == "rest":
            continue
        names = set(imports(path))
        assert "HTTPException" not in path.read_text(encoding="utf-8"), relative
        allowed = {"runtime.py": {"uvicorn"}, "proxy.py": {"starlette"}}.get(relative.name, set())
        assert not top_level(path) & (HTTP - allowed), relative
        if any(name.startswith("service.rest") for name in names):
            assert relative.name in {"runtime.py", "cli.py", "client.py"} or on_ray(relative), relative


def test_grpc_stays_in_rpc() -> None:
    for path in sources("service"):
        relative = path.relative_to(ROOT / "service")
        if relative.parts[0] == "rpc":
            assert not top_level(path) & HTTP, relative
            continue
        names = set(imports(path))
        assert not top_level(path) & (RPC - {"grpc"} if on_ray(relative) else RPC), relative
        assert not any(name.startswith("google.") for name in names), relative
        if any(name.startswith("service.rpc") for name in names):
            assert relative.name == "runtime.py" or on_ray(relative), relative


def on_ray(relative: Path) -> bool:
    """A composition root of its own, which puts both transports behind Serve's proxies."""
    return relative.parts[0] == "ray_serve"


def test_ray_stays_in_its_room() -> None:
    for path in sources("service"):
        relative = path.relative_to(ROOT / "service")
        if not on_ray(relative):
            assert "ray" not in top_level(path), relative
            assert not any(name.startswith("service.ray_serve") for name in imports(path)), relative


def test_the_engine_and_the_use_case_know_no_transport() -> None:
    for path in [*sources("service/engine"), ROOT / "service" / "denoiser.py"]:
        assert not any(name.startswith(("service.rest", "service.rpc")) for name in imports(path)), path


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("rdt_core", {"fastapi", "pydantic", "transformers", "service", "training"}),
        ("service.runtime", {"ray", "transformers", "datasets", "matplotlib", "tensorboard", "training"}),
        ("service.client", {"torch", "fastapi", "tokenizers", "grpc"}),
    ],
)
def test_what_an_import_pulls_in(module: str, unwanted: set[str]) -> None:
    script = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert module.partition(".")[0] in run.stdout.split()
    assert not set(run.stdout.split()) & unwanted


def test_loading_pulls_in_no_compiler() -> None:
    """It takes a second and 70 MB, and torch imports it for things as small as random values on `meta`."""
    script = "import sys; from rdt_core import checkpoint; checkpoint.load(sys.argv[1]); print(*sys.modules)"
    checkpoint = ROOT / "models/rdt-small/best_model.pt"
    run = subprocess.run(
        [sys.executable, "-c", script, str(checkpoint)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not set(run.stdout.split()) & {"torch._dynamo", "torch._inductor", "sympy"}


def test_the_engines_words_are_the_models() -> None:
    from rdt_core import config, halting  # noqa: PLC0415 - other tests here measure imports
    from service.engine import types  # noqa: PLC0415

    assert types.Halting == config.Halting
    assert types.HaltReason == halting.HaltReason


def test_files_are_rooms_not_warehouses() -> None:
    for package in (*OURS, "tests"):
        for path in sources(package):
            if "pb" in path.parts:  # generated
                continue
            n_lines = len(path.read_text(encoding="utf-8").splitlines())
            assert n_lines <= MAX_LINES, f"{path} has {n_lines} lines"
