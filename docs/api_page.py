"""Makes the page of modules of the site, from the docstrings, whenever the site is built (a hook of MkDocs)."""

from __future__ import annotations

import ast
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parents[1] / "lisa_dist"
INTRODUCTION = """# Modules

The command line and its keys are the interface that is kept stable. From Python these are meant to be called:

| | |
| --- | --- |
| `lisa_dist.cli.main(["train", "my.yaml"])` | any command; returns its exit code |
| `lisa_dist.config.loading.load(["method=lisa", "model.path=DIR"])` | the typed configuration of overrides |
| `lisa_dist.integrations.transformers.LisaCallback` | the method [inside Trainer](methods.md#inside-other-trainers) |
| `lisa_dist.method.sampling.Sampler` | the base of a [sampler](design.md#what-one-touches-to-add-something) |

Everything else may change. What is in which module, for those who read the code ([the architecture](design.md) first);
the docstrings say the rest.
"""


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the page to those of the site."""
    files.append(File.generated(config, "api.md", content=page()))


def page() -> str:
    """Return the page: for each package what it is for, and its modules with their public names."""
    lines = [INTRODUCTION]
    for package in sorted(file.parent for file in PACKAGE.rglob("__init__.py")):
        about = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
        rows = [row for file in sorted(package.glob("*.py")) if (row := row_of(file))]
        if package != PACKAGE and rows:
            name = ".".join(package.relative_to(PACKAGE.parent).parts)
            lines += [f"## {name}", "", about, "", "| module | | public names |", "| --- | --- | --- |", *rows, ""]
    return "\n".join(lines)


def row_of(file: Path) -> str:
    """Return a module's row, with the first paragraph of its docstring; empty where it defines nothing public."""
    tree = ast.parse(file.read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    public = ", ".join(f"`{name}`" for name in names if not name.startswith("_"))
    what = (ast.get_docstring(tree) or "").partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    return f"| `{file.stem}` | {'' if file.stem == '__init__' else what} | {public} |" if public else ""
