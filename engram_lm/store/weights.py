"""Which file of a model's directory holds a tensor."""

import json
from pathlib import Path

from engram_lm.errors import DataError
from engram_lm.store.header import read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> file, in the files that from_pretrained would read: one file, or the shards
    that the index names, or (in a checkpoint without either) whatever safetensors files there are.

    DataError where there are none or one cannot be read.
    """
    index = directory / INDEX
    if not (directory / SINGLE).exists() and index.exists():
        try:
            names = json.loads(index.read_text())["weight_map"]
            return {name: directory / file for name, file in names.items()}
        except OSError as error:
            raise DataError(f"{index}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{index}: not an index of weights ({error!r})") from error
    files = [directory / SINGLE]
    if not files[0].exists():
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise DataError(f"{directory}: no {SINGLE} and no {INDEX}")
    return {name: file for file in files for name in read_header(file).tensors}
