"""Where saved weights lie."""

from pathlib import Path

from plait.errors import ConfigError
from plait.trainer.files import put_back

SCHEME = "tinker://"


def weights_folder(path: str, root: Path) -> Path:
    """The checkpoint that a path names.

    Raises:
        ConfigError: there is none.
    """
    if path.startswith(SCHEME):
        parts = path.removeprefix(SCHEME).split("/")
        if len(parts) != 3 or parts[1] not in ("weights", "sampler_weights") or ".." in parts:
            raise ConfigError(
                f"a path has the form {SCHEME}<run>/weights/<name> or "
                f"{SCHEME}<run>/sampler_weights/<name>; got {path}"
            )
        folder = root.joinpath(*parts)
        put_back(folder)
    else:
        folder = Path(path)
        if (folder / "checkpoints").is_dir():
            kept = sorted((folder / "checkpoints").glob("best-*"))
            if not kept:
                raise ConfigError(f"{folder} is a run without trained weights yet; let it train")
            folder = kept[-1]
    if not (folder / "manifest.json").is_file():
        raise ConfigError(f"{path} is neither a checkpoint nor a run; name the folder of one")
    return folder
