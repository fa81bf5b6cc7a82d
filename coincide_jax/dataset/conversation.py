"""Turns to token ids, the supervised tokens and the place of the image (LLaVA's `vicuna_v1` and `phi` templates).

A sequence is

    [bos] SYSTEM USER: <image tokens>\\nquestion ASSISTANT: answer</s>USER: question ASSISTANT: answer</s>

Pieces are tokenised separately and joined: the header, the question with its role words, the answer with the blank
before it. So the tokens of a generation prompt (which ends in "ASSISTANT:") are a prefix of the training sequence.
With a BOS token (Llama has one, StableLM and Phi have none) the sequence begins with it.
"""

from typing import NamedTuple

import numpy as np

from coincide_jax.core.errors import UserError, unknown
from coincide_jax.dataset.tokenizer import Tokenizer

TERMINATORS = {"vicuna_v1": "</s>", "phi": "<|endoftext|>"}  # the templates share everything but this


class Encoded(NamedTuple):
    """One sequence of T positions, image positions included (they hold token 0).

    tokens int32[T]; image_start: first image position, -1 without image; labels bool[T]: token t is supervised (answers
    and their terminators); text bool[T]: questions and answers with terminators, neither system prompt nor image.
    """

    tokens: np.ndarray
    image_start: int
    labels: np.ndarray
    text: np.ndarray


def header(system: str, has_image: bool) -> str:
    """What stands before the first question; before an image it ends with the blank that LLaVA leaves there."""
    return (system + " " if system else "") + ("USER: " if has_image else "USER:")


def question_piece(question: str, first: bool, has_image: bool) -> str:
    """A question with the role words around it that the header does not hold."""
    if not first:
        return f"USER: {question} ASSISTANT:"
    return f"\n{question} ASSISTANT:" if has_image else f" {question} ASSISTANT:"


def answer_piece(answer: str | None) -> str | None:
    """An answer; the blank after "ASSISTANT:" belongs to it. None: one that nobody has asked for."""
    return None if answer is None else f" {answer}"


def pieces(turns: tuple[tuple[str, str | None], ...], has_image: bool) -> list[tuple[str, str | None]]:
    """(question piece, answer piece) of every turn."""
    return [
        (question_piece(question, turn == 0, has_image), answer_piece(answer))
        for turn, (question, answer) in enumerate(turns)
    ]


def render(turns: tuple[tuple[str, str | None], ...], has_image: bool, system: str) -> list[str]:
    """The pieces of a conversation as text, without image and terminators: what a tokenizer is trained on."""
    said = [text for pair in pieces(turns, has_image) for text in pair if text is not None]
    return [header(system, has_image), *said]


class Template:
    """A template bound to a tokenizer, a system prompt, a number of image tokens and a maximal length.

    Raises:
      UserError: unknown template, terminator not in the vocabulary, no room for image and question.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, system: str, image_tokens: int, max_length: int):
        if name not in TERMINATORS:
            raise unknown("dataset.template", name, TERMINATORS)
        self.tokenizer, self.image_tokens, self.max_length = tokenizer, image_tokens, max_length
        end = tokenizer.id_of(TERMINATORS[name])
        if end is None:
            raise UserError(
                f"the tokenizer has no token {TERMINATORS[name]}, which template '{name}' ends answers with"
            )
        self.eos_id = end
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self.headers = {flag: begin + tokenizer.encode(header(system, flag)) for flag in (False, True)}
        self.tail = tokenizer.encode(" ASSISTANT:", continued=True)
        need = len(self.headers[True]) + image_tokens + len(self.tail) + 2
        if need > max_length:
            raise UserError(
                f"dataset.max_length is {max_length} but system prompt and image alone take {need} positions; "
                f"raise it or shorten dataset.system"
            )

    def encode(self, turns: tuple[tuple[str, str | None], ...], has_image: bool) -> Encoded:
        """A training sequence, cut at the maximal length (image counted). Where an answer is None the next question
        follows at once."""
        tokens, image_start, begin = self._opening(has_image)
        labels = [False] * len(tokens)
        for turn, (question, answer) in enumerate(pieces(turns, has_image)):
            # only what follows the image begins a text: LLaVA tokenises the string before and after it
            asked = self.tokenizer.encode(question, continued=turn > 0 or not has_image)
            said = [] if answer is None else [*self.tokenizer.encode(answer, continued=True), self.eos_id]
            tokens += asked + said
            labels += [False] * len(asked) + [True] * len(said)
        return self._finish(tokens, image_start, labels, begin)

    def prompt(self, question: str, has_image: bool) -> Encoded:
        """A generation prompt, ending in "ASSISTANT:"; a question that is too long loses its end, not the role word."""
        tokens, image_start, begin = self._opening(has_image)
        tokens += self.tokenizer.encode(question_piece(question, True, has_image), continued=not has_image)
        if len(tokens) > self.max_length:
            tokens = tokens[: self.max_length - len(self.tail)] + self.tail
        return self._finish(tokens, image_start, [False] * len(tokens), begin)

    def _opening(self, has_image: bool) -> tuple[list[int], int, int]:
        """Tokens before the first question, image start, first text position."""
        tokens = list(self.headers[has_image])
        image_start = len(tokens) if has_image else -1
        tokens += [0] * (self.image_tokens if has_image else 0)
        return tokens, image_start, len(tokens)

    def _finish(self, tokens: list[int], image_start: int, labels: list[bool], begin: int) -> Encoded:
        ids = np.asarray(tokens[: self.max_length], np.int32)
        return Encoded(ids, image_start, np.asarray(labels[: self.max_length], bool), np.arange(len(ids)) >= begin)
