# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Images and their latents: opened, encoded, stored, streamed and drawn for training."""
