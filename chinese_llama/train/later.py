"""Figures of a step on their way from the GPU, so that reading them waits for nothing."""

from __future__ import annotations

import torch


class Later:
    """The numbers of a small tensor, copied to the host behind the work that makes them.

    On CUDA the copy goes to pinned memory and an event marks its end: reading waits for that event, not for what was
    queued since, and a step later not at all. Elsewhere reading is what it always is.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._values, self._done = values.detach(), None
        if values.is_cuda:
            self._values = self._values.to("cpu", non_blocking=True)  # pinned
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """The numbers of a tensor [n]."""
        if self._done is not None:
            self._done.synchronize()
        return [float(value) for value in self._values.tolist()]
