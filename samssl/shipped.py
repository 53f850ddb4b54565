"""The files of `ray_configs/` that come with the package, for whoever has no checkout of the project."""

from pathlib import Path

FOLDER = "ray_configs"
DEMO = Path(FOLDER, "studies", "demo.yaml")
JOBS_GPU = Path(FOLDER, "jobs", "gpu.yaml")


def shipped_folder() -> Path:
    """`ray_configs/`: inside the installed package (the wheel puts it there), or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / FOLDER
    return inside if inside.is_dir() else package.parent / FOLDER


def config_file(text: str) -> Path:
    """`text` as the path of a file; what begins with ray_configs/ and is not here is the shipped one.

    So the commands of the documentation work in any folder. A file of the same name that is here comes first.
    """
    path = Path(text)
    if path.exists() or path.parts[:1] != (FOLDER,):
        return path
    found = shipped_folder().joinpath(*path.parts[1:])
    return found if found.is_file() else path
