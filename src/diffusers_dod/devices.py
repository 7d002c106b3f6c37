# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Copies to a device that the host does not wait for."""

import torch


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """
    Copies a tensor to a device, without waiting for what the device does.

    A plain copy from the CPU waits until a GPU has finished all earlier work; one from pinned memory lines up.

    Args:
        tensor (`torch.Tensor`): The tensor.
        device (`torch.device` or `str`): The device.

    Returns:
        `torch.Tensor`: The tensor on the device; the same one if it was there.
    """
    device = torch.device(device)
    if tensor.device.type != "cpu" or device.type in ("cpu", "meta", "mps"):  # which has no pinned memory
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
