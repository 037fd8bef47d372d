"""The text layer of a PDF, by PDFium, which tells words apart where others run them together."""

import logging
import re
from pathlib import Path

from longlora.corpus.apart import UnparsableError
from longlora.corpus.decoding import encodable

logger = logging.getLogger(__name__)

SCANNED_LETTERS = 20
"""A PDF whose pages have fewer letters than this on average, and hold pictures, is a scan: stamps and page numbers."""

_EVERYWHERE = 1e7


def pdf_text(path: Path) -> str:
    """The text of all pages, a blank line between them.

    Raises:
        UnparsableError: it is damaged, encrypted, or scanned.
    """
    import pypdfium2
    from pypdfium2 import raw

    try:
        with pypdfium2.PdfDocument(path) as document:
            pages, pictures = [], False
            for page in document:
                # everywhere: bounds of a rotated or cropped page are not those that its letters count from
                words = page.get_textpage().get_text_bounded(-_EVERYWHERE, -_EVERYWHERE, _EVERYWHERE, _EVERYWHERE)
                pages.append(_page(words))
                pictures = pictures or any(True for _ in page.get_objects(filter=[raw.FPDF_PAGEOBJ_IMAGE]))
                page.close()
    except pypdfium2.PdfiumError as error:
        if error.err_code in (raw.FPDF_ERR_PASSWORD, raw.FPDF_ERR_SECURITY):
            raise UnparsableError("encrypted PDF", "is an encrypted PDF: save it without a password first.") from error
        raise UnparsableError(
            "damaged PDF", f"cannot be read as PDF ({error}): check that the file is whole."
        ) from error
    empty = sum(not page for page in pages)
    scanned = pictures and sum(map(_letters, pages)) < SCANNED_LETTERS * len(pages)
    if empty == len(pages) or scanned:
        raise UnparsableError(
            "scanned PDF, no text layer",
            f"has {'no' if empty == len(pages) else 'hardly any'} text layer on its {len(pages)} pages, they "
            "are pictures: run OCR on it first (ocrmypdf).",
        )
    if empty:
        logger.info("%d of %d pages have no text (pictures or blank)", empty, len(pages))
    return "\n\n".join(page for page in pages if page)


def _page(text: str) -> str:
    r"""A page's text as PDFium has it, words that were broken at the end of a line made whole.

    >>> _page("The hyphen\x02ated US\x02ASCII\r\nline. ")
    'The hyphenated US-ASCII\nline.'
    """
    text = re.sub("(?<=[^\\W\\dA-Z_])\x02(?=[^\\W\\dA-Z_])", "", text).replace("\x02", "-")
    return encodable(text.replace("\r\n", "\n").replace("\0", "")).strip()


def _letters(text: str) -> int:
    return sum(character.isalpha() for character in text)
