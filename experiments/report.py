"""Fill the tables of experiments/README.md from results/*.json.

    python -m experiments.report

A table stands between the markers <!-- table2 --> and <!-- end -->, for results/table2.json.
"""
import json
import re
import sys
from pathlib import Path

import cli

HERE = Path(__file__).parent
BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.S)


def cell(value) -> str:
    """[mean, standard error], a number or a text"""
    if isinstance(value, list):
        mean, error = value
        digits = 2 if abs(mean) < 2 and error < 1 else 1  # cosines and small differences
        return f"{mean:.{digits}f} ± {error:.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(result: dict) -> str:
    """The tables of a result. A row may lack columns of other rows."""
    blocks = []
    for title, table in result["tables"].items():
        columns = list(dict.fromkeys(column for row in table.values() for column in row))
        rows = [[name, *(cell(row.get(column, "")) for column in columns)] for name, row in table.items()]
        lines = [[title, *columns], ["---", *["---:"] * len(columns)], *rows]
        blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    setting = ", ".join(f"{name} {value}" for name, value in result["setting"].items())
    notes = [f"{name.replace('_', ' ')}: {value}" for name, value in result.items()
             if isinstance(value, str | float)]
    return "\n\n".join([*blocks, "; ".join([setting, *notes])])


def filled(text: str, results: Path = HERE / "results") -> str:
    """The text with every block filled: tables and pictures, or "Not run yet." where there is no result."""
    def fill(block: re.Match) -> str:
        file = results / f"{block[2]}.json"
        body = "Not run yet."
        if file.is_file():
            names = sorted(png.name for png in results.glob(f"{block[2]}*.png"))
            pictures = [f"![{name}](results/{name})" for name in names]
            body = "\n\n".join([markdown(json.loads(file.read_text())), *pictures])
        return f"{block[1]}{body}\n{block[3]}"

    return BLOCK.sub(fill, text)


def main() -> None:
    readme = HERE / "README.md"
    readme.write_text(filled(readme.read_text()))
    print(f"filled {readme}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
