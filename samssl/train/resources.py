"""What a training run asks of the machine or the cluster."""

from typing import Literal

from samssl.config import Count, PositiveInt, config

Strategy = Literal["ddp", "fsdp"]


@config
class ResourcesConfig:
    """Workers of one training run."""

    workers: PositiveInt = 1
    """Processes that train together, each with its own share of the batch."""
    strategy: Strategy = "ddp"
    """What workers share: `ddp` the batch only; `fsdp` weights, gradients and optimizer state as well."""
    use_gpu: bool | None = None
    """One GPU for each worker; null takes GPUs where the cluster has them."""
    cpus_per_worker: Count = 0
    """CPU cores of each worker; 0 shares all cores of the machine among the workers."""
    max_failures: Count = 2
    """How often lost workers are replaced, from the last saved state, before the run fails."""
