"""Training losses: errors of a batch's load, of each token's expert, and of each sequence's experts.

Shape suffixes: B sequences, T input positions, U decoder positions, K experts or top entries of a token, L MoE layers,
E logical experts.
"""

from torch import Tensor
from torch.nn.functional import cross_entropy

from data.traces.trace import PADDING, RouterTrace
from predictor.evaluation.metrics import shares
from predictor.network import Prediction

LEAST_SHARE = 1e-6
"""Lower bound of an expert's forecast share in a sequence; it keeps the logarithm finite."""


def load_loss(predicted_LE: Tensor, load_LE: Tensor) -> Tensor:
    """Total variation plus Kullback-Leibler divergence of the shares, plus 0.1 times the log error of the token count.

    The mean over the layers with load. The divergence has a gradient where that of the total variation vanishes.
    """
    carried = (load_LE.sum(-1) > 0).float()
    guess, truth = shares(predicted_LE), shares(load_LE)
    excess = (truth * (truth.clamp(min=1e-9).log() - guess.clamp(min=1e-9).log())).sum(-1)
    distance = 0.5 * (guess - truth).abs().sum(-1)
    tokens = (predicted_LE.sum(-1).clamp(min=1e-9) / load_LE.sum(-1).clamp(min=1.0)).log().abs()
    return ((distance + excess + 0.1 * tokens) * carried).sum() / carried.sum().clamp(min=1)


def token_loss(prediction: Prediction, trace: RouterTrace) -> Tensor:
    """Cross-entropy of the experts of input tokens, nats per expert: the mean over each token's K experts."""
    experts_BTLK = trace.experts.permute(1, 2, 0, 3).long()  # negative on padding and context
    if experts_BTLK.shape[-1] == 1:
        return cross_entropy(prediction.token_logits.flatten(0, 2), experts_BTLK.flatten(), ignore_index=PADDING)
    real = trace.tokens.computed
    log_share_NLE = prediction.token_logits[real].log_softmax(-1)
    return -log_share_NLE.gather(-1, experts_BTLK[real]).sum() / max(int(real.sum()) * experts_BTLK[0, 0].numel(), 1)


def distillation_loss(prediction: Prediction, trace: RouterTrace) -> Tensor:
    """Cross-entropy of the forecast under the router's probabilities of its likeliest experts, nats per token.

    This is the truncated knowledge distillation of SiDA-MoE: after the first few entries a router's softmax is noise.

    Raises:
        ValueError: If the trace does not contain the likeliest experts.
    """
    if trace.top_experts is None or trace.top_probabilities is None:
        raise ValueError(
            "the trace contains no likeliest experts to distil from; collect one with --top 4 (of a decoder-only "
            "model: its experts of a token), or set --model.distillation_weight 0"
        )
    teacher_LBTK = shares(trace.top_probabilities.float())
    log_share_LBTE = prediction.token_logits.log_softmax(-1).permute(2, 0, 1, 3)
    surprise_LBT = -(teacher_LBTK * log_share_LBTE.gather(-1, trace.top_experts.long())).sum(-1)
    real = trace.tokens.computed
    return (surprise_LBT * real).sum() / (real.sum() * len(surprise_LBT)).clamp(min=1)


def sequence_loss(prediction: Prediction, trace: RouterTrace) -> Tensor:
    """Cross-entropy of the experts of decoder tokens, nats per token; one forecast share serves a whole sequence."""
    decoder_load_BLE = prediction.sequence_load[:, len(trace.experts) :]
    log_share_LBE = shares(decoder_load_BLE).clamp(min=LEAST_SHARE).log().transpose(0, 1)
    experts_LBU = trace.decoder_experts.long().flatten(2)  # each of a token's experts is an entry
    real = experts_LBU >= 0
    surprise_LBU = -log_share_LBE.gather(2, experts_LBU.clamp(min=0)) * real
    return surprise_LBU.sum() / real.sum().clamp(min=1)
