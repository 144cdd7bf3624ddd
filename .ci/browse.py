"""Opens every built page in headless Chromium at 1280 pixels: browse.py docs/build.

No page logs an error, asks the network for anything, shows a broken picture or markup as text, or
has code wider than its box; every notebook shows a picture. Without Chromium, which comes with
`pip install -e ".[browser]"`, nothing is opened, and the reason is said.
"""

import json
import os
import pathlib
import sys

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu")

try:
    from PyQt6.QtCore import QEventLoop, QUrl
    from PyQt6.QtWebEngineCore import (
        QWebEnginePage,
        QWebEngineSettings,
        QWebEngineUrlRequestInterceptor,
    )
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication
except ImportError as reason:
    print(f"no page was opened: {reason}")
    sys.exit()

LOOK = r"""
(() => {
  const found = [];
  const article = document.querySelector("article") ?? document.body;
  article.querySelectorAll("details").forEach(folded => folded.open = true);
  for (const code of article.querySelectorAll("pre"))
    if (code.scrollWidth > code.clientWidth) {
      const lines = code.textContent.split("\n");
      found.push("a line is cut: " + lines.reduce((a, b) => a.length > b.length ? a : b));
    }
  if (document.documentElement.scrollWidth > innerWidth) found.push("wider than the window");
  for (const image of document.images)
    if (!image.naturalWidth) found.push("no picture at " + image.src);
  const text = article.cloneNode(true);
  const code = "pre, code, script, style, math, dt, strong";
  text.querySelectorAll(code).forEach(element => element.remove());
  const mark = /.*(`|\*\*(?!kwargs)|\*\w[\w ]*\*|\]\(|\{\w+\}|:\w+:|\$|^#+ |\\\w).*/m;
  const stray = mark.exec(text.textContent);
  if (stray) found.push("markup in the text: " + stray[0]);
  for (const code of article.querySelectorAll(":not(pre) > code"))
    if (code.textContent.includes("\\")) found.push("a backslash: " + code.textContent);
  if (location.pathname.includes("/notebooks/") && !article.querySelector(".cell_output img"))
    found.push("a notebook without a picture");
  return JSON.stringify(found);
})()
"""


class Page(QWebEnginePage):
    """Keeps what the console says."""

    def javaScriptConsoleMessage(self, level, message, line, source):
        """Qt calls this for each message; a page is to have none above the level of information."""
        if level != QWebEnginePage.JavaScriptConsoleMessageLevel.InfoMessageLevel:
            found.append(f"console: {message} ({source}:{line})")


class Network(QWebEngineUrlRequestInterceptor):
    """Blocks all that is no file."""

    def interceptRequest(self, request):
        """Qt calls this before each request."""
        if request.requestUrl().scheme() not in ("file", "data", "blob"):
            found.append(f"asks for {request.requestUrl().toString()}")
            request.block(True)


root = pathlib.Path(sys.argv[1]).resolve()
application = QApplication(sys.argv)
view, network, loop = QWebEngineView(), Network(), QEventLoop()
page = Page(view)
page.setUrlRequestInterceptor(network)
# Otherwise what a file asks of the network is dropped before anybody sees it.
remote = QWebEngineSettings.WebAttribute.LocalContentCanAccessRemoteUrls
page.settings().setAttribute(remote, True)
view.setPage(page)
view.resize(1280, 800)
view.show()


def finish(result=None):
    """Goes on after `loop.exec()`, with what was found or whether the page has loaded."""
    if result is False:
        found.append("does not load")
    if isinstance(result, str):
        found.extend(json.loads(result))
    loop.quit()


page.loadFinished.connect(finish)
wrong, pages = 0, sorted(root.rglob("*.html"))
for path in pages:
    found = []
    page.load(QUrl.fromLocalFile(str(path)))
    loop.exec()
    page.runJavaScript(LOOK, finish)
    loop.exec()
    wrong += len(found)
    for fault in found:
        print(f"{path.relative_to(root)}: {fault}")
print(f"{len(pages)} pages opened in Chromium, {wrong} faults")
sys.exit(bool(wrong) or not pages)
