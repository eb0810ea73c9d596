"""From what the user calls a model to a folder on this disk: a path, or a name on the Hugging Face hub.

Knows nothing of what is in the folder. The hub's library is imported only when a name needs it.
"""

from __future__ import annotations

import errno
import logging
import re
from pathlib import Path

from protocol.errors import CheckpointInvalid, ConfigInvalid, ManyhandsError, ModelUnsupported, StorageFull

_log = logging.getLogger(__name__)
_HUB_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
HUB_IGNORED = ("original/*", "onnx/*", "*/onnx/*")  # second copies of the same weights


def find_model_folder(model: str) -> Path:
    """Return the folder of a model, downloading `OWNER/NAME[@REVISION]` from the hub when no such folder is here.

    Blocks while it downloads. Respects HF_HUB_OFFLINE, HF_HOME and HF_TOKEN. Raises ConfigInvalid for what is neither
    a folder nor a hub name, CheckpointInvalid when the hub does not give it, StorageFull when the disk is full.
    """
    if not model:
        raise ConfigInvalid("no model is named", remedy="give a model folder or a hub name (--model)")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigInvalid(f"model {model} is a file", remedy="give the folder that holds its config.json")
    name = _HUB_NAME.fullmatch(model)
    if name is None:
        raise ConfigInvalid(
            f"model {model!r} is neither a folder nor a name on the hub",
            remedy="give an existing folder, or OWNER/NAME as on huggingface.co",
        )
    return _download(name["repo"], name["revision"])


def _download(repo: str, revision: str | None) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigInvalid(
            f"model {repo} is no folder here, and downloading needs huggingface_hub",
            remedy="pip install 'manyhands[serve]', or give a local folder",
        ) from error
    _log.info("model %s: looking it up on the hub", repo)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(HUB_PATTERNS), ignore_patterns=list(HUB_IGNORED)
            )
        )
    except (OSError, ValueError) as error:  # all of the hub's errors are one or the other
        raise _hub_error(repo, error) from error


def _hub_error(repo: str, error: OSError | ValueError) -> ManyhandsError:
    from huggingface_hub import errors

    told = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        return ModelUnsupported(
            f"model {repo} is gated", remedy="accept its licence on huggingface.co and set HF_TOKEN, or give a folder"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ConfigInvalid(
            f"the hub has no model {repo} (or it is private)", remedy="check the name, or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError | errors.HFValidationError):
        return ConfigInvalid(f"model {repo}: {told}", remedy="write OWNER/NAME or OWNER/NAME@REVISION")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return StorageFull(f"no room to download model {repo}: {told}", remedy="free space, or move HF_HOME")
    return CheckpointInvalid(
        f"model {repo} is not on this disk and can't be downloaded: {told}",
        remedy="check the network and HF_HUB_OFFLINE, or give a local folder",
    )
