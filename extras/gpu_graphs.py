"""CUDA graphs: what a GPU does again and again, started at once and without the host."""

import contextlib
from collections.abc import Callable, Hashable

import torch

import storage
from storage import UserError


class Graphs:
    """The graphs of one piece of work, by the shape of what it reads; on other devices none."""

    def __init__(self, device: torch.device, work: str) -> None:
        self.device = device
        self.work = work  # what it is, for an error
        self.is_used = device.type == "cuda"
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        if self.is_used:
            self.stream = torch.cuda.Stream(device)
            self.pool = torch.cuda.graph_pool_handle()

    def on_stream(self) -> contextlib.AbstractContextManager:
        """Return a context of a stream of its own: the default one cannot be captured."""
        if not self.is_used:
            return contextlib.nullcontext()
        default = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(default)
        return torch.cuda.stream(self.stream)

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do the work of a key: operation by operation the first time, then as a CUDA graph.

        It reads and writes the same tensors each time.  A graph draws its random numbers from the
        seed that is set when it is replayed.
        """
        if key not in self.graphs or not self.is_used:
            work()
            self.graphs[key] = None
            return
        if self.graphs[key] is None:
            self.graphs[key] = self.capture(work)
        self.graphs[key].replay()

    def capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record what work queues, without doing it.  Raises UserError where it asks the host."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                work()
        except RuntimeError as e:
            if storage.is_out_of_memory(e):
                raise
            reason = storage.one_line(e)
            raise UserError(
                f"{self.work} cannot be captured in a CUDA graph ({reason}): start the same "
                "command with --plain, which goes on from what is kept"
            ) from None
        return graph

    def copy_in(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy from the host without waiting."""
        if self.is_used:
            source = source.pin_memory()
        target.copy_(source, non_blocking=True)
