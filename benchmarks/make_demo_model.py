"""Make the small language model and the five texts that `fadapt sweep` runs on by itself.

All of the text comes from the standard library of the Python that runs this script, so anyone can
make both again. It is under the licence of CPython (PSF-2.0); modules that carry a copyright
notice of another holder are left out.

The base model reads **prose**: `pydoc_data.topics` (the language reference) and the docstrings of
the library's modules. It never reads a docstring with a `>>>` in it (the domain `sessions`), the
modules of `DOMAIN_MODULES` (their source is the domain `python`, its disassembly `bytecode`, their
pages as pydoc renders them `html`), or the package `encodings` (its tables are `charmaps`). One
prose document in twenty is held out to measure the base. A domain is made of short pieces of many
modules in a shuffled order, so the end of a file is of the same kind as its beginning. The same
Python, packages and machine give the same files; another Python has other text.

    python benchmarks/make_demo_model.py --out fadapt/data
"""

import argparse
import ast
import dis
import importlib
import io
import json
import math
import pydoc
import random
import re
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from types import CodeType

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

STDLIB = Path(sysconfig.get_path("stdlib"))
END = "<|endoftext|>"
CONTEXT = 256  # tokens in a training window
BATCH = 4
RATE = 3e-3  # the highest learning rate
CONFIG = LlamaConfig(
    vocab_size=1536,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    initializer_range=0.04,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
DOMAIN_BYTES = 72_000
DOMAIN_MODULES = """
argparse bdb calendar configparser contextlib csv dataclasses fileinput gettext heapq imaplib
mailbox pickle plistlib pprint queue random sched selectors shlex shutil tempfile threading
traceback weakref zipfile
""".split()  # noqa: SIM905  one name a line reads worse
LEFT_OUT = """
__pycache__ dist-packages encodings ensurepip idlelib lib2to3 site-packages test tests turtledemo
""".split()  # noqa: SIM905  one name a line reads worse
PRIVATE = re.compile(  # addresses of the web, of people, of memory, of this machine
    r"://|\w@\w|\b0x[0-9a-f]{8,}|" + re.escape(sys.prefix) + "|" + re.escape(str(STDLIB))
)
NOTICE = """\
The text in texts/ and the text that the model in model/ was trained on come from the standard
library of CPython {version}: the language reference of pydoc_data, docstrings, source code and
its disassembly, pages rendered by pydoc, and the tables of the package encodings, which CPython
makes from the mapping files of the Unicode Consortium. They are excerpts, cut into pieces and put
in another order, made by benchmarks/make_demo_model.py of fadapt.
Licence: Python Software Foundation License Version 2 (SPDX: PSF-2.0), in full below.

{licence}"""


def modules() -> Iterator[tuple[str, str]]:
    """The name and the source of each module of the library that this script may read."""
    for path in sorted(STDLIB.rglob("*.py")):
        parts = path.relative_to(STDLIB).with_suffix("").parts
        if not set(parts).intersection(LEFT_OUT):
            source = path.read_text("utf-8", "replace")
            notices = re.findall("(?i).*(?:copyright|rights reserved|permission is).*", source)
            if all("Python Software Foundation" in line for line in notices):
                yield ".".join(parts).removesuffix(".__init__"), source


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module, its classes and its functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def prose(library: dict[str, str]) -> list[str]:
    """The documents that the base model is trained on: a topic each, a module's docstrings each."""
    documents = [topics[name] for name in sorted(topics)]
    for name, source in library.items():
        if name.split(".")[0] not in DOMAIN_MODULES:
            documents.append("\n\n".join(t for t in docstrings(source) if ">>>" not in t))
    random.Random(0).shuffle(documents)
    return [text for text in documents if len(text) > 40]


def pieces(text: str, end: str = "\n", size: int = 1500) -> Iterator[str]:
    """Cut a text after occurrences of `end`, into pieces of at least `size` characters."""
    piece = ""
    for part in text.split(end):
        piece += part + end
        if len(piece) >= size:
            yield piece
            piece = ""


def disassembly(code: CodeType) -> Iterator[str]:
    """The bytecode of each function within a code object, as `dis` lists it."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            listing = io.StringIO()
            dis.dis(inner, file=listing, depth=0)
            text = re.sub(r"<code object (\S+) at [^>]*>", r"<code object \1>", listing.getvalue())
            yield f"{inner.co_qualname}:\n{text}\n"
            yield from disassembly(inner)


def charmaps() -> Iterator[str]:
    """Lines of the tables of the package `encodings`, none twice."""
    seen: set[str] = set()
    for path in sorted((STDLIB / "encodings").glob("*.py")):
        rows = re.findall(r"^.*0x[0-9A-Fa-f]+(?: ->|:).*\w\n", path.read_text("utf-8"), re.M)
        fresh = [row.lstrip() for row in rows if row.lstrip() not in seen]
        seen.update(fresh)
        yield from pieces("".join(fresh))


def assemble(parts: Iterable[str]) -> str:
    """Shuffle the pieces and join as many as make `DOMAIN_BYTES`."""
    chosen = sorted({part for part in parts if len(part) > 200 and not PRIVATE.search(part)})
    random.Random(0).shuffle(chosen)
    text = ""
    for part in chosen:
        if len((text + part).encode()) <= DOMAIN_BYTES:
            text += part.rstrip("\n") + "\n\n"
    return text


def domains(library: dict[str, str]) -> dict[str, str]:
    """The texts that the base model has not seen, by name."""
    held = {name: library[name] for name in DOMAIN_MODULES if name in library}
    pages = (pydoc.html.document(importlib.import_module(name)) for name in held)
    sessions = (t for source in library.values() for t in docstrings(source) if ">>>" in t)
    codes = (compile(source, name, "exec") for name, source in held.items())
    return {
        "bytecode": assemble(text for code in codes for text in disassembly(code)),
        "charmaps": assemble(charmaps()),
        "html": assemble(piece for page in pages for piece in pieces(page)),
        "python": assemble(p for source in held.values() for p in pieces(source, "\n\n")),
        "sessions": assemble(sessions),
    }


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """A byte-level BPE of which token 0 is the mark between documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    size, alphabet = CONFIG.vocab_size, pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """The tokens of the documents, a mark before each: `[tokens]`, int64."""
    return torch.tensor(tokenizer.encode("".join(END + text for text in documents)).ids)


def train(model: LlamaForCausalLM, tokens: torch.Tensor, steps: int) -> None:
    """Train the model in place on random windows of `tokens`: AdamW, a warm-up, then a cosine."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    start = time.perf_counter()
    for step in range(steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / 50, cosine)
        first = torch.randint(len(tokens) - CONTEXT, (BATCH, 1), generator=generator)
        batch = tokens[first + torch.arange(CONTEXT)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 249:
            spent = time.perf_counter() - start
            print(f"step {step + 1}, loss {loss.item():.3f}, {spent:.0f} s", flush=True)


@torch.no_grad()
def report(model: PreTrainedModel, tokenizer: Tokenizer, name: str, documents: list[str]) -> None:
    """Print the mean loss over consecutive windows of text that the model has not read."""
    tokens = encode(tokenizer, documents)
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    losses = [model(input_ids=w, labels=w).loss.item() for w in torch.split(windows, 1)]
    loss, size = sum(losses) / len(losses), len("".join(documents).encode())
    bits = loss * len(tokens) / size / math.log(2)
    print(f"{name:9} {size:7,} bytes  loss {loss:.3f} a token, {bits:.2f} bits a byte")


def main() -> None:
    """Write the texts, train the model, write it, read it back and print what it knows."""
    parser = argparse.ArgumentParser(description="Make the model and texts of `fadapt sweep`.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--steps", type=int, default=5000, help="training steps (5000)")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    library = dict(modules())
    texts = domains(library)
    (arguments.out / "texts").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (arguments.out / "texts" / f"{name}.txt").write_text(text, "utf-8", newline="\n")
    licence = next(STDLIB.glob("LICENSE.txt"), STDLIB.parent / "LICENSE.txt").read_text("utf-8")
    notice = NOTICE.format(version=sys.version.split()[0], licence=licence)
    (arguments.out / "NOTICE.txt").write_text(notice, "utf-8", newline="\n")

    documents = prose(library)
    held, read = documents[::20], [d for i, d in enumerate(documents) if i % 20]
    tokenizer = train_tokenizer(read)
    tokens = encode(tokenizer, read)
    print(f"{sum(map(len, read)):,} characters of prose are {len(tokens):,} tokens")

    model = LlamaForCausalLM(CONFIG)
    train(model, tokens, arguments.steps)

    folder = arguments.out / "model"
    model.to(dtype=torch.float16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER, indent=2) + "\n", "utf-8")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    report(model, tokenizer, "prose", held)
    for name, text in texts.items():
        report(model, tokenizer, name, [text])


if __name__ == "__main__":
    main()
