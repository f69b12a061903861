"""bfloat16 where the device computes it natively."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(device: torch.device, wanted: bool = True) -> AbstractContextManager[object]:
    """bfloat16 if wanted and native; emulated, it would only be slower."""
    if wanted and has_bfloat16(device):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # before Ampere it is emulated
    return device.type == "cpu" and cpu_has_bfloat16()


def cpu_has_bfloat16() -> bool:
    """AMX or AVX-512 with its products: 1.7 to 2.3 times as fast as float32, see `benchmarks.training`."""
    known: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch this runs on
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))
