"""Log-likelihoods of continuations of contexts, in batches of similar length.

A causal model sees nothing of what follows a token, so padding on the right of a row changes no state and no score.
Where several continuations share a context (multiple choice), the context is read once and each continuation starts
from its state; contexts are then padded on the left, where our models and those of transformers have masks. Logits are
computed at the scored positions only, which is most of the advantage over scoring entire rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import LongTensor, Tensor

from glalm import IGNORE_INDEX
from glalm.config.strict import RunError
from glalm.evals.eval_model import EvalModel

# Tokens per continuation that sharing a context must save to be worth it, since a state must be kept and copied: the
# break-even was 24 to 37 for a 340M GLA on an H200, and 10 to 100 for a 135M Llama.
MIN_SAVED_TOKENS = 32
MAX_STATE_BYTES = 2**30  # states held for continuations on the CPU; on a GPU, a tenth of its memory


class Choices(NamedTuple):
    """A context and its continuations, as token ids."""

    context: Sequence[int]
    continuations: list[list[int]]

    @property
    def longest(self) -> int:
        """Tokens of the longest continuation."""
        return max(map(len, self.continuations))


class Answer(NamedTuple):
    """The score of one continuation."""

    log_likelihood: float  # nats
    is_greedy: bool  # whether each of its tokens is the likeliest


class Row(NamedTuple):
    """A context with one continuation, the last `scored` of `tokens`. group and index: the place of its answer."""

    group: int
    index: int
    tokens: list[int]
    scored: int


def score_choices(
    model: EvalModel,
    groups: list[Choices],
    max_length: int,
    batch_tokens: int,
    advance: Callable[[int], object] = lambda continuations: None,
) -> list[list[Answer]]:
    """Return the answer to each continuation of each group.

    Args:
        groups: No context or continuation is empty.
        max_length: Tokens read at most: the earliest of a context are dropped, as lm-evaluation-harness does.
        batch_tokens: Tokens of a batch at most, padding included, unless a single row is longer.
        advance: Called with the number of continuations that were scored.

    Raises:
        ValueError: A continuation is longer than max_length.
        RunError: Some log-likelihoods are not finite.
    """
    longest = max((group.longest for group in groups), default=0)
    if longest > max_length:
        raise ValueError(f"a continuation has {longest} tokens, more than max_length={max_length}")
    answers: list[list[Answer | None]] = [[None] * len(group.continuations) for group in groups]
    shared, rows = choose_reading(model, groups, max_length)
    for batch in make_batches(rows, [len(row.tokens) - 1 for row in rows], batch_tokens):
        for row, answer in zip(batch, score_rows(model, batch), strict=True):
            answers[row.group][row.index] = answer
        advance(len(batch))
    # A group reads its context at once, then all its continuations.
    tokens_at_once = [max(len(groups[i].context), len(groups[i].continuations) * groups[i].longest) for i in shared]
    for batch in make_batches(shared, tokens_at_once, batch_tokens):
        found = []
        for part in split_by_memory(model, [groups[i] for i in batch]):
            found += score_shared(model, part)
            advance(sum(len(group.continuations) for group in part))
        for i, group_answers in zip(batch, found, strict=True):
            answers[i] = group_answers
    return answers


def choose_reading(model: EvalModel, groups: list[Choices], max_length: int) -> tuple[list[int], list[Row]]:
    """Return the groups whose context is read once, by index, and the rows of all others, both longest first."""
    shared: list[int] = []
    rows: list[Row] = []
    for i, group in enumerate(groups):
        fits = len(group.context) + group.longest - 1 <= max_length
        count = len(group.continuations)
        if model.accepts_state and fits and len(group.context) * (count - 1) / count > MIN_SAVED_TOKENS:
            shared.append(i)
        else:
            for j, tokens in enumerate(group.continuations):
                rows.append(Row(i, j, [*group.context, *tokens][-(max_length + 1) :], len(tokens)))
    shared.sort(key=lambda i: -len(groups[i].context))
    rows.sort(key=lambda row: -len(row.tokens))
    return shared, rows


def make_batches(items: list, lengths: list[int], max_tokens: int) -> Iterator[list]:
    """Yield the items in order, as many at once as fit into `max_tokens` when padded to the longest; at least one."""
    start = 0
    while start < len(items):
        stop = start + 1
        longest = lengths[start]
        while stop < len(items) and max(longest, lengths[stop]) * (stop + 1 - start) <= max_tokens:
            longest = max(longest, lengths[stop])
            stop += 1
        yield items[start:stop]
        start = stop


def score_rows(model: EvalModel, rows: list[Row]) -> list[Answer]:
    """Return the answer to the continuation of each row."""
    input_ids = pad_rows([row.tokens[:-1] for row in rows], model.device)
    features, _ = model.forward_features(input_ids)
    scored = []
    for row, row_features in zip(rows, features, strict=True):
        end = len(row.tokens) - 1
        scored.append(row_features[end - row.scored : end])
    return score_features(model, scored, [row.tokens[-row.scored :] for row in rows])


def score_shared(model: EvalModel, groups: list[Choices]) -> list[list[Answer]]:
    """Return the answers to all continuations of each group, whose context is read once."""
    device = model.device
    contexts = [group.context for group in groups]
    continuations = []
    owners = []
    for i, group in enumerate(groups):
        continuations += group.continuations
        owners += [i] * len(group.continuations)
    # The features after the context predict a continuation's first token, so only longer ones read from the state.
    longer = [i for i, tokens in enumerate(continuations) if len(tokens) > 1]
    is_padded = len({len(context) for context in contexts}) > 1
    mask = pad_rows([[1] * len(context) for context in contexts], device, left=True) if is_padded else None
    inputs = pad_rows(contexts, device, left=True)
    context_features, state = model.forward_features(inputs, mask, return_state=bool(longer))
    parts = [[context_features[owner, -1:]] for owner in owners]
    if longer:
        rows = make_ids([owners[i] for i in longer], device)
        inputs = pad_rows([continuations[i][:-1] for i in longer], device)
        full_mask = None if mask is None or model.is_ours else torch.cat([mask[rows], torch.ones_like(inputs)], 1)
        features, _ = model.forward_features(inputs, full_mask, state=model.select_states(state, rows))
        for row_features, i in zip(features, longer, strict=True):
            parts[i].append(row_features[: len(continuations[i]) - 1])
    answers = iter(score_features(model, list(chain.from_iterable(parts)), continuations))
    return [[next(answers) for _ in group.continuations] for group in groups]


def split_by_memory(model: EvalModel, groups: list[Choices]) -> Iterator[list[Choices]]:
    """Yield the groups in order, as many at once that the states of all their continuations fit into memory."""
    is_cuda = model.device.type == "cuda"
    budget = torch.cuda.get_device_properties(model.device).total_memory // 10 if is_cuda else MAX_STATE_BYTES
    part = []
    used = 0
    for group in groups:
        tokens = 1 if model.is_recurrent else len(group.context) + group.longest
        size = model.bytes_per_state * len(group.continuations) * tokens
        if part and used + size > budget:
            yield part
            part = []
            used = 0
        part.append(group)
        used += size
    yield part


@torch.no_grad()
def score_features(model: EvalModel, features: list[Tensor], continuations: list[list[int]]) -> list[Answer]:
    """Return the answer to each continuation.

    Args:
        features: Those of the positions before each token of the continuations, [..., d], to be read end to end.

    Raises:
        RunError: Some log-likelihoods are not finite.
    """
    targets = make_ids(chain.from_iterable(continuations), model.device)
    lengths = [len(tokens) for tokens in continuations]
    log_likelihood_parts = []
    greedy_parts = []
    for logits, part in model.iterate_logits(torch.cat(features), targets):
        log_likelihood_parts.append(logits.gather(-1, part[:, None])[:, 0] - logits.logsumexp(-1))
        greedy_parts.append(logits.argmax(-1) == part)
    log_likelihoods = torch.cat(log_likelihood_parts).double().cpu()
    require_finite(log_likelihoods)
    is_greedy = torch.cat(greedy_parts).cpu()
    answers = []
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        span = slice(end - length, end)
        answers.append(Answer(log_likelihoods[span].sum().item(), bool(is_greedy[span].all())))
    return answers


def score_documents(
    model: EvalModel, documents: list[list[int]], prefix_id: int, segment: int, batch_tokens: int
) -> list[float]:
    """Return the log-likelihood in nats of each document after the token `prefix_id`.

    A document is read `segment` tokens at a time, each from the state of the one before, so that every token is
    predicted from all before it.

    Raises:
        RunError: Some log-likelihoods are not finite.
    """
    totals = [0.0] * len(documents)
    order = sorted((i for i, ids in enumerate(documents) if ids), key=lambda i: -len(documents[i]))
    for batch in make_batches(order, [min(len(documents[i]), segment) for i in order], batch_tokens):
        rows = [[prefix_id, *documents[i]] for i in batch]
        inputs = pad_rows([row[:-1] for row in rows], model.device).split(segment, 1)
        targets = pad_rows([row[1:] for row in rows], model.device, fill=IGNORE_INDEX).split(segment, 1)
        state = None
        for k in range(len(inputs)):
            losses, state = model.score_tokens(inputs[k], targets[k], state, return_state=k + 1 < len(inputs))
            for i, loss in zip(batch, losses.double().sum(1).tolist(), strict=True):
                totals[i] -= loss
    require_finite(torch.tensor(totals))
    return totals


def require_finite(log_likelihoods: Tensor) -> None:
    """Raise RunError where a log-likelihood is NaN, by which a choice would be right or wrong by its place, or -inf."""
    if count := int((~log_likelihoods.isfinite()).sum()):
        raise RunError(f"{count} of {len(log_likelihoods)} log-likelihoods are not finite: the model's logits overflow")


# ------------------------------------------------------------------------------------------------------- tensors


def pad_rows(rows: list[Sequence[int]], device: torch.device, left: bool = False, fill: int = 0) -> LongTensor:
    """Return rows of ids as [B, T], padded with `fill` on the right, or on the left."""
    longest = max(map(len, rows))
    padded = []
    for row in rows:
        padding = [fill] * (longest - len(row))
        padded.append([*padding, *row] if left else [*row, *padding])
    return make_ids(padded, device)


def make_ids(values: Iterable, device: torch.device) -> LongTensor:
    return torch.tensor(list(values), dtype=torch.int64).to(device, non_blocking=True)
