"""The paper's prompt around a document and a question, in one place (appendix on LongAlpaca; its released data).

    Below is {material_type}. Memorize the content and answer my question after the {material_type}.
     {material_content}
     Now the material ends. {question}

The blanks around the content are those of the released data. Everything before the question is the same for every
question about a document, so that a model need read it only once.
"""

BEGINNINGS = {
    "book": "some paragraphs in the book{title}",
    "paper": "a paper",
    "material": "a material",
}
"""Kind of material -> how "Below is …" goes on; the kind itself is the word for it afterwards."""


def material_opening(content: str, material: str = "material", title: str = "") -> str:
    r"""The prompt as far as the question: the same for every question about `content`.

    >>> material_opening("Call me Ishmael.", "book", "Moby-Dick")
    'Below is some paragraphs in the book, Moby-Dick. Memorize the content and answer my question after the book.\n Call me Ishmael. \n Now the material ends. '

    Args:
        content: the document, or a section of it.
        material: `book`, `paper` or `material`.
        title: of a book; other kinds have none in their prompt.
    """  # noqa: E501
    beginning = BEGINNINGS[material].format(title=f", {title}" if title else "")
    return (
        f"Below is {beginning}. Memorize the content and answer my question after the {material}.\n"
        f" {content} \n Now the material ends. "
    )


def material_prompt(content: str, question: str, material: str = "material", title: str = "") -> str:
    """The user's turn of a long question: `material_opening` and the question."""
    return material_opening(content, material, title) + question.strip()
