"""What a text names: modules, make targets, flags, keys, recipes and files, each as a `Mention`.

Read are the code spans and code blocks of Markdown, the comments of YAML and the docstrings of Python. A word in
capitals (NAME, DIR) is a placeholder and names nothing.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (
    *("megatron_dllm", "checkpoints_tools", "recipes", "launch", "benchmarks", "tests", "docs", "examples"),
    *(".ci", ".github"),
)
PACKAGE = "megatron_dllm"

_COMMAND = re.compile(
    r"(?P<start>torchrun|(?:\S*/)?python3?)\b(?P<own>[^\n|;&`]*?)\s"
    r"(?:-m\s+(?P<module>[\w.]+(?:\{[\w, ]+\})?)|(?P<script>(?:launch|examples|tests|docs)/[\w/]+\.py))"
    r"(?P<rest>[^\n|;&]*)"
)
_TARGET = re.compile(r"(?:^|\()\s*make (?P<target>[a-z][\w-]*)(?P<rest>(?:\s+[A-Z_]+=\S+)*)")
_FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
_OVERRIDE = re.compile(r"^[+~]*(?P<key>[a-z_][\w.@/]*)=(?P<value>.*)$")
_DOTTED = re.compile(r"^(?P<key>[a-z_]+(?:\.[a-z_*]+)+)(?:(?:: |=)(?P<value>\S.*))?$")
_PATH = re.compile(r"(?<![\w/.$}])[\w.*-]+(?:/[\w.*{},-]+)*/?(?:::\w+)?")
_TREE_NAME = re.compile(r"^[\w.*-]+(?:/|\.py|\.md|\.yaml)$")
_LINK = re.compile(r"\]\((?!https?:|#)(?P<target>[^)#\s]+)")
_FILE_ENDINGS = (".py", ".json", ".jsonl", ".yaml", ".txt", ".pt", ".bin", ".patch", ".log", ".png", ".md", ".toml")
_PLACEHOLDER = re.compile(r"(?:^|[/._])[A-Z]{1,12}\d?(?:$|[/._])|\.\.\.|<|\$|\?\?\?|[…\"']")


@dataclass(frozen=True, order=True)
class Mention:
    """One thing that a text names.

    Attributes:
        kind: module, script, target, variable (of make), flag, key, recipe, path, link or function (of a test).
        name: as written, without what surrounds it.
        program: the module or script whose command line it stands in; "" outside of one.
    """

    kind: str
    name: str
    program: str = ""


def expand(name: str) -> list[str]:
    """`a.{b, c}` as `a.b` and `a.c`."""
    match = re.search(r"\{([^}]*)\}", name)
    if not match:
        return [name]
    return [name[: match.start()] + part.strip() + name[match.end() :] for part in match[1].split(",")]


def is_placeholder(text: str) -> bool:
    """Whether a word only stands for what a reader puts there: NAME, RUN/..., "${root}"."""
    return bool(_PLACEHOLDER.search(text.removesuffix("README.md").removesuffix("CHANGELOG.md")))


def markdown_code(text: str) -> tuple[list[str], list[str]]:
    """The code of a Markdown text: blocks (fenced or indented by four), and spans between backticks."""
    lines, blocks, prose, in_fence = text.splitlines(), [[]], [], False
    for line in lines:
        is_fence = line.lstrip().startswith("```")
        in_fence ^= is_fence
        if not is_fence and (in_fence or line.startswith("    ")):
            blocks[-1].append(line if in_fence else line[4:])
            continue
        if blocks[-1]:
            blocks.append([])
        prose.append("" if is_fence else line)
    spans = [match[2] for match in re.finditer(r"(`+)(.+?)\1", "\n".join(prose), re.DOTALL)]
    return ["\n".join(block) for block in blocks if block], [" ".join(span.split()) for span in spans]


def in_markdown(text: str) -> set[Mention]:
    """Everything that a Markdown text names."""
    blocks, spans = markdown_code(text)
    found = {Mention("link", match["target"]) for match in _LINK.finditer(text)}
    for block in blocks:
        tree = set(_tree(block))
        found |= tree or {*_commands(block), *_yaml_keys(block), *_paths(block, is_span=False)}
    for span in spans:
        found |= {*_commands(span), *_words(span), *_paths(span, is_span=True)}
    return found


def in_yaml_comments(text: str) -> set[Mention]:
    """What the comments of a recipe name: commands, and files of the project."""
    comments = "\n".join(match[1] for match in re.finditer(r"^\s*#( .*)$", text, re.MULTILINE))
    return {*_commands(comments), *_paths(comments, is_span=False)}


def in_docstrings(text: str) -> set[Mention]:
    """The commands that the docstrings of a Python file name."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, nodes)]
    return {mention for doc in docs for mention in _commands(doc)}


def command_lines(text: str) -> list[tuple[str, list[str]]]:
    """The commands in the code blocks of a Markdown text: program, and its words as a shell splits them."""
    lines = [line for block in markdown_code(text)[0] for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    found = [match for line in lines for match in _COMMAND.finditer(re.split(r"\s#\s", line)[0])]
    return [
        (program, shlex.split(re.split(r"\s{2,}", match["rest"].strip())[0]))
        for match in found
        for program in expand(match["module"] or match["script"])
    ]


def _commands(text: str) -> Iterator[Mention]:
    """The commands of a text: program, flags and overrides of each, and targets of make."""
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        for part in re.split(r"\s#\s|`", line):
            for match in _TARGET.finditer(part):
                yield Mention("target", match["target"])
                yield from (Mention("variable", word.split("=")[0]) for word in match["rest"].split())
            for match in _COMMAND.finditer(part):
                for program in expand(match["module"] or match["script"]):
                    if not is_placeholder(program):
                        yield Mention("module" if match["module"] else "script", program)
                        yield from _arguments(program, re.split(r"\s{2,}", match["rest"].strip())[0])


def _arguments(program: str, text: str) -> Iterator[Mention]:
    """Flags and overrides on one command line."""
    yield from (Mention("flag", flag, program) for flag in _FLAG.findall(text))
    for word in text.split():
        match = _OVERRIDE.match(word.strip("[\"'").rstrip("]\"'") if word.startswith(("[", '"', "'")) else word)
        if match and match["key"] != "key":
            yield from _override(match["key"], match["value"], program)


def _override(key: str, value: str, program: str) -> Iterator[Mention]:
    yield Mention("key", key, program)
    if not is_placeholder(value):
        yield Mention("recipe", f"{key}={value}", program)


def _words(span: str) -> Iterator[Mention]:
    """What a code span names that is no command: flags, overrides, dotted keys."""
    if _COMMAND.search(span):
        return
    yield from (Mention("flag", flag) for flag in _FLAG.findall(span))
    matches = [_OVERRIDE.match(word) for word in span.split()]
    for match in matches if all(matches) else []:
        if match and match["key"] != "key":
            yield from _override(match["key"], match["value"], "")
    dotted = _DOTTED.match(span)
    if dotted and not dotted["key"].endswith(_FILE_ENDINGS):
        yield Mention("key", dotted["key"])


def _yaml_keys(block: str) -> Iterator[Mention]:
    """The keys of a block that is YAML."""
    try:
        content = yaml.safe_load(block)
    except yaml.YAMLError:
        return

    def walk(node: object, prefix: str) -> Iterator[Mention]:
        if isinstance(node, dict):
            for name, value in node.items():
                yield Mention("key", f"{prefix}{name}")
                yield from walk(value, f"{prefix}{name}.")

    if isinstance(content, dict) and all(re.fullmatch(r"[a-z_]+", str(name)) for name in content):
        yield from walk(content, "")


def _paths(text: str, is_span: bool) -> Iterator[Mention]:
    """Files and folders of the project; in a span also those below the package, and bare names of Python files."""
    rooms = [folder.name for folder in (ROOT / PACKAGE).iterdir() if folder.is_dir()]
    for match in _PATH.finditer(text):
        path = match[0].rstrip(".,")
        first = path.split("/")[0]
        is_module = path.endswith((".py", "/"))
        if is_placeholder(path) or ("/" not in path and not (is_span and path.endswith(".py"))):
            continue
        if first in FOLDERS:
            yield from (Mention("path", name) for name in expand(path))
        elif is_span and is_module and first in rooms:
            yield from (Mention("path", f"{PACKAGE}/{name}") for name in expand(path))
        elif is_span and "/" not in path:
            yield Mention("path", f"**/{path}")


def _tree(block: str) -> Iterator[Mention]:
    """The files of a drawn tree of folders: a line that opens with one or more names, indented below its folder."""
    if not re.match(r"[a-z_]+/(\s|$)", block):
        return
    above: list[tuple[int, str]] = []
    for line in block.splitlines():
        names = []
        for word in line.split():
            if not _TREE_NAME.match(word):
                break
            names.append(word)
        indent = len(line) - len(line.lstrip())
        while above and above[-1][0] >= indent and names:
            above.pop()
        folder = above[-1][1] if above else ""
        yield from (Mention("path", folder + name) for name in names)
        if names and names[-1].endswith("/"):
            above.append((indent, folder + names[-1]))
