"""Show the examples of docstrings as code in the documentation: griffe knows the section by its plural alone."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the section `Example:`."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
