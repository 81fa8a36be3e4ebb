"""EMAs over two processes: `python run_distributed_ema.py FOLDER ddp|fsdp STEPS [CHECKPOINT]`.

Writes what each process holds, and the whole EMAs as `network_state` gathers them.
"""

import sys
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

from diffzoo.training.checkpointing import Checkpointing
from diffzoo.training.ema import EMA

LABELS = ("ema_0.9", "power_0.100")


class Module(L.LightningModule):
    def __init__(self, shard: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        # 7 rows do not divide by two processes: shards are uneven
        self.network = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 8))
        self.shard = shard

    def configure_model(self) -> None:
        if self.shard:
            from torch.distributed.fsdp import fully_shard

            for layer in (self.network[0], self.network[2]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        place = batch_idx * self.trainer.world_size + self.global_rank
        x = torch.randn(batch.shape, generator=torch.Generator().manual_seed(place))
        return (self.network(x) - x).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr=1e-2)


def whole(module: Module) -> dict[str, torch.Tensor]:
    """The raw weights, gathered."""
    state = module.network.state_dict()
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for n, p in state.items()}


def doubled(module: Module, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of an EMA and of its weights, a hundred updates after these doubled."""
    module.network.to(dtype)
    average = EMA([0.999], warm_start=False)
    average.prepare(module)
    weights = module.network[0].weight
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter.mul_(2)
    for _ in range(100):
        average.update()
    local = weights.to_local() if hasattr(weights, "to_local") else weights
    return average.averages["ema_0.999"]["0.weight"], local.detach().clone()


def main() -> None:
    folder, kind, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    warnings.simplefilter("ignore")
    averages = EMA([0.9], [0.1], snapshot_every=4)
    strategy = {
        "ddp": DDPStrategy(process_group_backend="gloo"),
        "fsdp": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
    }[kind]
    trainer = L.Trainer(
        max_steps=steps,
        default_root_dir=folder,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        callbacks=[averages, Checkpointing(every_n_steps=5, every_minutes=0)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = Module(kind == "fsdp")
    data = torch.utils.data.DataLoader(torch.zeros(800, 8), batch_size=8)
    trainer.fit(module, data, ckpt_path=sys.argv[4] if len(sys.argv) > 4 else None)
    raw = whole(module)
    with averages.averaged(module):
        inside = whole(module)
    after = whole(module)
    states = {label: averages.network_state(module, label) for label in LABELS}
    torch.save(
        {
            "raw": raw,
            "inside": inside,
            "after": after,
            "states": states,
            "local": averages.averages,
            "updates": averages.updates,
            "doubled": {str(dtype): doubled(module, dtype) for dtype in (torch.float32, torch.bfloat16)},
        },
        folder / f"rank{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main()
