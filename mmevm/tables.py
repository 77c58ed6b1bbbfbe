"""Tables for terminals and documents."""

from collections.abc import Sequence

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Return a Markdown table; the columns after the first ``text_columns`` are aligned to the right."""
    grid = Table(box=MARKDOWN)
    for i, title in enumerate(header):
        grid.add_column(title, justify='left' if i < text_columns else 'right', no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    console = Console(width=1000, markup=False, emoji=False, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(grid)
    return capture.get().strip()
