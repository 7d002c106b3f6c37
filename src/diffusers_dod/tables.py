# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Tables in Markdown and LaTeX."""

import re
from collections.abc import Collection, Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], text: Collection[str] = ()) -> str:
    """
    Formats a Markdown table. Its first column is text, on the left; its other columns are numbers, on the right.

    Args:
        header (`Sequence[str]`): Titles of the columns.
        rows (`Sequence[Sequence[str]]`): The cells of each row.
        text (`Collection[str]`, defaults to `()`): Titles of further columns that are text.

    Returns:
        `str`: The lines of the table.
    """
    rule = ["---" if title in (header[0], *text) else "---:" for title in header]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def format_latex(header: Sequence[str], rows: Sequence[Sequence[str]], text: Collection[str] = ()) -> str:
    """
    Formats a LaTeX table without packages, aligned as [`format_table`].

    Args:
        header (`Sequence[str]`): Titles of the columns.
        rows (`Sequence[Sequence[str]]`): The cells of each row.
        text (`Collection[str]`, defaults to `()`): Titles of further columns that are text.

    Returns:
        `str`: The lines of a `tabular`.
    """
    columns = "".join("l" if title in (header[0], *text) else "r" for title in header)
    lines = [" & ".join(re.sub(r"([%&#_$])", r"\\\1", cell) for cell in cells) + r" \\" for cells in (header, *rows)]
    lines[0] += r" \hline"
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *lines, r"\end{tabular}"])
