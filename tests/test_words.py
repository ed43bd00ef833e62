"""Words that were retired stay away: docs/glossary.md has the words that took their places."""

import ast
import re
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("quasar", "plugins", "calibration", "export", "engines", "runtime", "evaluation", "serving"),
    *("benchmarks", "examples"),
)
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retired:
    """A pattern over lines whose names are split into words: `cache_rows` and `CacheRows` read "cache rows".

    `phrases`: regular expressions of what may stand, looked for before names are split. `paths`: globs of files in
    which the pattern may stand. Both have their reason beside them. `only`: where it is looked for, if not everywhere.
    """

    pattern: str
    instead: str
    phrases: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    only: tuple[str, ...] = ("*",)


RETIRED = (
    Retired(
        pattern=r"behind",
        instead="after",
        # Hidden by something, which is no order.
        phrases=(r"behind one (adapter|protocol|interface)",),
    ),
    Retired(pattern=r"in front of", instead="before"),
    Retired(pattern=r"rows? in the cache|cached rows?|rows? of the cache", instead="cached positions, cached length"),
    Retired(pattern=r"spare (zero )?rows?", instead="spare positions"),
    Retired(
        pattern=r"(new|committed|rejected) rows?",
        instead="positions, tokens",
        # Names of nodes in the canonical graph.
        phrases=(r"\"mask\.new_rows?\"",),
    ),
    Retired(pattern=r"tenants?|parked|cache turns?|tak(e|es|ing) turns", instead="scheduler, slot, swapped out"),
    Retired(pattern=r"priced?|prices|pricing|dear(er|est)?|cheap(er|est|ly)?", instead="latency, slower, faster"),
    Retired(
        pattern=r"cost (curves?|surfaces?|models?|noise)|(pass|passes|rounds?) costs?|costs? of (a |the )?pass(es)?",
        instead="latency",
        # Keys of manifests and records, and a program's name that docs quote.
        phrases=(r"\bcost_surface_ms\b", r"\bcost_curve_ms\b", r"\bcost_noise\b", r"\bcost_curve\.py\b"),
        # The program's own file.
        paths=("benchmarks/cost_curve.py",),
    ),
    Retired(
        pattern=r"held back",
        instead="validation split, held out",
        # A key of manifests.
        phrases=(r"\bheld_back_tokens\b",),
    ),
    Retired(
        pattern=r"reconstruct\w*",
        instead="GPTQ",
        # Values in manifests and calibration.json.
        phrases=(r"\breconstructed rounding\b", r"\"reconstructed\"", r"\(nearest, reconstructed\)"),
    ),
    Retired(
        pattern=r"refine\w*",
        instead="learned smoothing",
        # Values in manifests and calibration.json.
        phrases=(r"\brefined factors\b", r"\"refined\"", r"\(off, alpha, refined\)"),
    ),
    Retired(pattern=r"parity", instead="exactness"),
    Retired(
        pattern=r"simulat(ion|ions|ed|es|ing|or)",
        instead="fake quantization (of INT8 in torch), replay (of recorded generations)",
    ),
    Retired(
        pattern=r"simulate",
        instead="fake quantize",
        # Elsewhere it is the command's name.
        only=("calibration/*", "export/*", "docs/adding-a-precision.md"),
    ),
)

# Names of modules that say nothing.
VAGUE = ("core.py", "make.py", "scenario.py", "timing.py", "measured.py", "utils.py", "helpers.py", "common.py")
# Modules of different packages that may share a name.
SHARED_MODULES = {
    "backend.py": "every back end has one, with the same members",
    "base.py": "the base class that the other files of its folder extend",
    "builder.py": "engines/tensorrt builds plans, export builds graphs",
    "catalog.py": "all precisions, and all GPU kernels",
    "cli.py": "every program has one",
    "compiled.py": "GPU kernels, and the sampler",
    "draft_head.py": "what one is in a directory, its graphs, its session, and what drafts with it",
    "files.py": "the common functions, and a back end's part of the manifest",
    "kv_compact.py": "an operator's reference and its kernel",
    "latency.py": "engines measure it, the controller models it",
    "library.py": "each opens one native library",
    "load_options.py": "every back end has one",
    "loading.py": "finds the back end; and each back end's own",
    "quantize_per_token.py": "an operator's reference and its kernel",
    "session.py": "the protocol, and each back end's own",
    "suffix_automaton.py": "the reference, the compiled form and its benchmark",
    "text_files.py": "export writes them, engines read them",
    "traces.py": "runtime writes them, evaluation reads them",
    "verifier.py": "export writes its graph, runtime runs it",
}
# Public classes of different packages that may share a name.
SHARED_CLASSES = {
    "Generation": "what a caller gets; and the tag of that name in chat templates",
    "Linear": "of a decoder's layer; and a step of a CUDA program",
    "Operator": "an entry of the operator table; and a lowering to one operator",
    "Targets": "devices that plans are compiled for; and the target's tokens in a pass",
}


def modules():
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def words_of(line):
    """The line with `snake_case` and `CamelCase` split."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[_-]", " ", line)


def lines():
    """Where, and the text: all of the packages, C++ and the docs; of the tests, names alone."""
    native = [path for path in sorted((ROOT / "plugins/cpu/native").iterdir()) if path.suffix in (".hpp", ".cpp")]
    pages = [ROOT / page for page in PAGES] + sorted((ROOT / "docs").glob("*.md"))
    for path in (*modules(), *native, *pages):
        name = path.relative_to(ROOT).as_posix()
        yield name, name, name
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            yield name, f"{name}:{number}", line
    for path in sorted((ROOT / "tests").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if found := re.match(r"\s*(?:def|class) ([Tt]est\w*)", line):
                yield name, f"{name}:{number}", found[1]


@pytest.mark.parametrize("retired", RETIRED, ids=lambda retired: retired.instead)
def test_retired_words_are_gone(retired):
    pattern = re.compile(rf"\b(?:{retired.pattern})\b", re.IGNORECASE)
    left = []
    for name, where, line in lines():
        if any(fnmatch(name, glob) for glob in retired.paths) or not any(fnmatch(name, glob) for glob in retired.only):
            continue
        for phrase in retired.phrases:
            line = re.sub(phrase, "", line)
        if pattern.search(words_of(line)):
            left.append(f"{where}: {line.strip()}")
    assert not left, f"write {retired.instead}:\n" + "\n".join(left)


def test_exceptions_are_needed():
    """A phrase or a path that stands nowhere any more goes from the list."""
    everything = [line for _, _, line in lines()]
    for retired in RETIRED:
        for phrase in retired.phrases:
            if "|" not in phrase:
                assert any(re.search(phrase, line) for line in everything), phrase
        for path in retired.paths:
            assert list(ROOT.glob(path)), path


def test_names_of_modules():
    by_name = defaultdict(set)
    for path in modules():
        by_name[path.name].add(path.relative_to(ROOT).parts[0])
    for name in VAGUE:
        assert name not in by_name, f"{name} says nothing"
    shared = {name for name, places in by_name.items() if len(places) > 1} - {"__init__.py", "__main__.py"}
    assert shared <= SHARED_MODULES.keys()


def test_public_class_names_are_unique():
    packages = defaultdict(set)
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                packages[node.name].add(path.relative_to(ROOT).parts[0])
    assert {name for name, places in packages.items() if len(places) > 1} == SHARED_CLASSES.keys()
