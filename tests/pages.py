"""What the tests of result pages share: a parser that sees what a browser would load."""

import re
from html.parser import HTMLParser

#: Attributes from which a browser loads something.
LOADED = {"src", "srcset", "data", "poster", "background", "action", "xlink:href", "manifest", "code", "archive"}


class Page(HTMLParser):
    """Tables as lists of rows, what would be loaded, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.loads, self.open = {}, [], []
        self.text = ""
        self._rows = self._cell = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)
        self.loads += [value for name, value in attributes if name in LOADED or (name == "href" and tag != "a")]
        self.loads += re.findall(r"url\(([^)]*)\)", given.get("style") or "")
        if tag in ("script", "iframe", "object", "embed", "link", "base"):
            self.loads.append(f"<{tag}>")
        if tag == "table":
            self._rows = self.tables[given["id"]] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "style":
            self.loads += re.findall(r"url\(([^)]*)\)|@import", data)
        elif self._cell:
            self._rows[-1][-1] += data
