"""What MkDocs calls while it builds the docs (mkdocs.yml): pages of README and of the package.

No page loads anything from the network: formulas are MathML, fonts are the reader's own.
"""

import html
import pkgutil
import re
import runpy
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

import sedd_jax

REPOSITORY = Path(__file__).parent.parent
WEB = runpy.run_path(str(REPOSITORY / "launch/web.py"))
# Pages that are README's sections: the file, its title and the sections' headings.
README_PAGES = {
    "commands.md": ("Training, evaluating, sampling", ["The commands"]),
    "corpora.md": ("Corpora and evaluations", ["Corpora and evaluations"]),
    "devices.md": ("Several devices and machines", ["On several devices and machines"]),
    "python.md": ("In Python", ["In Python"]),
    "checkpoints.md": ("To and from PyTorch", ["Checkpoints to and from PyTorch"]),
    "numbers.md": ("What the numbers mean", ["What the numbers mean"]),
    "status.md": ("What has run where", ["What has run where"]),
}
# The reference's pages: a layer's folder or modules, as README's table has them.
LAYERS = {
    "diffusion": "The mathematics",
    "models": "The networks",
    "kernels": "Kernels",
    "parallel": "Devices and processes",
    "host": "Files, the hub, the terminal",
    "data": "Corpora, tokenizers, records",
    "convert": "Formats of others",
    "runs": "A run's folder",
    "inference": "A trained model",
    "evaluation": "Evaluations",
    "training": "Training",
    "configs": "The configs",
}
MODULES = ("config", "registry", "experiment", "state")


def on_files(files, config):
    for name, (title, sections) in README_PAGES.items():
        text = "\n\n".join(_readme_section(section) for section in sections)
        files.append(File.generated(config, name, content=f"# {title}\n\n{text}"))
    pages = {folder: (title, _modules(folder)) for folder, title in LAYERS.items()}
    pages["modules"] = ("Other modules", [f"sedd_jax.{name}" for name in MODULES])
    for name, (title, modules) in pages.items():
        content = "\n\n".join([f"# {title}", *(f"::: {module}" for module in modules)])
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def _readme_section(heading: str) -> str:
    """What stands below README's heading; the links are those of a page of docs/."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)\n", readme, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    if heading not in sections:
        raise ValueError(f"README.md has no section {heading!r}; launch/site.py names it")
    return _links(sections[heading].strip(), folder="")


def _modules(folder: str) -> list[str]:
    """The names of all its modules, sorted; of the configs as the repository has them."""
    package = folder if folder == "configs" else f"sedd_jax/{folder}"
    prefix = package.replace("/", ".") + "."
    return sorted(
        module.name for module in pkgutil.walk_packages([str(REPOSITORY / package)], prefix)
    )


def _links(markdown: str, folder: str) -> str:
    ref = f"v{sedd_jax.__version__}"
    return WEB["absolute_links"](markdown, WEB["REPOSITORY"], ref, folder, site="docs")


def on_page_markdown(markdown, page, config, files):
    if page.file.generated_by:
        return markdown
    markdown = _links(markdown, "docs")
    return re.sub(r"<!-- README: (.+) -->", lambda match: _readme_section(match[1]), markdown)


def on_page_content(content, page, config, files):
    """LaTeX in arithmatex's \\(...\\) and \\[...\\] becomes MathML, which browsers draw."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match["display"] else "inline"
        return convert(html.unescape(match["inline"] or match["display"]), display=display)

    return re.sub(
        r'<(span|div) class="arithmatex">(?:\\\((?P<inline>.+?)\\\)|\\\[(?P<display>.+?)\\\])</\1>',
        mathml,
        content,
        flags=re.DOTALL,
    )
