"""Which files of a folder make up a release: those that a new one may replace, and those that are uploaded."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from proxbit.checkpoint.files import CARD_NAME, read_json
from proxbit.errors import CheckpointError
from proxbit.foreign import printable
from proxbit.hub.model_card import README

__all__ = ["CONFIG", "RELEASE_FILES", "check_links", "code_files", "is_release_file"]

CONFIG = "config.json"
# What `save_pretrained` of models, processors and tokenizers writes beside the two cards, by pattern.
RELEASE_FILES = (
    CARD_NAME,
    README,
    CONFIG,
    "generation_config.json",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Of them, those that may name code.
_NAMING = tuple(name for name in RELEASE_FILES if name.endswith("config.json"))


def is_release_file(name: str) -> bool:
    """Whether a release has files of this name; code of its own, see `code_files`, comes on top."""
    return any(fnmatchcase(name, pattern) for pattern in RELEASE_FILES)


def code_files(folder: Path) -> dict[str, str]:
    """The modules that a model or processor with code of its own takes: those that an `auto_map` names, and what they
    import from beside them. Nothing of them is run.

    Args:
        folder: of a release.

    Returns:
        The names of the files, there or not, and what names each.

    Raises:
        CheckpointError: if a file cannot be read, or a name is none of a module in the folder.
    """
    found: dict[str, str] = {}
    for name in _NAMING:
        if (folder / name).is_file():
            for module in _named(read_json(folder / name), name):
                found.setdefault(f"{module}.py", f"{name} (auto_map)")
    for file in (waiting := list(found)):
        for module in _imported(folder / file):
            if f"{module}.py" not in found:
                found[f"{module}.py"] = file
                waiting.append(f"{module}.py")
    return found


def _named(values: Any, where: str) -> Iterator[str]:
    """The modules of each `auto_map`, at any depth: of {"AutoModel": "module.Class"}, of two classes, or of null."""
    if isinstance(values, list):
        for value in values:
            yield from _named(value, where)
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        if key != "auto_map" or not isinstance(value, dict):
            yield from _named(value, where)
            continue
        for entry in value.values():
            for reference in entry if isinstance(entry, list) else [entry]:
                if not isinstance(reference, str) or "--" in reference:  # Null, or in another repository.
                    continue
                module = reference.partition(".")[0]
                if not module.isidentifier():
                    shown = printable(repr(reference))
                    raise CheckpointError(f"{where} names {shown} (auto_map), which is no class of a module beside it.")
                yield module


def _imported(file: Path) -> Iterator[str]:
    """The modules beside a file that it imports: `from .other import x`."""
    if not file.is_file():
        return
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{printable(file.name)} cannot be read as Python: {printable(error)}.") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            yield node.module.partition(".")[0]


def check_links(folder: Path, names: list[str]) -> None:
    """Check that files lie in a folder, and are not links to somewhere else: what is uploaded is what one sees.

    Args:
        folder: of the release; of a link, where it leads.
        names: of its files.

    Raises:
        CheckpointError: naming the file. The links of the cache of `huggingface_hub` lead to its `blobs`, and may.
    """
    home = folder.resolve()
    own, stores = {home / name for name in names}, []
    if home.parent.name == "snapshots":
        stores.append(home.parents[1] / "blobs")
    if home.is_relative_to(cache := Path(constants.HF_HUB_CACHE).resolve()):
        stores.append(cache)  # Blobs may be links themselves, to a store that repositories share.
    for name in names:
        place = (home / name).resolve()
        if place not in own and not any(place.is_relative_to(store) for store in stores):
            raise CheckpointError(
                f"{printable(name)} in {folder} is a link to {printable(place)}, no file of this release, and would be "
                "published. Put the file itself there if that is meant, or take the link away."
            )
