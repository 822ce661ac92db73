"""The reference of what `import ebm_prior` gives, an HTML page: `python .ci/docs.py FILE` (`pip install '.[docs]'`)."""

from __future__ import annotations

import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pdoc.doc
import pdoc.render

import ebm_prior


def page() -> str:
    """The page. The face imports its names when they are used: here, all of them."""
    names = list(ebm_prior._PLACES)
    for name in names:
        setattr(ebm_prior, name, getattr(ebm_prior, name))
    ebm_prior.__all__ = names  # type: ignore[attr-defined]
    module = pdoc.doc.Module(ebm_prior)
    for shown in module.classes:
        for field in fields(shown.obj) if is_dataclass(shown.obj) else ():
            member = shown.members.get(field.name)
            if member is not None and "help" in field.metadata:  # that of the option on the command line
                member.docstring = field.metadata["help"]  # type: ignore[misc]
    pdoc.render.configure(docformat="google", show_source=False, search=False)
    return pdoc.render.html_module(module, all_modules={"ebm_prior": module})


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
