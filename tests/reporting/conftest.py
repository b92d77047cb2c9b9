"""What the tests of the HTML pages share: a page taken apart."""

from html.parser import HTMLParser

import pytest


class Page(HTMLParser):
    """Elements with attributes, and text, of a page whose tags must be balanced."""

    VOID = ("meta", "img", "input", "br", "path", "use", "link")

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open, self.unbalanced = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID and (not self.open or self.open.pop() != tag):
            self.unbalanced.append(tag)

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag, css_class=None):
        found = [a for t, a in self.elements if t == tag]
        return [
            a for a in found if css_class is None or css_class in (a.get("class") or "").split()
        ]


@pytest.fixture
def page_of() -> type[Page]:
    """Takes the text of a page apart."""
    return Page
