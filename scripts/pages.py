"""Copy the pages of the project, and the files that they link to, to build/pages, from which mkdocs makes the site.

Paths stay as they are, so that a link works in the repository and on the site alike.
"""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "pages"
LINK = re.compile(r'\]\(([^)#:]+)(?:#[^)]*)?\)|src="([^":]+)"')


def find_pages(root: Path) -> list[Path]:
    """Return the pages, and every file that one of them links to, relative to the root."""
    pending = sorted([*root.glob("*.md"), *root.glob("docs/**/*.md"), root / "benchmarks" / "README.md"])
    files: dict[Path, None] = {}
    while pending:
        file = pending.pop()
        if file in files:
            continue
        files[file] = None
        if file.suffix == ".md":
            links = [page or picture for page, picture in LINK.findall(file.read_text())]
            pending += [path for link in links if (path := (file.parent / link).resolve()).is_file()]
    return [file.relative_to(root) for file in files]


def main() -> None:
    shutil.rmtree(PAGES, ignore_errors=True)
    for file in find_pages(ROOT):
        (PAGES / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, PAGES / file)


if __name__ == "__main__":
    main()
