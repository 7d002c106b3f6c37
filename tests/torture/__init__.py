"""
Faults of every kind against the real commands: `make torture`, or `python tests/torture ROW ...` for some rows.

`rows.py` runs tries and prints the table; the other files hold the rows. `docs/reliability.md` shows the last table.
"""
