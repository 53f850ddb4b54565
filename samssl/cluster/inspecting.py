"""`samssl inspect`: cases are read where Ray has room, the page is written here."""

from samssl.cluster.tasks import ray_map
from samssl.data.inspection import InspectConfig, inspect
from samssl.report.inspection import terminal, write_inspection


def run_inspect(config: InspectConfig) -> None:
    """Fingerprint a data set, and say what stands out."""
    seen = inspect(config, run=ray_map)
    print(terminal(seen, write_inspection(seen, config)), flush=True)
