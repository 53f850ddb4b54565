"""What `samssl serve` is told."""

import ipaddress
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from samssl.config import NonNegative, PositiveFloat, PositiveInt, config
from samssl.inference import InferenceConfig


@config
class ServeConfig(InferenceConfig):
    """A model bundle to a server on this machine that segments what it is sent."""

    bundle: Path
    """The bundle that `finetune` wrote."""
    more_bundles: tuple[Path, ...] = ()
    """Bundles of the same classes (folds, seeds) that predict together with it."""
    base: Path | None = None
    """The bundles' base weights, if they are not where they were when they were made."""
    host: str = "127.0.0.1"
    """Address that is listened on. There is no authentication: any other than this machine's own opens the
    server to whoever reaches it."""
    port: Annotated[int, Interval(ge=1, le=65535)] = 8000
    """Where it listens."""
    max_megabytes: PositiveFloat = 512.0
    """The largest body of a request, in 10^6 bytes; it is counted while it arrives."""
    max_megavoxels: PositiveFloat = 256.0
    """The most voxels or pixels of a scan, in 10^6, whatever it is compressed to."""
    max_requests: PositiveInt = 4
    """Scans that a replica takes up at once: one is segmented, the others arrive or wait. Further ones are
    refused."""
    timeout_s: PositiveFloat = 300.0
    """How long the upload, the waiting and the segmenting of a scan may take together."""
    replicas: PositiveInt = 1
    """Processes, each with the bundles in memory, that segment side by side."""
    gpus: NonNegative | None = None
    """GPUs of each replica; a part of one lets replicas share it. null: one where there are enough."""

    @property
    def max_bytes(self) -> int:
        """Of the body of a request."""
        return int(self.max_megabytes * 1e6)

    @property
    def local(self) -> bool:
        """Whether nobody but this machine reaches the server."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name
            return False
