"""The prose rules of CONTRIBUTING.md: phrases that no page, docstring, comment, help text or message may contain."""

import ast
import io
import re
import tokenize

import pytest
from conftest import ROOT

BANNED = {  # phrase: its plain form
    r"beside": "compared with, next to",
    r"(?<!there )(is|are|was|were) no(?! longer| more)": "is not a",
    r"what (fits|would|there is|it takes|it gave)|with what|by what|of what": "a noun: the data, the settings",
    r", for (it|its|they|their|he|this|that|these|those|there|nothing|no|none|we|then)": "because",
    r"cannot be had": "is not available",
    r"mend(s|ed|ing)?": "fix",
    r"anew": "again",
    r"for ever|likewise|nobody's|as many as": "forever, too, nobody owns",
    r"giv(e|es|en|ing)|gave": "pass, use, set, return",
    r"told|tell|tells|say|says|said": "report, print, is set to, name",
    r"decisions?": "environment step",
    r"pictures?": "image, figure",
    r"sentences?": "instruction",
    r"(?<!standard )deviations?": "std",
    r"simulators?": "environment",
    r"whole (files?|checkpoints?|episodes?|answers?|folders?)": "complete",
    r"the same command goes on|goes on where": "resumes",
}
EXCEPTIONS = {  # phrase: files, or lines, in which it is meant
    "sentence": ["CONTRIBUTING.md", "one sentence"],  # of English
    "give": ["gives up", "give up"],
    "say": ["paper"],
    "tell": ["tell whether", "tells the arm", "tells the user"],
    "told": ["arm ", "gripper "],  # an order to the robot
}
RULES = re.compile(
    r"^7\. Banned.*?(?=^8\.)|^\| word \|.*?\n(?!\|)", re.M | re.S
)  # CONTRIBUTING.md names the phrases


def product_files():
    """Return the files with prose of the present. Run logs under results/ are history."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/README.md")]
    folders = [
        ROOT,
        *(
            ROOT / name
            for name in (
                "common",
                "domains",
                "robot",
                "robot/sim",
                "tools",
                "tools/pretraining",
                "benchmarks",
            )
        ),
    ]
    return sorted(
        pages + [p for folder in folders for kind in ("py", "sh") for p in folder.glob(f"*.{kind}")]
    )


def prose(path):
    """Yield (line, text) of a file's prose: a page's text, or Python's comments, docstrings and messages."""
    source = path.read_text()
    if path.suffix == ".md":
        for code in (RULES, re.compile("```.*?```", re.S)):
            source = code.sub(lambda match: "\n" * match[0].count("\n"), source)
        yield from enumerate(source.splitlines(), 1)
    elif path.suffix == ".sh":
        yield from (
            (i, line)
            for i, line in enumerate(source.splitlines(), 1)
            if re.search("# |echo|printf", line)
        )
    else:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and re.search(r" |\n", node.value)
            ):
                yield from (
                    (node.lineno + i, line) for i, line in enumerate(node.value.splitlines())
                )


def violations(path):
    """Yield one line for each banned phrase in a file."""
    comments = [0]
    for line, text in prose(path):
        text = re.sub("`[^`]*`", "`x`", text)
        for phrase, plain in BANNED.items():
            for match in re.finditer(rf"(?<![\w-])({phrase})(?![\w-])", text, re.I):
                meant = EXCEPTIONS.get(match[1].lower().removesuffix("s"), [])
                if not any(exception in f"{path.name} {text}" for exception in meant):
                    yield f"{path.relative_to(ROOT)}:{line}: {match[1]!r} ({plain}): {text.strip()[:100]}"
        if text.startswith("#") and path.suffix == ".py":
            if text.startswith("# of ") and comments[-1] != line - 1:
                yield f"{path.relative_to(ROOT)}:{line}: a comment starts with 'of': {text.strip()[:100]}"
            comments.append(line)


def docstrings(path):
    """Yield (line, docstring) of a Python file, its functions and classes."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            yield getattr(node, "lineno", 1), ast.get_docstring(node)


@pytest.mark.parametrize("path", product_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_banned_phrase(path):
    """Each is replaced by its plain form (CONTRIBUTING.md, rule 7), or listed in EXCEPTIONS."""
    assert not list(violations(path))


def test_no_semicolon_in_a_docstring_s_first_line():
    """One statement a sentence (CONTRIBUTING.md, rule 6). A formula in brackets may have one."""
    wrong = {}
    for path in [path for path in product_files() if path.suffix == ".py"]:
        for line, text in docstrings(path):
            if ";" in re.sub(r"\([^()]*\)", "", text.split("\n")[0]):
                wrong[f"{path.relative_to(ROOT)}:{line}"] = text.split("\n")[0]
    assert not wrong


def test_a_banned_phrase_is_found(tmp_path, monkeypatch):
    """In a comment, a docstring, a message, a page and a script. Code itself, and longer words, are not prose."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    python = '"""Mend it\nbeside it."""\nwhole = f"give {1} away"  # of the head\n'
    (tmp_path / "a.py").write_text(
        python + 'what = "what"\nwhatever = "recommended to all, `what` too"\n'
    )
    (tmp_path / "a.md").write_text(
        "A picture\n`a picture`, pictured.\n```\nanew\n```\nthere is no end, it is no end\n"
    )
    (tmp_path / "a.sh").write_text("# mend\nmend=1\necho 'anew'\n")
    found = {
        kind: [v.split(": ")[0] for v in violations(tmp_path / f"a.{kind}")]
        for kind in ("py", "md", "sh")
    }
    assert sorted(found["py"]) == ["a.py:1", "a.py:2", "a.py:3", "a.py:3"]
    assert found["md"] == ["a.md:1", "a.md:6"] and found["sh"] == ["a.sh:1", "a.sh:3"]
