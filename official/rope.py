"""LLaMA-3.1's rotary frequencies: trained on 8,192 tokens, then slowed down for a context of 131,072.

    https://arxiv.org/abs/2407.21783, section 3.4.2

A pair that turns many times within the original context tells near positions apart, and is left as it is. A
pair that turns less than once could come to angles it has never seen, so its frequency is divided by
`factor`. In between, the two are blended.
"""
from math import pi

import torch

from official.configs import Config
from official.mistakes import BadFile, described

KINDS = "default", "llama3"


def slowed(freq: torch.Tensor, scaling: dict | None) -> torch.Tensor:
    """Frequencies [D/2] in radians per position -> the same, scaled as config.json says; None: unchanged."""
    if scaling is None:
        return freq
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * freq / (2 * pi)  # within the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slowed down, 1: left as it is
    return freq * (kept + (1 - kept) / scaling["factor"])


def read_scaling(cfg: Config) -> dict | None:
    """What config.json says: in rope_scaling or, in recent files, in rope_parameters; None: nothing."""
    for key in ("rope_scaling", "rope_parameters"):
        section = cfg.section(key)
        kind = section.text("rope_type", section.text("type", "default"))  # early files say `type`
        if kind not in KINDS:
            raise BadFile(f"{cfg.file}: {key}.rope_type is {described(kind)}, expected {' or '.join(KINDS)}; "
                          "other scalings of the rotary frequencies are not supported")
        if kind == "llama3":
            names = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
            scaling = {name: section.number(name) for name in names}
            low = scaling["low_freq_factor"]
            section.value("high_freq_factor", lambda high: high > low, f"more than low_freq_factor {low:g}")
            return scaling
    return None
