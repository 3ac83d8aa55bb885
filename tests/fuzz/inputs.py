"""Inputs of jobs: tar and parquet files, lists and folders, whole or damaged, and manifests that are damaged later."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from server import RefusedError, UnclearError, WrongError
from values import choose, distort_bytes, hostile

__all__ = ["check_answer", "check_shard", "damage_manifest", "make_input"]

NAMES = (
    *("a.png", "b.JPG", "a.png", "a.jpg", "x/a.png", "x/b.png", "./c.png", "d.txt", "e.json", "f.heic", "._g.png"),
    *("../up.png", "x/../../up.png", "/tmp/abs.png", "//abs.png", "..", ".", "/", "\u00e4.png", "a\udcff.png"),
    *("n" * 260 + ".png", "n" * 250 + ".png", "a.overlay.jpg", "con.png", "\n.png", "a.png/b.png", "C:\\a.png", ".png"),
)
KINDS = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"?")
COLUMNS = ("image", "bytes", "jpg", "key", "__key__", "id", "other")


def draw_picture(random: np.random.Generator, level: int) -> bytes:
    """Return a small PNG file, perhaps damaged."""
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(file, "PNG")
    return distort_bytes(random, file.getvalue(), level) if random.random() < 0.3 else file.getvalue()


def make_tar(random: np.random.Generator, level: int, folder: Path) -> Path:
    """Write a tar file with members of any name and kind."""
    path = folder / "in.tar"
    with tarfile.open(path, "w", format=choose(random, (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as archive:
        for _ in range(int(random.integers(0, 3 * level))):
            member, content = tarfile.TarInfo(choose(random, NAMES)), draw_picture(random, level)
            member.size = len(content)
            if random.random() < 0.2:
                member.type, member.linkname = choose(random, KINDS), choose(random, NAMES)
            if random.random() < 0.2 and archive.format == tarfile.PAX_FORMAT:
                sparse = {"major": "0", "minor": "1", "map": f"0,{len(content)}", "size": str(10**12)}
                member.pax_headers = {f"GNU.sparse.{key}": value for key, value in sparse.items()}
            archive.addfile(member, io.BytesIO(content))
    if random.random() < 0.4:
        path.write_bytes(distort_bytes(random, path.read_bytes(), level))
    return path


def make_parquet(random: np.random.Generator, level: int, folder: Path) -> Path:
    """Write a parquet file with columns of any type."""
    import pyarrow
    import pyarrow.parquet

    rows = int(random.integers(0, 3 * level))
    paths = ("a.png", "/dev/zero", "/etc/passwd", "\0", "n" * 300, ".", None)

    def draw_cell() -> Any:
        return {"bytes": draw_picture(random, level) if random.random() < 0.7 else None, "path": choose(random, paths)}

    columns: dict[str, Callable[[], list[Any]]] = {
        "records": lambda: [draw_cell() for _ in range(rows)],
        "pictures": lambda: [draw_picture(random, level) for _ in range(rows)],
        "paths": lambda: [choose(random, paths) for _ in range(rows)],
        "numbers": lambda: [choose(random, (1, 2.5, float("nan"), None)) for _ in range(rows)],
        "keys": lambda: [choose(random, ("a", "a", "", "\0", "../a", None)) for _ in range(rows)],
        "lists": lambda: [[1, 2]] * rows,
    }
    names = dict.fromkeys(choose(random, COLUMNS) for _ in range(1 + level))
    table = pyarrow.table({name: columns[choose(random, columns)]() for name in names})
    path = folder / "in.parquet"
    pyarrow.parquet.write_table(table, path)
    if random.random() < 0.4:
        path.write_bytes(distort_bytes(random, path.read_bytes(), level))
    return path


def make_folder(random: np.random.Generator, level: int, folder: Path) -> Path:
    """Write files of any name, most of which are pictures."""
    path = folder / "in"
    path.mkdir()
    for _ in range(1 + int(random.integers(0, 3 * level))):
        name = path / PurePosixPath(choose(random, NAMES)).name
        with contextlib.suppress(OSError):  # a name that a file may not have
            name.write_bytes(draw_picture(random, level))
    return path


def make_list(random: np.random.Generator, level: int, folder: Path) -> Path:
    """Write a list of inputs, some of which exist."""
    path, pictures = folder / "in.txt", [str(file) for file in make_folder(random, level, folder).iterdir()]
    names = [name for name in NAMES if name != "/"]  # whose pictures are all those of the machine
    lines = [choose(random, (*pictures, *pictures, *names, "in", "in.txt", "*", "[", "", "a\0b")) for _ in range(level)]
    encoding = choose(random, ("utf-8", "utf-8", "utf-8-sig", "utf-16"))
    path.write_bytes("\n".join(lines).encode(encoding, "surrogatepass" if encoding == "utf-16" else "surrogateescape"))
    return path


def make_input(random: np.random.Generator, level: int, folder: Path) -> Path:
    """Write an input of any kind, and return its path."""
    makers = [make_tar, make_tar, make_folder, make_list]
    if importlib.util.find_spec("pyarrow"):
        makers += [make_parquet, make_parquet]
    return choose(random, makers)(random, level, folder)


def damage_manifest(random: np.random.Generator, level: int, path: Path) -> None:
    """Change bytes of a manifest, or a value in one of its lines."""
    lines = path.read_bytes().split(b"\n")
    if random.random() < 0.5:
        path.write_bytes(distort_bytes(random, path.read_bytes(), level))
        return
    index = int(random.integers(len(lines)))
    with contextlib.suppress(ValueError):  # the last line is empty
        record = json.loads(lines[index])
        record[choose(random, record)] = hostile(random)
        lines[index] = json.dumps(record).encode()
    path.write_bytes(b"\n".join(lines))


def check_shard(path: Path) -> None:
    """Require that a shard of results can be read, and that nothing in it leads out of a folder."""
    if path.suffix == ".tar":
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is None or member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
                    raise WrongError(f"a member named {member.name!r}")
                if member.name.endswith(".json"):
                    json.load(content)
                else:
                    with Image.open(content) as picture:
                        picture.load()
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        for row in pyarrow.parquet.read_table(path).to_pylist():
            content = row["edges"] if "edges" in row else row["labels"]
            if (content is None) is (row["error"] is None):
                raise WrongError(f"a row with the file {content!r} and the error {row['error']!r}")


def check_answer(result: Any) -> None:
    """Require that a command ended as commands do: with a status, and with a reason where it was refused."""
    # failures of an earlier run were explained there
    error, text = result.exception, result.stderr or "by an earlier run" * ("by an earlier run" in result.stdout)
    if error is not None and not isinstance(error, SystemExit):
        raise UnclearError(f"{type(error).__name__}: {error}")
    if result.exit_code not in (0, 1, 2) or "Traceback" in text or (result.exit_code and not text.strip()):
        raise UnclearError(f"exit status {result.exit_code}: {text[:200]!r}")
    if result.exit_code == 2:
        if not any(word in text for word in ("edges: ", "no image files", "would ", "--")):
            raise UnclearError(text[:200])
        raise RefusedError(text)
