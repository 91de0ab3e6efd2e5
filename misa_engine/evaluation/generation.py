"""Answers of a model to many prompts: batches of about one length, beam search, smaller batches when memory ends."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from misa_engine.evaluation import batch_size as sizes
from misa_engine.evaluation.subjects import Subject


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], *, end: int | list[int], pad: int, new_tokens: int, beams: int = 1,
    device: torch.device | str = "cpu",
) -> list[list[int]]:  # fmt: skip
    """One batch, without sampling.

    Args:
        model: a causal language model.
        prompts: token ids, of any lengths; padded on the left.
        end: tokens that end an answer.
        pad: token that fills up.
        new_tokens: of an answer, at most.
        beams: width of the beam search; 1 is greedy.
        device: of the model.

    Returns:
        What follows each prompt, token ids, with the end token and padding as the model made them.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a model's own sampling settings, which are not used here
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, num_beams=beams,
            repetition_penalty=1.0, temperature=None, top_p=None, top_k=None, use_cache=True, pad_token_id=pad,
            eos_token_id=end,
        )  # fmt: skip
    return [row[longest:].tolist() for row in made]


class Answers:
    """Iterates over (place in ``prompts``, generated text), longest prompts first; see ``answers``."""

    def __init__(
        self, subject: Subject, prompts: Sequence[Sequence[int]], new_tokens: int, beams: int, wanted: int | None
    ) -> None:
        self.subject, self.prompts, self.new_tokens, self.beams, self.wanted = (
            subject, prompts, new_tokens, beams, wanted,
        )  # fmt: skip
        self.batch_size = 0
        """The one in use; 0 before the first batch."""

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Longest first: if memory does not suffice, it is known at once."""
        if not self.prompts:
            return
        model, tokenizer = self.subject.model, self.subject.tokenizer
        ends = ending_tokens(model, tokenizer)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
        order = sorted(range(len(self.prompts)), key=lambda place: -len(self.prompts[place]))
        longest = max(1, len(self.prompts[order[0]]))
        self.batch_size = self.wanted or sizes.batch_that_fits(
            model, length=longest + self.new_tokens, beams=self.beams, generates=True
        )

        def answered(part: Sequence[int]) -> list[list[int]]:
            # an empty prompt has nothing to attend to: the end of a text before it begins one
            asked = [list(self.prompts[place]) or [ends[0]] for place in part]
            return generate(
                model, asked, end=ends, pad=pad, new_tokens=self.new_tokens, beams=self.beams, device=model.device
            )

        for size, part, made in sizes.in_batches(order, self.batch_size, answered):
            self.batch_size = size
            for place, row in zip(part, made, strict=True):
                yield place, tokenizer.decode(row, skip_special_tokens=True)


def answers(
    subject: Subject, prompts: Sequence[Sequence[int]], *, new_tokens: int, beams: int = 1, batch_size: int | None
) -> Answers:
    """Generated texts of many prompts.

    Args:
        subject: the model.
        prompts: token ids.
        new_tokens: of an answer, at most.
        beams: width of the beam search.
        batch_size: prompts of a batch; None takes the planner's. Halved whenever memory does not suffice.

    Returns:
        An iterable of (place in ``prompts``, text); its ``batch_size`` is the last one used.
    """
    return Answers(subject, prompts, new_tokens, beams, batch_size)


def ending_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the generation configuration's and the tokenizer's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [*(own if isinstance(own, (list, tuple)) else [own]), tokenizer.eos_token_id]
    ends = list(dict.fromkeys(int(token) for token in found if token is not None))
    if not ends:
        raise ValueError("neither the model's generation configuration nor its tokenizer names an end-of-text token")
    return ends
