"""Configurations from JSON files and metadata. Every value is checked before a model is built from it."""
import json
from pathlib import Path
from typing import Callable

import prompts
from official.mistakes import BadFile, check_file, described, shown

LARGEST = 64 * 2**20  # bytes of a JSON file; the index of a large model has less than one million


def read_json(file: Path) -> dict:
    """Read a JSON object; ValueError or FileNotFoundError says in one line why that failed."""
    check_file(file)
    if file.stat().st_size > LARGEST:
        raise BadFile(f"{file}: {file.stat().st_size} bytes, expected at most {LARGEST}; download it again")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise BadFile(f"{file}: not valid JSON ({e}); download it again") from None
    if not isinstance(values, dict):
        raise BadFile(f"{file}: holds a {type(values).__name__}, expected an object; download it again")
    return values


class Config:
    """The values of a configuration file.

    Most methods return the value of one key, or raise a ValueError that names the file, the key and what was
    expected. A key that is absent or null has the value `default`. Without a default, the key is required.
    """

    def __init__(self, file: Path, values: dict, prefix: str = ""):
        self.file, self.values, self.prefix = file, values, prefix

    def value(self, key: str, fits: Callable[[object], bool], expected: str, default=None):
        found = self.values.get(key)
        found = default if found is None else found
        if found is None:
            raise BadFile(f"{self.file}: {self.prefix}{key} is missing; restore the original file")
        if not fits(found):
            raise BadFile(f"{self.file}: {self.prefix}{key} is {described(found)}, expected {expected}; "
                          "restore the original file")
        return found

    def whole(self, key: str, default: int | None = None, most: int = 2**20) -> int:
        fits = lambda x: type(x) is int and 1 <= x <= most  # a bool is an int too
        return self.value(key, fits, f"a whole number from 1 to {most}", default)

    def number(self, key: str, default: float | None = None, most: float = 1e12) -> float:
        fits = lambda x: type(x) in (int, float) and 0 < x <= most  # NaN fails both comparisons
        return float(self.value(key, fits, f"a number above 0, at most {most:g}", default))

    def flag(self, key: str, default: bool | None = None) -> bool:
        return self.value(key, lambda x: type(x) is bool, "true or false", default)

    def text(self, key: str, default: str | None = None) -> str:
        return self.value(key, lambda x: type(x) is str, "text", default)

    def section(self, key: str) -> "Config":
        """The values of an object inside this one; empty if it is absent."""
        values = self.value(key, lambda x: isinstance(x, dict), "an object", {})
        return Config(self.file, values, f"{self.prefix}{key}.")

    def multiple(self, key: str, of: str, times: int = 1) -> None:
        """ValueError unless the value of `key` is a multiple of `times` the value of `of`."""
        step = times * self.whole(of)
        self.value(key, lambda x: x % step == 0, f"a multiple of {step}, for {self.values[of]} {of}")

    def one_of(self, key: str, *known: str) -> str:
        return self.value(key, lambda x: isinstance(x, str) and x in known, " or ".join(known))

    def only(self, *known: str) -> None:
        """ValueError if there is a key that our version does not know."""
        for key in self.values:
            if key not in known:
                raise BadFile(f"{self.file}: {self.prefix}{shown(key)} is unknown, expected "
                              f"{', '.join(known)}; use the version of this project that wrote the file")

    def expect(self, expected: dict, what: str) -> None:
        """ValueError if a value asks for something that our model does not compute."""
        for key, value in expected.items():
            found = self.values.get(key)
            if found not in (value, None):
                raise BadFile(f"{self.file}: {self.prefix}{key} is {described(found)}, expected {value!r}; "
                              f"only {what} are supported")


def read_config(file: Path) -> Config:
    return Config(file, read_json(file))


def check_metadata(file: Path, meta: object) -> None:
    """ValueError if an adapter file's metadata have a value of the wrong type or of an absurd size."""
    cfg = Config(file, meta if isinstance(meta, dict) else {}, "metadata ")
    lavin, llama = cfg.section("lavin"), cfg.section("llama")
    adapter = lavin.section("adapter")
    llama.whole("dim")
    llama.whole("n_layers", most=1000)
    lavin.only("adapter", "vision", "vit_adapters", "vit_routing", "neck_dim", "normalize")
    adapter.only("kind", "dim", "scale", "tau", "dropout")
    adapter.one_of("kind", "mm", "rep")
    adapter.value("dim", lambda x: type(x) is int and x in range(2, 1025, 2), "an even number up to 1024")
    adapter.number("scale")
    adapter.number("tau")
    adapter.value("dropout", lambda x: type(x) in (int, float) and 0 <= x < 1, "a number from 0 to below 1")
    for key in ("vision", "vit_adapters"):
        lavin.flag(key)
    lavin.one_of("vit_routing", "cls", "token")
    lavin.one_of("normalize", "imagenet", "clip")
    lavin.whole("neck_dim", most=2**14)
    if "base" not in cfg.values:  # null in released files, but never absent
        raise BadFile(f"{file}: metadata base is missing; restore the original file")
    cfg.text("base", "")
    cfg.flag("captions")
    cfg.whole("max_new_tokens")
    try:
        prompts.check_format(cfg.text("format"))
        list(prompts.mixture(cfg.section("train").text("data", "-")))  # released files do not know their data
    except BadFile:
        raise
    except ValueError as e:
        raise BadFile(f"{file}: metadata: {e}; restore the original file") from None
