# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The trainer: data, checkpoints, the training loop and what goes with them."""
