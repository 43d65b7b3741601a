"""Softmax over many items without ever holding all logits.

Shape legend: T tokens, C candidates, D dim, c tokens of one chunk, M moments, F half-lives, N items, Q queries, E pairs
of a query and a candidate, e those of one chunk's tokens, K interests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Logits held at once: 2 MiB of float32 per thread of a CPU, to stay in its cache; 256 MiB to keep a GPU busy."""


class Trend(NamedTuple):
    """What is added to a logit for how much in demand its item was at the token's moment."""

    weight_TF: Tensor
    """float, the weight of each trend for each token's query"""
    moment_T: Tensor
    """int64, row of the table for each token"""
    table_MFN: Tensor
    """float32, every trend of every item at every moment; constant"""


class Habit(NamedTuple):
    """What is added to a logit for how often its item stands in the history of the token's query."""

    weight_TF: Tensor
    """float, the weight of each half-life for each token's query"""
    positive_TF: Tensor
    """float32, the counts of each token's positive; constant"""
    query_T: Tensor
    """int64, the query of each token"""
    offset_Q: Tensor
    """int64 [Q + 1]: ``offset_Q[q]`` to ``offset_Q[q + 1]`` are the pairs of query ``q``"""
    candidate_E: Tensor
    """int64, place of each pair's item among the candidates"""
    count_EF: Tensor
    """float32, the counts of each pair; constant"""

    def pairs(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the tokens ``rows``: pairs of each [c], token of each pair [e], its candidate [e], its counts [e, F]."""
        query_c = self.query_T[rows]
        num_c = self.offset_Q[query_c + 1] - self.offset_Q[query_c]
        token_e = torch.repeat_interleave(num_c)
        first_c = self.offset_Q[query_c] - (num_c.cumsum(0) - num_c)
        pair_e = first_c[token_e] + torch.arange(len(token_e), device=token_e.device)
        return num_c, token_e, self.candidate_E[pair_e], self.count_EF[pair_e]


def softmax_loss(
    user_TD: Tensor,
    positive_TD: Tensor,
    candidate_CD: Tensor,
    *,
    positive_T: Tensor,
    weight_T: Tensor,
    candidate_C: Tensor | None = None,
    log_correction_C: Tensor | None = None,
    trend: Trend | None = None,
    habit: Habit | None = None,
) -> Tensor:
    """Weighted sum over tokens of ``-log softmax`` of the positive item, against all or sampled candidates.

    The normaliser is ``exp(u.p) + sum_c exp(u.c + correction_c)`` over the candidates that are not the positive
    itself. With every item as candidate and no correction this is the full softmax. With ``S`` candidates drawn from
    ``q`` and ``correction = -log(S q)`` the sum is an unbiased estimate of the full one (the log-Q correction); the
    positive is not sampled, so it is not corrected.

    Args:
        user_TD: float, one query per token.
        positive_TD: float, the vector of each token's positive item.
        candidate_CD: float, candidate item vectors.
        positive_T: int64, item of each token, to keep it from being its own negative.
        weight_T: float, weight of each token's loss.
        candidate_C: int64, item of each candidate; an item may come twice. None where candidate ``c`` is item ``c``.
        log_correction_C: float, added to each candidate's logit.
        trend: adds ``weight . table[moment, :, item]`` to the logits of candidates and positives.
        habit: adds ``weight . count`` to the logits of the candidates and positives that the query's history holds.

    Returns:
        A float32 scalar. Logits ``[T, C]`` and their gradient exist for a chunk of tokens at a time only: gradients
        are accumulated in the forward pass, so nothing is recomputed in the backward pass.
    """
    loss = _SoftmaxLoss.apply(
        user_TD,
        positive_TD,
        candidate_CD,
        positive_T,
        weight_T.float(),
        candidate_C,
        log_correction_C,
        None if trend is None else trend.weight_TF,
        trend,
        None if habit is None else habit.weight_TF,
        habit,
    )
    assert isinstance(loss, Tensor)
    return loss


def interests_softmax_loss(
    user_TKD: Tensor,
    active_TK: Tensor,
    positive_TD: Tensor,
    candidate_CD: Tensor,
    *,
    positive_T: Tensor,
    weight_T: Tensor,
    candidate_C: Tensor | None = None,
    log_correction_C: Tensor | None = None,
) -> Tensor:
    """:func:`softmax_loss` where a query has several vectors, and an item's logit is the largest of theirs.

    Args:
        user_TKD: float, the vectors of each token's query.
        active_TK: bool, which of them count; at least one of each row.
        positive_TD, candidate_CD, positive_T, weight_T, candidate_C, log_correction_C: as there.

    Returns:
        A float32 scalar. Logits ``[T, K, C]`` exist for a chunk of tokens at a time, and are computed anew in the
        backward pass.
    """
    item_C = torch.arange(len(candidate_CD), device=candidate_CD.device) if candidate_C is None else candidate_C

    def part(
        user: Tensor, active: Tensor, positive: Tensor, item: Tensor, weight: Tensor, candidates: Tensor
    ) -> Tensor:
        absent = ~active.unsqueeze(-1)
        positive_logit = (user @ positive.unsqueeze(-1)).float().masked_fill(absent, -torch.inf).amax((1, 2))
        logit_cC = (user @ candidates.T).masked_fill(absent, -torch.inf).amax(1).float()
        if log_correction_C is not None:
            logit_cC = logit_cC + log_correction_C
        logit_cC = logit_cC.masked_fill(item_C == item.unsqueeze(1), -torch.inf)
        log_sum = torch.cat([positive_logit.unsqueeze(1), logit_cC], 1).logsumexp(1)
        return ((log_sum - positive_logit) * weight).sum()

    threads = torch.get_num_threads() if user_TKD.device.type == "cpu" else 1
    num_logits = max(1, user_TKD.shape[1] * len(candidate_CD))
    chunk = max(1, _CHUNK_ELEMENTS[user_TKD.device.type] * threads // num_logits)
    loss = torch.zeros((), device=user_TKD.device)
    for start in range(0, len(user_TKD), chunk):
        rows = slice(start, start + chunk)
        tokens = (user_TKD[rows], active_TK[rows], positive_TD[rows], positive_T[rows], weight_T[rows].float())
        value = checkpoint(part, *tokens, candidate_CD, use_reentrant=False)
        assert isinstance(value, Tensor)
        loss = loss + value
    return loss


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        user_TD: Tensor,
        positive_TD: Tensor,
        candidate_CD: Tensor,
        positive_T: Tensor,
        weight_T: Tensor,
        candidate_C: Tensor | None,
        log_correction_C: Tensor | None,
        trend_weight_TF: Tensor | None,
        trend: Trend | None,
        habit_weight_TF: Tensor | None,
        habit: Habit | None,
    ) -> Tensor:
        loss = torch.zeros((), device=user_TD.device)
        grad_user, grad_positive = torch.empty_like(user_TD), torch.empty_like(positive_TD)
        grad_candidate = torch.zeros_like(candidate_CD, dtype=torch.float32)
        grad_trend = None if trend_weight_TF is None else torch.empty_like(trend_weight_TF)
        grad_habit = None if habit_weight_TF is None else torch.empty_like(habit_weight_TF)
        threads = torch.get_num_threads() if user_TD.device.type == "cpu" else 1
        chunk = max(1, _CHUNK_ELEMENTS[user_TD.device.type] * threads // max(1, len(candidate_CD)))
        for start in range(0, len(user_TD), chunk):
            rows = slice(start, start + chunk)
            user, positive, weight = user_TD[rows], positive_TD[rows], weight_T[rows, None]
            positive_logit = (user.float() * positive.float()).sum(-1, keepdim=True)
            logit_cC = (user @ candidate_CD.T).float()
            trend_cFC = positive_trend = pairs = None
            if trend_weight_TF is not None:
                assert trend is not None
                trend_weight, moment = trend_weight_TF[rows].float(), trend.moment_T[rows]
                trend_cFC = trend.table_MFN[moment]
                if candidate_C is not None:
                    trend_cFC = trend_cFC.index_select(2, candidate_C)
                positive_trend = trend.table_MFN[moment, :, positive_T[rows]]
                logit_cC += torch.bmm(trend_weight.unsqueeze(1), trend_cFC).squeeze(1)
                positive_logit = positive_logit + (trend_weight * positive_trend).sum(-1, keepdim=True)
            if habit_weight_TF is not None:
                assert habit is not None
                habit_weight = habit_weight_TF[rows].float()
                pairs = _, token_e, candidate_e, count_eF = habit.pairs(rows)
                place_e = token_e * logit_cC.shape[1] + candidate_e
                logit_cC.view(-1).index_add_(0, place_e, (habit_weight[token_e] * count_eF).sum(-1))
                positive_logit = positive_logit + (habit_weight * habit.positive_TF[rows]).sum(-1, keepdim=True)
            if log_correction_C is not None:
                logit_cC += log_correction_C
            if candidate_C is None:
                logit_cC.scatter_(1, positive_T[rows, None], -torch.inf)
            else:
                logit_cC.masked_fill_(candidate_C == positive_T[rows, None], -torch.inf)
            # One exponential serves both the normaliser and the gradient, and what a token's whole row is multiplied
            # by is multiplied into its few dimensions instead.
            highest = torch.maximum(logit_cC.amax(-1, keepdim=True), positive_logit)
            share_cC = logit_cC.sub_(highest).exp_()
            total = share_cC.sum(-1, keepdim=True) + (positive_logit - highest).exp()
            log_sum = highest + total.log()
            loss += ((log_sum - positive_logit) * weight).sum()
            scale = weight / total
            share_cC = share_cC.to(user.dtype)
            positive_share = (((positive_logit - log_sum).exp() - 1) * weight).to(user.dtype)
            _accumulate(grad_candidate, share_cC.T, user * scale.to(user.dtype))
            grad_user[rows] = (share_cC @ candidate_CD) * scale.to(user.dtype) + positive_share * positive
            grad_positive[rows] = positive_share * user
            if grad_trend is not None:
                assert trend_cFC is not None
                assert positive_trend is not None
                met = torch.bmm(trend_cFC, share_cC.float().unsqueeze(-1)).squeeze(-1)
                grad_trend[rows] = (met * scale + positive_share.float() * positive_trend).to(grad_trend.dtype)
            if grad_habit is not None:
                assert habit is not None
                assert pairs is not None
                num_c, token_e, candidate_e, count_eF = pairs
                met_eF = share_cC[token_e, candidate_e].float().unsqueeze(-1) * count_eF
                met = torch.segment_reduce(met_eF, "sum", lengths=num_c, initial=0)
                known = positive_share.float() * habit.positive_TF[rows]
                grad_habit[rows] = (met * scale + known).to(grad_habit.dtype)
        ctx.save_for_backward(grad_user, grad_positive, grad_candidate.to(candidate_CD.dtype), grad_trend, grad_habit)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        user, positive, candidate, trend, habit = (
            None if grad is None else grad * grad_outputs[0] for grad in ctx.saved_tensors
        )
        return user, positive, candidate, None, None, None, None, trend, None, habit, None


def _accumulate(into: Tensor, left: Tensor, right: Tensor) -> None:
    """``into += left @ right``, without a temporary where the types are the same.

    Autocast does not reach an operation in place: under it the product is made apart, in the narrower type.
    """
    if into.dtype == left.dtype and not torch.is_autocast_enabled(into.device.type):
        into.addmm_(left, right)
    else:
        into += left @ right
