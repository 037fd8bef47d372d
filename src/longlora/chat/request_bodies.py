"""What the page sends, checked: a request may come from anything that speaks HTTP."""

import json
from typing import Any

from aiohttp import web

from longlora.chat.documents import ChatDocument
from longlora.corpus.decoding import LONE_SURROGATES, encodable
from longlora.errors import UserError

MOST_REFERENCES = 32
"""Documents that one question may be about."""


async def json_body(request: web.Request) -> dict[str, Any]:
    """The JSON object of a request; raises UserError where it is none."""
    content = await request.read()
    try:
        # half a character (a lone surrogate, which JSON can write) is replaced: nothing could be done with it
        body = json.loads(content)
        whole = json.dumps(body, ensure_ascii=False)
        body = json.loads(encodable(whole)) if LONE_SURROGATES.search(whole) else body
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one
        raise UserError("the request is not JSON, or is nested too deeply.") from error
    if not isinstance(body, dict):
        raise UserError("the request must be a JSON object.")
    return body


def objects(body: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The list of objects under `name`, empty where there is none; raises UserError where it is something else."""
    found = body.get(name, [])
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise UserError(f'"{name}" must be a list of objects.')
    return found


def references(body: dict[str, Any]) -> list[dict[str, Any]]:
    """What a question is about, each of it once; raises UserError where that is too much."""
    found = objects(body, "documents")
    if len(found) > MOST_REFERENCES:
        raise UserError(f"a question may be about {MOST_REFERENCES} documents, not {len(found):,}.")
    return [each for at, each in enumerate(found) if each not in found[:at]]


def plain_turns(body: dict[str, Any]) -> list[dict[str, str]]:
    """The conversation so far, user and assistant by turns; raises UserError where it is not."""
    turns = objects(body, "turns")
    for at, turn in enumerate(turns):
        if turn.get("role") != ("assistant" if at % 2 else "user") or not isinstance(turn.get("content"), str):
            raise UserError('"turns" must be a list of {"role", "content"}, user and assistant by turns.')
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def named_documents(body: dict[str, Any]) -> list[ChatDocument]:
    """What the page says that a conversation was about; the documents themselves may be gone. Raises
    UserError where it says it otherwise."""
    named = []
    for each in objects(body, "documents"):
        name, tokens, section, heading = (each.get(key) for key in ("name", "tokens", "section", "heading"))
        if not isinstance(name, str) or not isinstance(tokens, int) or not isinstance(section, int | None):
            raise UserError('"documents" must be a list of {"name", "tokens", "section", "heading"}.')
        named.append(ChatDocument(name, "", tokens, "material", "", section, str(heading or "")))
    return named
