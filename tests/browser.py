"""Pages in headless Chromium (the Qt WebEngine), in a process of its own: `browser.py JSON` prints JSON.

The argument holds `pages` (paths), `widths` (of the window), `dark`, `script` (run in the loaded page; its value is
JSON), and `pictures` (a folder for screenshots, or null). For each page and width the answer has what the console said,
which addresses were asked for, whether the page loaded, and what the script returned.
"""

import json
import os
import sys
from pathlib import Path

from PySide6.QtCore import QEventLoop, QTimer, QUrl
from PySide6.QtWebEngineCore import (
    QWebEnginePage,
    QWebEngineProfile,
    QWebEngineSettings,
    QWebEngineUrlRequestInterceptor,
)
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

HEIGHT = 900


class Requests(QWebEngineUrlRequestInterceptor):
    """Notes the address of every request."""

    def __init__(self):
        super().__init__()
        self.found = []

    def interceptRequest(self, info):
        address = info.requestUrl().toString()
        self.found.append("data:" if address.startswith("data:") else address)


class Page(QWebEnginePage):
    """Notes what is written to the console, errors of the page among it."""

    def __init__(self, profile):
        super().__init__(profile)
        self.console = []

    def javaScriptConsoleMessage(self, level, message, line, source):
        self.console.append(f"{message} (line {line})")


def show(path, width, script, picture):
    profile, requests = QWebEngineProfile(), Requests()
    profile.setUrlRequestInterceptor(requests)
    # Otherwise what a page from disk asks of the network is dropped before it is seen.
    profile.settings().setAttribute(QWebEngineSettings.WebAttribute.LocalContentCanAccessRemoteUrls, True)
    page, view, loop, answers = Page(profile), QWebEngineView(), QEventLoop(), []
    view.setPage(page)
    view.resize(width, HEIGHT)
    view.show()
    page.loadFinished.connect(lambda loaded: (answers.append(loaded), loop.quit()))
    page.load(QUrl.fromLocalFile(path))
    loop.exec()
    page.runJavaScript(f"JSON.stringify({script})", lambda value: (answers.append(value), loop.quit()))
    loop.exec()
    if picture is not None:
        QTimer.singleShot(500, loop.quit)
        loop.exec()
        view.grab().save(str(picture))
    found = {"page": path, "width": width, "loaded": answers[0], "console": page.console, "requests": requests.found}
    view.setPage(None)
    page.deleteLater()
    return found | {"answer": json.loads(answers[1] or "null")}


def main():
    order = json.loads(sys.argv[1])
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    os.environ["QTWEBENGINE_DISABLE_SANDBOX"] = "1"  # Root has none.
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = f"--blink-settings=preferredColorScheme={0 if order['dark'] else 1}"
    application = QApplication(["browser"])
    found = []
    for path in order["pages"]:
        for width in order["widths"]:
            name = f"{Path(path).stem}-{width}{'-dark' if order['dark'] else ''}.png"
            picture = None if order["pictures"] is None else Path(order["pictures"]) / name
            found.append(show(path, width, order["script"], picture))
    sys.stdout.write(json.dumps(found))
    sys.stdout.flush()
    application.quit()
    os._exit(0)  # Qt would tear down what the interpreter has freed already.


if __name__ == "__main__":
    main()
