"""Log-likelihoods of continuations of contexts, in batches of about one length.

A causal model sees nothing of what comes after a token, so rows are padded on the right: it changes no state and no
score that counts. Where several continuations share a context (multiple choice), the context is read once and each
continuation goes on from its state; contexts are then padded on the left, where both kinds of model have masks.
Logits are made at the scored positions only, which is most of the advantage over scoring whole rows.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

import torch
from torch import LongTensor, Tensor

from glalm import IGNORE_INDEX
from glalm.evals.eval_model import Subject

Answer = tuple[float, bool]  # log-likelihood in nats; whether every token is the likeliest
# Tokens that sharing its context has to save a continuation, as many as keeping and copying a state costs: 24 to 37 for
# a 340M GLA on an H200, 10 to 100 for a 135M Llama.
WORTH_SHARING = 32
STATES_AT_ONCE = 2**30  # bytes of states held for the continuations on the CPU; a tenth of a GPU's memory


def log_likelihoods(
    subject: Subject,
    contexts: list[tuple[list[int], list[list[int]]]],
    max_length: int,
    batch_tokens: int,
    advance: Callable[[int], object] = int,
) -> list[list[Answer]]:
    """The answer to each continuation of each context (context, [continuation, ...]), ids, none of them empty.

    At most max_length tokens are read: the earliest of a context are dropped, as lm-evaluation-harness does. A batch is
    at most batch_tokens, padding included, or one row. `advance` is called with the number of continuations scored.
    Raises ValueError at a continuation longer than max_length.
    """
    longest = max((len(c) for _, continuations in contexts for c in continuations), default=0)
    if longest > max_length:
        raise ValueError(f"a continuation has {longest} tokens, more than max_length={max_length}")
    answers: list[list[Answer | None]] = [[None] * len(continuations) for _, continuations in contexts]
    together, rows = [], []
    for i, (context, continuations) in enumerate(contexts):
        if subject.can_resume and _worth_sharing(context, continuations, max_length):
            together.append(i)
        else:
            rows += [(i, j, (context + c)[-(max_length + 1) :], len(c)) for j, c in enumerate(continuations)]
    rows.sort(key=lambda row: -len(row[2]))
    for batch in batches(rows, [len(row[2]) - 1 for row in rows], batch_tokens):
        found = score_rows(subject, [(tokens, scored) for _, _, tokens, scored in batch])
        for (i, j, _, _), answer in zip(batch, found, strict=True):
            answers[i][j] = answer
        advance(len(batch))
    together.sort(key=lambda i: -len(contexts[i][0]))
    for batch in batches(together, [_tokens_together(*contexts[i]) for i in together], batch_tokens):
        found = []
        for part in within_states(subject, [contexts[i] for i in batch]):
            found += score_shared(subject, part)
            advance(sum(len(continuations) for _, continuations in part))
        for i, answer in zip(batch, found, strict=True):
            answers[i] = answer
    return answers


def batches(items: list, lengths: list[int], tokens: int) -> Iterator[list]:
    """Items in order, as many at once as fit into `tokens` when all are as long as the longest of them, or one."""
    start = 0
    while start < len(items):
        stop, longest = start + 1, lengths[start]
        while stop < len(items) and max(longest, lengths[stop]) * (stop + 1 - start) <= tokens:
            longest = max(longest, lengths[stop])
            stop += 1
        yield items[start:stop]
        start = stop


def score_rows(subject: Subject, rows: list[tuple[list[int], int]]) -> list[Answer]:
    """The answer to the last `scored` tokens of each row (tokens, scored), after those before them."""
    input_ids = padded([tokens[:-1] for tokens, _ in rows], subject.device)
    features, _ = subject.read(input_ids)
    ends = [len(tokens) - 1 for tokens, _ in rows]
    found = [row[end - scored : end] for row, end, (_, scored) in zip(features, ends, rows, strict=True)]
    targets = [token for tokens, scored in rows for token in tokens[-scored:]]
    return answers_of(subject, torch.cat(found), targets, [scored for _, scored in rows])


def score_shared(subject: Subject, groups: list[tuple[list[int], list[list[int]]]]) -> list[list[Answer]]:
    """The answers to all continuations of each context, which is read once."""
    device, contexts = subject.device, [context for context, _ in groups]
    continuations = [(g, c) for g, (_, many) in enumerate(groups) for c in many]
    longer = [i for i, (_, c) in enumerate(continuations) if len(c) > 1]
    mask = left_mask(contexts, device)
    features, state = subject.read(padded(contexts, device, left=True), mask, keep_state=bool(longer))
    parts = {i: [features[g, -1:]] for i, (g, _) in enumerate(continuations)}
    if longer:
        owners = index([continuations[i][0] for i in longer], device)
        inputs = padded([continuations[i][1][:-1] for i in longer], device)
        after = None if mask is None or subject.ours else torch.cat([mask[owners], torch.ones_like(inputs)], 1)
        features, _ = subject.read(inputs, after, state=subject.repeat(state, owners))
        for row, i in zip(features, longer, strict=True):
            parts[i].append(row[: len(continuations[i][1]) - 1])
    scored = [x for i in range(len(continuations)) for x in parts[i]]
    targets = [token for _, c in continuations for token in c]
    flat = iter(answers_of(subject, torch.cat(scored), targets, [len(c) for _, c in continuations]))
    return [[next(flat) for _ in many] for _, many in groups]


def within_states(subject: Subject, groups: list[tuple]) -> Iterator[list[tuple]]:
    """The groups (context, continuations), fewer at once where all continuations' states are too large."""
    total = torch.cuda.get_device_properties(subject.device).total_memory if subject.device.type == "cuda" else 0
    budget = total // 10 or STATES_AT_ONCE
    part, used = [], 0
    for group in groups:
        context, continuations = group
        tokens = 1 if subject.recurrent else len(context) + max(map(len, continuations))
        size = subject.state_size * len(continuations) * tokens
        if part and used + size > budget:
            yield part
            part, used = [], 0
        part.append(group)
        used += size
    yield part


@torch.no_grad()
def answers_of(subject: Subject, features: Tensor, targets: list[int], lengths: list[int]) -> list[Answer]:
    """features: [sum of lengths, ...], in order, which predict the targets; an answer for each length."""
    nats, greedy = [], []
    for logits, wanted in subject.predictions(features, index(targets, subject.device)):
        nats.append(logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(-1))
        greedy.append(logits.argmax(-1) == wanted)
    nats, greedy = torch.cat(nats).double().cpu(), torch.cat(greedy).cpu()
    ends = list(accumulate(lengths))
    return [(nats[e - n : e].sum().item(), bool(greedy[e - n : e].all())) for e, n in zip(ends, lengths, strict=True)]


def carried(subject: Subject, documents: list[list[int]], prefix: int, segment: int, batch_tokens: int) -> list[float]:
    """Log-likelihood of each document after the token `prefix`, read `segment` tokens at a time with the state carried
    on, so that every token is given all before it."""
    totals = [0.0] * len(documents)
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
    for batch in batches(order, [min(len(documents[i]), segment) for i in order], batch_tokens):
        rows = [[prefix, *documents[i]] for i in batch]
        input_ids = padded([row[:-1] for row in rows], subject.device)
        targets = padded([row[1:] for row in rows], subject.device, fill=IGNORE_INDEX)
        state = None
        for start in range(0, input_ids.shape[1], segment):
            part = slice(start, start + segment)
            losses, state = subject.score(input_ids[:, part], targets[:, part], state)
            for i, loss in zip(batch, losses.double().sum(1).tolist(), strict=True):
                totals[i] -= loss
    return totals


# ------------------------------------------------------------------------------------------------------- tensors


def padded(rows: list[list[int]], device: torch.device, left: bool = False, fill: int = 0) -> LongTensor:
    longest = max(map(len, rows))
    gaps = [[fill] * (longest - len(row)) for row in rows]
    return index([gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)], device)


def left_mask(rows: list[list[int]], device: torch.device) -> LongTensor | None:
    """1 at the tokens of rows padded on the left; None where there is no padding."""
    if len({len(row) for row in rows}) == 1:
        return None
    return padded([[1] * len(row) for row in rows], device, left=True)


def index(values: Iterable, device: torch.device) -> LongTensor:
    return torch.tensor(list(values), dtype=torch.int64).to(device, non_blocking=True)


def _tokens_together(context: list[int], continuations: list[list[int]]) -> int:
    return max(len(context), len(continuations) * max(map(len, continuations)))


def _worth_sharing(context: list[int], continuations: list[list[int]], max_length: int) -> bool:
    saved = (len(continuations) - 1) * len(context) / len(continuations)
    return len(context) + max(map(len, continuations)) - 1 <= max_length and saved > WORTH_SHARING
