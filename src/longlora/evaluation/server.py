"""Greedy answers from an OpenAI-compatible server (vLLM and others) in place of a loaded model: same prompts, same
scoring, and a server's speed for long sweeps.

Prompts go as token ids to `URL/completions`, which vLLM, SGLang and llama.cpp take; answers come back as text and are
tokenised again.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx

from longlora.errors import UserError
from longlora.progress import Progress

AT_A_TIME = 8
"""Requests under way where nothing else is asked for."""

SECONDS = 3600
"""A server may be busy with other long prompts."""


def served_model(url: str) -> str:
    """The name of the model that the server at `url` has, the first where there are several.

    Raises:
        UserError: there is no such server.
    """
    try:
        answer = httpx.get(f"{url.rstrip('/')}/models", timeout=30)
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"--server {url} does not answer as an OpenAI-compatible server does ({type(error).__name__}): give its "
            "base address, such as http://localhost:8000/v1."
        ) from error


def answers(
    url: str, tokenizer: Any, prompts: Sequence[Any], max_new_tokens: int, *, batch: int = 0, title: str = "answers"
) -> Iterator[tuple[int, list[int]]]:
    """Greedy continuations as they come, `(index of the prompt, new tokens)`, as `generation.generate_each`.

    Args:
        url: of the server's API, up to `/v1`.
        tokenizer: the model's.
        prompts: token ids (N,) of each.
        max_new_tokens: tokens an answer has at most.
        batch: requests under way; 0 chooses.
        title: of the progress.

    Raises:
        UserError: the server fails, or refuses a prompt.
    """
    name = served_model(url)

    def ask(index: int) -> list[int]:
        question: dict[str, Any] = {
            "model": name,
            "prompt": [int(token) for token in prompts[index]],
            "max_tokens": max_new_tokens,
            "temperature": 0,
        }
        try:
            answer = httpx.post(f"{url.rstrip('/')}/completions", json=question, timeout=SECONDS)
            answer.raise_for_status()
            text = answer.json()["choices"][0]["text"]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            said = getattr(getattr(error, "response", None), "text", "") or str(error)
            raise UserError(
                f"--server {url} did not answer a prompt of {len(prompts[index]):,} tokens: {said:.200}"
            ) from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    shortest_first = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with (
        ThreadPoolExecutor(batch or AT_A_TIME) as pool,
        Progress(f"{title} by {name}", "tokens", sum(map(len, prompts))) as bar,
    ):
        asked = {pool.submit(ask, index): index for index in shortest_first}
        done = 0
        for number, future in enumerate(as_completed(asked), start=1):
            index = asked[future]
            try:
                tokens = future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            yield index, tokens
            done += len(prompts[index])
            bar.show(done, f"{number:,} of {len(prompts):,} prompts")
