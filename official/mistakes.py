"""What is wrong with a file, said in one line: the file, what was expected, what to do."""
from pathlib import Path


class BadFile(ValueError):
    """A file that our readers refuse."""


def damaged(file: Path, reason: object, hint: str = "download it again") -> BadFile:
    reason = str(reason).strip().partition("\n")[0].partition(". ")[0]
    return BadFile(f"{file}: damaged or cut short ({shown(reason)}); {hint}")


def refused(file: Path, reason: str) -> BadFile:
    return BadFile(f"{file}: refused, because {reason}; download it from its official source")


def check_file(file: Path) -> None:
    """Refuse a folder, a pipe or a device before it is opened: opening a pipe can wait forever."""
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; download it")
    if not file.is_file():
        raise BadFile(f"{file}: a folder, pipe or device, expected a regular file; download it again")


def complain(path, problems: dict[str, list[str]], hint: str) -> None:
    """Raise a BadFile that lists all problems, three names each. Without problems, do nothing."""
    texts = []
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - 3} more" if names[3:] else ""
            texts.append(f"{what} {', '.join(map(shown, names[:3]))}{more}")
    if texts:
        raise BadFile(f"{path}: {'; '.join(texts)}; {hint}")


def shown(text: str) -> str:
    """Text from a file, fit for a message: printable and at most 100 characters long."""
    text = text if len(text) <= 100 else text[:98] + ".."
    return text if text.isprintable() else ascii(text)


def described(value: object) -> str:
    """A value from a file, fit for a message: of a container only its type, for its text may be endless."""
    if value is None or isinstance(value, (str, float)) or isinstance(value, int) and abs(value) < 10**20:
        return shown(repr(value[:100] if isinstance(value, str) else value))
    kind = type(value).__name__
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
