"""Check that the sources use the project's words: `python scripts/terms.py [FILE ...]`, by default all that git tracks.

Three checks: words and phrases that no text may have (US spelling, no metaphors), names that no Python code may define,
and first words with which no docstring of a function begins. Each message says what to write instead.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# records, third-party texts, and the two files that must name the words
SKIPPED = ("LICENSE", "constraints.txt", "benchmarks/results/*", "scripts/terms.py", "tests/test_terms.py")
SUFFIXES = {"", ".cff", ".cpp", ".cu", ".h", ".in", ".md", ".py", ".pyi", ".sh", ".toml", ".yaml", ".yml"}

# (files, word): the places where a word is right, each with its reason
ALLOWED: tuple[tuple[str, str], ...] = ()

# an underscore counts as the end of a word, so that names are found, too
WORDS = {
    r"(un)?heard|hears?|hearing|listen(s|ed|ing|ers?)?": "capture, on_attention, or another word for what happens",
    r"doors?": "input conversion, or the name of the module",
    r"told|telling": "given, passed, reported, or say it in another way",
    r"for the while|as people have them|of its own|so many": "plain words",
    r"licen[c]es?|licen[c]ed": "license",
    r"[a-z]*colour[a-z]*": "color",
    r"neighbour[a-z]*": "neighbor",
    r"behaviour[a-z]*": "behavior",
    r"favour[a-z]*": "favor",
    r"centre[sd]?": "center",
    r"grey[a-z]*": "gray",
    r"artefacts?": "artifact",
    r"distils?": "distill",
    r"(un)?label(led|ling)|model(led|ling)|cancel(led|ling)": "a single l: labeled, modeled, canceled",
    r"(re|de|un)?(normal|optim|initial|serial|synchron|quant|vector|parallel|recogn|organ|general|minim|maxim|summar|token|binar"
    r"|raster|standard|visual|equal|regular|penal|discret|factor|special|util|categor|character|linear|local|random|stabil)"
    r"is(e|es|ed|er|ers|ing|ation|ations)": "-ize",
    r"analys(e|ed|ing)": "analyze",
}
GLOSSARY = "see the glossary in CONTRIBUTING.md"
NAMES = {
    r"Taps|fold_taps|Around|waves|stretch|join|draw|Turns|HeardError|UnheardError": GLOSSARY,
    r"place|explained|matching|lacking|check_room|embed_nothing|kept_null_text": GLOSSARY,
    r"telling_item|crests|begin_as|visited": GLOSSARY,
    r"found|kinds|made|kept|given|seen|each": "a variable is named after what it holds",
}
FUNCTIONS = {r"_?\w+_of": "a function is named by a verb: make_..., find_..., get_..."}
OPENINGS = "All Both Each Every How Of One So Some Such Two When Where Whether Which Who Whose"  # ruff finds others


def main() -> int:
    """Print every violation; the status is 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="files to check, by default all that git tracks")
    paths = parser.parse_args().files or tracked_files()
    messages = [message for path in paths for message in check_file(path.resolve())]
    print("\n".join(messages) or f"{len(paths)} files use the project's words")
    return bool(messages)


def tracked_files() -> list[Path]:
    """Return the files of the repository that git tracks or would track."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def check_file(path: Path) -> list[str]:
    """Return a message for each violation in a file, in the order of its lines; none for a file of another kind."""
    name = path.relative_to(ROOT).as_posix()
    if path.suffix not in SUFFIXES or any(fnmatch(name, pattern) for pattern in SKIPPED):
        return []
    text = path.read_text(encoding="utf-8")
    violations = [*check_words(text), *(check_code(text) if path.suffix in (".py", ".pyi") else ())]
    return [
        f"{name}:{line}: {word!r}: {advice}"
        for line, word, advice in sorted(violations)
        if not any(fnmatch(name, pattern) and word == allowed for pattern, allowed in ALLOWED)
    ]


def check_words(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, word and advice for each word or phrase that no text may have, in any case."""
    for pattern, advice in WORDS.items():
        for match in re.finditer(rf"(?<![A-Za-z])(?:{pattern})(?![A-Za-z])", text, re.IGNORECASE):
            yield text.count("\n", 0, match.start()) + 1, match[0], advice


def check_code(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, word and advice for each name and each docstring of a function that Python code may not have."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from check_names(node.name, node.lineno, NAMES | FUNCTIONS)
            yield from check_opening(node)
        elif isinstance(node, ast.ClassDef):
            yield from check_names(node.name, node.lineno, NAMES)
        elif isinstance(node, ast.arg):
            yield from check_names(node.arg, node.lineno, NAMES)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield from check_names(node.id, node.lineno, NAMES)


def check_names(name: str, line: int, patterns: dict[str, str]) -> Iterator[tuple[int, str, str]]:
    """Yield line, name and advice if a pattern matches the whole of a name."""
    for pattern, advice in patterns.items():
        if re.fullmatch(pattern, name):
            yield line, name, advice


def check_opening(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[int, str, str]]:
    """Yield line, word and advice if a docstring begins like a noun or a clause; properties may."""
    decorators = {ast.unparse(decorator).partition("(")[0].rpartition(".")[2] for decorator in function.decorator_list}
    docstring = ast.get_docstring(function)
    if docstring and not decorators & {"property", "cached_property", "fixture"}:
        word = docstring.split()[0].strip(",.:")
        if word in OPENINGS.split():
            yield function.body[0].lineno, word, "a docstring begins with an imperative verb: Return, Read, Make, ..."


if __name__ == "__main__":
    sys.exit(main())
