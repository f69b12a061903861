"""`python -m training.scorer --text F --tokenizer F --output F`: train what `rdt-evaluate --scorer` scores with.

A small left-to-right model of the evaluated models' word pieces. Train it on other text than they learned from: a
scorer that has read the same text finds their mistakes likely.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from rdt_core.checkpoint import CheckpointError
from rdt_core.tokenizer import Tokenizer
from training.config import ConfigError, can_be_made
from training.corpus import TEXTS, VALIDATION_TOKENS, Corpus, load_tokenizer, local_corpus, shown_files
from training.data import stable_seed
from training.evaluation.causal import CausalConfig, CausalLM, save_scorer
from training.evaluation.restoring import cut_segments
from training.files import make_folder
from training.memory import enough_memory
from training.mixed_precision import autocast
from training.options import check_batch_size, check_numbers, device_named, path_named
from training.stopping import command
from training.vocabulary import vocabulary_loss
from training.warm_start import copy_embeddings

WARMUP_RATIO = 0.05
HELD_OUT_SEGMENTS = 64


def drawn_texts(corpus: Corpus, tokenizer: Tokenizer, length: int, n: int, seed: int) -> Tensor:
    """`n` random stretches of a text, with [CLS] and [SEP] as in an evaluation: `(n, length)`, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    body = length - 2
    starts = torch.randint(len(corpus) - body + 1, (n,), generator=generator).tolist()
    bodies = np.stack([corpus.tokens[start : start + body] for start in starts]).astype(np.int64)
    first, last = (torch.full((n, 1), token) for token in (tokenizer.cls_id, tokenizer.sep_id))
    return torch.cat((first, torch.from_numpy(bodies), last), 1)


def train(
    model: CausalLM,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    n_steps: int,
    batch_size: int,
    length: int,
    learning_rate: float,
    seed: int,
) -> Iterator[float]:
    """One AdamW step for each value asked for: the loss in nats a token. The rate rises linearly, then falls to 0."""
    device = model.embedding.weight.device
    optimizer = AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, round(WARMUP_RATIO * n_steps))
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / warmup, (n_steps - step) / max(1, n_steps - warmup)))
    for step in range(n_steps):
        texts = drawn_texts(corpus, tokenizer, length, batch_size, stable_seed(seed, step)).to(device)
        with autocast(device):
            features = model.features(texts[:, :-2]).flatten(0, 1)  # what follows the last word is no text
            loss = vocabulary_loss(features, model.embedding.weight, model.bias, texts[:, 1:-1].flatten())
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        yield loss.item()


@torch.no_grad()
def bits_a_token(model: CausalLM, segments: Sequence[Tensor]) -> float:
    """Mean surprise in bits over the words of held-out segments."""
    device = model.embedding.weight.device
    nats = [model.nats(segment[None].to(device))[:, :-1].mean().item() for segment in segments]
    return sum(nats) / len(nats) / math.log(2)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rdt-scorer", description="Train a left-to-right model to score text with.")
    parser.add_argument("--text", required=True, help=TEXTS)
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json, or the checkpoint that carries it")
    parser.add_argument("--output", required=True, type=path_named, help="the file to write")
    parser.add_argument("--init-from", type=path_named, help="a folder with a BERT-like model, for its embeddings")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=16, help="texts a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens a text (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--cache-dir", type=path_named, default="runs/cache")
    options = parser.parse_args(arguments)
    try:
        bits = _run(options)
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"rdt-scorer: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {bits:.3f} bits a token on the end of the text, which it did not learn from")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise `ConfigError` for an option out of range."""
    lowest = {"steps": 1, "batch_size": 1, "length": 3, "d_model": 1, "heads": 1, "layers": 1, "seed": 0}
    check_numbers(options, lowest, {"layers"})
    check_batch_size(options.batch_size, options.length)
    if not 0 < options.learning_rate < math.inf:
        raise ConfigError(f"--learning-rate is {options.learning_rate}: want a number > 0")
    if options.d_model % (unit := 2 * options.heads) != 0:
        raise ConfigError(f"--d-model is {options.d_model}: want a multiple of 2 x --heads = {unit}")


def _run(options: argparse.Namespace) -> float:
    """Train a scorer and write it. Returns its bits a token of held-out text. Raises `ConfigError` and `OSError`."""
    _check(options)
    device = device_named(options.device)
    make_folder(options.output.parent, "the folder of --output")
    if options.output.exists() and not options.output.is_file():
        raise ConfigError(f"--output is {str(options.output)!r}: want a file")
    tokenizer = load_tokenizer(options.tokenizer, "--tokenizer")
    whole = local_corpus(options.text, tokenizer, options.cache_dir, "--text")
    if len(whole) < (least := 10 * (options.length - 2)):
        wanted = f"want at least {least}, ten times --length without its ends: a tenth is held out"
        raise ConfigError(f"--text has {len(whole)} tokens: {wanted}")
    corpus, held_out = whole.split(min(VALIDATION_TOKENS, len(whole) // 10))
    tokens = torch.from_numpy(held_out.tokens.astype("int64"))
    segments = cut_segments(tokens, tokenizer, options.length, HELD_OUT_SEGMENTS, named="the end of --text")
    config = CausalConfig(tokenizer.vocab_size, options.d_model, options.heads, options.layers, 4 * options.d_model)
    torch.manual_seed(stable_seed(options.seed))
    with can_be_made():
        model = CausalLM(config)
    if options.init_from is not None:
        copy_embeddings(model.embedding, options.init_from, tokenizer, named="--init-from")
    model.to(device)
    steps = train(
        model,
        corpus,
        tokenizer,
        n_steps=options.steps,
        batch_size=options.batch_size,
        length=options.length,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    with (
        enough_memory("--batch-size", options.batch_size, "--length"),
        tqdm(steps, total=options.steps, desc="scorer", unit="step", disable=None) as bar,
    ):
        for loss in bar:
            bar.set_postfix(nats=f"{loss:.3f}", refresh=False)
    bits = bits_a_token(model.eval(), segments)
    if not math.isfinite(bits):
        raise ConfigError(f"--learning-rate is {options.learning_rate}: the scorer has diverged; nothing was saved")
    names = shown_files(options.text)
    training = {"text": names, "steps": options.steps, "batch_size": options.batch_size, "length": options.length,
                "learning_rate": options.learning_rate, "seed": options.seed, "held_out_bits": bits}  # fmt: skip
    save_scorer(options.output, model, tokenizer, options.output.stem, training)
    return bits


if __name__ == "__main__":
    sys.exit(main())
