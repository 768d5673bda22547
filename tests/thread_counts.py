"""Results that must not depend on the number of threads."""

import torch


def results_with_threads(compute):
    """What `compute()` returns with one thread, with two, and with two again."""
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    return results
