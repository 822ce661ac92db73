"""The reference of what `import ebm_prior` gives, as HTML: `python .ci/docs.py FOLDER`, after `pip install '.[docs]'`."""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc
import pdoc.render

import ebm_prior


def main(folder: Path) -> None:
    """Write index.html and ebm_prior.html. The face imports its names when they are used: here, all of them."""
    names = list(ebm_prior._PLACES)
    for name in names:
        setattr(ebm_prior, name, getattr(ebm_prior, name))
    ebm_prior.__all__ = names  # type: ignore[attr-defined]
    pdoc.render.configure(docformat="google", show_source=False, search=False, include_undocumented=False)
    pdoc.pdoc("ebm_prior", output_directory=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
