"""RDT, the model: packed recursive encoder, gate, masking, tokenizer, checkpoint, reference inference.

Needs torch, tokenizers and numpy; knows nothing of the service or the trainer.
"""

from rdt_core.checkpoint import Checkpoint, CheckpointError, LoadedModel
from rdt_core.config import PRESETS, ModelConfig
from rdt_core.inference import Restoration, restore
from rdt_core.model import RDT, State
from rdt_core.packing import Packing, pack, unpack
from rdt_core.tokenizer import Encoding, Tokenizer

__all__ = [
    "PRESETS",
    "RDT",
    "Checkpoint",
    "CheckpointError",
    "Encoding",
    "LoadedModel",
    "ModelConfig",
    "Packing",
    "Restoration",
    "State",
    "Tokenizer",
    "pack",
    "restore",
    "unpack",
]
