"""Ways to spoil the folder of a checkpoint. Each takes the folder and a seeded generator, and changes its files."""

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "NEEDS", "SPECIAL", "Mutation"]

Mutation = Callable[[Path, random.Random], None]
# Relative to the folder of the case: what code of a pickle would leave, and a good weight file that lies outside.
MARK, OUTSIDE = "../mark", "../outside"
HEADER = 8  # bytes of the length of the header
HUGE = (2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -1, 0)
STRANGE = (None, True, False, 0, -1, 1, 2, 0.5, -2.0, 1e308, "", "x", "../x", "\0", "🧨" * 40, [], [1], {}, {"a": [{}]})
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E5M2",
    "F4",
    "U64",
    "C64",
    "x",
    "",
    3,
)


class Marks:
    """Unpickling an instance makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self.path,)


def weights(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("model*.safetensors")))


def read(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    end = HEADER + struct.unpack("<Q", content[:HEADER])[0]
    return json.loads(content[HEADER:end]), content[end:]


def write(file: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as safetensors writes it, so that a header that did not change has its length
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def of_header(change: Callable[[dict[str, Any], random.Random], None]) -> Mutation:
    def mutate(folder: Path, rng: random.Random) -> None:
        file = weights(folder, rng)
        header, data = read(file)
        change(header, rng)
        write(file, header, data)

    return mutate


def of_tensor(change: Callable[[dict[str, Any], random.Random], None]) -> Mutation:
    """A change of the entry of one tensor."""
    return of_header(lambda header, rng: change(header[tensor_name(header, rng)], rng))


def tensor_name(header: dict[str, Any], rng: random.Random) -> str:
    return rng.choice(sorted(set(header) - {"__metadata__"}))


def header_length(folder: Path, rng: random.Random) -> None:
    file = weights(folder, rng)
    content = file.read_bytes()
    true = struct.unpack("<Q", content[:HEADER])[0]
    length = rng.choice(
        [0, 1, true - 1, true + 1, true + 8, len(content), 10**8, 2**32, 2**63, 2**64 - 1, rng.getrandbits(64)]
    )
    file.write_bytes(struct.pack("<Q", length) + content[HEADER:])


def header_text(folder: Path, rng: random.Random) -> None:
    file = weights(folder, rng)
    header, data = read(file)
    text = bytearray(json.dumps(header).encode())
    choice = rng.randrange(5)
    if choice == 0:
        for _ in range(rng.randint(1, 4)):
            text[rng.randrange(len(text))] = rng.randrange(256)
    elif choice == 1:
        del text[rng.randrange(len(text)) :]
    elif choice == 2:
        text = bytearray(
            rng.choice([b"", b"{", b"[]", b"null", b"1e999", b'"x"', b"{}", b'{"a":{}}', b"\xff\xfe", b"[" * 99_999])
        )
    elif choice == 3:
        key = tensor_name(header, rng)
        text[1:1] = json.dumps({key: header[key]}).encode()[1:-1] + b","
    else:
        nested: Any = rng.choice(STRANGE)
        depth = rng.choice([2, 50, 5000])
        text[1:1] = b'"deep":' + b"[" * depth + json.dumps(nested).encode() + b"]" * depth + b","
    write(file, bytes(text), data)


def rename(header: dict[str, Any], rng: random.Random) -> None:
    key = tensor_name(header, rng)
    other = tensor_name(header, rng)
    name = rng.choice(
        [key[:-1], key + "x", key.replace("0", "1"), f"../{key}", "", "\0", "a" * 9999, "__metadata__", other, "/etc/x"]
    )
    header[name] = header.pop(key)


def swap_names(header: dict[str, Any], rng: random.Random) -> None:
    first, second = tensor_name(header, rng), tensor_name(header, rng)
    header[first], header[second] = header[second], header[first]


def drop(header: dict[str, Any], rng: random.Random) -> None:
    del header[tensor_name(header, rng)]


def dtype(entry: dict[str, Any], rng: random.Random) -> None:
    entry["dtype"] = rng.choice(DTYPES)


def shape(entry: dict[str, Any], rng: random.Random) -> None:
    sizes = entry["shape"]
    choice = rng.randrange(6)
    if choice == 0:
        entry["shape"] = list(reversed(sizes))
    elif choice == 1:
        entry["shape"] = [*sizes, rng.choice([0, 1, 2, -1])]
    elif choice == 2:
        entry["shape"] = sizes[:-1]
    elif choice == 3:
        entry["shape"] = rng.choice(STRANGE)
    elif choice == 4 and sizes:
        sizes[rng.randrange(len(sizes))] = rng.choice([*HUGE, 1.5, "2", None, sizes[0] + 1])
    else:
        entry["shape"] = [rng.choice(HUGE) for _ in range(rng.randint(1, 5))]


def offsets(entry: dict[str, Any], rng: random.Random) -> None:
    begin, end = entry["data_offsets"]
    entry["data_offsets"] = rng.choice(
        [
            [begin + 1, end + 1],
            [begin, end - 1],
            [end, begin],
            [0, end - begin],
            [-1, end],
            [begin],
            [begin, rng.choice(HUGE)],
            [rng.choice(HUGE), rng.choice(HUGE)],
            rng.choice(STRANGE),
        ]
    )


def length(folder: Path, rng: random.Random) -> None:
    file = weights(folder, rng)
    content = file.read_bytes()
    choice = rng.randrange(4)
    if choice == 0:
        file.write_bytes(content[: rng.randrange(len(content))])
    elif choice == 1:
        file.write_bytes(content + rng.randbytes(rng.choice([1, 7, 8, 4096])))
    elif choice == 2:
        place = rng.randrange(len(content))
        file.write_bytes(content[:place] + content[place + rng.choice([1, 8, 100]) :])
    else:
        file.write_bytes(rng.choice([b"", b"\0" * 8, b"\0" * 4096, content[::-1], rng.randbytes(4096)]))


def data_bits(folder: Path, rng: random.Random) -> None:
    file = weights(folder, rng)
    header, data = read(file)
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 16])):
        place = rng.randrange(8 * len(changed))
        changed[place // 8] ^= 1 << place % 8
    write(file, header, bytes(changed))


def any_bits(folder: Path, rng: random.Random) -> None:
    file = rng.choice(sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md"))
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 2, 16])):
        place = rng.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree of JSON."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [(tree, key) for key, _ in items] + [place for _, value in items for place in places(value)]


def nest(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def spoil(tree: Any, rng: random.Random) -> Any:
    """One value changed, taken away or added."""
    container, key = rng.choice(places(tree))
    value = container[key]
    choice = rng.randrange(6)
    if choice == 0:
        container[key] = rng.choice(STRANGE)
    elif choice == 1:
        container[key] = rng.choice(HUGE)
    elif choice == 2:
        del container[key]
    elif choice == 3 and isinstance(container, dict):
        container[rng.choice(["unknown", "", key + "x", "__class__", "auto_map", "_target_"])] = rng.choice(STRANGE)
    elif choice == 4 and isinstance(value, int | float) and not isinstance(value, bool):
        container[key] = rng.choice([value + 1, value - 1, -value, value * 2, float(value), str(value), [value]])
    elif choice == 5 and isinstance(value, str):
        container[key] = rng.choice([value[:-1], value + "x", value.upper(), value * 9999, f"../{value}", [value]])
    else:
        container[key] = rng.choice([nest(rng.choice([3, 100])), rng.choice(STRANGE)])
    return tree


def of_json(name: str, part: str | None = None) -> Mutation:
    """A change of a value in a JSON file, below `part` of it; folders without such a file get other changes."""

    def mutate(folder: Path, rng: random.Random) -> None:
        file = folder / name
        if not file.is_file():
            return any_bits(folder, rng)
        tree = json.loads(file.read_text())
        if part is None or not isinstance(tree.get(part), dict):
            tree = spoil(tree, rng)
        else:
            tree[part] = spoil(tree[part], rng)
        file.write_text(json.dumps(tree))
        return None

    return mutate


def json_text(folder: Path, rng: random.Random) -> None:
    """No JSON, or not what is expected at the top."""
    file = rng.choice(sorted(folder.glob("*.json")))
    text = file.read_bytes()
    place = rng.randrange(len(text))
    changed = [
        text[:place],
        text[:place] + rng.randbytes(1) + text[place + 1 :],
        *(b"", b"[]", b"null", b"3", b'"x"', b"{}", b"\xff\xfe\0", b"NaN", b"{" * 50, b'{"a":' * 99_999),
        b'{"a":' + b"[" * 99_999 + b"]" * 99_999 + b"," + text.lstrip()[1:],
        b'{"a":' + b"9" * 99_999 + b"," + text.lstrip()[1:],
    ]
    file.write_bytes(rng.choice(changed))


def bomb(folder: Path, rng: random.Random) -> None:
    """A few bytes that claim terabytes: in a tensor of the model, or in one more."""
    file = weights(folder, rng)
    header, data = read(file)
    key = rng.choice([tensor_name(header, rng), "bomb.weight"])
    header[key] = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [len(data), len(data) + 2**42]}
    write(file, header, data)


def sparse_bomb(folder: Path, rng: random.Random) -> None:
    """The same, and the file is as long as it says, of which the disk holds a few blocks."""
    bomb(folder, rng)
    for file in folder.glob("model*.safetensors"):
        header, _ = read(file)
        end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
        if end >= 2**42:
            os.truncate(file, HEADER + struct.unpack("<Q", file.read_bytes()[:HEADER])[0] + end)


def shard_name(make: Callable[[Path, random.Random], Any]) -> Mutation:
    """An index that names something else for one of its files, or for the only one."""

    def mutate(folder: Path, rng: random.Random) -> None:
        file = folder / "model.safetensors.index.json"
        if file.is_file():
            index = json.loads(file.read_text())
        else:
            whole = folder / "model.safetensors"
            names = set(read(whole)[0]) - {"__metadata__"}
            whole.rename(folder / "model-00001-of-00001.safetensors")
            index = {
                "metadata": {"total_size": 1},
                "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors"),
            }
        old = rng.choice(sorted(set(index["weight_map"].values())))
        outside = folder / OUTSIDE
        outside.mkdir()
        (outside / old).write_bytes((folder / old).read_bytes())
        new = make(outside / old, rng)
        index["weight_map"] = {key: new if name == old else name for key, name in index["weight_map"].items()}
        file.write_text(json.dumps(index))

    return mutate


def card_name(folder: Path, rng: random.Random) -> None:
    """A card whose file names lead elsewhere."""
    card = folder / "quantization_card.json"
    tree = json.loads(card.read_text()) if card.is_file() else {"files": {"model.safetensors": {"sha256": "0" * 64}}}
    name = rng.choice(["../outside/model.safetensors", "/etc/hostname", "..\\x", "\0", "a/b"])
    tree["files"] = {name: next(iter(tree["files"].values()))}
    card.write_text(json.dumps(tree))


def pickled(name: str, *, alone: bool, old: bool = False, dtype_too: bool = False) -> Mutation:
    """A file whose unpickling leaves a mark, beside the weights or in their place."""

    def mutate(folder: Path, rng: random.Random) -> None:
        if alone:
            for file in folder.glob("model*"):
                file.unlink()
        if dtype_too:  # transformers looks for the dtype in the weights where the configuration has none.
            config = json.loads((folder / "config.json").read_text())
            config.pop("dtype", None)
            (folder / "config.json").write_text(json.dumps(config))
        (folder / name).write_bytes(pickle.dumps(Marks(folder / MARK), protocol=0 if old else 2))
        if name.endswith("index.json"):
            (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "shard.bin"}}))
            (folder / "shard.bin").write_bytes(pickle.dumps(Marks(folder / MARK)))

    return mutate


def link(name: str, target: str) -> Mutation:
    """A symbolic link in the place of a file; `{name}` in the target is the file itself, moved outside."""

    def mutate(folder: Path, rng: random.Random) -> None:
        file = weights(folder, rng) if name == "weights" else folder / name
        if not file.exists():
            return any_bits(folder, rng)
        outside = folder / OUTSIDE
        outside.mkdir()
        file.rename(outside / file.name)
        file.symlink_to(target.format(name=f"../outside/{file.name}", same=file.name))
        return None

    return mutate


def no_file(make: Callable[[Path], Any], name: str = "weights") -> Mutation:
    """A pipe or a folder in the place of a file."""

    def mutate(folder: Path, rng: random.Random) -> None:
        file = weights(folder, rng) if name == "weights" else folder / name
        file.unlink(missing_ok=True)
        make(file)

    return mutate


def set_config(**values: Any) -> Mutation:
    """Fields of config.json; a dict adds to the dict that is there."""

    def mutate(folder: Path, rng: random.Random) -> None:
        config = json.loads((folder / "config.json").read_text())
        for key, value in values.items():
            config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(config))

    return mutate


def remote_code(folder: Path, rng: random.Random) -> None:
    """A repository with code of its own, which nobody said to trust."""
    (folder / "modeling_own.py").write_text(f"import os\nos.mkdir({str(folder / MARK)!r})\nclass Own: pass\n")
    set_config(auto_map={"AutoConfig": "modeling_own.Own", "AutoModelForImageClassification": "modeling_own.Own"})(
        folder, rng
    )


def untouched(folder: Path, rng: random.Random) -> None:
    """The control: what is wrong with the others is not the folder."""


SPECIAL: dict[str, Mutation] = {
    "untouched": untouched,
    "bomb: header claims 4 TiB": bomb,
    "bomb: sparse file of 4 TiB": sparse_bomb,
    "index: path out of the folder": shard_name(lambda file, _: f"../outside/{file.name}"),
    "index: absolute path": shard_name(lambda file, _: str(file.resolve())),
    "index: path into a folder": shard_name(lambda file, _: f"sub/{file.name}"),
    "index: name that is no text": shard_name(lambda _, rng: rng.choice([3, None, True, 1.5])),
    "index: a pickle": shard_name(lambda _, __: "pytorch_model.bin"),
    "index: missing file": shard_name(lambda _, __: "model-00009-of-00009.safetensors"),
    "card: paths": card_name,
    "pickle: pytorch_model.bin alone": pickled("pytorch_model.bin", alone=True),
    "pickle: alone, no dtype in config.json": pickled("pytorch_model.bin", alone=True, dtype_too=True),
    "pickle: pytorch_model.bin.index.json": pickled("pytorch_model.bin.index.json", alone=True, dtype_too=True),
    "pickle: named model.safetensors": pickled("model.safetensors", alone=True),
    "pickle: the same, no dtype": pickled("model.safetensors", alone=True, old=True, dtype_too=True),
    "pickle: beside, pytorch_model.bin": pickled("pytorch_model.bin", alone=False),
    "pickle: beside, optimizer.pt": pickled("optimizer.pt", alone=False),
    "pickle: beside, training_args.bin": pickled("training_args.bin", alone=False),
    "link: to the weights": link("weights", "{name}"),
    "link: to nothing": link("weights", "nowhere"),
    "link: to itself": link("weights", "{same}"),
    "link: to /dev/zero": link("weights", "/dev/zero"),
    "link: config.json to /dev/zero": link("config.json", "/dev/zero"),
    "link: card to itself": link("quantization_card.json", "{same}"),
    "pipe: weights": no_file(os.mkfifo),
    "pipe: card": no_file(os.mkfifo, "quantization_card.json"),
    "folder: weights": no_file(Path.mkdir),
    "folder: card": no_file(Path.mkdir, "quantization_card.json"),
    "config: transformers_weights out of the folder": set_config(transformers_weights="../outside/model.safetensors"),
    "config: transformers_weights is a pickle": set_config(transformers_weights="pytorch_model.bin"),
    "config: remote code": remote_code,
    "config: a billion layers": set_config(num_hidden_layers=10**9),
    "config: a billion labels": set_config(num_labels=10**9),
    "config: a picture of a billion pixels a side": set_config(image_size=10**9),
    "config: wide layers": set_config(hidden_size=2**40),
    "config: patterns that take for ever": set_config(quantization_config={"include": ["*a" * 40 + "b"]}),
}

# The file that a kind is about, where not every checkpoint has it.
NEEDS = {"index JSON": "model.safetensors.index.json", "card JSON": "quantization_card.json"}

KINDS: dict[str, Mutation] = {
    "header length": header_length,
    "header JSON": header_text,
    "tensor names": of_header(rename),
    "tensor names swapped": of_header(swap_names),
    "tensors missing": of_header(drop),
    "dtypes": of_tensor(dtype),
    "shapes": of_tensor(shape),
    "offsets": of_tensor(offsets),
    "file length": length,
    "bits of the data": data_bits,
    "bits of any file": any_bits,
    "config.json": of_json("config.json"),
    "quantization_config": of_json("config.json", "quantization_config"),
    "index JSON": of_json("model.safetensors.index.json"),
    "card JSON": of_json("quantization_card.json"),
    "processor JSON": of_json("preprocessor_config.json"),
    "no JSON": json_text,
}
