"""Train the embedded demo model from scratch and write it in the Hugging Face layout.

The corpus is the Python source of the standard library of the running CPython (PSF-2.0 licence); nothing is
downloaded. The script trains a byte-level BPE tokenizer, then a small Llama-architecture decoder with grouped-query
attention, and exports config.json, generation_config.json, model.safetensors (bf16), tokenizer.json,
tokenizer_config.json and training.json (how the run went).

The learning rate follows the *progress* of the run. Progress is elapsed time over --minutes, so a run on a busy
machine still ends fully annealed, or step over --steps, which makes a run repeatable on the same machine.

Shape legend: B batch, T positions, E hidden, H query heads, K key/value heads, D head size, F feed-forward, V vocab.
"""

import argparse
import ctypes
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save as safetensors_bytes
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as fn

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
SPACE, NEWLINE = "\u0120", "\u010a"  # how byte-level BPE spells these two bytes in its vocabulary

# Runs of newlines, of two or more spaces (indentation) and of other blanks stay whole; a single space goes with the
# word, the digit or the punctuation that follows it.
PIECES = r"\n+| {2,}|[^\S\n ]+| ?[\p{L}_]+| ?\p{N}| ?[^\s\p{L}\p{N}_]+| "

# Folders left out: third-party code, tests, and big tables that are data rather than code.
SKIPPED_FOLDERS = frozenset({"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"})

CHAT_TEMPLATE = (
    "{{- bos_token }}{% for message in messages %}{{- message['content'] }}"
    "{% if not loop.last %}{{- '\\n' }}{% endif %}{% endfor %}"
)

# Progress at which the windows grow from a quarter of the context to a half, and to the whole.
LONGER_AT = (0.45, 0.8)

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    vocab: int = 2048
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    head_size: int = 32
    feed_forward: int = 640
    positions: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


@dataclass
class Record:
    """What a reader may want to know about a run; written as training.json."""

    python: str = platform.python_version()
    seed: int = 0
    parameters: int = 0
    train_files: int = 0
    train_bytes: int = 0
    train_tokens: int = 0
    held_out_files: int = 0
    held_out_bytes: int = 0
    held_out_tokens: int = 0
    steps: int = 0
    tokens_seen: int = 0
    minutes: float = 0.0
    train_loss: float = math.nan
    held_out_loss: float = math.nan
    held_out_bits_per_byte: float = math.nan
    history: list[dict[str, float]] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------- data


def source_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) of every module under root, in a fixed order."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\f", "")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield relative.as_posix(), text


def is_held_out(name: str) -> bool:
    """Choose about one file in thirty for evaluation, by the hash of its path, so the choice never moves."""
    return hashlib.sha256(name.encode()).digest()[0] < 9


def read_corpus(root: Path) -> tuple[list[str], list[str]]:
    """Return the training texts and the held-out texts."""
    train: list[str] = []
    held_out: list[str] = []
    for name, text in source_files(root):
        (held_out if is_held_out(name) else train).append(text)
    return train, held_out


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Train the byte-level BPE tokenizer; encoding puts BOS first, decoding gives back the very same text."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True, normalized=False) for name in (BOS, EOS, PAD)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return tokenizer


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> Ids:
    """Encode the texts as one stream: BOS, file, EOS, BOS, file, EOS and so on."""
    encodings = tokenizer.encode_batch(texts)
    return np.concatenate([np.array([*encoding.ids, EOS_ID], dtype=np.int64) for encoding in encodings])


class Stream:
    """The token stream of the training files, cut anew into windows for every epoch."""

    def __init__(self, tokenizer: Tokenizer, ids: Ids, seed: int, split_share: float = 0.04) -> None:
        self.ids = ids
        self.random = np.random.default_rng(seed)
        self.split_share = split_share
        numbers = tokenizer.get_vocab()
        pieces = sorted(numbers, key=lambda piece: numbers[piece])
        self.space_id = numbers[SPACE]
        self.ends_line = np.array([set(piece) == {NEWLINE} or piece == BOS for piece in pieces])
        self.without_space = np.array(
            [numbers.get(p[1:], -1) if p[0] == SPACE and p[1:].strip(SPACE) else -1 for p in pieces]
        )

    def with_split_spaces(self) -> Ids:
        """Split a few " word" tokens into " " and "word", so that a prompt may end with a space."""
        bare = self.without_space[self.ids]
        chosen = (bare >= 0) & (self.random.random(len(self.ids)) < self.split_share)
        ids = np.where(chosen, bare, self.ids)
        return np.insert(ids, np.flatnonzero(chosen), self.space_id)

    def epoch(self, length: int) -> tuple[Ids, Ids]:
        """Return (stream, starts): windows of length + 1 tokens that start after a line end, in random order."""
        ids = self.with_split_spaces()
        starts = line_windows(ids, self.ends_line, length, int(self.random.integers(length)))
        return ids, self.random.permutation(starts)

    def batches(self, tokens: int, length: Callable[[], int]) -> Iterator[Tensor]:
        """Yield batches (B, T+1) of about `tokens` positions for ever; length() is asked at the start of an epoch."""
        ids, starts, size = self.ids, np.zeros(0, dtype=np.int64), 0
        while True:
            rows = tokens // max(size, 1)
            if size != length() or len(starts) < rows:
                size = length()
                rows = tokens // size
                ids, starts = self.epoch(size)
            yield windows(ids, starts[:rows], size)
            starts = starts[rows:]


def line_windows(ids: Ids, ends_line: npt.NDArray[np.bool_], length: int, offset: int) -> Ids:
    """Return window starts about `length` apart; each is the last token before a line (a line end or BOS)."""
    line_ends = np.flatnonzero(ends_line[ids])
    wanted = np.arange(offset, len(ids) - 2 * length, length)
    return line_ends[np.searchsorted(line_ends, wanted)]


def windows(ids: Ids, starts: Ids, length: int) -> Tensor:
    """Cut windows (B, T+1) and put BOS first, as a prompt has it."""
    rows = np.stack([ids[start : start + length + 1] for start in starts])
    rows[:, 0] = BOS_ID
    return torch.from_numpy(rows)


# --------------------------------------------------------------------------------------------------------------- model


def rope_tables(shape: Shape, positions: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin (T, D) of the rotary embedding, both halves of D alike."""
    inverse = shape.rope_theta ** (-torch.arange(0, shape.head_size, 2).float() / shape.head_size)
    angles = torch.outer(torch.arange(positions).float(), inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to x (B, N, T, D)."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear map without bias."""
    return nn.Linear(inputs, outputs, bias=False)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 128) -> Tensor:
    """Attend from q (N, T, D) to k and v (N, T, D), a block of queries at a time.

    On a processor without matrix units this takes half the time of PyTorch's fused attention in bf16.
    """
    mask = torch.full((block, block), -math.inf, dtype=q.dtype).triu(1)
    mixed = []
    for first in range(0, q.shape[1], block):
        last = min(first + block, q.shape[1])
        scores = torch.bmm(q[:, first:last], k[:, :last].transpose(1, 2))
        here = mask[: last - first, : last - first]
        mixed.append(torch.bmm((scores + fn.pad(here, (first, 0))).softmax(-1), v[:, :last]))
    return torch.cat(mixed, dim=1)


class Attention(nn.Module):
    """Causal grouped-query attention; attribute names are those of the Hugging Face checkpoint."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_size, self.group = shape.head_size, shape.heads // shape.kv_heads
        self.q_proj = linear(shape.hidden, shape.heads * shape.head_size)
        self.k_proj = linear(shape.hidden, shape.kv_heads * shape.head_size)
        self.v_proj = linear(shape.hidden, shape.kv_heads * shape.head_size)
        self.o_proj = linear(shape.heads * shape.head_size, shape.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map x (B, T, E) to (B, T, E)."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for p in self.projections())
        q, k = rotate(q, cos, sin) * self.head_size**-0.5, rotate(k, cos, sin)
        k, v = k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1)
        with torch.autocast("cpu", enabled=False):  # which would take the softmax to fp32
            mixed = causal_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        out: Tensor = self.o_proj(mixed.view_as(q).transpose(1, 2).flatten(2))
        return out

    def projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Return the three input projections."""
        return self.q_proj, self.k_proj, self.v_proj


class FeedForward(nn.Module):
    """SwiGLU feed-forward block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = linear(shape.hidden, shape.feed_forward)
        self.up_proj = linear(shape.hidden, shape.feed_forward)
        self.down_proj = linear(shape.feed_forward, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, E) to (B, T, E)."""
        out: Tensor = self.down_proj(fn.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map x (B, T, E) to (B, T, E)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """The decoder; the output matrix is the embedding matrix."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights; the matrices that write into the residual stream start smaller."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.shape.layers) if writes else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) for ids (B, T)."""
        x = self.embed_tokens(ids)
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        cos, sin = (table.to(kind) for table in rope_tables(self.shape, ids.shape[1]))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return fn.linear(self.norm(x), self.embed_tokens.weight)


def loss_of(model: Llama, batch: Tensor) -> Tensor:
    """Return the mean next-token loss of a batch (B, T+1)."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch[:, :-1])
    return fn.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


# ------------------------------------------------------------------------------------------------------------ training


def optimizers(model: Llama, muon_rate: float, adam_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    hidden = [w for w in model.layers.parameters() if w.ndim == 2]
    chosen = {id(w) for w in hidden}
    others = [w for w in model.parameters() if id(w) not in chosen]
    adam = torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if muon_rate <= 0:
        return [adam, torch.optim.AdamW(hidden, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)]
    muon = torch.optim.Muon(hidden, lr=muon_rate, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [adam, muon]


def rate_factor(progress: float, warm_up: float = 0.02, decay_from: float = 0.35) -> float:
    """Warm up, hold, then decay linearly to nothing at progress 1."""
    if progress < warm_up:
        return (progress + 0.001) / (warm_up + 0.001)
    return min(1.0, max(0.0, (1.0 - progress) / (1.0 - decay_from)))


@torch.inference_mode()
def evaluate(model: Llama, batches: list[Tensor]) -> float:
    """Return the mean loss over the held-out batches."""
    return sum(loss_of(model, batch).item() for batch in batches) / len(batches)


def held_out_batches(stream: Stream, ids: Ids, length: int, limit: int = 160) -> list[Tensor]:
    """Cut the held-out stream into batches of eight windows, at most `limit` windows in all."""
    starts = line_windows(ids, stream.ends_line, length, 0)[:limit]
    return [windows(ids, starts[i : i + 8], length) for i in range(0, len(starts) - 7, 8)]


class Trainer:
    """The training loop, with reports and exports on the way."""

    def __init__(self, args: argparse.Namespace, model: Llama, stream: Stream, record: Record) -> None:
        self.args, self.model, self.stream, self.record = args, model, stream, record
        self.optimizers = optimizers(model, args.muon_rate, args.adam_rate)
        self.base_rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.begun = self.reported = self.exported = time.monotonic()
        self.smooth = math.nan

    def progress(self) -> float:
        """Return how much of the run is done, 0 to 1."""
        if self.args.steps:
            return self.record.steps / int(self.args.steps)
        return (time.monotonic() - self.begun) / (60.0 * float(self.args.minutes))

    def length(self) -> int:
        """Return the window length: short at first, the whole context at the end."""
        progress, longest = self.progress(), self.model.shape.positions
        first, second = LONGER_AT
        return longest // 4 if progress < first else longest // 2 if progress < second else longest

    def step(self, batch: Tensor) -> None:
        """Make one update."""
        factor = rate_factor(self.progress())
        for optimizer, rate in zip(self.optimizers, self.base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        loss = loss_of(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.count(loss.item(), batch[:, 1:].numel())

    def count(self, loss: float, tokens: int) -> None:
        """Keep the books after an update."""
        self.record.steps += 1
        self.record.tokens_seen += tokens
        self.record.minutes = round((time.monotonic() - self.begun) / 60, 2)
        self.smooth = loss if math.isnan(self.smooth) else 0.98 * self.smooth + 0.02 * loss
        self.record.train_loss = round(self.smooth, 4)

    def report(self, held_out: list[Tensor]) -> None:
        """Measure the held-out loss and print a line."""
        record = self.record
        record.held_out_loss = round(evaluate(self.model, held_out), 4)
        bits = record.held_out_loss / math.log(2) * record.held_out_tokens / record.held_out_bytes
        record.held_out_bits_per_byte = round(bits, 4)
        line: dict[str, float] = {
            "step": record.steps,
            "tokens": record.tokens_seen,
            "minutes": record.minutes,
            "train_loss": record.train_loss,
            "held_out_loss": record.held_out_loss,
        }
        record.history.append(line)
        speed = record.tokens_seen / (60 * max(record.minutes, 0.01))
        print(json.dumps(line), f"progress {self.progress():.3f}  {speed:.0f} tokens/s", flush=True)

    def run(self, held_out: list[Tensor], export: Callable[[], None]) -> None:
        """Train to the end of the budget."""
        for batch in self.stream.batches(self.args.batch_tokens, self.length):
            if self.progress() >= 1.0:
                break
            self.step(batch)
            now = time.monotonic()
            if now - self.reported > 60 * self.args.report_minutes:
                self.report(held_out)
                self.reported = time.monotonic()
            if now - self.exported > 60 * self.args.export_minutes:
                export()
                self.exported = time.monotonic()
        self.report(held_out)
        export()


# -------------------------------------------------------------------------------------------------------------- export


def model_config(shape: Shape) -> dict[str, object]:
    """Return config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": shape.positions,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_eps,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def generation_config(shape: Shape) -> dict[str, object]:
    """Return generation_config.json."""
    return {
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "max_length": shape.positions,
    }


def tokenizer_config(shape: Shape) -> dict[str, object]:
    """Return tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": shape.positions,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def export_all(folder: Path, model: Llama, tokenizer: Tokenizer, record: Record) -> None:
    """Write the whole model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": weight.detach().bfloat16() for name, weight in model.named_parameters()}
    write_whole(folder / "model.safetensors", safetensors_bytes(tensors, metadata={"format": "pt"}))
    write_whole(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    documents = {
        "config.json": model_config(model.shape),
        "generation_config.json": generation_config(model.shape),
        "tokenizer_config.json": tokenizer_config(model.shape),
        "training.json": asdict(record),
    }
    for name, document in documents.items():
        write_whole(folder / name, (json.dumps(document, indent=2) + "\n").encode())


# ---------------------------------------------------------------------------------------------------------------- main


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
    Trainer(args, model, stream, record).run(held_out, lambda: export_all(args.out, model, tokenizer, record))


if __name__ == "__main__":
    main()
