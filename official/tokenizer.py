"""LLaMA's tokenizer: tokenizer.model, a sentencepiece model, or from LLaMA-3 on tokenizer.json, a BPE.

tokenizer.json needs the package `tokenizers`. It does not say which pieces are BOS and EOS, so their names
come from tokenizer_config.json beside it. There is no padding id.
"""
from pathlib import Path
from typing import Iterable, Iterator

from official.configs import read_config
from official.mistakes import BadFile, described, shown

SPARE = 1024  # a LLaMA has fewer than so many embeddings without a piece; some models round the number up


def tokenizer_path(path: str | Path) -> Path:
    """The tokenizer of a folder of LLaMA weights: in the folder or, in Meta's layout, one folder up."""
    for folder in (Path(path), Path(path).resolve().parent):
        for name in ("tokenizer.model", "tokenizer.json"):
            if (folder / name).is_file():
                return folder / name
    raise FileNotFoundError(f"{Path(path) / 'tokenizer.model'}: not found, neither here nor one folder up, "
                            "nor a tokenizer.json; copy the one that comes with the LLaMA weights")


def tokenizer_files(tokenizer: Path) -> list[Path]:
    """A tokenizer's own file, and for tokenizer.json the file that names BOS and EOS."""
    beside = [tokenizer.with_name("tokenizer_config.json")] if tokenizer.suffix == ".json" else []
    return [tokenizer, *beside]


def special_ids(tokenizer: Path) -> dict[str, int]:
    """bos_token_id and eos_token_id as config.json has them; ValueError if the files do not give them."""
    if tokenizer.suffix == ".model":
        return {"bos_token_id": 1, "eos_token_id": 2}
    bpe, names = (read_config(file) for file in tokenizer_files(tokenizer))
    pieces = bpe.value("added_tokens", lambda x: isinstance(x, list), "a list", [])
    known = {str(piece.get("content")): piece.get("id") for piece in pieces if isinstance(piece, dict)}
    ids = {}
    for key in ("bos_token", "eos_token"):
        name = names.values.get(key)
        name = name.get("content") if isinstance(name, dict) else name
        ids[f"{key}_id"] = id = known.get(str(name))
        if type(id) is not int:
            raise BadFile(f"{names.file}: {key} is {described(name)}, which {bpe.file.name} does not have "
                          "among its added tokens; copy both files from the same download")
    return ids


class Tokenizer:
    def __init__(self, path: str | Path, vocab_size: int | None = None):
        """path: a tokenizer file or a folder of LLaMA weights.

        ValueError if a LLaMA with `vocab_size` embeddings has too few or far too many for this tokenizer.
        """
        file = Path(path) if Path(path).suffix in (".model", ".json") else tokenizer_path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such tokenizer; it comes with the LLaMA weights")
        if file.suffix == ".json":
            self.open_bpe(file)
        else:
            self.open_sentencepiece(file)
        if vocab_size and not self.vocab_size <= vocab_size < self.vocab_size + SPARE:
            raise BadFile(f"{file}: {self.vocab_size} pieces, but the LLaMA has {vocab_size} embeddings; "
                          "use the tokenizer that came with this LLaMA")
        if min(self.bos, self.eos) < 0:
            raise BadFile(f"{file}: has no BOS or no EOS piece, so it is not a LLaMA tokenizer")

    def open_sentencepiece(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor
        try:
            sp = SentencePieceProcessor(model_file=str(file))
        except Exception:
            raise BadFile(f"{file}: not a sentencepiece model; from LLaMA-3 on, use Hugging Face's layout "
                          "with tokenizer.json") from None
        self.to_ids, self.to_text = sp.encode, sp.decode
        self.bos, self.eos, self.vocab_size = sp.bos_id(), sp.eos_id(), sp.vocab_size()

    def open_bpe(self, file: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{file}: the package tokenizers is missing; pip install tokenizers") from None
        self.bos, self.eos = special_ids(file).values()
        try:
            bpe = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # it raises Exception itself
            raise BadFile(f"{file}: not a tokenizer ({shown(str(e))}); download it again") from None
        bpe.no_truncation(), bpe.no_padding()
        bpe.encode_special_tokens = True  # "<|eot_id|>" in a prompt is text, as "</s>" is for sentencepiece
        self.to_ids = lambda text: bpe.encode(text, add_special_tokens=False).ids
        self.to_text = bpe.decode  # without special tokens
        self.vocab_size = 1 + max(bpe.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Token ids without BOS and EOS; ValueError if the text holds bytes that are not UTF-8."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the text {ascii(text[:60])} is not valid UTF-8; type --prompt anew") from None
        return self.to_ids(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids. An id without a piece is skipped: some LLaMAs have more embeddings than pieces."""
        return self.to_text([id for id in ids if id < self.vocab_size])

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode ids one by one. A character of several byte tokens is held back until it is complete."""
        seen, printed = [], ""
        for id in ids:
            seen.append(id)
            text = self.decode(seen)
            if not text.endswith("\ufffd"):  # the sign of an incomplete character
                yield text[len(printed):]
                printed = text
        if rest := self.decode(seen)[len(printed):]:  # the text ends inside a character
            yield rest
