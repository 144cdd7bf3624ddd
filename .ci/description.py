"""Makes the package's description of the README: links to files of a clone become their text."""

import pathlib
import re

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Description(MetadataHookInterface):
    """Hatchling asks it for the field `readme`, which is dynamic."""

    def update(self, metadata):
        """Sets the description; pictures of a clone are left out."""
        text = pathlib.Path(self.root, "README.md").read_text()
        text = re.sub(r"!\[[^]]*\]\((?!http)[^)]*\)\n*", "", text)
        text = re.sub(r"\[([^]]*)\]\((?!http)[^)]*\)", r"\1", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
