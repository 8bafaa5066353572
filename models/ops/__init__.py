"""Ops of the models: one folder each, with a short float32 ground truth (`naive.py`) beside the fast paths."""

from .full_softmax import full_softmax_loss, full_softmax_loss_naive
from .hstu_attention import hstu_attention, hstu_attention_eager, hstu_attention_host, hstu_attention_naive
from .keyed_dropout import keyed_dropout, keyed_dropout_naive
from .norm_gate_dropout import norm_gate_dropout, norm_gate_dropout_naive
from .sampled_bce import sampled_bce_loss, sampled_bce_loss_naive
from .sampled_softmax import (
    sampled_logits,
    sampled_logits_naive,
    sampled_softmax_loss,
    sampled_softmax_loss_host,
    sampled_softmax_loss_naive,
)
from .silu_attention import (
    Visibility,
    silu_attention_auto,
    silu_attention_eager,
    silu_attention_host,
    silu_attention_naive,
)
from .softmax_attention import softmax_attention, softmax_attention_grouped, softmax_attention_naive

__all__ = [
    "Visibility",
    "full_softmax_loss",
    "full_softmax_loss_naive",
    "hstu_attention",
    "hstu_attention_eager",
    "hstu_attention_host",
    "hstu_attention_naive",
    "keyed_dropout",
    "keyed_dropout_naive",
    "norm_gate_dropout",
    "norm_gate_dropout_naive",
    "sampled_bce_loss",
    "sampled_bce_loss_naive",
    "sampled_logits",
    "sampled_logits_naive",
    "sampled_softmax_loss",
    "sampled_softmax_loss_host",
    "sampled_softmax_loss_naive",
    "silu_attention_auto",
    "silu_attention_eager",
    "silu_attention_host",
    "silu_attention_naive",
    "softmax_attention",
    "softmax_attention_grouped",
    "softmax_attention_naive",
]
