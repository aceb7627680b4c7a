"""Make the demo dataset: questions and answers about the standard library, from the docstrings of this Python.

    python scripts/make_demo_data.py data/quickstart.jsonl

About 2,000 rows in the `messages` format, the same for the same Python version. Needs only the standard library.
"""

import importlib
import inspect
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

MODULES = """
abc argparse array ast asyncio base64 bisect builtins calendar cmath cmd code codecs collections colorsys compileall
concurrent.futures configparser contextlib copy copyreg csv ctypes dataclasses datetime decimal difflib dis doctest
email.message email.utils enum errno fileinput filecmp fnmatch fractions functools gc getopt glob graphlib gzip
hashlib heapq hmac html html.parser http.client http.cookies http.server imaplib importlib.metadata importlib.util
inspect io ipaddress itertools json keyword linecache locale logging logging.handlers lzma mailbox math mimetypes
multiprocessing numbers operator os os.path pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint
profile pstats py_compile queue quopri random re reprlib rlcompleter runpy sched secrets select selectors shelve
shlex shutil signal smtplib socket socketserver sqlite3 ssl stat statistics string stringprep struct subprocess
symtable sys sysconfig tabnanny tarfile tempfile textwrap threading time timeit token tokenize trace traceback
tracemalloc types typing unicodedata unittest unittest.mock urllib.parse urllib.request urllib.robotparser uuid
warnings wave weakref webbrowser xml.dom.minidom xml.etree.ElementTree xmlrpc.client zipapp zipfile zipimport zlib
zoneinfo
"""

MAX_SUMMARY = 200  # characters; longer first paragraphs are manuals, not answers
MIN_SUMMARY = 30


def rows() -> Iterator[dict[str, object]]:
    """Yield a row for each documented name, in the order of MODULES, then alphabetically; each summary occurs once."""
    seen: set[str] = set()
    for module_name in MODULES.split():
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # optional in some builds of Python
            continue
        for name, member in documented_members(module_name, module):
            summary = first_paragraph(inspect.getdoc(member) or "")
            if summary is None or summary in seen:
                continue
            seen.add(summary)
            yield {
                "messages": [
                    {"role": "user", "content": question(name, member, number=len(seen))},
                    {"role": "assistant", "content": answer(name, module_name, member, summary)},
                ]
            }


def documented_members(module_name: str, module: types.ModuleType) -> Iterator[tuple[str, object]]:
    """Yield the module, its public functions and classes, and the public methods that the classes define themselves."""
    yield module_name, module
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or getattr(member, "__module__", None) != module.__name__:
            continue
        if inspect.isroutine(member):
            yield f"{module_name}.{name}", member
        elif inspect.isclass(member):
            yield f"{module_name}.{name}", member
            for method_name, method in sorted(vars(member).items()):
                if not method_name.startswith("_") and (inspect.isroutine(method) or isinstance(method, property)):
                    yield f"{module_name}.{name}.{method_name}", getattr(member, method_name)


def first_paragraph(doc: str) -> str | None:
    """Return the first paragraph after the signature, in one line; None if it does not make a good answer."""
    paragraphs = [p for p in re.split(r"\n\s*\n", doc.strip()) if p.strip()]
    if paragraphs and re.fullmatch(r"[\w.]+\(.*\)(\s*->.*)?", paragraphs[0].strip(), flags=re.DOTALL):
        paragraphs = paragraphs[1:]
    summary = " ".join(paragraphs[0].split()) if paragraphs else ""
    # Memory addresses differ from run to run.
    return summary if MIN_SUMMARY <= len(summary) <= MAX_SUMMARY and " at 0x" not in summary else None


def answer(name: str, module_name: str, member: object, summary: str) -> str:
    """Return an answer of a form that is soon learned: what `name` is, its summary, and how to import it."""
    if inspect.ismodule(member):
        return f"`{name}` is a module of the standard library.\n\n{summary}\n\nImport it with `import {name}`."
    if inspect.isclass(member):
        kind = "class"
    elif name.removeprefix(f"{module_name}.").count(".") == 0:
        kind = "function"
    else:
        kind = "property" if isinstance(member, property) else "method"
    return f"`{name}` is a {kind} of the module `{module_name}`.\n\n{summary}\n\nImport it with `import {module_name}`."


def question(name: str, member: object, *, number: int) -> str:
    """Return a question about `name`; `number` selects one of a few wordings."""
    if inspect.ismodule(member):
        forms = ("What is the Python module `{}` for?", "Describe the standard library module `{}`.")
    elif inspect.isclass(member):
        forms = ("What is the Python class `{}`?", "Explain `{}` from the Python standard library.")
    else:
        forms = (
            "What does `{}` do in Python?",
            "Explain `{}` from the Python standard library.",
            "How is Python's `{}` documented?",
        )
    return forms[number % len(forms)].format(name)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: make_demo_data.py FILE.jsonl")
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows()]
    # All names are about 3,000 rows; evenly spaced rows keep every module.
    step = max(1.0, len(lines) / 2000)
    selected = [lines[int(i * step)] for i in range(min(2000, len(lines)))]
    path.write_text("\n".join(selected) + "\n", encoding="utf-8")
    print(f"{path}: {len(selected):,} of {len(lines):,} rows")


if __name__ == "__main__":
    main()
