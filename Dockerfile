# One file for CPU and CUDA: the build of torch is the only difference. Needs Docker 23 or newer.
#
#   docker build --build-arg TORCH_INDEX_URL=URL .   CPU, the default; URL is the index of CPU wheels that PyTorch's
#                                                    install page names (not needed where pip finds them already)
#   docker build --build-arg TORCH=cuda .            CUDA, as pip's usual index has it; TORCH_INDEX_URL chooses another
#   docker build --target training ...                 with what training needs; everything else is shared
#   docker build --build-arg EXTRAS=service,otel ...   more of the project's extras
#
# A torch of the wrong kind fails the build: a CPU image never pulls the gigabytes of CUDA by accident.

FROM python:3.11-slim-bookworm AS python
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore


# What to install, and nothing else of the project: a layer below is built again only when its own list changes.
FROM python AS lists
ARG EXTRAS=service
COPY pyproject.toml constraints.txt /project/
WORKDIR /lists
RUN <<LISTS
python - "$EXTRAS" <<'PYTHON'
import sys, tomllib
from pathlib import Path

project = tomllib.loads(Path("/project/pyproject.toml").read_text())["project"]
extras, pins = project["optional-dependencies"], Path("/project/constraints.txt").read_text()


def wanted(extra):  # one may ask for another, by a project name that elsewhere is somebody else's
    for line in extras[extra]:
        yield from wanted(line[4:-1]) if line.startswith("rdt[") else [line]


asked_for = {"service", *sys.argv[1].split(",")}
lists = {
    "torch.txt": [line for line in pins.splitlines() if line.startswith("torch==")],
    "constraints.txt": pins.splitlines(),
    "service.txt": project["dependencies"] + sorted({line for extra in asked_for for line in wanted(extra)}),
    "training.txt": extras["training"],
}
for name, lines in lists.items():
    Path(name).write_text("\n".join(lines) + "\n")
PYTHON
LISTS


FROM python AS dependencies
RUN python -m venv --without-pip /opt/rdt
ARG TORCH=cpu
ARG TORCH_INDEX_URL=
COPY --from=lists /lists/torch.txt /lists/
# "+cpu" is found on an index of CPU wheels alone; "===" is the build without a suffix, which is CUDA's.
# Headers, static libraries and tests serve those who build against torch: nobody does here.
RUN <<TORCH
set -eu
pin=$(cat /lists/torch.txt)
case "$TORCH,${TORCH_INDEX_URL:+index}" in
    cpu,*) pin="$pin+cpu" ;;
    cuda,) pin="torch===${pin#torch==}" ;;
    cuda,index) ;;
    *) echo "TORCH is '$TORCH': want cpu or cuda" >&2; exit 1 ;;
esac
set -- "$pin" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
python -m pip --python /opt/rdt/bin/python install --no-deps "$@" || {
    echo "No $pin was found. CPU: pass --build-arg TORCH_INDEX_URL=URL (with compose, set TORCH_CPU_INDEX_URL=URL)," >&2
    echo "the index of CPU wheels that PyTorch's install page names. CUDA: pass --build-arg TORCH=cuda." >&2
    exit 1
}
cd /opt/rdt/lib/python3.11/site-packages/torch
rm -rf include share test bin/test_* bin/*_test bin/protoc*
find . -name '*.a' -delete
TORCH
COPY --from=lists /lists/constraints.txt /lists/service.txt /lists/
RUN python -m pip --python /opt/rdt/bin/python install -c /lists/constraints.txt -r /lists/service.txt \
    && find /opt/rdt/lib -type d -name tests -prune -exec rm -rf {} + \
    && /opt/rdt/bin/python -c "from torch.version import cuda; assert bool(cuda) == ('$TORCH' == 'cuda'), cuda"


# The wheel is built in an environment of its own, which takes constraints from variables alone: older pips from the
# first, newer ones from the second.
FROM python AS package
ENV PIP_CONSTRAINT=/project/constraints.txt PIP_BUILD_CONSTRAINT=/project/constraints.txt
COPY pyproject.toml constraints.txt README.md LICENSE /project/
COPY rdt_core /project/rdt_core
COPY service /project/service
COPY training /project/training
RUN python -m pip wheel --no-deps --wheel-dir /dist /project


# No header, no compiler, no pip of its own. Modules were compiled on installing, so the root file system may be
# read-only; torch wants a /tmp that is not.
FROM python AS runtime
ENV PATH=/opt/rdt/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN useradd --system --uid 10001 --user-group --home-dir /tmp --no-create-home --shell /usr/sbin/nologin rdt \
    && install --directory --owner rdt --group rdt /models /logs /cache
COPY --from=dependencies /opt/rdt /opt/rdt
WORKDIR /app
COPY models/rdt-small models/rdt-small


FROM runtime AS training
RUN --mount=from=lists,source=/lists,target=/lists \
    /usr/local/bin/python -m pip --python /opt/rdt/bin/python install -c /lists/constraints.txt -r /lists/training.txt
RUN --mount=from=package,source=/dist,target=/dist \
    /usr/local/bin/python -m pip --python /opt/rdt/bin/python install --no-deps /dist/*.whl
COPY training/configs /configs
USER rdt
ENTRYPOINT ["rdt-train"]
CMD ["--help"]


FROM runtime AS service
RUN --mount=from=package,source=/dist,target=/dist \
    /usr/local/bin/python -m pip --python /opt/rdt/bin/python install --no-deps /dist/*.whl
ENV RDT_HOST=0.0.0.0
USER rdt
EXPOSE 8000 50051
# Ready rather than live: being unhealthy restarts nothing, it tells `up --wait` and dependents when requests are taken.
# A process that cannot recover ends by itself, and the restart policy acts on that.
HEALTHCHECK --interval=5s --timeout=4s --start-period=2m --retries=3 CMD ["python", "-I", "-S", "-c", \
    "import http.client, os; \
    probe = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('RDT_HTTP_PORT', 8000)), timeout=3); \
    probe.request('GET', '/health/ready'); \
    raise SystemExit(probe.getresponse().status != 200)"]
ENTRYPOINT ["rdt-serve"]
