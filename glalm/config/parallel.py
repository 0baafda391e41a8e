"""How the processes of a run share its model."""

from dataclasses import dataclass
from typing import Literal

from glalm.config.strict import divisors, require


@dataclass
class ParallelConfig:
    # ddp: every process holds the model and sums gradients. fsdp2: weights, gradients and moments are sharded over all
    # processes. hsdp: sharded over `shard` of them, with as many copies as fit.
    mode: Literal["ddp", "fsdp2", "hsdp"] = "ddp"
    shard: int | None = None  # hsdp: processes that share one copy; null: those of one machine
    replicate: int | None = None  # hsdp: copies; null: all processes / shard
    # What gradients are summed over processes in; the sums are float32 again. bf16 halves what goes over the links, and
    # under fsdp2 and hsdp a process's micro-batches are then added up in it too.
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    reshard: bool = True  # free a block's gathered weights after its forward; false: keep them till its backward
    timeout_minutes: float = 30.0  # a collective that waits for longer ends the run

    def __post_init__(self):
        for name in ("shard", "replicate", "timeout_minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, f"parallel.{name} must be positive, not {value}")
        require(
            self.mode == "hsdp" or (self.shard, self.replicate) == (None, None),
            f"parallel.shard and parallel.replicate belong to parallel=hsdp, not to {self.mode}",
        )

    def mesh(self, world: int, local_world: int) -> tuple[int, int]:
        """(copies of the model, processes that share one) for `world` processes, `local_world` on each machine.

        Raises ConfigError when the processes do not make up the mesh.
        """
        if self.mode != "hsdp":
            return (world, 1) if self.mode == "ddp" else (1, world)
        shard = self.shard or (max(1, world // self.replicate) if self.replicate else local_world)
        require(
            world % shard == 0,
            f"parallel.shard={shard} does not divide the {world} processes that run; {divisors(world)}, or start a "
            f"multiple of {shard} processes",
        )
        replicate = self.replicate or world // shard
        require(
            replicate * shard == world,
            f"parallel.replicate={replicate} times parallel.shard={shard} needs {replicate * shard} processes, one a "
            f"GPU, but {world} run; start as many, or write parallel.replicate=null",
        )
        return replicate, shard
