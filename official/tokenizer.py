"""LLaMA's tokenizer: a sentencepiece model, tokenizer.model, with BOS 1, EOS 2 and no padding id."""
from pathlib import Path
from typing import Iterable, Iterator

from official.mistakes import BadFile


def tokenizer_path(path: str | Path) -> Path:
    """The tokenizer.model of a folder of LLaMA weights: in the folder or, in Meta's layout, one folder up."""
    for folder in (Path(path), Path(path).resolve().parent):
        if (folder / "tokenizer.model").is_file():
            return folder / "tokenizer.model"
    raise FileNotFoundError(f"{Path(path) / 'tokenizer.model'}: not found, neither here nor one folder up; "
                            "copy the tokenizer.model that comes with the LLaMA weights")


class Tokenizer:
    def __init__(self, path: str | Path, vocab_size: int | None = None):
        """path: tokenizer.model or a folder of LLaMA weights. ValueError if it has another vocab_size."""
        from sentencepiece import SentencePieceProcessor
        file = Path(path) if Path(path).suffix == ".model" else tokenizer_path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such tokenizer; it comes with the LLaMA weights")
        try:
            self.sp = SentencePieceProcessor(model_file=str(file))
        except Exception:
            raise BadFile(f"{file}: not a sentencepiece model") from None
        self.bos, self.eos, self.vocab_size = self.sp.bos_id(), self.sp.eos_id(), self.sp.vocab_size()
        if vocab_size not in (None, self.vocab_size):
            raise BadFile(f"{file}: {self.vocab_size} pieces, but the LLaMA has {vocab_size} embeddings; "
                          "use the tokenizer.model that came with this LLaMA")
        if min(self.bos, self.eos) < 0:
            raise BadFile(f"{file}: has no BOS or no EOS piece, so it is not a LLaMA tokenizer")

    def encode(self, text: str) -> list[int]:
        """Token ids without BOS and EOS; ValueError if the text holds bytes that are not UTF-8."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the text {ascii(text[:60])} is not valid UTF-8; type --prompt anew") from None
        return self.sp.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode(ids)

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
