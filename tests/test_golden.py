"""A trained LLaMA writes the text that it must write, in every layout and on every path through the model.

stories260K has 260K parameters. It was trained with grouped-query attention and tied embeddings. Its folder
holds it in three layouts, and greedy_200.txt has its 200 greedy tokens after BOS, on which transformers and
the C program it was published with agree.
"""
import pytest
import torch
from conftest import REAL

from data import Example, collate
from lavin import TEXT, LaVIN, LaVINConfig
from llama import LLaMA
from official.tokenizer import Tokenizer
from speed.step import FoldedLaVIN

STORIES = REAL / "stories260K"
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="stories260K is not in ../shared/data")


def tell(folder, dtype=torch.float32, fold: bool = False) -> str:
    """200 greedy tokens after BOS, as text; the untrained adapters are the identity"""
    llama = LLaMA.from_pretrained(folder, dtype=dtype)
    tokenizer = Tokenizer(folder, llama.cfg.vocab_size)
    model = LaVIN(llama, None, LaVINConfig(vision=False)).eval()
    model = FoldedLaVIN(model, TEXT) if fold else model
    bos = collate([Example(None, [tokenizer.bos], 0, [], 0)], 0, "clip")
    (ids,) = model.generate(bos, 200, tokenizer.eos, temperature=0)
    return tokenizer.decode(ids)


@pytest.mark.parametrize("fold", [False, True], ids=["modules", "folded"])
@pytest.mark.parametrize("layout", ["gqa", "mha", "meta"])
def test_a_trained_llama_tells_its_story(layout, fold):
    assert tell(STORIES / layout, fold=fold) == (STORIES / "greedy_200.txt").read_text()
