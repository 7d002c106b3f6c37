# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Measures of how good samples are."""
