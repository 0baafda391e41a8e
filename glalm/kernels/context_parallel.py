"""Context parallelism: the processes of a group share the tokens of each sequence, and hand on the state.

Process r of R holds the r-th of R equal runs of tokens, its shard. A linear recurrence takes the state that enters a
shard to the one that leaves it by S -> decay * S + local, where `local` is what the shard's tokens leave behind from a
state of zeros. These summaries have the size of a state, however long the shard is. So one all-gather of them and a
fold in the order of the processes give each process the state that enters its shard (LASP-2, arXiv 2502.07563), and
the backward pass does the same in the other direction with the gradients of the entering states.

The fold's sums are in the dtype of the states, float32 or float64, and always in the order of the processes, so they do
not depend on the timing of the network.

Softmax attention has no such summary: gather_ranks gathers its keys and values, and its backward pass is one
reduce-scatter (the sequence-distributed attention of arXiv 2311.02382).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from glalm.kernels.common import has_kernel, refuse_double_backward, without_autocast


@dataclass(frozen=True)
class ContextShard:
    """Where this process's tokens lie in the sequences that the processes of a group share.

    An operator with a `context` takes the tokens of the shard, [B, T, ...] of sequences with `size` * T tokens, and
    returns their outputs. The initial state is the one before the first process's tokens, and the final state the one
    after the last's, both the same on every process. The gradient of the initial state is the sum over the processes of
    what each returns. All processes of the group must call the same operators in the same order, and either all or none
    of them must have the final state in their loss: the backward pass gathers its gradients, and would wait for ever
    for a process that has none.

    With packed sequences, B rows of T tokens lie in one row, as flatten_batch lays them out, and `cu_seqlens` bounds
    the parts of sequences that are in the shard. The first of each row may continue a sequence of the process before
    this one, and the last may be continued by the next. Such calls have no initial and no final states.
    """

    group: str  # the name of the process group
    rank: int  # of this process in the group
    size: int  # processes of the group
    # For packed sequences, int64 [3, B]. rows[0] and rows[1] are the indices of each row's first and last sequence;
    # rows[2] is the number of tokens of the first sequence that earlier processes hold.
    rows: Tensor | None = None

    def shift_positions(self, start: Tensor, T: int) -> Tensor:
        """Return the positions of the shard's first tokens, int64 [N], in sequences of which `start` [N] were seen."""
        if self.rows is None:
            return start + self.rank * T
        return start.index_add(0, self.rows[0], self.rows[2])

    def exchange(
        self, local: Tensor, decay: Tensor, initial: Tensor | None, is_matrix: bool = False, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Send this process's summary to the others, and compute from all of them the state that enters its shard.

        Args:
            local: [N, ...], the states after the shard's tokens, from states of zeros.
            decay: [N, ...], by which the shard multiplies the states that enter it, broadcast to `local`.
            initial: [B, ...], the states before the first process's tokens, or None for zeros.
            is_matrix: Whether `decay` holds matrices [N, ..., K, K], which multiply states [N, ..., K, V].
            reverse: Compute the backward pass: fold from the last process to the first, with transposed matrices. Then
                `local` is the gradient with respect to the entering states, `initial` that with respect to the final
                ones, and the results are the gradients with respect to the leaving and the initial states.

        Returns:
            The states [N, ...] that enter the shard, and those [B, ...] after the last process's tokens.
        """
        summaries = self._summarize_rows(local, decay, reverse)
        message = torch.cat([summary.flatten(1) for summary in summaries], 1)
        messages = all_gather(message, self.group, self.size)
        entering, final = self._fold(messages, *summaries, initial, is_matrix, reverse)
        if self.rows is None:
            return entering, final
        first, last, tokens_before = self.rows
        if reverse:
            return place_rows(entering, last, len(local)), final
        entering = torch.where(expand_like(tokens_before > 0, entering), entering, 0)
        return place_rows(entering, first, len(local)), final

    def _fold(
        self, messages: Tensor, local: Tensor, decay: Tensor, initial: Tensor | None, is_matrix: bool, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the states [B, ...] that enter this process's rows, and those after the last process's tokens.

        Args:
            messages: [size, B, ...], the summaries of all processes, flattened and joined.
            local, decay: this process's summaries, which have the shapes of all.
            initial, is_matrix, reverse: as of exchange.
        """
        sizes = [*zip(local.shape[1:], decay.shape[1:], strict=True)]
        while sizes and sizes[-1][1] == 1:
            sizes.pop()
        repeats_over_last_axes = all(size == decay_size for size, decay_size in sizes)
        is_float32 = local.dtype == torch.float32 and has_kernel(local)
        # Inside a compiled graph the fold is left to torch.compile.
        if is_float32 and repeats_over_last_axes and not is_matrix and not torch.compiler.is_compiling():
            from glalm.kernels.triton.exchange import fold_summaries  # A machine without a GPU may lack Triton.

            return fold_summaries(messages, local.shape, decay.shape[1:].numel(), initial, self.rank, reverse)
        S = torch.zeros_like(local) if initial is None else initial.clone()  # Results must not alias inputs.
        entering = S
        for rank in reversed(range(self.size)) if reverse else range(self.size):
            if rank == self.rank:
                entering = S
            local_row, decay_row = messages[rank].split([local.shape[1:].numel(), decay.shape[1:].numel()], 1)
            local_row = local_row.view(local.shape)
            decay_row = decay_row.view(decay.shape)
            if is_matrix:
                with without_autocast(S):
                    S = local_row + (decay_row.mT if reverse else decay_row) @ S
            else:
                S = torch.addcmul(local_row, decay_row, S)
        return entering, S

    def _summarize_rows(self, local: Tensor, decay: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        """Return what the sequences [N, ...] do to the state that crosses each row, [B, ...]."""
        if self.rows is None:
            return local, decay
        first, last, tokens_before = self.rows
        continues = expand_like(tokens_before > 0, local)
        crosses_whole_row = expand_like((tokens_before > 0) & (first == last), decay)
        decay = torch.where(crosses_whole_row, decay[first], 0)
        return (torch.where(continues, local[first], 0) if reverse else local[last]), decay

    def unpack_rows(self, x: Tensor) -> Tensor:
        """Return the tokens of packed sequences [1, B * T, ...] by rows, [B, T, ...]; other tokens as they are."""
        return x if self.rows is None else x.reshape(self.rows.shape[1], -1, *x.shape[2:])

    def place_first(self, x: Tensor, N: int) -> Tensor:
        """Return [N, ...] with x [B, ...] at the sequences in which the rows begin, and zeros elsewhere."""
        return x if self.rows is None else place_rows(x, self.rows[0], N)

    def read_entering(self, reads: Tensor, entering: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Return what the tokens read of the states that enter the shard: their product with `reads`.

        Args:
            reads: [B, T, H, K], by rows.
            entering: [N, H, K, V], the states that enter the sequences.
            cu_seqlens: the bounds of packed sequences, of which only the first of each row is entered by a state.

        Returns:
            [B, T, H, V].
        """
        if self.rows is None:
            return torch.einsum("bthk,bhkv->bthv", reads, entering)
        assert cu_seqlens is not None  # as check_context checks
        first = self.rows[0]
        effect = torch.einsum("bthk,bhkv->bthv", reads, entering[first])
        is_in_first = torch.arange(reads.shape[1], device=reads.device) < cu_seqlens.diff()[first][:, None]
        return effect * is_in_first[..., None, None]


def check_context(context: ContextShard | None, initial_state, output_final_state: bool, cu_seqlens) -> None:
    """Check that a call with a context describes its packed sequences, and asks for no states of them.

    Raises:
        ValueError: it does not.
    """
    if context is None:
        return
    if (context.rows is None) != (cu_seqlens is None):
        raise ValueError("context: its `rows` and cu_seqlens describe packed sequences; give both or neither")
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        raise ValueError("context: packed sequences that processes share have no initial and no final states")


def place_rows(x: Tensor, index: Tensor, N: int) -> Tensor:
    """Return zeros [N, ...] with the rows of x at `index`."""
    return x.new_zeros(N, *x.shape[1:]).index_copy(0, index, x)


def expand_like(x: Tensor, like: Tensor) -> Tensor:
    """Return x [n] as [n, 1, ...], with as many axes as `like`."""
    return x.view(-1, *(1 for _ in like.shape[1:]))


# Collectives, by the operators that torch.compile knows -----------------------------------------------------


def all_gather(x: Tensor, group: str, size: int) -> Tensor:
    """Return x of every process of the group, [size, *x.shape], without a derivative."""
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group)
    return torch.ops._c10d_functional.wait_tensor(gathered).view(size, *x.shape)


def gather_ranks(x: Tensor, context: ContextShard) -> Tensor:
    """Return x of every process of the group, [size, *x.shape]. Each process gets the sum of all gradients of its x."""
    return GatherRanks.apply(x, context.group, context.size)


def gather_tokens(x: Tensor, context: ContextShard) -> Tensor:
    """Return x [B, T, ...] of all processes, [B, size * T, ...]."""
    return gather_ranks(x, context).transpose(0, 1).flatten(1, 2)


class GatherRanks(torch.autograd.Function):
    """Differentiate an all-gather by a reduce-scatter."""

    @staticmethod
    def forward(ctx, x, group, size):
        ctx.group = group
        ctx.size = size
        return all_gather(x, group, size)

    @staticmethod
    def backward(ctx, dgathered):
        with torch.no_grad():
            dx = torch.ops._c10d_functional.reduce_scatter_tensor(
                dgathered.flatten(0, 1).contiguous(), "sum", ctx.size, ctx.group
            )
            dx = torch.ops._c10d_functional.wait_tensor(dx)
        (dx,) = refuse_double_backward("context parallelism", (dx,), (dgathered,))
        return dx, None, None


def exchange_states(
    local: Tensor, decay: Tensor, initial: Tensor | None, context: ContextShard, is_matrix: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute ContextShard.exchange with derivatives in local, decay and initial."""
    return ExchangeStates.apply(
        local, decay, initial, is_matrix, context.group, context.rank, context.size, context.rows
    )


class ExchangeStates(torch.autograd.Function):
    """Differentiate an exchange by an exchange in the other direction."""

    @staticmethod
    def forward(ctx, local, decay, initial, is_matrix, group, rank, size, rows):
        context = ContextShard(group, rank, size, rows)
        entering, final = context.exchange(local, decay, initial, is_matrix)
        ctx.save_for_backward(decay, entering, rows)
        # The gradients of a final state that no process has in its loss are None, and need no all-gather.
        ctx.set_materialize_grads(False)
        ctx.options = is_matrix, group, rank, size
        return entering, final

    @staticmethod
    def backward(ctx, dentering, dfinal):
        decay, entering, rows = ctx.saved_tensors
        is_matrix, group, rank, size = ctx.options
        context = ContextShard(group, rank, size, rows)
        with torch.no_grad():
            dentering_or_0 = torch.zeros_like(entering) if dentering is None else dentering
            dlocal, dinitial = reverse_exchange(context, dentering_or_0, decay, dfinal, is_matrix)
            if is_matrix:
                with without_autocast(dlocal):
                    ddecay = dlocal @ entering.mT
            else:
                ddecay = (dlocal * entering).sum_to_size(decay.shape)
        grads = (dlocal, ddecay, dinitial if ctx.needs_input_grad[2] else None)
        inputs = (decay, entering, dentering, dfinal)
        return *refuse_double_backward("context parallelism", grads, inputs), None, None, None, None, None


def reverse_exchange(
    context: ContextShard, dentering: Tensor, decay: Tensor, dfinal: Tensor | None, is_matrix: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the states that leave the shard [N, ...], and of the initial states [B, ...].

    Args:
        dentering: [N, ...], the gradients with respect to the entering states through the shard's outputs alone, not
            through the states that leave it.
        decay: as of ContextShard.exchange.
        dfinal: [B, ...], this process's gradient of the final states, or None, which it must then be on all processes.
    """
    if dfinal is not None:
        dfinal = all_gather(dfinal, context.group, context.size).sum(0)
    dleaving, dinitial = context.exchange(dentering, decay, dfinal, is_matrix, reverse=True)
    return dleaving, dinitial if context.rank == 0 else torch.zeros_like(dinitial)


def gather_history(
    x: Tensor, state: Tensor | None, length: int, context: ContextShard, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the `length` tokens before each sequence of the shard, and those before the end of the last process's.

    Args:
        x: [B, T, channels], or [1, B * T, channels] of packed sequences.
        state: [B, length, channels], the tokens before the first process's; zeros if None.

    Returns:
        [N, length, channels], with zeros before the beginning of a sequence, and [B, length, channels], or None for
        packed sequences.
    """
    rows = context.unpack_rows(x)
    B, T, channels = rows.shape
    tails = gather_ranks(rows[:, max(0, T - length) :].transpose(0, 1), context)
    past = rows.new_zeros(length, B, channels) if state is None else state.to(x.dtype).transpose(0, 1)
    before = torch.cat([past, tails[: context.rank].flatten(0, 1)])[-length:].transpose(0, 1)
    if context.rows is None:
        return before, torch.cat([past, tails.flatten(0, 1)])[-length:].transpose(0, 1)
    assert cu_seqlens is not None  # as check_context checks
    age = torch.arange(length, 0, -1, device=x.device)
    is_in_sequence = age <= context.rows[2][:, None]
    return context.place_first(before * is_in_sequence[..., None], cu_seqlens.shape[0] - 1), None
