"""The configuration of a training run, checked before anything runs. `config_file` reads it.

Every field below is a YAML key of its section. An unknown key or a bad value is a `ConfigError`, one
line that names the key, the value and what is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from rdt_core.checkpoint import checked_name
from rdt_core.config import CHOICES
from rdt_core.masking import SCHEDULES


class ConfigError(ValueError):
    """A setting that does not exist or has a value out of its range."""


def one_line(error: Exception | str) -> str:
    """What a library says is wrong, for the end of a message of ours."""
    return " ".join(str(error).split())


@contextmanager
def can_be_made() -> Iterator[None]:
    """Around the making of a model. Raises `ConfigError` if torch cannot, for lack of memory most often."""
    try:
        yield
    except RuntimeError as error:
        raise ConfigError(f"a model of this size cannot be made: {one_line(error)}") from error


@dataclass(frozen=True)
class ModelSection:
    """The shape of the model, and what requests are answered with by default; `vocab_size` is the tokenizer's.

    `max_seq_len` is the longest text that the server takes, even if `data.max_seq_length` and so all texts in training
    are shorter.
    """

    d_model: int = 512
    n_heads: int = 8
    n_encoder_layers: int = 6
    n_decoder_layers: int = 0
    d_ff: int = 2048
    dropout: float = 0.1
    decoder_type: str = "linear"
    norm: str = "pre"
    positions: str = "rotary"
    gate_hidden_dim: int = 256
    gate_shortlist: int = 0
    n_prelude_layers: int = 0
    level_conditioning: bool = False
    max_seq_len: int = 512
    halting: str = "gate"
    max_steps: int = 20
    threshold: float = 0.05


@dataclass(frozen=True)
class TrainingSection:
    batch_size: int = 16
    """Sequences of `data.max_seq_length` tokens in each of the `gradient_accumulation_steps` batches of a step. Of
    shorter sequences, a batch holds as many more as have about the same number of tokens."""
    gradient_accumulation_steps: int = 1
    num_epochs: int = 10
    num_steps: int | None = None
    """Optimizer steps; overrides `num_epochs`."""
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    adam_beta2: float = 0.98
    warmup_ratio: float = 0.05
    warmup_steps: int | None = None
    """Optimizer steps; overrides `warmup_ratio`."""
    scheduler: str = "cosine"
    decay_ratio: float = 0.25
    """Share of the run over which `warmup_stable_decay` falls to zero."""
    max_grad_norm: float = 1.0
    average_decay: float | None = None
    """Decay per step of a running average of the encoder's weights. The average replaces them when the encoder has
    learnt: before the last `gate_steps`, or at the end."""
    scheme: str = "unroll"
    """`unroll`: random depth, every masked token supervised. `chain`: the seed's step-by-step reveal."""
    max_chain_length: int = 4
    """Most passes of one training example: of the random unroll, or of the chain."""
    grad_passes: int = 2
    """So many last passes are supervised and carry a gradient."""
    one_pass_steps: int = 0
    """First so many steps with a single pass: cheap pretraining before the recursion."""
    total_steps: int = 20
    """Steps of the masking chain, and the unit of the gate's level."""
    masking_strategy: str = "linear"
    random_token_share: float = 0.0
    keep_token_share: float = 0.0
    loss_weight_recon: float = 1.0
    loss_weight_gate: float = 1.0
    gate_every_n_steps: int = 4
    """With `unroll`, how often the gate is taught by a deep run; 0: only in the `gate_steps`."""
    gate_passes: int = 8
    """Passes of that deep run; what its last one predicts counts as final."""
    gate_sequences: int = 8
    gate_steps: int = 0
    """With `unroll`, the last so many steps of the run teach the gate alone, on the finished encoder. All steps
    of a run teach the gate of `init_from` and leave the rest of it as it is."""
    gate_change_share: float = 0.02
    """Predictions count as settled once at most this share differs from the final ones."""
    compile: bool = False
    """`torch.compile` the encoder's layers: takes a quarter of a minute, and needs a C++ compiler, on CUDA Triton."""
    init_from: str | None = None
    """A checkpoint of this project that this model starts from, or a local folder with a BERT-like one, whose token
    embeddings it takes, and with `model.norm: post` and `model.positions: learned` all that fits of the rest."""
    save_every_n_epochs: int = 1
    save_every_n_steps: int | None = None
    keep_last_n_checkpoints: int = 3

    def n_warmup_steps(self, n_steps: int) -> int:
        """Warm-up steps of a run in which `n_steps` teach the encoder."""
        return round(self.warmup_ratio * n_steps) if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True)
class DataSection:
    dataset_name: str = "wikitext-2"
    """`wikitext-2`, `wikitext-103`, another hub name, or local files (`.txt`, `.raw`, `.tokens`, each also with `.xz`),
    comma-separated."""
    validation_name: str | None = None
    """Text to validate on; by default the hub's validation split, or the end of the local text."""
    max_seq_length: int = 128
    min_seq_length: int = 16
    full_length_share: float = 0.5
    """Share of batches drawn at `max_seq_length`; the others at lengths log-uniform from the minimum."""
    start_share: float = 0.5
    """Share of segments that start where a paragraph does; fewer do where paragraphs are long. With 1, and paragraphs
    as long as the segments, each segment is one paragraph."""
    tokenizer_name: str = "bert-base-uncased"
    """A hub name, or the path of a `tokenizer.json` or of a checkpoint."""
    cache_dir: str = "runs/cache"
    num_workers: int = 0
    pin_memory: bool = False


@dataclass(frozen=True)
class OutputSection:
    checkpoint_dir: str = "runs/checkpoints"
    log_dir: str = "runs/logs"
    log_every_n_steps: int = 10
    eval_every_n_epochs: int = 1
    eval_every_n_steps: int | None = None
    eval_batches: int = 16


@dataclass(frozen=True)
class TrainConfig:
    name: str = "rdt"
    seed: int = 0
    mixed_precision: bool = True
    """bfloat16 where the device has it (CUDA from Ampere on, CPUs with AMX or AVX-512 BF16); elsewhere float32."""
    model: ModelSection = field(default_factory=ModelSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    data: DataSection = field(default_factory=DataSection)
    output: OutputSection = field(default_factory=OutputSection)

    def __post_init__(self) -> None:
        _check(self)

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


IMMATERIAL = ("data.num_workers", "data.pin_memory", "data.cache_dir", "output.log_dir", "output.log_every_n_steps")
"""Settings that do not change what is learnt."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """What two configurations, as mappings, both have and not alike: `{"training.learning_rate": "0.1 -> 0.2"}`."""
    found: dict[str, str] = {}
    for name in sorted(before.keys() & now.keys()):
        key, old, new = prefix + name, before[name], now[name]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= differences(old, new, f"{key}.")
        elif old != new and key not in IMMATERIAL:
            found[key] = f"{old} -> {new}"
    return found


AT_LEAST = {
    0: (
        "seed", "training.one_pass_steps", "training.gate_every_n_steps", "training.gate_steps",
        "training.weight_decay", "training.loss_weight_recon", "training.loss_weight_gate", "data.num_workers",
    ),
    1: (
        "training.batch_size", "training.gradient_accumulation_steps", "training.num_epochs", "training.num_steps",
        "training.max_chain_length", "training.grad_passes", "training.total_steps", "training.gate_sequences",
        "training.save_every_n_epochs", "training.save_every_n_steps", "training.warmup_steps",
        "training.keep_last_n_checkpoints", "output.log_every_n_steps", "output.eval_every_n_epochs",
        "output.eval_every_n_steps", "output.eval_batches",
    ),
    2: ("training.gate_passes",),
    3: ("data.min_seq_length",),
}  # fmt: skip
LARGEST_COUNT, TOKENS_A_BATCH = 1000, 2**20
"""Larger values are taken for typing errors, which would use up all memory. Larger batches come from
`training.gradient_accumulation_steps`."""
AT_MOST = ("training.max_chain_length", "training.gate_passes", "training.total_steps", "data.num_workers")
ABOVE_ZERO = ("training.learning_rate", "training.max_grad_norm")
SHARES = (
    "training.warmup_ratio", "training.decay_ratio", "training.random_token_share", "training.keep_token_share",
    "training.gate_change_share", "data.full_length_share", "data.start_share",
)  # fmt: skip
DECAYS = ("training.adam_beta2", "training.average_decay")
NAMES = (
    "name", "data.tokenizer_name", "data.cache_dir", "training.init_from", "output.checkpoint_dir", "output.log_dir",
)  # fmt: skip
LISTS_OF_NAMES = ("data.dataset_name", "data.validation_name")
ONE_OF: dict[str, tuple[str, ...]] = {
    "training.scheduler": ("cosine", "linear", "warmup_stable_decay"),
    "training.scheme": ("unroll", "chain"),
    "training.masking_strategy": tuple(SCHEDULES),
    **{f"model.{name}": allowed for name, allowed in CHOICES.items()},
}


def _check(config: TrainConfig) -> None:
    for minimum, keys in AT_LEAST.items():
        for key in keys:
            value = _get(config, key)
            if value is not None and not value >= minimum:
                raise ConfigError(f"{key} is {value}: want >= {minimum}")
    for key in ABOVE_ZERO:
        if not 0 < _get(config, key) < float("inf"):
            raise ConfigError(f"{key} is {_get(config, key)}: want a number > 0")
    for key in SHARES:
        if not 0 <= _get(config, key) <= 1:
            raise ConfigError(f"{key} is {_get(config, key)}: want 0 to 1")
    for key in DECAYS:
        if (decay := _get(config, key)) is not None and not 0 < decay < 1:
            raise ConfigError(f"{key} is {decay}: want 0 to 1, ends excluded")
    for key, allowed in ONE_OF.items():
        if _get(config, key) not in allowed:
            raise ConfigError(f"{key} is {_get(config, key)!r}: want one of {', '.join(allowed)}")
    _check_memory(config)
    _check_names(config)
    _check_together(config)


def _check_memory(config: TrainConfig) -> None:
    for key in AT_MOST:
        if (value := _get(config, key)) > LARGEST_COUNT:
            raise ConfigError(f"{key} is {value}: want <= {LARGEST_COUNT}")
    n, length = config.training.batch_size, config.data.max_seq_length
    if n * length > TOKENS_A_BATCH:
        wanted = f"{n * length} tokens with data.max_seq_length = {length}, want <= {TOKENS_A_BATCH}"
        raise ConfigError(f"training.batch_size is {n}: that is {wanted}")


def _check_names(config: TrainConfig) -> None:
    for key in NAMES:
        if (name := _get(config, key)) is not None and not name.strip():
            raise ConfigError(f"{key} is {name!r}: want a name")
    for key in LISTS_OF_NAMES:
        if (names := _get(config, key)) is not None and not all(name.strip() for name in names.split(",")):
            raise ConfigError(f"{key} is {names!r}: want a name, or several between commas")
    try:
        checked_name(config.name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_together(config: TrainConfig) -> None:
    """Settings that are in range but contradict others."""
    section, data = config.training, config.data
    if section.scheme == "chain" and section.gate_steps:
        raise ConfigError("training.gate_steps is for scheme unroll: with chain the gate learns all along, want 0")
    if section.scheme == "chain" and section.max_chain_length > section.total_steps:
        raise ConfigError(
            f"training.max_chain_length is {section.max_chain_length}: with scheme chain want at most "
            f"training.total_steps = {section.total_steps}"
        )
    if section.loss_weight_recon == section.loss_weight_gate == 0:
        raise ConfigError("training.loss_weight_recon and training.loss_weight_gate are 0: want one of them above")
    if section.random_token_share + section.keep_token_share > 1:
        raise ConfigError("training.random_token_share + training.keep_token_share is over 1")
    if not data.min_seq_length <= data.max_seq_length <= config.model.max_seq_len:
        raise ConfigError(
            f"data.max_seq_length is {data.max_seq_length}: want data.min_seq_length = "
            f"{data.min_seq_length} to model.max_seq_len = {config.model.max_seq_len}"
        )


def _get(config: TrainConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
