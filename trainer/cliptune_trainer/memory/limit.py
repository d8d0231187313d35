"""What a process may take of its device.

Enters: a device and a budget. Leaves: an allocator that says so when it is used up. Called by the planner,
before it probes.
"""

from __future__ import annotations

import torch


def limit_process(device: torch.device, budget_bytes: int) -> None:
    """From here on torch's allocator fails beyond the budget, rather than take what is for others.

    On the CPU nothing is limited: a limit on addresses would hit libraries that map more than they use.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total), device)
    elif device.type == "mps":
        recommended = torch.mps.recommended_max_memory()
        torch.mps.set_per_process_memory_fraction(min(2.0, budget_bytes / recommended))
