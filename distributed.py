"""The ranks of a run under torchrun: who prints and writes, what reaches all of them.

Rank 0 decides, reads and writes; on_rank0 hands its results on.  With a folder that all machines
share, nothing else is sent.  Without one, each machine's first rank keeps a copy of the files that
its ranks are about to read: token ids, an untrained or a finished student.  Checkpoints, students,
completions and logs are written on rank 0's machine alone.

torch is imported in functions: a run without torchrun may not need it.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import storage


class Ranks(NamedTuple):  # this process among those of a run; by default the only one
    rank: int = 0  # 0 to world_size - 1
    world_size: int = 1
    device: Any = None  # torch.device

    @property
    def is_rank0(self) -> bool:
        """Whether this process prints, and decides on and writes files."""
        return self.rank == 0


def init_ranks(device: Any) -> Ranks:
    """Join the process group that torchrun describes in the environment; without it: one rank."""
    if "RANK" not in os.environ:
        return Ranks(0, 1, device)
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"  # gloo: for what --shard cpu offloads
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(backend)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def print_on_rank0(text: str) -> None:
    """Print a line, unless torchrun has made this another rank than the first."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def print0(ranks: Ranks, text: str) -> None:
    """Print a line on rank 0, above a progress bar if there is one."""
    if ranks.is_rank0:
        from tqdm import tqdm

        tqdm.write(text)
        sys.stdout.flush()


def on_rank0(ranks: Ranks, function: Callable, *arguments: Any) -> Any:
    """Call function on rank 0 alone; return its result on every rank, when it is done."""
    if ranks.world_size == 1:
        return function(*arguments)
    import torch.distributed as dist

    result = [None]
    if ranks.is_rank0:
        result = [function(*arguments)]
    dist.broadcast_object_list(result)
    return result[0]


def wait_for_all(ranks: Ranks) -> None:
    """Go on when all ranks have come here."""
    if ranks.world_size > 1:
        import torch.distributed as dist

        dist.barrier()


def rank_and_world_size() -> tuple[int, int]:
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather(value: Any) -> list:
    """Return the value of each rank; every rank must call it."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ---------------- Files that other machines lack

MODEL_SUFFIXES = {".json", ".model", ".txt", ".safetensors", ".bin", ".jinja"}
PART_BYTES = 2**26  # of a file that are sent at once


def is_first_of_machine(ranks: Ranks) -> bool:
    """Return whether this rank writes what its machine's ranks read."""
    return ranks.is_rank0 or os.environ.get("LOCAL_RANK") == "0"


def share_folder(folder: Path, ranks: Ranks) -> None:
    """Put the files of a folder of rank 0's, such as a student, on machines that lack them."""
    if ranks.world_size > 1:
        names = on_rank0(ranks, model_files, folder)
        share_files(folder, names, ranks)


def model_files(folder: Path) -> list[str]:
    """Return the names of a model folder's files; of a hub name, none."""
    if not folder.is_dir():
        return []
    names = []
    for path in folder.iterdir():
        if path.suffix in MODEL_SUFFIXES:
            names.append(path.name)
    return sorted(names)


def share_files(folder: Path, names: Iterable[str], ranks: Ranks) -> list[str]:
    """Put rank 0's files of these names into the folder of machines that lack them.

    Returns what this rank wrote.  Every rank must call it; folder may be another one on each
    machine, names are rank 0's.
    """
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
    if on_this_machine == ranks.world_size:
        return []
    import torch.distributed as dist

    wanted = on_rank0(ranks, lambda: {name: file_hash(folder / name) for name in names})
    lacking = []
    if is_first_of_machine(ranks):
        lacking = [name for name in wanted if file_hash(folder / name) != wanted[name]]
    of_ranks: list = [None] * ranks.world_size
    dist.all_gather_object(of_ranks, lacking)
    for name in wanted:
        if any(name in names for names in of_ranks):
            broadcast_file(folder / name, name in lacking, ranks)
    dist.barrier()  # what one rank of a machine wrote, all of it may read
    return lacking


def file_hash(path: Path) -> str | None:
    if path.exists():
        return storage.file_sha256(path)
    return None


def broadcast_file(path: Path, is_lacking: bool, ranks: Ranks) -> None:
    """Send a file of rank 0; write it where it is lacking, whole or not at all."""
    import torch
    import torch.distributed as dist

    size = on_rank0(ranks, lambda: path.stat().st_size)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.ExitStack() as stack:
        if ranks.is_rank0:
            source = stack.enter_context(open(path, "rb"))
        if is_lacking:
            path.parent.mkdir(parents=True, exist_ok=True)
            target = stack.enter_context(open(temporary, "wb"))
            stack.callback(temporary.unlink, missing_ok=True)
        for start in range(0, size, PART_BYTES):
            part = torch.empty(min(PART_BYTES, size - start), dtype=torch.uint8)
            if ranks.is_rank0:
                source.readinto(part.numpy())
            dist.broadcast(part, src=0)
            if is_lacking:
                target.write(part.numpy())
        if is_lacking:
            target.flush()
            os.replace(temporary, path)
