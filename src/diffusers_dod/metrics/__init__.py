# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Numbers that compare images or their features: one file for each metric."""
