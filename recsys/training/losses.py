"""Softmax over many items without ever holding all logits.

Shape legend: T tokens, C candidates, D dim, c tokens of one chunk, M moments, F trends, N items.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

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

    Returns:
        A float32 scalar. Logits ``[T, C]`` and their gradient exist for a chunk of tokens at a time only: gradients
        are accumulated in the forward pass, so nothing is recomputed in the backward pass.
    """
    weight_TF, moment_T, table_MFN = trend or (None, None, None)
    loss = _SoftmaxLoss.apply(
        user_TD,
        positive_TD,
        candidate_CD,
        positive_T,
        weight_T.float(),
        candidate_C,
        log_correction_C,
        weight_TF,
        moment_T,
        table_MFN,
    )
    assert isinstance(loss, Tensor)
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
        moment_T: Tensor | None,
        table_MFN: Tensor | None,
    ) -> Tensor:
        loss = torch.zeros((), device=user_TD.device)
        grad_user, grad_positive = torch.empty_like(user_TD), torch.empty_like(positive_TD)
        grad_candidate = torch.zeros_like(candidate_CD, dtype=torch.float32)
        grad_trend = None if trend_weight_TF is None else torch.empty_like(trend_weight_TF)
        threads = torch.get_num_threads() if user_TD.device.type == "cpu" else 1
        chunk = max(1, _CHUNK_ELEMENTS[user_TD.device.type] * threads // max(1, len(candidate_CD)))
        for start in range(0, len(user_TD), chunk):
            rows = slice(start, start + chunk)
            user, positive, weight = user_TD[rows], positive_TD[rows], weight_T[rows, None]
            positive_logit = (user.float() * positive.float()).sum(-1, keepdim=True)
            logit_cC = (user @ candidate_CD.T).float()
            trend_cFC = positive_trend = None
            if trend_weight_TF is not None:
                assert moment_T is not None
                assert table_MFN is not None
                trend_weight, moment = trend_weight_TF[rows].float(), moment_T[rows]
                trend_cFC = table_MFN[moment]
                if candidate_C is not None:
                    trend_cFC = trend_cFC.index_select(2, candidate_C)
                positive_trend = table_MFN[moment, :, positive_T[rows]]
                logit_cC += torch.bmm(trend_weight.unsqueeze(1), trend_cFC).squeeze(1)
                positive_logit = positive_logit + (trend_weight * positive_trend).sum(-1, keepdim=True)
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
        saved = [grad_user, grad_positive, grad_candidate.to(candidate_CD.dtype)]
        ctx.save_for_backward(*saved, *([] if grad_trend is None else [grad_trend]))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        user, positive, candidate, *trend = (grad * grad_outputs[0] for grad in ctx.saved_tensors)
        return user, positive, candidate, None, None, None, None, trend[0] if trend else None, None, None


def _accumulate(into: Tensor, left: Tensor, right: Tensor) -> None:
    """``into += left @ right``, without a temporary where the types are the same.

    Autocast does not reach an operation in place: under it the product is made apart, in the narrower type.
    """
    if into.dtype == left.dtype and not torch.is_autocast_enabled(into.device.type):
        into.addmm_(left, right)
    else:
        into += left @ right
