"""A lean model divided among processes (DDP, FSDP2) learns as one that is whole."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from chinese_llama.data.templates import IGNORE
from chinese_llama.model.frugal import add_lora_product
from chinese_llama.model.lean import lean
from tests.model.test_lean import batch, pair

EMBEDDINGS = ("new-rows", "full")


def halves() -> list[dict[str, Any]]:
    """The batch of two processes."""
    whole = batch()
    return [{name: t[rows] for name, t in whole.items()} for rows in (slice(0, 2), slice(2, 3))]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found[name.replace("module.", "", 1)] = whole.clone()
    return found


def sharded(model: Any) -> Any:
    """As accelerate does it: the layers, the embedding, the last norm with the head, then the rest."""
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model()
    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(base.model.embed_tokens)
    fully_shard([base.model.norm, base.lm_head])
    return fully_shard(model)


def dropped() -> torch.Tensor:
    """What dropout leaves of ones, by the seed that all processes set."""
    torch.manual_seed(0)
    one = torch.eye(64)
    return add_lora_product(torch.zeros(8, 64), torch.ones(8, 64), one, one, 1.0, 0.5)


def work(rank: int, port: int, place: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mine = halves()[rank]
    items = int((batch()["labels"][:, 1:] != IGNORE).sum())
    learnt = int((mine["labels"][:, 1:] != IGNORE).sum())
    found = {}
    for embeddings in EMBEDDINGS:
        for divide in (DistributedDataParallel, sharded):
            model = divide(lean(pair(embeddings)[0]))
            for _ in range(2):  # a second micro batch adds up
                model(**mine, num_items_in_batch=items, learnt=learnt).loss.backward()
            found[f"{embeddings} {divide.__name__}"] = gradients(model)
    torch.save((found, dropped()), f"{place}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def test_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(tmp_path / "found")), nprocs=2)
    (found, mask), (_, other) = (torch.load(tmp_path / f"found.{n}", weights_only=True) for n in (0, 1))
    assert (mask != other).float().mean() > 0.3, "each process drops something else"
    assert len(found) == 4
    for divided, gradients_of in found.items():
        usual = pair(divided.split()[0])[0]
        for _ in range(2):
            usual(**batch()).loss.backward()
        expected = gradients(usual)
        assert gradients_of.keys() == expected.keys()
        for parameter, gradient in gradients_of.items():  # both take the mean over processes of what are sums
            torch.testing.assert_close(
                2 * gradient, expected[parameter], msg=lambda m, d=divided, p=parameter: f"{d}: {p}: {m}"
            )
