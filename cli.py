"""Command lines from dataclasses: a field is a flag, its type and default are the flag's, its comment is the help."""
import argparse
import dataclasses
import difflib
import inspect
import os
import re
import sys
from contextlib import contextmanager


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        unknown = re.search(r"unrecognized arguments: --([\w-]+)", message)
        if unknown:
            flags = [o[2:] for a in self._actions for o in a.option_strings if o.startswith("--")]
            near = difflib.get_close_matches(unknown[1].replace("-", "_"), flags, n=3, cutoff=0.5)
            hint = f"did you mean --{' or --'.join(near)}?" if near else "see --help"
            message = f"unknown flag --{unknown[1]}; {hint}"
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def underscored(word: str) -> str:
    """--dry-run is --dry_run; the dash of --no-vision stays"""
    name, *value = word.split("=", 1)
    if not name.startswith("--"):
        return word
    prefix = "--no-" if name.startswith("--no-") else "--"
    return "=".join([prefix + name.removeprefix(prefix).replace("-", "_"), *value])


def parse(config: type, presets: dict[str, dict] | None = None, argv: list[str] | None = None):
    """An instance of the dataclass `config` from the command line.

    presets  {name: {field: default}}; `config` then has a field `recipe` that picks one, explicit flags win
    """
    argv = [underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    source = "".join(inspect.getsource(c) for c in config.__mro__[-2::-1])  # a subclass's own comment comes last and wins
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", source, re.M))
    parser = Parser(description=(config.__doc__ or "").strip(), allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(config):
        flag, text = f"--{f.name}", comments.get(f.name, "").replace("%", "%%")
        kind = type(f.default) if f.default is not None else str
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, metavar=kind.__name__)
        parser.add_argument(flag, default=f.default, help=f"{text} (default: {f.default})", **how)
    if presets:
        first = parser.parse_known_args(argv)[0].recipe
        if first not in presets:
            parser.error(f"unknown --recipe {first!r}; known: {', '.join(presets)}")
        parser.set_defaults(**presets[first])
    return config(**vars(parser.parse_args(argv)))


def run(main) -> None:
    """Call main(); a user's mistake (ValueError, OSError) becomes one line on stderr and exit status 1."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
    except (ValueError, OSError) as e:
        if os.environ.get("LAVIN_TRACEBACK"):  # for whoever debugs the code instead of the input
            raise
        sys.exit(f"{os.path.basename(sys.argv[0])}: {e}")


def at_least(cfg, **bounds: float) -> None:
    """ValueError if a flag is below its bound"""
    for flag, least in bounds.items():
        if getattr(cfg, flag) < least:
            raise ValueError(f"--{flag} {getattr(cfg, flag)}: at least {least} is needed")


def pick_device(device: str, dtype: str) -> tuple:
    """("auto" or a torch device, "auto", "fp32" or "bf16") -> both; auto is CUDA in bf16, else the CPU in fp32"""
    import torch  # here: scoring a predictions file does without it
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if dtype != "auto" and dtype not in dtypes:
        raise ValueError(f"unknown --dtype {dtype!r}; known: auto, {', '.join(dtypes)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        d = torch.device(device)
        torch.empty(0, device=d)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {device}: not usable here; try cpu") from None
    return d, dtypes.get(dtype, torch.bfloat16 if d.type == "cuda" else torch.float32)


def processes() -> tuple[int, int]:
    """this process and how many there are, as torchrun tells"""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group(backend: str, **options):
    """All processes, met at its beginning and at its end, may talk through torch.distributed within; one: nothing to do"""
    if processes()[1] == 1:
        yield
        return
    import torch.distributed as dist
    # Imported once there is a group, this keeps it, as the default of its functions, and with it the threads of gloo,
    # one of which may then still be at work while Python shuts down, and abort.
    import torch.distributed.nn.functional
    dist.init_process_group(backend, **options)
    try:
        dist.barrier()
        yield
        dist.barrier()  # nobody leaves while another still talks: gloo would abort
    finally:
        dist.destroy_process_group()


def clock(seconds: float) -> str:
    """75 -> 1:15, 3700 -> 1:01:40"""
    m, s = divmod(int(seconds + 0.5), 60)
    h, m = divmod(m, 60)
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"
