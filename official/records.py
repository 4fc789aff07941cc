"""Text files, JSON and JSON lines. An error names the file and the record; a picture stays in its folder."""
import json
import re
from pathlib import Path


def read_text(path: Path, what: str) -> str:
    """The text of a file. `what` tells the user which file is expected here."""
    if not path.is_file():  # a pipe is no file either: reading it could wait forever
        raise FileNotFoundError(f"{path}: no such file; expected {what}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not text in UTF-8 ({e.reason} at byte {e.start})") from None


def parse_json(where: str, text: str):
    try:
        content = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # encode() refuses half a surrogate pair
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:  # json recurses into nested lists
        raise ValueError(f"{where}: not valid JSON ({e})") from None
    return content


def read_json(path: Path, what: str, kind: type = object):
    content = parse_json(str(path), read_text(path, what))
    if not isinstance(content, kind):
        expected = getattr(kind, "__name__", kind)
        raise ValueError(f"{path}: holds {type(content).__name__}, expected a {expected}; {what}")
    return content


def read_lines(path: Path, what: str) -> list[str]:
    return read_text(path, what).rstrip("\n").split("\n")  # splitlines() would also split at U+2028


def read_records(path: Path, what: str) -> list[tuple[str, dict]]:
    """[(file and position, record)] of a JSON list, or of a .jsonl file with one record per line."""
    if path.suffix == ".jsonl":
        lines = enumerate(read_lines(path, what), start=1)
        records = [(f"{path}:{n}", parse_json(f"{path}:{n}", line)) for n, line in lines if line.strip()]
    else:
        records = [(f"{path}: record {i}", record) for i, record in enumerate(read_json(path, what, list))]
    if not records:
        raise ValueError(f"{path}: empty; expected {what}")
    return records


def field(where: str | Path, record: dict, name: str, kind: type = str, default=None):
    """record[name], which must be of type `kind`; if it is missing or null, the default or an error."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a JSON object, so it has no field {name!r}")
    value = default if record.get(name) is None else record[name]
    if not isinstance(value, kind) or isinstance(value, bool):  # to Python, JSON's true is an int
        raise ValueError(f"{where}: {name!r} is missing or not {getattr(kind, '__name__', kind)}")
    return value


def inside(where: str, folder: Path, *names: str) -> Path:
    """folder/name/.. for names from a data file; ValueError if a name would leave the folder.

    The picture itself may be a symbolic link to another place: a user makes links, a data file can't.
    """
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{where}: {name!r} leaves its folder; expected a relative path without ..")
    return folder.joinpath(*names)
