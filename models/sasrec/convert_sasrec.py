"""Weights of public SASRec implementations under the names of this one.

Two naming families are known (`i` is the number of a block):

    here                             pre-LN family                         post-LN family
    items (rows of the table)        item_emb.weight                       item_embedding(s).weight
    position_embedding.weight        pos_emb.weight                        position_embedding(s).weight
    norm.*                           last_layernorm.*                      LayerNorm.*
    layers.i.attention_norm.*        attention_layernorms.i.*              ENC.i.ATT.LayerNorm.*
    layers.i.{q,k,v}_proj.*          attention_layers.i.in_proj_*, thirds  ENC.i.ATT.{query,key,value}.*
    layers.i.o_proj.*                attention_layers.i.out_proj.*         ENC.i.ATT.dense.*
    layers.i.feed_forward_norm.*     forward_layernorms.i.*                ENC.i.FFN.LayerNorm.*
    layers.i.up_proj.*               forward_layers.i.conv1.*, [F, D, 1]   ENC.i.FFN.dense_1.*
    layers.i.down_proj.*             forward_layers.i.conv2.*, [D, F, 1]   ENC.i.FFN.dense_2.*

ENC is `trm_encoder.layer` or `item_encoder.layer`, ATT `multi_head_attention` or `attention`, FFN `feed_forward` or
`intermediate`. Item 0 of both families is padding. Position tables of the pre-LN family may have a row 0 for padding
too. The model must be configured alike, which names and shapes cannot tell:

- pre-LN family: layer_norm "original" for the code that normalises the query alone, "pre" for code with
  norm_first=True, "post_final" for code with norm_first=False;
- post-LN family: layer_norm "post", scale_items False, position_alignment "start" (positions count from 0), the
  hidden_act and layer_norm_eps of the other code.

Difference: the code of the pre-LN family pads histories at their start and hides only the future, so that the keys of
the padding enter each softmax. Here there is no padding. The states are equal for histories that fill the other code's
window, or where it hides its padding; for shorter ones they differ, the more the shorter the history is.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .modeling_sasrec import SASRecForRetrieval

_PRE = {
    r"item_emb\.weight": "items",
    r"pos_emb\.weight": "position_embedding.weight",
    r"last_layernorm\.(weight|bias)": r"norm.\1",
    r"attention_layernorms\.(\d+)\.(weight|bias)": r"layers.\1.attention_norm.\2",
    r"attention_layers\.(\d+)\.in_proj_(weight|bias)": r"layers.\1.qkv_proj.\2",
    r"attention_layers\.(\d+)\.out_proj\.(weight|bias)": r"layers.\1.o_proj.\2",
    r"forward_layernorms\.(\d+)\.(weight|bias)": r"layers.\1.feed_forward_norm.\2",
    r"forward_layers\.(\d+)\.conv1\.(weight|bias)": r"layers.\1.up_proj.\2",
    r"forward_layers\.(\d+)\.conv2\.(weight|bias)": r"layers.\1.down_proj.\2",
}
_BLOCK = r"(?:trm_encoder|item_encoder)\.layer\.(\d+)\."
_ATTENTION, _FEED_FORWARD = r"(?:multi_head_attention|attention)\.", r"(?:feed_forward|intermediate)\."
_POST = {
    r"item_embeddings?\.weight": "items",
    r"position_embeddings?\.weight": "position_embedding.weight",
    r"LayerNorm\.(weight|bias)": r"norm.\1",
    _BLOCK + _ATTENTION + r"LayerNorm\.(weight|bias)": r"layers.\1.attention_norm.\2",
    _BLOCK + _ATTENTION + r"query\.(weight|bias)": r"layers.\1.q_proj.\2",
    _BLOCK + _ATTENTION + r"key\.(weight|bias)": r"layers.\1.k_proj.\2",
    _BLOCK + _ATTENTION + r"value\.(weight|bias)": r"layers.\1.v_proj.\2",
    _BLOCK + _ATTENTION + r"dense\.(weight|bias)": r"layers.\1.o_proj.\2",
    _BLOCK + _FEED_FORWARD + r"LayerNorm\.(weight|bias)": r"layers.\1.feed_forward_norm.\2",
    _BLOCK + _FEED_FORWARD + r"dense_1\.(weight|bias)": r"layers.\1.up_proj.\2",
    _BLOCK + _FEED_FORWARD + r"dense_2\.(weight|bias)": r"layers.\1.down_proj.\2",
}


def convert_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the weights of a public implementation.

    Args:
        weights: its state dict, of one of the families above.

    Returns:
        "items" [items + 1, D] with the padding row 0, and the parameters of `SASRecModel` by name.

    Raises:
        ValueError: for a name that no family has.
    """
    rules = _PRE if "item_emb.weight" in weights else _POST
    converted: dict[str, Tensor] = {}
    for name, value in weights.items():
        ours = next((re.sub(rule, new, name) for rule, new in rules.items() if re.fullmatch(rule, name)), None)
        if ours is None:
            raise ValueError(f"weight {name!r} belongs to no known SASRec implementation: rename or leave it out")
        if "qkv_proj" in ours:
            parts = zip("qkv", value.chunk(3), strict=True)
            converted |= {ours.replace("qkv_proj", f"{letter}_proj"): part for letter, part in parts}
        else:
            is_convolution = value.dim() == 3
            converted[ours] = value.squeeze(2) if is_convolution else value
    return converted


def load_public_weights(
    model: SASRecForRetrieval, weights: Mapping[str, Tensor], item_ids: Tensor | None = None
) -> None:
    """Put the weights of a public implementation into a model, items into its table.

    Args:
        model: configured like the other code, see above.
        weights: the other state dict.
        item_ids: int64 [items], the id here of the other code's items 1, 2, ...; None: the same numbers. Items of the
            other code beyond these (a mask token) are left out.

    Raises:
        ValueError: for unknown names, missing weights, a layer_norm that the family does not have, or shapes that do
            not fit the config.
    """
    orders = ("original", "pre", "post_final") if "item_emb.weight" in weights else ("post",)
    converted = convert_weights(weights)
    if "items" not in converted:
        raise ValueError("the weights hold no item embeddings: item_emb.weight or item_embedding(s).weight is missing")
    if model.config.layer_norm not in orders:
        raise ValueError(
            f"the code behind these names has no layer_norm {model.config.layer_norm!r}: configure the model with one "
            f"of {list(orders)}, as the other code computes."
        )
    rows = converted.pop("items")[1:].float()
    if item_ids is None:
        item_ids = torch.arange(1, len(rows) + 1)
    if item_ids.shape[0] > len(rows):
        raise ValueError(f"{item_ids.shape[0]} item ids were given, but the weights hold {len(rows)} items")
    positions = converted.get("position_embedding.weight")
    if positions is not None and len(positions) == model.config.max_sequence_length + 1:
        converted["position_embedding.weight"] = positions[1:]  # row 0 was padding
    own = model.model.state_dict()
    wrong = sorted(set(own) ^ set(converted))
    wrong += [name for name in own if name in converted and own[name].shape != converted[name].shape]
    if wrong:
        raise ValueError(f"the weights do not fit the config: {', '.join(wrong)}. Configure the model like the other.")
    model.model.load_state_dict(converted)
    model.embeddings.import_rows("items", {"ids": item_ids.long(), "rows": rows[: len(item_ids)].contiguous()})


__all__ = ["convert_weights", "load_public_weights"]
