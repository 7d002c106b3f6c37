# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Markdown tables."""

from diffusers_dod.tables import format_table


def test_a_table_by_hand():
    rows = [["rk4", "4", "fixed"], ["dopri5", "6.5", "adaptive"]]
    assert format_table(["solver", "evaluations", "steps"], rows, text=["steps"]) == (
        "| solver | evaluations | steps |\n| --- | ---: | --- |\n| rk4 | 4 | fixed |\n| dopri5 | 6.5 | adaptive |"
    )
    assert format_table(["a", "b"], []) == "| a | b |\n| --- | ---: |"
