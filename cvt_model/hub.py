"""Hub ids: from `org/name` or `org/name@revision` to a directory in the local cache.

What enters: an id. What leaves: a directory that holds the checkpoint's files, downloaded unless
cached (HF_HOME and HF_HUB_OFFLINE are honoured). It must not know what the files mean.
"""

import re
from pathlib import Path

from cvt_model.errors import CheckpointError
from cvt_model.presets import HUB_IDS

CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
SAFETENSORS_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
PICKLE_FILES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-*.bin",
)
TENSORFLOW_FILES = ("tf_model.h5",)
HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
OR_LOCAL = "or give a local directory"


def split_revision(source: str) -> tuple[str, str | None]:
    """`org/name@revision` to its parts; the revision is None where there is none."""
    repo_id, _, revision = source.partition("@")
    return repo_id, revision or None


def is_hub_id(source: str) -> bool:
    return HUB_ID.fullmatch(split_revision(source)[0]) is not None


def full_id(source: str) -> str:
    """The Hub id that the short name of a published model stands for; any other id as it is."""
    name, revision = split_revision(source)
    repo_id = HUB_IDS.get(name, name)
    return f"{repo_id}@{revision}" if revision else repo_id


def fetch(source: str) -> Path:
    """The directory of a Hub id's files; only the first kind of weights that it has is downloaded.

    Raises CheckpointError.
    """
    repo_id, revision = split_revision(source)
    for weights in (SAFETENSORS_FILES, PICKLE_FILES, TENSORFLOW_FILES):
        directory = download(repo_id, revision, CONFIG_FILES + weights)
        if any(any(directory.glob(pattern)) for pattern in weights):
            break
    return directory


def download(repo_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    # Imported here: it takes as long as all else that an actor imports beside torch.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"{repo_id}@{revision}" if revision else repo_id
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name}: access to this Hub repository must be granted; ask for it on its page and "
            f"log in with `hf auth login`, {OR_LOCAL}"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{name}: the Hub repository has no revision {revision!r}; check the spelling"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such local directory, built-in model or Hub repository; check the "
            f"spelling, log in with `hf auth login` if it is private, {OR_LOCAL}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{name}: {not_cached_message()}") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{name}: downloading from the Hub failed: {reason}; try again, {OR_LOCAL}"
        ) from error


def not_cached_message() -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            "no such local directory or built-in model, and not in the Hub cache "
            f"({constants.HF_HUB_CACHE}) while HF_HUB_OFFLINE is set; check the spelling, unset "
            f"HF_HUB_OFFLINE, {OR_LOCAL}"
        )
    return (
        "no such local directory or built-in model, not in the Hub cache "
        f"({constants.HF_HUB_CACHE}), and the Hub cannot be reached; check the spelling and the "
        f"network, {OR_LOCAL}"
    )
