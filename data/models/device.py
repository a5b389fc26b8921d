"""pick_device: the device that a command runs its model on."""

import os
from typing import Literal, get_args

import torch

from data.arguments import check_choice

Device = Literal["cpu", "cuda"]


def pick_device(asked: Device | None = None) -> torch.device:
    """The device of this process: as asked, else CUDA where there is a device for this process, else the CPU.

    Under torchrun, process i of a machine takes CUDA device i.

    Raises:
        ValueError: If it is another word, or CUDA is asked for and there is no device for this process.
    """
    if asked is not None:
        check_choice("device", asked, get_args(Device))
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if asked == "cuda" and index >= count:
        found = f"{count} for process {index} of this machine" if count else "none"
        raise ValueError(f"device is cuda, and of CUDA devices torch finds {found}; use --device cpu")
    return torch.device("cuda", index) if asked != "cpu" and index < count else torch.device("cpu")
