"""Where the project is found on the web, and Markdown whose links work there.

setup.py (PyPI's page) and site.py (the docs) read this file; it imports nothing of ours.
"""

import re
from pathlib import PurePosixPath

# Where the repository is public, https://github.com/OWNER/NAME: set by the release that makes it so
# (docs/releasing.md). PyPI's links, the images of its page and the docs' links to files need it.
REPOSITORY = ""
PAPER = "https://arxiv.org/abs/2310.16834"

# A fenced block or a code span, which stay as they are, or a link or image.
_LINK = re.compile(
    r"(?P<code>^```.*?^```|`[^`]*`)"
    r"|(?P<image>!?)\[(?P<text>(?:!\[[^\]]*\]\([^)]*\)|[^\[\]])*)\]\((?P<target>[^)\s]+)\)",
    re.DOTALL | re.MULTILINE,
)


def absolute_links(
    markdown: str, repository: str, ref: str, folder: str = "", site: str | None = None
) -> str:
    """Markdown of a file in `folder` whose relative links also work outside the repository.

    Links point at the files of `ref`, a tag or branch, on `repository`'s website, images at their
    bytes. Without a website links become their text, and images are left out. What is in the
    folder `site` is linked relative to that.
    """

    def absolute(match: re.Match[str]) -> str:
        target, text = match["target"], match["text"]
        if match["code"] is not None:
            return match[0]
        if not match["image"]:
            text = _LINK.sub(absolute, text)  # a picture that is a link
        if not re.match(r"[a-z]+:|#", target):
            path = _in_repository(folder, target)
            if site and path.startswith(f"{site}/"):
                return f"{match['image']}[{text}]({path.removeprefix(f'{site}/')})"
            if not repository:
                return "" if match["image"] else text
            target = f"{repository}/{'raw' if match['image'] else 'blob'}/{ref}/{path}"
        return f"{match['image']}[{text}]({target})"

    return _LINK.sub(absolute, markdown)


def _in_repository(folder: str, target: str) -> str:
    """docs, ../configs/base.py#x -> configs/base.py#x"""
    parts: list[str] = []
    for part in PurePosixPath(folder, target).parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


def project_urls(repository: str, ref: str) -> dict[str, str]:
    """What PyPI shows beside the description."""
    if not repository:
        return {"Paper": PAPER}
    return {
        "Source": repository,
        "Documentation": f"{repository}/tree/{ref}/docs",
        "Changelog": f"{repository}/blob/{ref}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
        "Paper": PAPER,
    }
