#!/usr/bin/env bash
# Everything that wants a card, in under eight minutes, on a machine that has torch, numpy and tokenizers and no more.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1

"$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no card")'
if "$PYTHON" -c 'import pytest, hypothesis, pytest_asyncio' 2> /dev/null; then
    timeout 120 "$PYTHON" -m pytest -m gpu tests/rdt_core tests/service/test_cuda_graph.py || [ $? = 5 ]
else
    echo "pytest is not here: the tests marked gpu are left out"
fi
timeout 330 "$PYTHON" -m benchmarks.gpu "$@"
timeout 90 "$PYTHON" -m benchmarks.training --steps 20 training.batch_size=64 || echo "no figures of training"
