"""JSON files of sizes and options: config.json and params.json."""
import json
from pathlib import Path


def read_json(path: Path) -> dict:
    """Read a JSON object; ValueError or FileNotFoundError says in one line why that failed."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; download it with the weights")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e}); download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a JSON {type(values).__name__}, expected an object; download it again")
    return values


def check_config(file: Path, cfg: dict, expected: dict, what: str) -> None:
    """ValueError if `cfg` asks for something that our model does not compute; an absent key is fine."""
    for key, value in expected.items():
        if cfg.get(key, value) not in (value, None):
            raise ValueError(f"{file}: {key} {cfg[key]!r}, expected {value!r}; "
                             f"only {what} are supported")
