"""The reasons why sites of public models are left alone, in the words of docs/coverage.md."""

from __future__ import annotations

MIXED = "no_contraction, a layer"
ANOTHER = {
    MIXED: "A linear layer or a convolution mixes the scores of all heads before the softmax (CaiT, EfficientFormer "
    "V2).",
    "scores_used_elsewhere": "The scores are read a second time: mixed between heads before the softmax (talking "
    "heads), compared with their own largest values (sparse top-k), summed up to positions (CoPE), kept for other "
    "heads or for the next layer (selective, residual attention). A fused op never has all scores of a row at once.",
    "softmax_axis": "The weights are mixed between heads before they meet v (CaiT, DeepViT): what is summed is no "
    "longer the axis of the softmax.",
    "weights_used_elsewhere": "The weights decide something (GroupViT's assignment) or are mixed between heads "
    "(talking heads); or the model is trained, and returns them or hands them over a graph break (JetMoe). Then they "
    "are needed for the backward, and have a gradient of their own.",
}
"""Sites that are no fused attention: no op that keeps the scores to itself computes them."""

CUT_OFF = "no_contraction, graph break"
NOT_SEEN = {
    CUT_OFF: "Dynamo breaks the graph between the scores and the softmax (`.item()`), for every backend.",
    "not_in_a_graph": "The code runs outside of every graph: Dynamo does not trace it.",
    "not_compiled": "The model fails under `torch.compile`, also without us.",
}
"""Sites that no backend of `torch.compile` gets to see."""

LEFT = {
    "weights_changed": "Weights of positions alone are added to those of the scores, each with its share (ConViT).",
    "mixed_fills": "In training only: a causal mask that is a buffer, of contents nobody knows when compiling, and "
    "padding that is added as the lowest number. In a row that keeps no key, eager's gradient is neither that of the "
    "one mask nor that of the other.",
    "bias_beside_finite_fill": "In training only: a bias of which nothing is known, a buffer or made of activations, "
    "and a mask that writes the lowest number. Were the bias as low, eager would spread a row over masked keys.",
    "floor_grad": "In training only: `max(scores, lowest number)` halves the gradient in rows that keep no key.",
    "no_contraction": "Scores of overlapping chunks, written into one tensor piece by piece: several products, one "
    "softmax.",
    "score_op": "Scores of global and of local keys, two products, joined before one softmax (Pegasus-X).",
    "scale_tensor": "The scores are multiplied by the mask, and -1e4 is added where it is 0 (OpenAI GPT): such a key "
    "is not removed, it keeps a small weight.",
    "sink_axis": "Sinks that vary with the query, beside a mask that writes into the scores: they would become one "
    "more key, which the mask would have to leave out.",
}
"""The other sites."""


def key_of(code: str, text: str) -> str:
    """The code of a reason, or that of a special case of it."""
    if code == "no_contraction" and ("comes from a linear layer" in text or "comes from 'opaque'" in text):
        return MIXED
    return CUT_OFF if code == "no_contraction" and "graph break has cut it off" in text else code


def in_words(key: str) -> str:
    """Why, for somebody who does not know the recogniser; "" for a code that no site of the zoo had so far."""
    return {**ANOTHER, **NOT_SEEN, **LEFT}.get(key, "")
