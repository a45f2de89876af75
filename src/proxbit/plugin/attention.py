"""The attention implementations of proxbit, by name: `from_pretrained(..., attn_implementation="proxbit_int8")`."""

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from proxbit.nn.attention import ATTENTIONS

__all__: list[str] = []

for _name, _function in ATTENTIONS.items():
    AttentionInterface.register(_name, _function)
    # Masks as sdpa is given them.
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
