"""Which package may import what, read from the sources, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
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


@cache
def imports(path: Path) -> set[str]:
    """Dotted names of everything the file imports, wherever in the file it does."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            names.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
    return names


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
        names = imports(path)
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
        names = imports(path)
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


def loaded(*statements: str) -> list[set[str]]:
    """The modules that are there after each of these, in a process of their own."""
    script = "import sys\n" + "".join(f"{statement}\nprint(*sys.modules)\n" for statement in statements)
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return [set(line.split()) for line in run.stdout.splitlines()]


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_what_an_import_pulls_in() -> None:
    """A compiler takes a second and 70 MB, and torch imports it for things as small as random values on `meta`. FastAPI
    brings the API of OpenTelemetry along; what costs, and ours, is what must not be there.
    """
    core, model, server = loaded(
        "import rdt_core",
        "rdt_core.checkpoint.load('models/rdt-small/best_model.pt')",
        "import service.runtime; service.tracing.opening.open_tracer(None)",
    )
    assert "rdt_core" in core
    assert not packages(core) & {"fastapi", "pydantic", "transformers", "service", "training"}
    assert "torch" in model
    assert not model & {"torch._dynamo", "torch._inductor", "sympy"}
    assert {"service.runtime", "service.tracing"} <= server
    assert not packages(server) & {"ray", "transformers", "datasets", "matplotlib", "tensorboard", "training"}
    assert not server & {"opentelemetry.sdk", "opentelemetry.exporter", "service.tracing.otel"}


def test_callers_need_little() -> None:
    (client,) = loaded("import service.client")
    assert "service" in packages(client)
    assert not packages(client) & {"torch", "fastapi", "tokenizers", "grpc"}


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
