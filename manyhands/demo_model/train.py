"""Train the embedded demo model from scratch and write it in the Hugging Face layout.

The corpus is the Python source of the standard library of the running CPython (PSF-2.0 licence); nothing is
downloaded. The script trains a byte-level BPE tokenizer, then a small Llama-architecture decoder with grouped-query
attention, and exports config.json, generation_config.json, model.safetensors (bf16), tokenizer.json,
tokenizer_config.json and training.json (how the run went).

The learning rate follows the *progress* of the run: elapsed time over --minutes, or step over --steps.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import sysconfig
from dataclasses import asdict
from pathlib import Path

import torch
from training.corpus import read_corpus
from training.export import export_all
from training.model import Llama, Shape
from training.record import Record
from training.stream import Stream, held_out_batches
from training.tokenizer import encode_all, train_tokenizer
from training.trainer import Budget, Trainer


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: giving back and faulting in the activations costs a third of the time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and platform.system() == "Linux":
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**30)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(option, value)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model on the Python standard library.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder to write")
    parser.add_argument("--minutes", type=float, default=50.0, help="length of the run in minutes")
    parser.add_argument("--steps", type=int, default=0, help="length of the run in updates; replaces --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="positions in one update")
    parser.add_argument("--muon-rate", type=float, default=4e-3, help="0 trains everything with AdamW")
    parser.add_argument("--adam-rate", type=float, default=4e-3)
    parser.add_argument("--report-minutes", type=float, default=2.0)
    parser.add_argument("--export-minutes", type=float, default=5.0)
    return parser.parse_args()


def main() -> None:
    """Train and export."""
    args = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    shape = Shape(layers=args.layers)
    train_texts, held_out_texts = read_corpus(Path(sysconfig.get_path("stdlib")))
    tokenizer = train_tokenizer(train_texts, shape.vocab)
    train_ids, held_out_ids = encode_all(tokenizer, train_texts), encode_all(tokenizer, held_out_texts)
    model = Llama(shape)
    record = Record(
        seed=args.seed,
        parameters=sum(weight.numel() for weight in model.parameters()),
        train_files=len(train_texts),
        train_bytes=sum(len(text.encode()) for text in train_texts),
        train_tokens=len(train_ids),
        held_out_files=len(held_out_texts),
        held_out_bytes=sum(len(text.encode()) for text in held_out_texts),
        held_out_tokens=len(held_out_ids),
    )
    print(json.dumps(asdict(record)), flush=True)
    stream = Stream(tokenizer, train_ids, args.seed)
    held_out = held_out_batches(stream, held_out_ids, shape.positions // 2)
    budget = Budget(
        minutes=args.minutes,
        steps=args.steps,
        batch_tokens=args.batch_tokens,
        muon_rate=args.muon_rate,
        adam_rate=args.adam_rate,
        report_minutes=args.report_minutes,
        export_minutes=args.export_minutes,
    )
    Trainer(budget, model, stream, record).run(held_out, lambda: export_all(args.out, model, tokenizer, record))


if __name__ == "__main__":
    main()
