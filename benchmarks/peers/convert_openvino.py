"""A folder of transformers, written anew as OpenVINO GenAI reads it: traced by openvino, its weights rounded by nncf.

OpenVINO's users call optimum-intel for this. Its releases lag behind those of transformers (2.2 wants one older than 5.6) and
need torchvision, whose wheel on PyPI does not load beside PyTorch for CPUs and then breaks transformers: so it cannot be had
beside the other peers. What it does for Llama is done here, by the same tools and with its defaults.
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

MODES: dict[str, dict[str, Any]] = {  # optimum-intel's; embedding and output layer stay in 8 bit where the rest is 4
    "int8": dict(mode=nncf.CompressWeightsMode.INT8_ASYM),
    "int4": dict(mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=128, ratio=1.0),
}
INPUTS = ("input_ids", "attention_mask", "position_ids")


class Past:
    """A cache of transformers that holds what it is given, so that tracing sees keys and values as inputs and outputs."""

    def __init__(self, given: tuple[torch.Tensor, ...]) -> None:
        self.given, self.grown = given, []

    def get_seq_length(self, layer: int = 0) -> int:
        return self.given[2 * layer].shape[2]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> list[torch.Tensor]:
        new = [torch.cat(pair, dim=2) for pair in zip(self.given[2 * layer : 2 * layer + 2], (keys, values), strict=True)]
        self.grown += new
        return new


class Step(torch.nn.Module):
    """Logits of some ids, and the keys and values of all ids so far."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: torch.Tensor, attention_mask: torch.Tensor, positions: torch.Tensor, *given: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        past = Past(given)
        start, end = given[0].shape[2], given[0].shape[2] + ids.shape[1]
        # The mask as transformers itself makes it, but of operations that can be traced.
        mask = (torch.arange(end) <= torch.arange(start, end)[:, None]) & attention_mask[:, None, None].bool()
        output = self.model(ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True)
        return (output.logits, *past.grown)


def write(hf: str, folder: Path, variant: str) -> None:
    source = AutoModelForCausalLM.from_pretrained(hf, attn_implementation="sdpa").eval()
    plain = source.dtype == torch.float32
    if not plain:
        keep_16_bit(source)  # or the whole graph would compute in it, which OpenVINO does not expect
    model = trace(source)
    if variant:
        model = nncf.compress_weights(model, **MODES[variant])
    folder.mkdir()
    openvino.save_model(model, folder / "openvino_model.xml", compress_to_fp16=not plain)


def trace(source: PreTrainedModel) -> openvino.Model:
    """OpenVINO's form of a step, whose keys and values are its own state."""
    config = source.config
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    past = [f"{kind}.{i}" for i in range(config.num_hidden_layers) for kind in ("keys", "values")]
    example = [torch.ones(2, 2, dtype=torch.long), torch.ones(2, 5, dtype=torch.long), torch.tensor([[3, 4]] * 2)]
    example += [torch.zeros(2, heads, 3, width) for _ in past]
    with torch.no_grad():
        model = openvino.convert_model(Step(source), example_input=tuple(example))
    for port, name in zip(model.inputs, (*INPUTS, *past), strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)  # by which GenAI looks for its inputs
        port.get_node().set_partial_shape(openvino.PartialShape([-1, -1] if name in INPUTS else [-1, heads, -1, width]))
    for port, name in zip(model.outputs, ("logits", *(f"grown.{name}" for name in past)), strict=True):
        port.get_tensor().set_names({name})

    # GenAI looks for keys and values that are reordered by an input beam_idx, and that begin as empty as there are rows.
    beams = ops.parameter([-1], openvino.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([beams])
    for name in past:
        readers = model.input(name).get_target_inputs()
        reordered = ops.gather(model.input(name), beams, ops.constant(0))
        for reader in readers:
            reader.replace_source_output(reordered.output(0))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, {name: f"grown.{name}" for name in past})
    n_rows = ops.gather(ops.shape_of(model.input("input_ids"), "i64"), ops.constant([0]), ops.constant(0))
    empty = ops.concat([n_rows, ops.constant(np.array([heads, 0, width]))], axis=0)
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([ops.broadcast(ops.constant(0.0, node.get_output_element_type(0)), empty)])
    model.validate_nodes_and_infer_types()
    return model


def step_bytes(folder: str) -> int:
    model = openvino.Core().read_model(f"{folder}/openvino_model.xml")
    constants = (node for node in model.get_ops() if node.get_type_name() == "Constant")
    return sum(node.get_byte_size() for node in constants if "embed_tokens" not in node.get_friendly_name())
