"""llama.cpp itself, out of a package that brings it built: what it computes and says with a GGUF file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest


class LlamaCpp:
    """A running model."""

    def __init__(self, gguf: Path, context: int, lora: Path | None = None) -> None:
        xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp (xllamacpp, the extra check) is not installed")
        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(gguf), context, 1
        parameters.warmup, parameters.cpuparams.n_threads, parameters.n_gpu_layers = False, 1, 0
        if lora is not None:
            parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora))]
        self._server = xllamacpp.Server(parameters)

    def _completed(self, prompt: Any, **options: Any) -> dict[str, Any]:
        request = {"prompt": prompt, "temperature": 0.0, "cache_prompt": True, **options}
        return self._server.handle_completions(request)["choices"][0]

    def log_probabilities(self, tokens: Sequence[int], vocabulary: int) -> np.ndarray:
        """(V,) of the token after `tokens`."""
        # it is made to say a letter, since it tells nothing of an end or of half a character; the probabilities are the
        # model's own all the same
        letter = {"max_tokens": 1, "logit_bias": [["a", 1000.0]]}
        found = self._completed(list(tokens), logprobs=vocabulary, **letter)["logprobs"]["content"][0]
        row = np.full(vocabulary, np.nan)
        for each in found["top_logprobs"]:
            row[each["id"]] = each["logprob"]
        return row

    def said(self, prompt: Any, tokens: int) -> str:
        """What it goes on with, greedily; `prompt` is tokens, or text that it tokenises itself."""
        return str(self._completed(prompt, max_tokens=tokens)["text"])
