"""Softmax over many items without ever holding all logits.

Shape legend: T tokens, C candidates, D dim, c tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Logits held at once: 2 MiB of float32 per thread of a CPU, to stay in its cache; 256 MiB to keep a GPU busy."""


def softmax_loss(
    user_TD: Tensor,
    positive_TD: Tensor,
    candidate_CD: Tensor,
    *,
    positive_T: Tensor,
    weight_T: Tensor,
    candidate_C: Tensor | None = None,
    log_correction_C: Tensor | None = None,
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

    Returns:
        A float32 scalar. Logits ``[T, C]`` and their gradient exist for a chunk of tokens at a time only: gradients
        are accumulated in the forward pass, so nothing is recomputed in the backward pass.
    """
    loss = _SoftmaxLoss.apply(
        user_TD, positive_TD, candidate_CD, positive_T, weight_T.float(), candidate_C, log_correction_C
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
    ) -> Tensor:
        loss = torch.zeros((), device=user_TD.device)
        grad_user, grad_positive = torch.empty_like(user_TD), torch.empty_like(positive_TD)
        grad_candidate = torch.zeros_like(candidate_CD, dtype=torch.float32)
        threads = torch.get_num_threads() if user_TD.device.type == "cpu" else 1
        chunk = max(1, _CHUNK_ELEMENTS[user_TD.device.type] * threads // max(1, len(candidate_CD)))
        for start in range(0, len(user_TD), chunk):
            rows = slice(start, start + chunk)
            user, positive, weight = user_TD[rows], positive_TD[rows], weight_T[rows, None]
            positive_logit = (user.float() * positive.float()).sum(-1, keepdim=True)
            logit_cC = (user @ candidate_CD.T).float()
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
        ctx.save_for_backward(grad_user, grad_positive, grad_candidate.to(candidate_CD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_user, grad_positive, grad_candidate = ctx.saved_tensors
        scale = grad_outputs[0]
        return grad_user * scale, grad_positive * scale, grad_candidate * scale, None, None, None, None


def _accumulate(into: Tensor, left: Tensor, right: Tensor) -> None:
    """``into += left @ right``, without a temporary where the types are the same.

    Autocast does not reach an operation in place: under it the product is made apart, in the narrower type.
    """
    if into.dtype == left.dtype and not torch.is_autocast_enabled(into.device.type):
        into.addmm_(left, right)
    else:
        into += left @ right
