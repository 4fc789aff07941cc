"""Command lines from dataclasses: a field is a flag, its default is the flag's, its comment is the help text.

    epochs: float = 1.0  # passes over the train split [0, inf)
    dropout: float = 0.0  # dropout inside the adapters [0, 1)

The comment of a number may end with its range: "[" and "]" include the bound, "(" and ")" exclude it, inf is
no bound. parse() refuses any other number in one line with exit status 2: "train.py: --dropout 2.0: expected
a number from 0 to below 1". A float without a range must be finite. A text may be empty if its default is, or
if its comment says what "" means: `"": none`.
"""
import argparse
import dataclasses
import difflib
import inspect
import os
import re
import signal
import sys
from contextlib import contextmanager

from evaluation import ending

ending.handle_signals(os.path.dirname(os.path.abspath(__file__)))
RANGE = re.compile(r"([\[(])(-?[\d.]+|-inf), (-?[\d.]+|inf)([\])])$")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        unknown = re.search(r"unrecognized arguments: --([\w-]+)", message)
        if unknown:
            helps = {o[2:]: a.help for a in self._actions for o in a.option_strings if o.startswith("--")}
            near = difflib.get_close_matches(unknown[1].replace("-", "_"), helps, n=3, cutoff=0.5) or [
                flag for flag, text in helps.items()
                if not flag.startswith("no-") and re.search(rf"\b{unknown[1]}", str(text))][:3]
            hint = f"did you mean --{' or --'.join(near)}?" if near else "see --help"
            message = f"unknown flag --{unknown[1]}; {hint}"
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def underscored(word: str) -> str:
    """Turn --dry-run into --dry_run, and --no-any-base into --no-any_base."""
    return re.sub(r"^(--(?:no-)?)([^=]+)", lambda m: m[1] + m[2].replace("-", "_"), word)


def out_of_range(value: int | float, comment: str) -> str:
    """What a flag with this comment expects instead of `value`; "" if the value is in range."""
    found = RANGE.search(comment)
    malformed = not found and re.search(r"(^|\s)[\[(](-?\d|-?inf)", comment)
    assert not malformed, f"declare a range like [0, 1), not {comment!r}"
    opening, low, high, closing = found.groups() if found else ("(", "-inf", "inf", ")")
    above_low = value >= float(low) if opening == "[" else value > float(low)
    below_high = value <= float(high) if closing == "]" else value < float(high)
    if type(value) is int and abs(value) >= 10**15:
        return "a number of at most 15 digits"
    if above_low and below_high:  # never true for nan
        return ""
    if high == "inf":
        at_low = "of at least" if opening == "[" else "above"
        return "a finite number" if low == "-inf" else f"a number {at_low} {low}"
    return f"a number from {'above ' * (opening == '(')}{low} to {'below ' * (closing == ')')}{high}"


def parse(config: type, presets: dict[str, dict] | None = None, argv: list[str] | None = None):
    """Read the command line into an instance of the dataclass `config`.

    presets: {name: {field: default}}; the flag --recipe picks one, and flags that are given override it
    """
    argv = [underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    source = "".join(inspect.getsource(c) for c in config.__mro__[-2::-1])  # base classes first
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", source, re.M))
    parser = Parser(description=(config.__doc__ or "").strip(), allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = presets or {}
    for f in dataclasses.fields(config):
        by_recipe = {name: preset.get(f.name, f.default) for name, preset in presets.items()}
        default = by_recipe[config.recipe] if presets else f.default
        others = [f"; --recipe {name}: {value}" for name, value in by_recipe.items() if value != default]
        text = f"{comments.get(f.name, '')} (default: {default}{''.join(others)})".replace("%", "%%")
        kind = type(f.default) if f.default is not None else str
        options = {"type": kind, "metavar": kind.__name__}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(f"--{f.name}", default=f.default, help=text, **options)
    if presets:
        recipe = parser.parse_known_args(argv)[0].recipe
        if recipe not in list(presets):
            parser.error(f"unknown --recipe {recipe!r}; known: {', '.join(presets)}")
        parser.set_defaults(**presets[recipe])
    flags = vars(parser.parse_args(argv))
    for name, value in flags.items():
        comment = comments.get(name, "")
        may_be_empty = getattr(config, name) == "" or '"": ' in comment
        blank = isinstance(value, str) and not value.strip() and (value or not may_be_empty)
        if blank or value in ([], "--"):  # before Python 3.13, argparse turns --name=-- into []
            parser.error(f"--{name} is empty; expected a value")
        if type(value) in (int, float) and (expected := out_of_range(value, comment)):
            parser.error(f"--{name} {value}: expected {expected}")
    return config(**flags)


def run(main) -> None:
    """Call main(). A user's mistake (ValueError, OSError) becomes one line on stderr and exit status 1.

    Ctrl-C ends with status 130 and SIGTERM with 143, as shells expect.
    """
    signal.signal(signal.SIGTERM, ending.terminated)
    try:
        main()
        sys.stdout.flush()  # here, where a full disk behind it is one line
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        message = ending.message(e)
        if not message or os.environ.get("LAVIN_TRACEBACK"):  # set it to see where the error came from
            raise
        sys.exit(f"{os.path.basename(sys.argv[0])}: {message}")


def pick_device(device: str, dtype: str) -> tuple:
    """--device and --dtype as torch objects. auto: a CUDA GPU in bf16; else an Apple GPU or a CPU in fp32."""
    import torch  # not at the top: scoring a file of predictions needs no torch
    signal.signal(signal.SIGINT, signal.default_int_handler)  # imports are done: Ctrl-C is an exception
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if dtype != "auto" and dtype not in dtypes:
        raise ValueError(f"unknown --dtype {dtype!r}; known: auto, {', '.join(dtypes)}")
    if device == "auto":
        apple = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if apple else "cpu"
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # fails without such a device, and on "meta"
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device {device}: not usable here; try cpu") from None
    if chosen.type == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if chosen.index is None and local >= gpus:
            raise ValueError(f"more processes than GPUs; use --nproc_per_node {gpus}, or --device cpu")
        chosen = torch.device("cuda", local if chosen.index is None else chosen.index)
        torch.cuda.set_device(chosen)
    return chosen, dtypes.get(dtype, torch.bfloat16 if chosen.type == "cuda" else torch.float32)


def processes() -> tuple[int, int]:
    """The rank of this process and the number of processes, as torchrun sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """True on rank 0, the one that prints and writes files."""
    return processes()[0] == 0


def say(text: str) -> None:
    """Print on stderr, on rank 0."""
    if is_main():
        print(text, file=sys.stderr)


@contextmanager
def process_group(backend: str, **options):
    """Set up torch.distributed for the `with` block. A single process needs no group and gets none."""
    if processes()[1] == 1:
        yield
        return
    import torch.distributed as dist

    # The functions of this module keep the current process group as a default argument. Import it while there
    # is none: a kept group keeps gloo's threads alive, and one of them may abort while Python shuts down.
    import torch.distributed.nn.functional  # noqa: F401
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it waits in C++, where no handler of Python's runs
    dist.init_process_group(backend, **options)
    signal.signal(signal.SIGTERM, ending.terminated)
    try:
        with ending.watched():
            dist.barrier()
            yield
            dist.barrier()  # gloo aborts if one process leaves while another still sends
    finally:
        dist.destroy_process_group()
