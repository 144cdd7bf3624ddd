"""Every link within the built pages leads to a page, and every `#anchor` to something on its page.

python .ci/check_links.py docs/build
"""

import pathlib
import re
import sys

root = pathlib.Path(sys.argv[1])
dead = []
for page in root.rglob("*.html"):
    text = page.read_text()
    anchors = set(re.findall(r'id="([^"]+)"', text))
    for link in re.findall(r'(?:href|src)="([^"]+)"', text):
        if link.startswith(("http:", "https:", "mailto:", "data:")):
            continue
        path, _, anchor = re.sub(r"\?.*", "", link).partition("#")
        if not (page.parent / path).exists() or (anchor and not path and anchor not in anchors):
            dead.append(f"{page.relative_to(root)}: {link}")
print("\n".join(dead) or "no dead link")
sys.exit(bool(dead))
