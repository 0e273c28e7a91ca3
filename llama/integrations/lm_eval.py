"""A model for lm-evaluation-harness (`pip install lm_eval`), by the name llama-meta.

    python -m llama.integrations.lm_eval run --model llama-meta --model_args ckpt_dir=FOLDER,max_seq_len=2048 --tasks TASKS

The command is the harness's own, with this model registered. In Python, pass an instance of `LlamaMeta` to
`lm_eval.simple_evaluate`. All requests of a task are computed in one call, so that few-shot examples and questions are computed
once; `--batch_size` is the number of rows in the KV cache.
"""

import collections
import json
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llama import InputError, Llama, Score
from llama.integrations.scored_answers import encode_answer
from llama.tokenizer import encode_prompt

NAME = "llama-meta"
DEFAULT_ROWS = 8
# Private characters of Unicode around the tokens of a dialog, in the texts that the harness passes on.
BEGIN_DIALOG, END_DIALOG = "\ue000", "\ue001"


@register_model(NAME)
class LlamaMeta(TemplateLM):
    """Answer the harness's requests with a `Llama`.

    ckpt_dir, tokenizer_path, max_seq_len, device and options: arguments of `Llama.build`. llama: instead of these, a model that
    has been built.
    batch_size: rows of the KV cache, or "auto" for 8. max_batch_size: the same, and goes before batch_size.
    max_gen_toks: largest number of new tokens in an answer, for tasks that give none. BOS precedes each text, if the model's
    texts begin with it.
    """

    def __init__(
        self,
        ckpt_dir: str | None = None,
        tokenizer_path: str | None = None,
        max_seq_len: int = 2048,
        batch_size: int | str = DEFAULT_ROWS,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        llama: Llama | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if llama is None:
            rows = max_batch_size or (DEFAULT_ROWS if str(batch_size).startswith("auto") else int(batch_size))
            if ckpt_dir is None:
                raise InputError(f"{NAME} needs a model; give ckpt_dir=FOLDER in --model_args")
            # The harness asks for cuda:0 by default, also where there is none.
            where = None if str(device).startswith("cuda") and not torch.cuda.is_available() else device
            if device != where:
                print(f"llama: this PyTorch sees no CUDA GPU, so {NAME} does not run on {device}", file=sys.stderr)
            llama = Llama.build(ckpt_dir, tokenizer_path, int(max_seq_len), rows, device=where, **options)
        self.llama, self.max_gen_toks = llama, int(max_gen_toks)
        self.max_length = llama.model.params.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return self.llama.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Return the token before a text that has no context."""
        return self.llama.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return f"{NAME}-{self.llama.tokenizer.n_words}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.llama.chat_format.name if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a dialog as a text that `tok_encode` understands.

        add_generation_prompt: must be True: the dialog ends with a message of the user.
        """
        if not add_generation_prompt:
            raise InputError("add_generation_prompt is False; a dialog must end with a message of the user")
        return BEGIN_DIALOG + json.dumps(chat_history) + END_DIALOG

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text, after BOS unless add_special_tokens is False. It may begin with a dialog."""
        tokenizer = self.llama.tokenizer
        if string.startswith(BEGIN_DIALOG) and END_DIALOG in string:
            dialog, _, answer = string[1:].partition(END_DIALOG)
            messages = json.loads(dialog)
            return encode_answer(self.llama, messages, answer) if answer.strip() else self.llama.encode_dialog(messages)
        if add_special_tokens is False:
            return tokenizer.encode(string, bos=False, eos=False)
        return encode_prompt(tokenizer, string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a context and of its continuation.

        The harness counts white space at the end of a context to the continuation. Here that of a chat template, such as the
        line end of "assistant\\n", is added, which the text of the context does not show.
        """
        tokens, scored = super()._encode_pair(context, continuation)
        while context.endswith(END_DIALOG) and self.llama.tokenizer.token_bytes(tokens[-1]).isspace():
            scored.insert(0, tokens.pop())
        return tokens, scored

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the log probability of each continuation, and whether greedy sampling would generate it.

        requests: tuples (texts, tokens of the context, tokens of the continuation). The first tokens of a context that is too
        long are left out.
        """
        groups: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)  # context -> indices of its requests
        for i, (_, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise InputError(f"request {i} scores {len(continuation)} tokens, more than max_seq_len={self.max_length}")
            groups[tuple(context[-room:])].append(i)
        scores = self.llama.score([*groups], [[requests[i][2] for i in members] for members in groups.values()])
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for members, choices in zip(groups.values(), cast("list[list[Score]]", scores), strict=True):
            for i, each in zip(members, choices, strict=True):
                results[i] = each.total, each.is_greedy
                if (texts := requests[i][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, results[i])
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log probability of each text, scored in windows of the whole context length."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            pairs = [make_disjoint_window(pair) for pair in rolling]
            windows += [(None, *pair) for pair in pairs]
            counts.append(len(pairs))
        values = iter([total for total, _ in self._loglikelihood_tokens(windows)])
        results = [sum(next(values) for _ in range(n)) for n in counts]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each context, up to the first stop string. Requests with equal options share a call."""
        groups: dict[str, list[int]] = collections.defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        results = [""] * len(requests)
        for members in groups.values():
            options = self._sampling_options(requests[members[0]].args[1])
            room = max(1, self.max_length - options["max_gen_len"])
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in members]
            answers = self.llama.text_completion(prompts, **options)
            for i, answer in zip(members, answers, strict=True):
                results[i] = answer["generation"]
                self.cache_hook.add_partial("generate_until", requests[i].args, results[i])
        return results

    def _sampling_options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return options of `text_completion` for the generation_kwargs of a task. Raise InputError for an unknown one."""
        kwargs = dict(given)
        until = kwargs.pop("until", None) or []
        kwargs = {name: value for name, value in kwargs.items() if value is not None and (name, value) != ("num_beams", 1)}
        sampled = kwargs.pop("do_sample", kwargs.get("temperature", 0) > 0)
        lengths = [kwargs.pop(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in kwargs]
        temperature = kwargs.pop("temperature", 1.0 if sampled else 0.0)
        options: dict[str, Any] = {
            "stop": [until] if isinstance(until, str) else [text for text in until if text],
            "max_gen_len": int(lengths[0] if lengths else self.max_gen_toks),
            "temperature": temperature if sampled else 0.0,
            **{name: kwargs.pop(name) for name in ("top_p", "top_k", "min_p", "repetition_penalty", "seed") if name in kwargs},
        }
        if kwargs:
            raise InputError(f"generation_kwargs has {', '.join(kwargs)}, which {NAME} does not know; leave it out")
        return {"top_p": 1.0, **options}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
