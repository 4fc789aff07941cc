"""Which model a path holds, and in whose layout."""
import re
from pathlib import Path

from official.configs import read_json
from official.mistakes import described

# model_type in config.json -> our model, or why we have none
MODELS = {"llama": "LLaMA", "mistral": "LLaMA", "clip": "CLIP", "clip_vision_model": "CLIP"}
REFUSED = {
    "qwen2": "its q, k and v have biases", "qwen3": "it normalises q and k",
    "phi3": "it stores q, k and v as one", "phi": "its blocks are parallel",
    "gpt2": "it has learned positions and LayerNorm",
    "gemma": "its embeddings are scaled and its norms shifted", "mixtral": "it is a mixture of experts",
    "siglip": "it has no [cls] token", "siglip_vision_model": "it has no [cls] token",
    "dinov2": "it scales its residuals", "vit": "it has another order of norms"}
REFUSED |= {kind: REFUSED["gemma"] for kind in ("gemma2", "gemma3", "gemma3_text")}


def identify(path: Path, wanted: str = "") -> str:
    """The model and the layout at `path`: "LLaMA, Meta", "CLIP, OpenAI", ..

    ValueError or FileNotFoundError if the layout is unknown, or if the model is not the `wanted` one.
    """
    found = find_layout(path, wanted or "LLaMA or CLIP")
    if not found.startswith(wanted):
        raise ValueError(f"{path}: holds a {found.partition(',')[0]}, expected a {wanted}; "
                         "did you swap --llama and --clip?")
    return found


def find_layout(path: Path, wanted: str) -> str:
    if path.suffix == ".pt" and path.is_file():
        return "CLIP, OpenAI"
    here = sorted(f.name for f in path.iterdir()) if path.is_dir() else []
    meta = [name for name in here if re.fullmatch(r"consolidated\.\d\d\.pth", name)]
    hf = [name for name in here if re.match(r"(pytorch_)?model\b.*\.(safetensors|bin)", name)]
    if "params.json" in here and meta:
        return "LLaMA, Meta"
    if "config.json" in here and (hf or not meta):
        kind = read_json(path / "config.json").get("model_type")
        if not isinstance(kind, str) or kind not in MODELS:
            why = f" ({REFUSED[kind]})" if isinstance(kind, str) and kind in REFUSED else ""
            raise ValueError(f"{path / 'config.json'}: model_type is {described(kind)}{why}, expected "
                             f"{' or '.join(MODELS)}; see official/MODELS.md")
        return f"{MODELS[kind]}, Hugging Face"
    if meta or hf:
        owner, config = ("Meta", "params.json") if meta else ("Hugging Face", "config.json")
        raise FileNotFoundError(f"{path}: {(meta or hf)[0]} is in {owner}'s layout, but {config} is missing; "
                                "copy it from the same download")
    if len([name for name in here if name.endswith(".pt")]) == 1:
        return "CLIP, OpenAI"
    raise FileNotFoundError(f"{path}: no such folder of {wanted} weights; expected config.json with "
                            "model.safetensors (Hugging Face), params.json with consolidated.00.pth (Meta), "
                            "or ViT-L-14.pt (OpenAI's CLIP)")
