"""Convert a model from transformers to OpenVINO GenAI: trace the model with openvino, and quantize its weights with nncf.

Users of OpenVINO do this with optimum-intel, which cannot be installed beside the other peers. Its release 2.2 requires a
transformers older than 5.6. It also requires torchvision, whose wheel on PyPI does not load beside PyTorch for CPUs and then
breaks transformers. This module uses the same tools in the same steps, with optimum-intel's defaults.
"""

from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
import torch
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation
from openvino.frontend.pytorch.patch_model import __make_16bit_traceable as keep_16_bit
from transformers import AutoModelForCausalLM, PreTrainedModel

# The settings that optimum-intel passes to nncf. With int4, nncf still stores the embedding and the output layer in 8 bit.
MODES: dict[str, dict[str, Any]] = {
    "int8": dict(mode=nncf.CompressWeightsMode.INT8_ASYM),
    "int4": dict(mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=128, ratio=1.0),
}
INPUTS = ("input_ids", "attention_mask", "position_ids")


class TracedCache:
    """A KV cache for transformers, used for tracing: its keys and values become inputs and outputs of the traced graph."""

    def __init__(self, past: tuple[torch.Tensor, ...]) -> None:
        self.past, self.present = past, []

    def get_seq_length(self, layer: int = 0) -> int:
        return self.past[2 * layer].shape[2]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> list[torch.Tensor]:
        joined = [torch.cat(pair, dim=2) for pair in zip(self.past[2 * layer : 2 * layer + 2], (keys, values), strict=True)]
        self.present += joined
        return joined


class Step(torch.nn.Module):
    """The module to trace: compute the logits of new tokens, and the keys and values of all tokens so far."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: torch.Tensor, attention_mask: torch.Tensor, positions: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        cache = TracedCache(past)
        start, end = past[0].shape[2], past[0].shape[2] + tokens.shape[1]
        # transformers would compute an equal mask, but with operations that cannot be traced.
        mask = (torch.arange(end) <= torch.arange(start, end)[:, None]) & attention_mask[:, None, None].bool()
        output = self.model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        return (output.logits, *cache.present)


def write(hf: str, folder: Path, variant: str) -> None:
    """Convert a model folder in Hugging Face's format for OpenVINO GenAI. variant: "int8", "int4", or "" to not quantize."""
    source = AutoModelForCausalLM.from_pretrained(hf, attn_implementation="sdpa").eval()
    is_float32 = source.dtype == torch.float32
    if not is_float32:
        keep_16_bit(source)  # only the weights stay in 16 bit: OpenVINO expects a graph that computes in float32
    model = trace(source)
    if variant:
        model = nncf.compress_weights(model, **MODES[variant])
    folder.mkdir()
    openvino.save_model(model, folder / "openvino_model.xml", compress_to_fp16=not is_float32)


def trace(source: PreTrainedModel) -> openvino.Model:
    """Return an OpenVINO model that computes a forward pass and keeps keys and values as internal state."""
    config = source.config
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    past = [f"{name}.{i}" for i in range(config.num_hidden_layers) for name in ("keys", "values")]
    example = [torch.ones(2, 2, dtype=torch.long), torch.ones(2, 5, dtype=torch.long), torch.tensor([[3, 4]] * 2)]
    example += [torch.zeros(2, heads, 3, width) for _ in past]
    with torch.no_grad():
        model = openvino.convert_model(Step(source), example_input=tuple(example))
    for port, name in zip(model.inputs, (*INPUTS, *past), strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)  # OpenVINO GenAI finds an input by this name
        port.get_node().set_partial_shape(openvino.PartialShape([-1, -1] if name in INPUTS else [-1, heads, -1, width]))
    for port, name in zip(model.outputs, ("logits", *(f"present.{name}" for name in past)), strict=True):
        port.get_tensor().set_names({name})

    # OpenVINO GenAI requires an input beam_idx, which reorders the rows of keys and values, and an initial state of length 0.
    beams = ops.parameter([-1], openvino.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([beams])
    for name in past:
        readers = model.input(name).get_target_inputs()
        reordered = ops.gather(model.input(name), beams, ops.constant(0))
        for reader in readers:
            reader.replace_source_output(reordered.output(0))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, {name: f"present.{name}" for name in past})
    n_rows = ops.gather(ops.shape_of(model.input("input_ids"), "i64"), ops.constant([0]), ops.constant(0))
    empty = ops.concat([n_rows, ops.constant(np.array([heads, 0, width]))], axis=0)
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([ops.broadcast(ops.constant(0.0, node.get_output_element_type(0)), empty)])
    model.validate_nodes_and_infer_types()
    return model


def step_bytes(folder: str) -> int:
    """Return the total size, in bytes, of the weights that a decode step reads, which are all but the embedding."""
    model = openvino.Core().read_model(f"{folder}/openvino_model.xml")
    constants = (node for node in model.get_ops() if node.get_type_name() == "Constant")
    return sum(node.get_byte_size() for node in constants if "embed_tokens" not in node.get_friendly_name())
