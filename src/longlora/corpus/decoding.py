"""Bytes as text: the encoding that was asked for, else what the bytes say themselves, else what they look like."""

import codecs
import re

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_DECLARED = re.compile(rb"""(?:charset|encoding)\s{0,9}=\s{0,9}["']?\s{0,9}([A-Za-z0-9_.:-]{1,40})""")

SAMPLE_BYTES = 65_536
"""So much of a text that is not UTF-8 is looked at to tell its encoding."""

LONE_SURROGATES = re.compile("[\ud800-\udfff]")


class UnknownEncodingError(ValueError):
    """The bytes are no text in any encoding that could be told."""


def encodable(text: str) -> str:
    """`text` with lone surrogates, which JSON and PDF can carry but UTF-8 cannot, replaced by U+FFFD."""
    try:
        text.encode()  # many times faster than a search
    except UnicodeEncodeError:
        return LONE_SURROGATES.sub("\ufffd", text)
    return text


def decoded(content: bytes, encoding: str = "auto", *, declared: bool = False) -> str:
    """The text in `content`, its ends of line as `\\n`.

    >>> decoded("naïve".encode("utf-16")), decoded(b"caf\\xe9 au lait", "latin-1")
    ('naïve', 'café au lait')

    Args:
        content: the bytes.
        encoding: a name that Python knows, or `auto`: by a byte order mark, what is declared, UTF-8, or its looks.
        declared: the text may say itself which encoding it has, as HTML does near its beginning.

    Raises:
        UnknownEncodingError: it is not in that encoding, or in none that could be told.
    """
    for name in _candidates(content, encoding, declared):
        try:
            return content.decode(name).replace("\r\n", "\n").replace("\r", "\n")
        except (UnicodeDecodeError, LookupError):
            continue
    asked = "in no encoding that can be told" if encoding == "auto" else f"not {encoding} text"
    raise UnknownEncodingError(asked)


def _candidates(content: bytes, encoding: str, declared: bool) -> list[str]:
    if encoding != "auto":
        return [encoding]
    for mark, name in _MARKS:
        if content.startswith(mark):
            return [name]
    if declared and (found := _DECLARED.search(content, 0, 2048)):
        # what calls itself latin-1 is read as its superset, as browsers do (WHATWG Encoding, section 4.2)
        name = found[1].decode().lower()
        return ["cp1252" if name in ("iso-8859-1", "latin-1", "ascii", "us-ascii") else name, "utf-8", "cp1252"]
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return _guessed(content, error.start)
    return ["utf-8"]


def _guessed(content: bytes, first: int) -> list[str]:
    """What `content`, not UTF-8 from byte `first` on, may be; nothing where it looks like no text."""
    from charset_normalizer import from_bytes

    begin = max(0, first - SAMPLE_BYTES // 2)
    sample = content[begin : begin + SAMPLE_BYTES]
    if b"\0" in sample:
        return []
    found = list(from_bytes(sample, cp_exclusion=["utf_16", "utf_32", "utf_16_le", "utf_16_be", "utf_7"]))
    western = [each for each in found if "cp1252" in each.could_be_from_charset]
    if western and western[0].coherence >= found[0].coherence:  # a few accents could be those of any code page
        return ["cp1252", "latin-1"]
    return [found[0].encoding] if found else []
