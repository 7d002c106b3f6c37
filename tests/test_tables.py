# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Tables in Markdown and LaTeX."""

from diffusers_dod.tables import format_latex, format_table


def test_a_table_by_hand():
    rows = [["rk4", "4", "fixed"], ["dopri5", "6.5", "adaptive"]]
    assert format_table(["solver", "evaluations", "steps"], rows, text=["steps"]) == (
        "| solver | evaluations | steps |\n| --- | ---: | --- |\n| rk4 | 4 | fixed |\n| dopri5 | 6.5 | adaptive |"
    )
    assert format_table(["a", "b"], []) == "| a | b |\n| --- | ---: |"


def test_a_latex_table_by_hand():
    rows = [["fid_infinity", "3.9", "1 % to 2 %"], ["R&D", "$5", "#1"]]
    assert format_latex(["metric", "value", "interval"], rows, text=["interval"]) == "\n".join(
        [
            r"\begin{tabular}{lrl}",
            r"metric & value & interval \\ \hline",
            r"fid\_infinity & 3.9 & 1 \% to 2 \% \\",
            r"R\&D & \$5 & \#1 \\",
            r"\end{tabular}",
        ]
    )
