"""Files of a remote store kept on a local disk, so that each is fetched once.

fsspec's own caches write a file under its final name while it is still coming, so a killed run leaves
half a file that is taken for a whole one, and `filecache` writes its whole catalogue anew for each file.
Here a copy is written aside and renamed, and any number of processes may share a folder.
"""

import shutil
from pathlib import Path
from typing import Any

from samssl.files import written_aside

KEEP_FREE_BYTES = 10 << 30


class CachedFiles:
    """The reading side of an fsspec filesystem, with every file that is touched kept in `folder`.

    Where the disk would be left with less than `keep_free_bytes`, nothing more is kept, and reads go to
    the remote filesystem, range by range. Files never change under their name, so copies never expire.
    """

    def __init__(
        self, filesystem: Any, root: str, folder: Path, keep_free_bytes: int = KEEP_FREE_BYTES
    ) -> None:
        self.filesystem, self.root = filesystem, root
        self.folder, self.keep_free_bytes = folder, keep_free_bytes

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes `start` to `end` of a file below `root`, counted as slices count."""
        local = self.folder / path.removeprefix(self.root).lstrip("/")
        if not local.is_file() and not self._fetch(path, local):
            return self.filesystem.cat_file(path, start=start, end=end)
        with local.open("rb") as file:
            size = file.seek(0, 2)
            first, last, _ = slice(start, end).indices(size)
            file.seek(first)
            return file.read(max(0, last - first))

    def _fetch(self, path: str, local: Path) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        size = int(self.filesystem.info(path)["size"])
        if shutil.disk_usage(self.folder).free - size < self.keep_free_bytes:
            return False
        with written_aside(local) as partial:
            self.filesystem.get_file(path, str(partial))
        return True
