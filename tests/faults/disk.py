"""A disk that has seen a list of file operations, and what may be on it after a crash.

The strict reading of POSIX: data of a file is safe once the file was synced, a name once its folder was synced, a
rename moves a name at once or not at all; everything else may be lost or kept, each on its own.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

Tree = dict[str, bytes | None]  # path -> content of a file, None for a folder


@dataclass(frozen=True)
class Operation:
    """What one call changed; `note` is a remark of the program that was recorded."""

    kind: str
    path: str
    path2: str = "-"
    offset: int = 0
    data: bytes = b""


def read_log(log: Path) -> list[Operation]:
    """The operations that recorder.c wrote."""
    content, at, operations = log.read_bytes(), 0, []
    while at < len(content):
        end = content.index(b"\n", at)
        kind, path, path2, offset, size = content[at:end].decode().split("\t")
        at = end + 1 + int(size)
        operations.append(Operation(kind, path, path2, int(offset), content[end + 1 : at]))
    return operations


@dataclass(eq=False)
class File:
    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""

    @property
    def is_safe(self) -> bool:
        return self.data == self.synced


@dataclass(eq=False)
class Folder:
    names: "dict[str, Node]" = field(default_factory=dict)
    synced: "dict[str, Node]" = field(default_factory=dict)


Node = File | Folder
Change = list[tuple[Folder, str, Node | None]]  # happens at once: (folder, name) -> node


class Disk:
    """Applies operations; `after_crash` makes one of the trees that may be found then."""

    def __init__(self) -> None:
        self.root = Folder()
        self.pending: list[Change] = []  # names that are not safe yet, in order

    def apply(self, operation: Operation) -> None:
        if operation.kind != "note":
            getattr(self, f"_{operation.kind}")(operation)

    def tree(self) -> Tree:
        """What programs see."""
        return dict(_walk(self.root, lambda folder: folder.names, lambda file: bytes(file.data)))

    def after_crash(self, keeps: Callable[[], bool], content: Callable[[File], bytes]) -> Tree:
        """What is left when each name that is not safe stays if `keeps()`, unsafe files holding `content`."""
        names = {id(f): dict(f.synced) for f in self._folders()}
        for change in self.pending:
            if keeps():
                for folder, name, node in change:
                    _assign(names.setdefault(id(folder), dict(folder.synced)), name, node)
        return dict(
            _walk(
                self.root,
                lambda folder: names.get(id(folder), folder.synced),
                lambda file: file.synced if file.is_safe else content(file),
            )
        )

    def _folders(self) -> list[Folder]:
        found, waiting = [], [self.root]
        while waiting:
            folder = waiting.pop()
            found.append(folder)
            waiting += [n for n in {**folder.synced, **folder.names}.values() if isinstance(n, Folder)]
        return found

    def _change(self, change: Change) -> None:
        for folder, name, node in change:
            _assign(folder.names, name, node)
        self.pending.append(change)

    def _place(self, path: str) -> tuple[Folder, str]:
        folder: Node = self.root
        *above, name = PurePosixPath(path).parts
        for part in above:
            folder = folder.names[part]  # type: ignore[union-attr]
        assert isinstance(folder, Folder)
        return folder, name

    def _find(self, path: str) -> Node:
        if path == ".":
            return self.root
        folder, name = self._place(path)
        if name not in folder.names:
            # safetensors writes .tmpXXXXXX and renames it by a system call that no library sees.
            (hidden,) = [other for other in folder.names if other.startswith(".tmp")]
            self._change([(folder, hidden, None), (folder, name, folder.names[hidden])])
        return folder.names[name]

    def _file(self, path: str) -> File:
        node = self._find(path)
        assert isinstance(node, File)
        return node

    def _create(self, operation: Operation) -> None:
        folder, name = self._place(operation.path)
        if name not in folder.names:
            self._change([(folder, name, File())])

    def _truncate(self, operation: Operation) -> None:
        self._create(operation)
        self._file(operation.path).data = bytearray()

    def _write(self, operation: Operation) -> None:
        data = self._file(operation.path).data
        data.extend(bytes(max(0, operation.offset - len(data))))
        data[operation.offset : operation.offset + len(operation.data)] = operation.data

    def _resize(self, operation: Operation) -> None:
        file = self._file(operation.path)
        file.data = file.data[: operation.offset] + bytes(max(0, operation.offset - len(file.data)))

    def _mkdir(self, operation: Operation) -> None:
        folder, name = self._place(operation.path)
        self._change([(folder, name, Folder())])

    def _rename(self, operation: Operation) -> None:
        node = self._find(operation.path)
        folder, name = self._place(operation.path)
        folder2, name2 = self._place(operation.path2)
        self._change([(folder, name, None), (folder2, name2, node)])

    def _remove(self, operation: Operation) -> None:
        self._find(operation.path)
        folder, name = self._place(operation.path)
        self._change([(folder, name, None)])

    def _sync(self, operation: Operation) -> None:
        node = self._find(operation.path)
        if isinstance(node, File):
            node.synced = bytes(node.data)
            return
        for change in [c for c in self.pending if any(folder is node for folder, *_ in c)]:
            for folder, name, target in change:
                _assign(folder.synced, name, target)
            self.pending.remove(change)


def _assign(names: dict[str, Node], name: str, node: Node | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def _walk(
    folder: Folder, names: Callable[[Folder], dict[str, Node]], content: Callable[[File], bytes], prefix: str = ""
) -> Iterator[tuple[str, bytes | None]]:
    for name, node in names(folder).items():
        if isinstance(node, File):
            yield prefix + name, content(node)
        else:
            yield prefix + name, None
            yield from _walk(node, names, content, f"{prefix}{name}/")


def crashes(disk: Disk, following: Operation | None, rng: random.Random, draws: int) -> Iterator[tuple[str, Tree]]:
    """Trees that may be found when the power goes, or all processes are killed, now or during the next operation."""
    yield "killed", disk.tree()
    if following is not None and following.kind == "write" and len(following.data) > 1:
        torn = disk.tree()
        old = torn.get(following.path) or b""
        torn[following.path] = old[: following.offset] + following.data[: len(following.data) // 2]
        yield "killed in a write", torn
    yield "all unsynced lost", disk.after_crash(lambda: False, lambda file: file.synced)
    yield "names without data", disk.after_crash(lambda: True, lambda file: file.synced)
    yield "names with zeros", disk.after_crash(lambda: True, lambda file: bytes(len(file.data)))

    def some(file: File) -> bytes:
        data = bytes(file.data)
        return rng.choice([file.synced, b"", data, bytes(len(data)), data[: rng.randrange(len(data) + 1)]])

    for _ in range(draws):
        kept = rng.choice([0.2, 0.5, 0.8])
        yield "some unsynced lost", disk.after_crash(lambda kept=kept: rng.random() < kept, some)  # type: ignore[misc]


class Scratch:
    """A real folder that is made equal to one tree after another, rewriting only what differs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree: Tree = {}
        folder.mkdir()

    def show(self, tree: Tree) -> None:
        for path in sorted(self.tree, reverse=True):
            if path not in tree or (tree[path] is None) != (self.tree[path] is None):
                self._remove(path)
        for path in sorted(tree):
            content = tree[path]
            if path not in self.tree and content is None:
                (self.folder / path).mkdir()
            elif content is not None and self.tree.get(path) != content:
                (self.folder / path).write_bytes(content)
        self.tree = dict(tree)

    def _remove(self, path: str) -> None:
        if self.tree.pop(path) is None:
            shutil.rmtree(self.folder / path, ignore_errors=True)
        else:
            (self.folder / path).unlink(missing_ok=True)
