"""Random damages to a folder of files, each reproducible from its seed."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Damager:
    """Damages one folder, with the folders of other checkpoints as a source of files that are whole but wrong."""

    def __init__(self, folder: Path, others: list[Path], seed: int) -> None:
        self.folder, self.others, self.rng = folder, others, random.Random(seed)
        self.files = sorted(path for path in folder.iterdir() if path.is_file())

    def damage(self) -> str:
        """Does one damage; says which."""
        kinds: list[tuple[int, Callable[[], str]]] = [
            (6, self.flip_bits),
            (2, self.overwrite),
            (2, self.truncate),
            (1, self.extend),
            (1, self.remove),
            (1, self.duplicate),
            (2, self.swap),
            (2, self.take_from_another),
            (6, self.edit_json),
            (1, self.rename),
            (1, self.replace_by_folder),
            (1, self.replace_by_link),
            (1, self.forge_header),
        ]
        weights, functions = zip(*kinds, strict=True)
        return self.rng.choices(functions, weights)[0]()

    def any_file(self, suffix: str = "") -> Path:
        return self.rng.choice([path for path in self.files if path.name.endswith(suffix)])

    def flip_bits(self) -> str:
        path = self.any_file()
        data = bytearray(path.read_bytes())
        places = [self.rng.randrange(8 * len(data)) for _ in range(self.rng.choice([1, 1, 2, 8]))]
        for place in places:
            data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        return f"flip bits {places} of {path.name}"

    def overwrite(self) -> str:
        path = self.any_file()
        data = bytearray(path.read_bytes())
        start = self.rng.randrange(len(data))
        length = min(self.rng.choice([1, 8, 512, 4096]), len(data) - start)
        data[start : start + length] = bytes(length) if self.rng.random() < 0.5 else self.rng.randbytes(length)
        path.write_bytes(data)
        return f"overwrite {length} bytes of {path.name} at {start}"

    def truncate(self) -> str:
        path = self.any_file()
        length = self.rng.choice([0, 1, 8, path.stat().st_size - 1, self.rng.randrange(path.stat().st_size)])
        path.write_bytes(path.read_bytes()[:length])
        return f"truncate {path.name} to {length}"

    def extend(self) -> str:
        path = self.any_file()
        path.write_bytes(path.read_bytes() + self.rng.randbytes(self.rng.choice([1, 7, 4096])))
        return f"extend {path.name}"

    def remove(self) -> str:
        path = self.any_file()
        path.unlink()
        return f"remove {path.name}"

    def duplicate(self) -> str:
        path = self.any_file()
        number = self.rng.randrange(1, 12)
        name = self.rng.choice(
            [f"dense-{number:05d}-of-00009.safetensors", f"embeddings-{number:05d}-of-00099.safetensors", "more.json"]
        )
        shutil.copyfile(path, self.folder / name)
        return f"copy {path.name} to {name}"

    def swap(self) -> str:
        suffix = self.rng.choice([".safetensors", ".json", ""])
        one, two = self.rng.sample([path for path in self.files if path.name.endswith(suffix)], 2)
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
        return f"swap {one.name} and {two.name}"

    def take_from_another(self) -> str:
        other = self.rng.choice(self.others)
        path = self.rng.choice(sorted(other.iterdir()))
        shutil.copyfile(path, self.folder / path.name)
        return f"take {path.name} from {other.name}"

    def edit_json(self) -> str:
        path = self.any_file(".json")
        content = json.loads(path.read_text())
        container, key = self._any_place(content)
        old = container[key]
        action = self.rng.choice(["remove", "replace", "replace", "nudge"])
        if action == "remove":
            del container[key]
        elif action == "nudge" and isinstance(old, (int, float)) and not isinstance(old, bool):
            container[key] = old + self.rng.choice([1, -1, 0.5, 2**40])
        else:
            container[key] = self.rng.choice([None, True, -1, 2**70, 1e308, "", "../x", [], {}, [[1]], {"a": None}])
        path.write_text(json.dumps(content, indent=1))
        return f"edit {path.name}: {action} {key!r}, was {str(old)[:40]!r}"

    def _any_place(self, content: Any) -> tuple[Any, Any]:
        places: list[tuple[Any, Any]] = []
        waiting = [content]
        while waiting:
            value = waiting.pop()
            keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
            places += [(value, key) for key in keys]
            waiting += [value[key] for key in keys]
        return self.rng.choice(places)

    def rename(self) -> str:
        path = self.any_file()
        name = self.rng.choice([path.name + ".bak", "x" + path.name, path.name.replace("0000", "0001")])
        path.rename(self.folder / name)
        return f"rename {path.name} to {name}"

    def replace_by_folder(self) -> str:
        path = self.any_file()
        path.unlink()
        path.mkdir()
        return f"a folder instead of {path.name}"

    def replace_by_link(self) -> str:
        path, other = self.any_file(), self.rng.choice(self.others)
        path.unlink()
        target = self.rng.choice([other / path.name, path, Path("/dev/zero"), Path("gone")])
        path.symlink_to(target)
        return f"a link to {target} instead of {path.name}"

    def forge_header(self) -> str:
        path = self.any_file(".safetensors")
        length = self.rng.choice([0, 1, 2**20, 2**32, 2**60, 2**64 - 1])
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
        return f"{path.name} claims a header of {length} bytes"
